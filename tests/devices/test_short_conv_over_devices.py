"""The short convolution of a sequence that is split over devices: outputs, taps and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from race_jax.layers import short_conv
from tests.test_short_conv import BATCH, FEATURES, LENGTH, MASK, SEGMENT, SEGMENTS, naive


def by_shard_map(x, kernel, taps, masks):
    def local(x, kernel, taps, masks):
        return short_conv.short_convolution(
            x, kernel, taps=taps, segment=jnp.asarray(SEGMENT), axis_name="seq", **masks
        )

    split, devices = P(None, "seq"), jax.devices()[:4]
    mesh = jax.make_mesh((4,), ("seq",), axis_types=(AxisType.Auto,), devices=devices)
    specs = split, P(), P(), dict.fromkeys(masks, split)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(split, P()))(
        x, kernel, taps, masks
    )


def on_explicit_mesh(x, kernel, taps, masks):
    split = NamedSharding(jax.sharding.get_abstract_mesh(), P(None, "seq"))
    x, masks = jax.tree.map(lambda x: jax.sharding.reshard(x, split), (x, masks))
    return short_conv.short_convolution(x, kernel, taps=taps, segment=jnp.asarray(SEGMENT), **masks)


@pytest.mark.parametrize("run", [by_shard_map, on_explicit_mesh])
@pytest.mark.parametrize(
    ("padded", "packed"), [(False, False), (True, True)], ids=["plain", "padded, packed"]
)
def test_stretches_of_three_tokens_give_the_whole(rng, assert_close, run, padded, packed):
    shapes = (BATCH, LENGTH, FEATURES), (short_conv.WIDTH, FEATURES), (BATCH, 3, FEATURES)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    masks = {"mask": jnp.asarray(MASK)} if padded else {}
    masks |= {"segment_ids": jnp.asarray(SEGMENTS)} if packed else {}

    def whole(x, kernel, taps, masks):
        return short_conv.short_convolution(
            x, kernel, taps=taps, segment=jnp.asarray(SEGMENT), **masks
        )

    def gradients(function):
        def loss(*arrays):
            out, after = function(*arrays, masks)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + (after**2).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)

    mesh = jax.make_mesh((4,), ("seq",), devices=jax.devices()[:4])
    with jax.set_mesh(mesh) if run is on_explicit_mesh else jax.default_device(jax.devices()[0]):
        got, found = jax.device_get((jax.jit(run)(*arrays, masks), gradients(run)))
    mask = MASK if padded else np.ones_like(MASK)
    ids = SEGMENTS if packed else np.repeat(SEGMENT[:, None], LENGTH, axis=1)
    want = naive(*map(np.asarray, arrays), SEGMENT, mask, ids)
    assert_close("out and taps", got, want, kind="outputs")
    for name, one, two in zip("x kernel taps".split(), found, gradients(whole), strict=True):
        assert_close(name, one, two, kind="gradients")


def test_heads_that_are_split_over_devices_give_the_whole(rng, assert_close):
    shapes = (BATCH, LENGTH, 2, FEATURES), (short_conv.WIDTH, 2, FEATURES), (BATCH, 3, 2, FEATURES)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    masks = {"mask": jnp.asarray(MASK), "segment_ids": jnp.asarray(SEGMENTS)}

    def run(x, kernel, taps):
        return short_conv.short_convolution(
            x, kernel, taps=taps, segment=jnp.asarray(SEGMENT), **masks
        )

    want = jax.device_get(jax.jit(run)(*arrays))
    with jax.set_mesh(jax.make_mesh((2, 2, 2), ("data", "seq", "heads"))):
        x = jax.device_put(arrays[0], P("data", "seq", "heads"))
        got = jax.jit(run)(x, *arrays[1:])
    assert jax.typeof(got[0]).sharding.spec == P("data", "seq", "heads", None)
    assert_close("out and taps", jax.device_get(got), want, kind="outputs")
