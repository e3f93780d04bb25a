"""Positions are counted per segment, and the parts of a block are those that were published."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.core.rotary import rotate
from race_jax.layers.positions import alibi_bias
from race_jax.models.layers import gelu, token_positions
from race_jax.models.norm import LayerNorm


def places(mask, segments, start, start_segment):
    """Returns each token's number within its segment. Padding has the number before it."""
    found, count, current = [], start, start_segment
    for present, segment in zip(mask, segments, strict=True):
        if present:
            count = 0 if segment != current else count
            current = segment
            count += 1
        found.append(max(count - 1, 0))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_positions_count_the_tokens_of_each_segment(rng, seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((4, 9)) < 0.6
    segments = np.sort(rng.integers(0, 3, (4, 9))).astype(np.int32)
    start = np.array([0, 5, 3, 2], np.int32)
    start_segment = np.array([-1, 0, 1, segments[3, 0]], np.int32)
    segments = np.where(mask, segments, 99)
    got = token_positions(
        9,
        jnp.asarray(start),
        key_value_mask=jnp.asarray(mask),
        segment_ids=jnp.asarray(segments),
        start_segment=jnp.asarray(start_segment),
    )
    want = [places(*row) for row in zip(mask, segments, start.tolist(), start_segment, strict=True)]
    assert got.tolist() == want


def test_rotary_products_depend_on_the_distance_alone(rng, assert_close):
    query, key = (jnp.asarray(rng.normal(size=(1, 5, 2, 8)), jnp.float32) for _ in range(2))
    place = jnp.arange(5)[None]

    def products(shift):
        turned = rotate(query, place + shift), rotate(key, place + shift)
        return jnp.einsum("btnh,bsnh->bnts", *turned)

    assert_close("shifted", products(13), products(0), kind="identity")
    assert np.abs(products(0) - jnp.einsum("btnh,bsnh->bnts", query, key)).max() > 0.1


def test_rotation_is_by_the_published_angles():
    turned = rotate(jnp.eye(4)[None, None, :2], jnp.array([[3]]))[0, 0]
    want = [
        [np.cos(3), 0, np.sin(3), 0],
        [0, np.cos(3 / 100), 0, np.sin(3 / 100)],
    ]
    np.testing.assert_allclose(turned, want, atol=1e-6)


def test_linear_biases_have_the_published_slopes():
    bias = alibi_bias(8, jnp.array([[4, 5, 7]]))
    np.testing.assert_array_equal(bias[0, :, 2, 0], -3.0 * 0.5 ** np.arange(1, 9))
    np.testing.assert_array_equal(bias[0, 0], bias[0, 0].T)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_is_that_of_flax_and_keeps_one_array(rng, dtype, assert_close):
    x = jnp.asarray(3 * rng.normal(size=(100,)), dtype)
    np.testing.assert_array_equal(gelu(x), nnx.gelu(x))
    slope = lambda f, x: jax.grad(lambda x: f(x).sum())(x)  # noqa: E731
    want = slope(nnx.gelu, x.astype("float32"))
    assert_close("slope", slope(gelu, x), want, kind="gradients", dtype=dtype)
    tangent = jax.jvp(gelu, (x,), (jnp.ones_like(x),))[1]
    assert_close("forward mode", tangent, want, kind="gradients", dtype=dtype)
    kept = jax.tree.leaves(jax.vjp(gelu, x)[1])
    assert sum(array.size for array in kept) == x.size
    assert sum(array.size for array in jax.tree.leaves(jax.vjp(nnx.gelu, x)[1])) > x.size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_the_norm_is_that_of_flax(rng, dtype, mean, assert_close):
    ours, flax_s = (
        norm(32, dtype=kind, use_fast_variance=False, rngs=nnx.Rngs(0))
        for norm, kind in ((LayerNorm, dtype), (nnx.LayerNorm, "float32"))
    )
    for name in ("scale", "bias"):
        drawn = jnp.asarray(rng.normal(size=32), jnp.float32)
        for norm in (ours, flax_s):
            getattr(norm, name)[...] = drawn
    x = jnp.asarray(rng.normal(size=(2, 7, 32)) + mean, dtype)
    weights = jnp.asarray(rng.normal(size=x.shape), jnp.float32)

    def run(norm, x):
        loss = lambda norm, x: (weights * norm(x)).sum()  # noqa: E731
        return norm(x), nnx.grad(loss, argnums=(0, 1))(norm, x)

    (got, d_got), (want, d_want) = run(ours, x), run(flax_s, x.astype("float32"))
    assert got.dtype == dtype
    assert_close("outputs", got, want, kind="outputs", dtype=dtype)
    got, want = jax.tree.leaves(d_got), jax.tree.leaves(d_want)
    assert_close("gradients", got, want, kind="gradients", dtype=dtype)


def test_the_norm_has_a_hessian(rng, assert_close):
    x = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    ours, flax_s = (norm(5, rngs=nnx.Rngs(0)) for norm in (LayerNorm, nnx.LayerNorm))
    got, want = (jax.hessian(lambda x, f=f: (f(x) ** 3).sum())(x) for f in (ours, flax_s))
    assert_close("hessian", got, want, kind="gradients")
