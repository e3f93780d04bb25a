"""An axis of the caller's ``jax.shard_map`` beside axes over which JAX shards the arrays itself.

JAX 0.10 and 0.12 cannot differentiate nested calls of ``jax.shard_map``. Outputs are compared.
"""

import jax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import race_jax
from race_jax.layers import short_conv

SPLITS = {"batch": P("rest", "seq"), "sequence": P(None, ("seq", "rest"))}


def draw(rng):
    query, key, value = jax.random.normal(rng, (3, 2, 16, 2, 4))
    planes = jax.random.normal(jax.random.key(1), (2, 2, 4))
    return query, key, value, planes


def mesh(kind):
    return jax.make_mesh((2, 4), ("rest", "seq"), axis_types=(kind, kind))


def attend(axis_name, is_causal):
    def run(*arrays):
        return race_jax.race_attention(*arrays, is_causal=is_causal, axis_name=axis_name)

    return run


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "bidirectional"])
def test_both_axes_count(is_causal, split, assert_close):
    """The caller splits the sequence, and an Explicit axis splits the batch or each stretch."""
    arrays = draw(jax.random.key(0))
    both, tokens = SPLITS[split], P(None, "seq")
    want = jax.jit(attend(None, is_causal))(*arrays)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = [jax.device_put(x, both) for x in arrays[:3]] + [jax.device_put(arrays[3], P())]
        run = jax.shard_map(
            attend("seq", is_causal),
            in_specs=(tokens, tokens, tokens, P()),
            out_specs=tokens,
            axis_names={"seq"},
        )
        got = jax.device_get(jax.jit(run)(*placed))
    assert_close("out", got, want, kind="outputs")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_an_axis_outside_of_shard_map_is_an_error(kind):
    arrays = draw(jax.random.key(0))
    with (
        jax.set_mesh(mesh(kind)),
        pytest.raises(ValueError, match=r"axis_name='seq' must name axes of a jax\.shard_map"),
    ):
        attend("seq", True)(*arrays)


def test_the_short_convolution_too(assert_close):
    x = jax.random.normal(jax.random.key(0), (2, 16, 3))
    kernel, taps = jax.random.normal(jax.random.key(1), (4, 3)), jax.numpy.zeros((2, 3, 3))

    def convolve(axis_name):
        segment = jax.numpy.zeros(2, jax.numpy.int32)
        return lambda x, kernel, taps: short_conv.short_convolution(
            x, kernel, taps=taps, segment=segment, axis_name=axis_name
        )[0]

    want = jax.jit(convolve(None))(x, kernel, taps)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        placed = jax.device_put(x, P("rest", "seq")), *jax.device_put((kernel, taps), P())
        split = P(None, "seq")
        run = jax.shard_map(
            convolve("seq"), in_specs=(split, P(), P()), out_specs=split, axis_names={"seq"}
        )
        got = jax.device_get(jax.jit(run)(*placed))
    assert_close("out", got, want, kind="outputs")
