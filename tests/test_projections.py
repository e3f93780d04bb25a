"""Flax layers whose projections are tied, replaced, wrapped or intercepted, and remat."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from race_jax import linen
from race_jax.layers.race import RACEAttention

BATCH, LENGTH, WIDTH, HEADS = 2, 6, 8, 2
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
NAMES = ("query", "key", "value", "out")


class Adapter(nnx.Module):
    """A low-rank adapter of any module, as a user would write it."""

    def __init__(self, base, width, shape, rngs):
        self.base = base
        self.down = nnx.Param(jax.random.normal(rngs.params(), (width, 2)))
        self.up = nnx.Param(jax.random.normal(rngs.params(), (2, *shape)))

    def __call__(self, x):
        flat = x.reshape(*x.shape[:2], -1)
        return self.base(x) + jnp.tensordot(flat @ self.down[...], self.up[...], 1)


def layer(**options):
    return RACEAttention(HEADS, WIDTH, rngs=nnx.Rngs(0), **options)


@nnx.jit
def call(module, x):
    return module(x)


@pytest.mark.parametrize("fold_planes", [pytest.param(False, marks=pytest.mark.once), True])
def test_a_tied_projection_is_the_projection(assert_close, fold_planes):
    tied, copied = layer(fold_planes=fold_planes), layer(fold_planes=fold_planes)
    tied.key = tied.query
    nnx.update(copied.key, nnx.state(copied.query))
    assert not {"query", "key"} <= set(nnx.state(tied))  # one variable under one of its names
    assert_close("output", call(tied, X), call(copied, X), kind="rerun")
    gradient = nnx.jit(nnx.grad(lambda module: jnp.sum(module(X) ** 2)))
    got, want = gradient(tied), gradient(copied)
    both = want["query"]["kernel"][...] + want["key"]["kernel"][...]
    assert_close("gradient", got["key"]["kernel"][...], both, kind="gradients")


@pytest.mark.parametrize(
    ("names", "fold_planes"),
    [
        (("query",), True),
        pytest.param(("key",), True, marks=pytest.mark.once),
        pytest.param(("value", "out"), True, marks=pytest.mark.once),
        pytest.param(NAMES, False, marks=pytest.mark.once),
    ],
)
def test_a_wrapped_projection_is_called_and_gets_gradients(assert_close, names, fold_planes):
    module, merged = layer(fold_planes=fold_planes), layer()
    for seed, name in enumerate(names, start=1):
        shape = (WIDTH,) if name == "out" else (HEADS, WIDTH // HEADS)
        adapter = Adapter(getattr(module, name), WIDTH, shape, nnx.Rngs(seed))
        setattr(module, name, adapter)
        kernel = getattr(merged, name).kernel
        added = jnp.tensordot(adapter.down[...], adapter.up[...], 1)
        kernel[...] = kernel[...] + added.reshape(kernel.shape)
    assert_close("output", call(module, X), call(merged, X), kind="modules")
    gradients = nnx.jit(nnx.grad(lambda module: jnp.sum(module(X) ** 2)))(module)
    assert all(np.abs(gradients[name]["up"][...]).max() > 0 for name in names)


def test_flax_s_own_low_rank_layers_take_the_place_of_each_projection(assert_close):
    """nnx.LoRALinear has no axis of heads. It returns all heads in one axis, and takes them so."""
    module, plain = layer(), layer()
    for name in NAMES:
        lora = nnx.LoRALinear(WIDTH, WIDTH, lora_rank=2, rngs=nnx.Rngs(1))
        lora.kernel[...] = getattr(plain, name).kernel[...].reshape(WIDTH, WIDTH)
        setattr(module, name, lora)
    assert_close("untrained", call(module, X), call(plain, X), kind="modules")
    trained = nnx.DiffState(0, nnx.LoRAParam)
    gradients = nnx.jit(nnx.grad(lambda m: jnp.sum(m(X) ** 2), argnums=trained))(module)
    assert all(np.abs(gradients[name]["lora"]["lora_b"][...]).max() > 0 for name in NAMES)


@pytest.mark.once
@pytest.mark.parametrize("fold_planes", [False, True])
@pytest.mark.parametrize(("name", "heads"), [("query", 1), ("key", 1), ("key", 8)])
def test_a_projection_with_other_heads_is_refused(name, heads, fold_planes):
    module = layer(fold_planes=fold_planes)
    size = module.key.kernel.shape
    setattr(module, name, nnx.LinearGeneral(size[0], (heads, size[-1]), rngs=nnx.Rngs(1)))
    with pytest.raises(ValueError, match=rf"projection '{name}' .*; the layer needs"):
        module(jnp.ones((1, 3, size[0])))


def test_what_is_not_folded_is_said_once(caplog):
    module = layer(fold_planes=True)
    module.query = Adapter(module.query, WIDTH, (HEADS, WIDTH // HEADS), nnx.Rngs(1))
    with caplog.at_level(logging.WARNING, "race_jax"):
        for _ in range(2):
            jax.eval_shape(module, X)
    said = [record.message for record in caplog.records if "query projection" in record.message]
    assert len(said) <= 1  # none where an earlier test has made it say so


def test_a_projection_of_another_shape_is_named():
    module = layer()
    module.value = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'value' gave shape \(2, 6, 3\).*needs \(2, 6, 2, 4\)"):
        module(X)


def test_a_norm_may_be_replaced():
    module = layer(normalize_qk=True)
    before = call(module, X)
    module.key_ln = nnx.RMSNorm(WIDTH // HEADS, rngs=nnx.Rngs(0))
    assert not np.allclose(call(module, X), before)


def test_linen_interceptors_see_the_projections():
    twin = linen.RACEAttention(HEADS)
    variables = twin.init(jax.random.key(0), X)
    seen = []

    def double(next_function, args, kwargs, context):
        out = next_function(*args, **kwargs)
        if isinstance(context.module, nn.DenseGeneral):
            seen.append(context.module.name)
            return 2 * out
        return out

    plain = twin.apply(variables, X)
    with nn.intercept_methods(double):
        doubled = twin.apply(variables, X)
    assert sorted(seen) == sorted(NAMES)
    assert not np.allclose(doubled, plain)


def test_a_layer_that_is_causal_from_the_start_can_be_recomputed(assert_close):
    module = layer(is_causal=True)
    want = module(X, is_causal=True)
    assert_close("field", module(X), want, kind="rerun")
    assert not np.allclose(module(X, is_causal=False), want)
    assert_close("nnx", nnx.remat(RACEAttention.__call__)(module, X), want, kind="identity")
    mask = jnp.ones((BATCH, LENGTH), bool)
    masked = nnx.remat(RACEAttention.__call__)(module, X, mask=mask)
    assert_close("nnx, with a mask", masked, want, kind="identity")

    twin = nn.remat(linen.RACEAttention)(HEADS, is_causal=True)
    variables = twin.init(jax.random.key(0), X)
    want = linen.RACEAttention(HEADS).apply(variables, X, is_causal=True)
    assert_close("linen", twin.apply(variables, X), want, kind="identity")


def test_a_flag_that_became_an_array_is_named():
    words = "is_causal must be a Python bool.*set it where the layer is made"
    with pytest.raises(TypeError, match=words):
        nnx.remat(RACEAttention.__call__)(layer(), X, is_causal=True)
    with pytest.raises(TypeError, match=words):
        nn.remat(linen.RACEAttention)(HEADS).init(jax.random.key(0), X, is_causal=True)


@pytest.mark.once
def test_linen_layers_made_with_one_set_of_planes_are_warned_of():
    def init(split):
        stack = nn.vmap(
            linen.RACEAttention,
            in_axes=None,
            axis_size=2,
            variable_axes={"params": 0, "hash_planes": 0},
            split_rngs={"params": True, "planes": split},
        )
        streams = {"params": jax.random.key(0), "planes": jax.random.key(1)}
        return jax.tree.leaves(stack(HEADS).init(streams, X)["hash_planes"])[0]

    with pytest.warns(UserWarning, match="the same hash planes"):
        same = init(split=False)
    np.testing.assert_array_equal(same[0], same[1])
    differ = init(split=True)
    assert not np.array_equal(differ[0], differ[1])


EVERY_OPTION = {
    "forget_gate": "data",
    "short_conv": "before",
    "output_norm": "rms",
    "output_gate": "silu",
}


@pytest.mark.parametrize("options", [EVERY_OPTION, EVERY_OPTION | {"fold_planes": True}], ids=str)
def test_no_rank_is_promoted_in_the_layer(options):
    module = layer(is_causal=True, **options)
    with jax.numpy_rank_promotion("raise"):
        jax.eval_shape(module, X)
        jax.eval_shape(layer(normalize_qk=True), X)


@pytest.mark.once
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_batch_of_no_sequences_gives_none(is_causal):
    options = EVERY_OPTION if is_causal else {"fold_planes": True}
    module, empty = layer(is_causal=is_causal, **options), X[:0]
    assert module(empty).shape == (0, LENGTH, WIDTH)
    twin = linen.RACEAttention(HEADS, is_causal=is_causal)
    assert twin.apply(twin.init(jax.random.key(0), X), empty).shape == (0, LENGTH, WIDTH)


@pytest.mark.parametrize(
    "options",
    [
        {"forget_gate": "data"},
        # with columns of zeros for the kernels
        pytest.param({"forget_gate": "learned", "num_planes": 3}, marks=pytest.mark.once),
        pytest.param({"forget_gate": "data", "num_kv_heads": 1}, marks=pytest.mark.once),
    ],
    ids=str,
)
def test_hash_and_gate_of_self_attention_come_from_one_product(assert_close, options):
    """With keys from another array, even of the same numbers, each has a product of its own."""
    module = layer(is_causal=True, fold_planes=True, **options)

    def loss(module, x, other):
        return jnp.sum(module(x, other) ** 2)

    gradient = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))
    same = nnx.jit(nnx.value_and_grad(lambda module, x: loss(module, x, None), argnums=(0, 1)))
    got, (d_got, d_x) = same(module, X)
    want, (d_want, d_query) = gradient(module, X, jnp.copy(X))
    assert_close("loss", got, want, kind="outputs")
    assert_close("gradients", nnx.to_pure_dict(d_got), nnx.to_pure_dict(d_want), kind="gradients")
    assert not np.allclose(d_x, d_query, rtol=1e-2)  # the gradient of the keys is a part of d_x

    graph, state = nnx.split(module)
    traced = jax.make_jaxpr(lambda x: nnx.merge(graph, state)(x))(X)
    apart = jax.make_jaxpr(lambda x, other: nnx.merge(graph, state)(x, other))(X, X)
    count = lambda jaxpr: str(jaxpr).count("dot_general")  # noqa: E731
    assert count(traced) < count(apart)
