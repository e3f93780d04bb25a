"""The NNX module: Flax's conventions, planes, the paper's preset, state, dropout and transforms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import race_jax
from race_jax.core import reference
from race_jax.layers.planes import HashPlanes
from race_jax.layers.race import RACEAttention

BATCH, LENGTH, WIDTH = 2, 8, 16


def shapes(make):
    """Returns the names and shapes of a module's parameters, without making them."""
    state = nnx.state(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))), nnx.Param)
    return jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(state))


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@nnx.jit(static_argnames="is_causal")
def call(module, x, is_causal=True):
    return module(x, is_causal=is_causal)


@nnx.jit
def resume(module, x, state):
    return module(x, is_causal=True, state=state)


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_heads": 2, "qkv_features": 32, "out_features": 6, "in_kv_features": 5},
        {"normalize_qk": True, "use_bias": False},
    ],
)
def test_parameters_are_those_of_flax(options):
    flax = functools.partial(nnx.MultiHeadAttention, 4, WIDTH, **options)
    ours = functools.partial(RACEAttention, 4, WIDTH, learn_sharpness=False, **options)
    assert shapes(ours) == shapes(flax)


def test_own_parameters_and_fields():
    make = functools.partial(
        RACEAttention, 4, WIDTH, num_kv_heads=2, value_dim=3, num_tables=5, num_planes=2,
        forget_gate="data", short_conv="before", output_norm="rms", output_gate="sigmoid",
        learn_planes=True,
    )  # fmt: skip
    projections = {"query", "key", "value", "out"}
    assert {name: shape for name, shape in shapes(make).items() if name not in projections} == {
        "log_sharpness": (2,),
        "gate_bias": (2,),
        "gate_kernel": (WIDTH, 2),
        "conv_kernel": (4, WIDTH),
        "out_gate_kernel": (WIDTH, 4, 3),
        "out_norm_scale": (3,),
        "planes": (5, 2, 4),
    }
    module = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    assert (module.num_heads, module.head_dim, module.planes_scale) == (4, 4, 0.5)


def test_planes_come_from_their_own_seed_and_differ_from_layer_to_layer():
    def layers(**streams):
        rngs = nnx.Rngs(**streams)
        return [RACEAttention(2, WIDTH, rngs=rngs).planes[...] for _ in range(2)]

    first, second = layers(params=0, planes=1)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(layers(params=7, planes=1), [first, second])
    assert not np.array_equal(layers(params=0, planes=2)[0], first)


def test_fixed_planes_are_no_parameter_and_learned_ones_are():
    """Fixed planes are part of the state. Gradients with respect to nnx.Param leave them out."""
    fixed = RACEAttention(2, WIDTH, rngs=nnx.Rngs(0))
    learned = RACEAttention(2, WIDTH, learn_planes=True, rngs=nnx.Rngs(0))
    assert isinstance(fixed.planes, HashPlanes)
    assert "planes" in nnx.state(fixed)
    assert "planes" not in nnx.state(fixed, nnx.Param)
    x = normal(BATCH, LENGTH, WIDTH)
    grad = nnx.grad(lambda module, x: jnp.sum(module(x) ** 2))
    assert "planes" not in nnx.eval_shape(grad, fixed, x)
    assert np.abs(nnx.jit(grad)(learned, x)["planes"][...]).max() > 0


def test_a_restored_state_gives_the_same_outputs(assert_close):
    make = functools.partial(RACEAttention, 2, WIDTH, dropout_rate=0.1, deterministic=True)
    saved, other = make(rngs=nnx.Rngs(0)), make(rngs=nnx.Rngs(1))
    x = normal(BATCH, LENGTH, WIDTH)
    want = call(saved, x)
    assert not np.allclose(call(other, x), want)
    nnx.update(other, nnx.state(saved))
    assert_close("output", call(other, x), want, kind="rerun")


@pytest.mark.parametrize("is_causal", [False, True])
def test_paper_is_algorithms_1_and_2(assert_close, is_causal):
    module = RACEAttention.paper(2, WIDTH, num_tables=3, num_planes=2, rngs=nnx.Rngs(0))
    assert set(nnx.state(module, nnx.Param)) == {"query", "key", "value", "out", "log_sharpness"}
    assert module.log_sharpness.shape == ()

    @nnx.jit
    def algorithms(module, x):
        heads = reference.all_pairs(
            module.query(x), module.key(x), module.value(x), module.planes[...],
            sharpness=1.0, is_causal=is_causal,
        )  # fmt: skip
        return module.out(heads)

    x = normal(BATCH, LENGTH, WIDTH)
    assert_close("output", call(module, x, is_causal), algorithms(module, x), kind="outputs")


def test_paper_planes_have_scale_one_and_ours_follow_the_head_dim():
    for make, scale in ((RACEAttention.paper, 1.0), (RACEAttention, 128**-0.5)):
        planes = make(2, 256, rngs=nnx.Rngs(0)).planes[...]
        np.testing.assert_allclose(np.std(planes), scale, rtol=0.1)


def test_paper_refuses_what_it_fixes():
    with pytest.raises(TypeError, match="forget_gate"):
        RACEAttention.paper(2, WIDTH, forget_gate="data", rngs=nnx.Rngs(0))


def test_prefill_and_decoding_are_one_call(assert_close):
    """A prompt, and then tokens one by one under jit, give the outputs of the whole sequence."""
    module = RACEAttention(
        4, WIDTH, num_kv_heads=2, forget_gate="data", short_conv="before", rngs=nnx.Rngs(0)
    )
    x = normal(BATCH, LENGTH, WIDTH)
    prompt, state = resume(module, x[:, :4], module.init_state(BATCH))
    parts = [prompt]
    before = jax.tree.map(np.asarray, state)
    for t in range(4, LENGTH):
        part, after = resume(module, x[:, t : t + 1], state)
        state = after
        parts.append(part)
    assert_close("output", jnp.concatenate(parts, axis=1), call(module, x), kind="resumed")
    repeated, _ = resume(module, x[:, 4:5], before)
    assert_close("the old state again", repeated, parts[1], kind="rerun")


@pytest.mark.parametrize("short_conv", ["before", "qkv"])
def test_one_array_given_three_times_is_self_attention_unless_a_transform_splits_it(short_conv):
    layer = RACEAttention(4, WIDTH, short_conv=short_conv, rngs=nnx.Rngs(0))
    x = normal(BATCH, LENGTH, WIDTH)
    within = nnx.jit(lambda layer, x: layer(x, x, x, is_causal=True))(layer, x)
    np.testing.assert_array_equal(within, call(layer, x))
    message = (
        "inputs_q, inputs_k and inputs_v are not one array. A transform such as jit makes three "
        "arrays of one .* leave inputs_k and inputs_v out"
    )
    with pytest.raises(ValueError, match=message):
        nnx.jit(lambda layer, *inputs: layer(*inputs, is_causal=True))(layer, x, x, x)
    with pytest.raises(ValueError, match=message):
        layer(x, x + 0, x, is_causal=True)


def test_dropout_follows_flax(assert_close):
    make = functools.partial(RACEAttention, 2, WIDTH, dropout_rate=0.5, rngs=nnx.Rngs(0))
    module, x = make(), normal(BATCH, LENGTH, WIDTH)
    run = nnx.jit(
        lambda module, x, **options: module(x, **options), static_argnames="deterministic"
    )
    with pytest.raises(ValueError, match="needs deterministic=True or False"):
        module(x)
    full, dropped = run(module, x, deterministic=True), run(module, x, deterministic=False)
    kept = np.asarray(dropped) != 0
    assert 0.3 < kept.mean() < 0.7
    assert_close("kept entries", dropped[kept], 2 * full[kept], kind="identity")
    assert not np.array_equal(run(module, x, deterministic=False), dropped)
    module.eval()
    assert_close("eval()", run(module, x), full, kind="rerun")
    assert nnx.view(module, deterministic=False).deterministic is False
    without = make(keep_rngs=False, deterministic=False)
    assert without.rngs is None
    with pytest.raises(ValueError, match="keep_rngs=False"):
        without(x)
    assert (np.asarray(run(without, x, rngs=nnx.Rngs(1))) == 0).any()


def test_dtypes_follow_flax():
    module = RACEAttention(2, WIDTH, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(module))} == {"float32"}
    assert jax.eval_shape(lambda x: module(x), x).dtype == jnp.bfloat16
    half = RACEAttention(2, WIDTH, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(half))} == {"bfloat16"}
    assert jax.eval_shape(lambda x: half(x), x).dtype == jnp.float32
    assert half.init_state(1).race.mass.dtype == jnp.float32


def test_an_implementation_is_passed_through():
    module = RACEAttention(2, WIDTH, implementation="pallas", value_dim=300, rngs=nnx.Rngs(0))
    with pytest.raises(NotImplementedError):
        module(normal(1, 2, WIDTH))


def test_normalization_is_passed_through():
    x = normal(BATCH, LENGTH, WIDTH)
    outs = [
        call(RACEAttention(2, WIDTH, normalization=name, rngs=nnx.Rngs(0)), x)
        for name in ("global", "bucket")
    ]
    assert not np.allclose(*outs)


def test_a_missing_stream_is_named():
    with pytest.raises(ValueError, match="lacks the stream 'params'"):
        RACEAttention(2, WIDTH, rngs=nnx.Rngs(planes=0))
    with pytest.raises(ValueError, match="lacks the stream 'dropout'"):
        RACEAttention(2, WIDTH, dropout_rate=0.1, rngs=nnx.Rngs(params=0, planes=1))


def test_streams_that_flax_modules_ask_for_are_enough():
    """Without a stream of their own, planes are drawn from the stream of the parameters."""
    first, second, dropping = (
        RACEAttention(2, WIDTH, dropout_rate=rate, rngs=nnx.Rngs(params=seed, dropout=1))
        for seed, rate in ((0, 0.0), (2, 0.0), (0, 0.1))
    )
    np.testing.assert_array_equal(first.planes[...], dropping.planes[...])
    assert not np.array_equal(first.planes[...], second.planes[...])


def test_seeds_of_planes_and_parameters_share_no_numbers():
    """With the seeds planes=1 and params=0, no plane has a number that params=1 draws."""

    def unit(planes):
        return np.asarray(planes).ravel() / np.std(planes)

    planes = RACEAttention(1, 16, num_tables=1, rngs=nnx.Rngs(params=0, planes=1)).planes[...]
    stream = nnx.Rngs(params=1).params
    for _ in range(12):  # more than a layer draws
        drawn = jax.random.normal(stream(), planes.shape)
        assert not np.allclose(unit(drawn), unit(planes), atol=1e-3)


def test_one_set_of_planes_for_layers_made_together_is_warned_of():
    def stack(**options):
        rngs = nnx.Rngs(params=0, planes=1)
        make = nnx.vmap(lambda rngs: RACEAttention(2, WIDTH, rngs=rngs), in_axes=(axes,))
        with nnx.split_rngs(rngs, splits=2, **options):
            return make(rngs)

    axes = nnx.StateAxes({"planes": None, ...: 0})
    with pytest.warns(UserWarning, match="the same hash planes"):
        stack(only="params")
    axes = 0
    planes = stack().planes[...]
    assert not np.array_equal(*planes)


def test_partitioned_initialisers_keep_their_names():
    """As in Flax, the sharding names of an initializer reach the projections."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "heads", None))
    with nnx.use_eager_sharding(False):
        module = RACEAttention(2, WIDTH, kernel_init=init, rngs=nnx.Rngs(0))
    assert module.query.kernel.get_metadata("out_sharding") == ("embed", "heads", None)
    assert module.query.kernel.shape == (WIDTH, 2, 8)


def test_the_public_name_is_this_module():
    assert race_jax.RACEAttention is RACEAttention
