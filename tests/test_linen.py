"""The Linen module: parameters exchanged with the NNX module, streams, state and dropout."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors, nnx
from flax import linen as nn

from race_jax import linen
from race_jax.layers.race import RACEAttention
from tests import newest

BATCH, LENGTH, WIDTH = 2, 6, 8
X = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
STREAMS = {"params": jax.random.key(1), "planes": jax.random.key(2)}
MASK = jnp.arange(LENGTH) < jnp.array([[LENGTH], [4]])
EVERYTHING = {
    "num_kv_heads": 2,
    "value_dim": 3,
    "out_features": 5,
    "forget_gate": "data",
    "half_life": 100.0,
    "short_conv": "before",
    "output_norm": "rms",
    "output_gate": "silu",
}
CASES = {
    "everything": (EVERYTHING, True),
    "convolutions on queries, keys and values": (
        {"short_conv": "qkv", "qkv_activation": "silu", "output_gate": "sigmoid"},
        True,
    ),
    "learned planes, norms, no bias": (
        {"learn_planes": True, "normalize_qk": True, "use_bias": False},
        False,
    ),
}


@pytest.mark.parametrize("case", newest.examples(CASES, ["everything"]))
def test_parameters_go_both_ways_with_equal_outputs_and_gradients(assert_close, case):
    options, is_causal = CASES[case]
    module = RACEAttention(4, WIDTH, **options, rngs=nnx.Rngs(0))
    twin = linen.RACEAttention(4, **options)
    call = {"mask": MASK, "is_causal": is_causal}

    @jax.jit
    def run(variables):
        out = twin.apply(variables, X, **call)
        return jnp.sum(out**2), out

    @jax.jit
    def run_nnx(params, rest):
        out = nnx.merge(graph, params, rest)(X, **call)
        return jnp.sum(out**2), out

    graph, params, rest = nnx.split(module, nnx.Param, ...)
    variables = {"params": nnx.to_pure_dict(params)}
    if not module.learn_planes:
        variables["hash_planes"] = {"planes": module.planes[...]}
    assert_close("to Linen", run(variables), run_nnx(params, rest), kind="modules")

    initial = jax.eval_shape(lambda: twin.init(STREAMS, X, is_causal=is_causal))
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, variables)
    variables = jax.tree.map(lambda leaf: leaf + 0.1, variables)
    nnx.update(module, *variables.values())
    _, params, rest = nnx.split(module, nnx.Param, ...)
    assert_close("from Linen", run_nnx(params, rest), run(variables), kind="modules")
    if not is_causal:  # the cheaper of the two to compile; the code is the same
        want = jax.jit(jax.grad(run, has_aux=True))(variables)[0]["params"]
        got = jax.jit(jax.grad(run_nnx, has_aux=True))(params, rest)[0]
        assert_close("gradients", nnx.to_pure_dict(got), want, kind="modules")


def test_fields_are_those_of_the_nnx_module():
    """Fields that both kinds of module can have are in both, with the same defaults."""
    nnx_fields = inspect.signature(RACEAttention.__init__).parameters
    linen_fields = inspect.signature(linen.RACEAttention).parameters
    only_nnx = {"self", "in_features", "in_kv_features", "keep_rngs", "rngs"}
    assert set(nnx_fields) - only_nnx == set(linen_fields) - {"name", "parent"}
    for name in set(linen_fields) - {"name", "parent", "kernel_init", "bias_init"}:
        assert nnx_fields[name].default == linen_fields[name].default, name


def test_paper_presets_agree():
    module = RACEAttention.paper(2, WIDTH, rngs=nnx.Rngs(0))
    twin = linen.RACEAttention.paper(2, name="attention")
    same = ("planes_scale", "sharpness", "learn_sharpness", "shared_sharpness", "forget_gate")
    assert [getattr(twin, name) for name in same] == [getattr(module, name) for name in same]
    assert twin.name == "attention"


def test_planes_have_their_own_stream_and_differ_from_layer_to_layer():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return linen.RACEAttention(2)(linen.RACEAttention(2)(x))

    init = jax.jit(Two().init)

    def planes(**streams):
        keys = {name: jax.random.key(seed) for name, seed in streams.items()}
        return jax.tree.leaves(init(keys, X)["hash_planes"])

    first, second = planes(params=0, planes=1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(planes(params=5, planes=1), [first, second])
    assert not np.array_equal(planes(params=0, planes=2)[0], first)


def test_fixed_planes_must_be_passed_to_apply():
    layer = linen.RACEAttention(2)
    params = layer.init(STREAMS, X)["params"]
    with pytest.raises(errors.ScopeCollectionNotFound, match="hash_planes"):
        layer.apply({"params": params}, X)


def test_a_call_with_a_state_continues(assert_close):
    layer = linen.RACEAttention(2, forget_gate="learned", short_conv="before")
    run = jax.jit(
        lambda variables, x, state: layer.apply(variables, x, is_causal=True, state=state)
    )
    variables = layer.init(STREAMS, X, is_causal=True)
    whole, last = run(variables, X, layer.init_state(BATCH, WIDTH))
    first, state = run(variables, X[:, :3], layer.init_state(BATCH, WIDTH))
    second, state = run(variables, X[:, 3:], state)
    got = jnp.concatenate([first, second], axis=1), state
    assert_close("output and state", got, (whole, last), kind="resumed")


def test_dropout_follows_flax():
    layer = linen.RACEAttention(2, dropout_rate=0.5)
    variables = layer.init(STREAMS, X, deterministic=True)
    run = jax.jit(
        lambda keys, **options: layer.apply(variables, X, deterministic=False, **options, rngs=keys)
    )
    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, X)
    dropped = run({"dropout": jax.random.key(0)})
    assert 0.3 < np.mean(np.asarray(dropped) == 0) < 0.7
    assert not np.array_equal(run({"dropout": jax.random.key(1)}), dropped)
    np.testing.assert_array_equal(
        run({}, dropout_rng=jax.random.key(3)), run({}, dropout_rng=jax.random.key(3))
    )


def test_partitioned_initialisers_keep_their_boxes():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "heads", None))
    layer = linen.RACEAttention(2, kernel_init=init)
    params = jax.eval_shape(layer.init, STREAMS, X)["params"]
    assert params["query"]["kernel"].names == ("embed", "heads", None)
    assert params["query"]["kernel"].value.shape == (WIDTH, 2, 4)
