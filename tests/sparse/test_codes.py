"""Codes are packed and unpacked without loss, and scores are those of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.core.hashing import init_planes, init_rotations, soft_hash
from race_jax.sparse import (
    SparseCache,
    SparseConfig,
    codes,
    reference,
    score,
    scores,
    socket_sharpness,
)
from tests import quick
from tests.sparse.problems import draw_tokens

pytestmark = pytest.mark.once


def test_rotations_are_orthogonal(assert_close):
    rows = init_rotations(jax.random.key(0), num_rotations=3, head_dim=8).reshape(3, 8, 8)
    product = np.einsum("rih,rjh->rij", rows, rows)
    assert_close("R R^T", product, np.tile(np.eye(8), (3, 1, 1)), kind="identity")
    assert np.abs(np.einsum("ih,jh->ij", rows[0], rows[1])).max() > 0.1


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_come_back_and_lie_where_the_layout_says(rng, bits):
    for count in (8, 24, 64, 128, 200):
        unsigned = rng.integers(0, 2**bits, (3, count)).astype(np.uint32)
        words = np.asarray(codes.pack_levels(jnp.asarray(unsigned), bits))
        assert words.shape == (3, -(-count * bits // 32))
        levels = codes.unpack_levels(jnp.asarray(words), bits, count)
        np.testing.assert_array_equal(levels, 2.0 * unsigned - (2**bits - 1))
        data = words.astype("<u4").view(np.uint8).astype(int)
        for i in range(count):
            byte = data[:, i % data.shape[1]] >> (bits * (i // data.shape[1]))
            np.testing.assert_array_equal(byte & (2**bits - 1), unsigned[:, i])


def test_tables_come_back_and_do_not_straddle_words(rng):
    for planes in range(1, 11):
        tables = 7
        held = rng.integers(0, 2**planes, (3, tables)).astype(np.uint32)
        words = codes.pack_tables(jnp.asarray(held), planes)
        assert words.shape == (3, -(-tables // (32 // planes)))
        for table in range(tables):
            got = codes.code_of_table(words, jnp.asarray(table), planes)
            np.testing.assert_array_equal(got, held[:, table])
            word, place = divmod(table, 32 // planes)  # from the lowest bits on, by the docstring
            there = np.asarray(words)[:, word] >> (planes * place) & (2**planes - 1)
            np.testing.assert_array_equal(there, held[:, table])


@pytest.mark.parametrize("scorer", ["socket", "quantized"])
def test_a_cache_of_whole_tiles_can_be_made(scorer):
    """The tokens after the last whole tile are then none."""
    config = SparseConfig(scorer=scorer)
    shape = 1, 2 * codes.TILE, 1, 128
    cache = jax.eval_shape(lambda: SparseCache.init(jax.random.key(0), *shape, config=config))
    assert cache.codes.shape[:3] == (1, 1, 2 * codes.TILE)


def test_a_projection_of_zero_is_a_bit_of_one():
    zeros, planes = jnp.zeros((1, 4)), jnp.ones((6, 4))
    assert codes.code_tables(zeros, planes, 3).tolist() == [[0b111111]]
    words, factor = codes.code_levels(zeros, planes, 1)
    assert codes.unpack_levels(words, 1, 6).tolist() == [[1.0] * 6]
    assert factor.tolist() == [0.0]
    for bits in (1, 2, 4):  # zero lies in the first step above it
        words, _ = codes.code_levels(jnp.array([[0.0, -0.0, -1.0]]), jnp.eye(3), bits)
        assert codes.unpack_levels(words, bits, 3)[0, :2].tolist() == [1.0, 1.0]


def test_the_first_plane_is_the_highest_bit(assert_close):
    """A code is the index of a corner in the order of `soft_hash`."""
    planes = init_planes(jax.random.key(0), num_tables=3, num_planes=4, head_dim=16)
    key = jax.random.normal(jax.random.key(1), (20, 16))
    words = codes.code_tables(key, planes.reshape(-1, 16), 4)
    z = jnp.einsum("sh,lph->slp", key, planes)
    phi = soft_hash(z, sharpness=50.0).reshape(20, 3, 16)
    for table in range(3):
        got = codes.code_of_table(words, jnp.asarray(table), 4)
        np.testing.assert_array_equal(got, phi[:, table].argmax(axis=-1))


def half_tables(u, sharpness):
    """phi (..., 2^P) of u (..., P), by products of sigmoids over each half of the planes."""

    def over(u):
        planes = u.shape[-1]
        corners = 2 * (np.arange(2**planes)[:, None] >> np.arange(planes)[::-1] & 1) - 1
        return (1 / (1 + np.exp(-2 * sharpness * u[..., None, :] * corners))).prod(axis=-1)

    half = u.shape[-1] // 2
    high, low = over(u[..., :half]), over(u[..., half:])
    return (high[..., :, None] * low[..., None, :]).reshape(*u.shape[:-1], -1)


@pytest.mark.parametrize("num_planes", [1, 3, 10])
def test_socket_is_its_softmax_over_corners(rng, assert_close, num_planes):
    config = SparseConfig(scorer="socket", num_tables=4, num_planes=num_planes, sharpness=0.3)
    query, key = rng.normal(size=(3, 16)), rng.normal(size=(9, 16))
    planes = rng.normal(size=(4, num_planes, 16)).astype(np.float32)
    flat = jnp.asarray(planes.reshape(-1, 16))
    words = codes.code_tables(jnp.asarray(key, jnp.float32), flat, num_planes)
    got = scores.soft_counts(
        jnp.asarray(query, jnp.float32)[:, None, None], words[None, None].repeat(3, 0), flat, config
    )
    want = [reference.socket_scores(q, key, planes.astype(float), 0.3) for q in query]
    assert_close("scores", got[:, 0, 0], np.array(want), kind="identity")
    z = jnp.einsum("qh,lph->qlp", query, planes)
    soft = np.asarray(soft_hash(z, sharpness=0.3)).reshape(3, 4, -1)
    halves = half_tables(np.tanh(np.asarray(z, float)), 0.3)
    assert_close("sum of phi", halves.sum(axis=-1), np.ones((3, 4)), kind="identity")
    for name, phi in (("by soft_hash", soft), ("by half tables", halves)):
        gathered = sum(
            phi[:, t][:, np.asarray(codes.code_of_table(words, jnp.asarray(t), num_planes))]
            for t in range(4)
        )
        assert_close(name, got[:, 0, 0], gathered, kind="identity")


def test_a_value_weighted_score_is_that_of_soft_hash_times_the_norm(rng, assert_close):
    """Through the cache: four query heads of two key/value heads, with values of their own width.

    Without the weights, the norm of a value does not count.
    """
    sizes = {"num_tables": 5, "num_planes": 4, "budget": 200}
    query, key, value = draw_tokens(rng, 2, 9, 4, 2, 16, 5)
    for weighting in (True, False):
        config = SparseConfig(scorer="socket", value_weighting=weighting, **sizes)
        cache = SparseCache.init(jax.random.key(0), 2, 9, 2, 16, 5, jnp.float32, config=config)
        cache = quick.jit(SparseCache.append)(cache, key, value)
        got = score(jnp.asarray(query[:, -1:]), cache, config)
        z, sharpness = codes.project(query[:, -1], cache.planes), config.sharpness_for(16)
        phi = np.asarray(soft_hash(z.reshape(2, 4, 5, 4), sharpness=sharpness))
        phi = phi.reshape(2, 4, 5, 16)
        bits = np.asarray(codes.project(key, cache.planes)).reshape(2, 9, 2, 5, 4) >= 0
        corner = (bits * 2 ** np.arange(3, -1, -1)).sum(axis=-1)
        norm = np.linalg.norm(value, axis=-1) if weighting else np.ones((2, 9, 2))
        want = [
            [(phi[b, n, np.arange(5), corner[b, :, n // 2]].sum(-1) * norm[b, :, n // 2])
             for n in range(4)] for b in range(2)
        ]  # fmt: skip
        assert_close("scores", got[:, 0], np.array(want), kind="identity")


@pytest.mark.parametrize(("bits", "rotations"), [(1, 1), (1, 2), (1, 4), (2, 1), (4, 1)])
def test_linear_scores_are_exact_integers(rng, bits, rotations):
    """The same integer from float32, bfloat16 and int8 products."""
    key = rng.normal(size=(50, 128)).astype(np.float32)
    query = rng.normal(size=(4, 128)).astype(np.float32) * 3
    scorer = "quantized" if bits > 1 else "sign_linear"
    config = SparseConfig(scorer=scorer, num_rotations=rotations, code_bits=bits)
    planes = codes.draw(jax.random.key(0), config.coding(), 128)
    assert planes.dtype == jnp.bfloat16
    rounded, _ = codes.round_query(jnp.asarray(query), planes)
    words, factor = codes.code_levels(jnp.asarray(key), planes, bits)
    levels = np.asarray(codes.unpack_levels(words, bits, len(planes)))
    exact = np.asarray(rounded).astype(int) @ levels.astype(int).T
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        out = jnp.int32 if dtype == jnp.int8 else jnp.float32
        factors = rounded.astype(dtype), jnp.asarray(levels).astype(dtype)
        got = jnp.einsum("qm,sm->qs", *factors, preferred_element_type=out)
        np.testing.assert_array_equal(np.asarray(got).astype(int), exact)
    wide = key.astype(float), np.asarray(planes, float), bits
    want = [reference.linear_scores(one, *wide) for one in np.asarray(rounded)]
    got = np.asarray(factor, np.float32) * exact
    differing = np.abs(got - want) > 1e-3 * np.abs(want).max()  # a level at a rounding border
    assert differing.mean() < 0.01
    own = np.asarray(codes.round_query(jnp.asarray(key), planes)[0]) * levels
    units = np.asarray(codes.round_query(jnp.asarray(key), planes)[1])[:, 0]
    np.testing.assert_allclose(
        np.asarray(factor, float) * own.sum(axis=1) * units, (key**2).sum(axis=1), rtol=4e-3
    )


ERRORS = {(1, 1): 0.75, (1, 2): 0.53, (1, 4): 0.38, (2, 1): 0.36, (4, 1): 0.11}


@pytest.mark.parametrize(("bits", "rotations"), ERRORS)
def test_linear_estimates_of_logits_are_as_exact_as_measured(rng, bits, rotations):
    """The error over the spread of Gaussian logits, within 10 %, and a slope of one."""
    query, key = (jnp.asarray(rng.normal(size=(n, 128)), jnp.float32) for n in (32, 4096))
    scorer = "quantized" if bits > 1 else "sign_linear"
    coding = SparseConfig(scorer=scorer, num_rotations=rotations, code_bits=bits).coding()

    @quick.jit
    def both(query, key):
        planes = codes.draw(jax.random.key(0), coding, 128)
        words, factor = codes.code_levels(key, planes, bits)
        rounded, unit = codes.round_query(query, planes)
        product = rounded @ codes.unpack_levels(words, bits, len(planes)).T
        return unit * product * factor.astype(jnp.float32), query @ key.T

    estimate, exact = map(np.asarray, both(query, key))
    error, expected = (estimate - exact).std() / exact.std(), ERRORS[bits, rotations]
    assert 0.9 * expected < error < 1.1 * expected
    if bits == 1:
        assert 0.95 < error / np.sqrt((np.pi / 2 - 1) / rotations) < 1.05
    slope = (estimate * exact).sum() / (exact**2).sum()
    assert abs(slope - 1) < 0.01


@pytest.mark.parametrize(("bits", "rotations"), [(1, 1), (1, 2), (2, 1), (4, 1)])
def test_linear_estimates_are_unbiased_over_rotations(rng, bits, rotations):
    """The mean of q . k over 400 drawings of the rotations, within four of its deviations."""
    query = rng.normal(size=64).astype(np.float32)
    near = np.array([0.0, 0.3, 0.7, -0.7, 1.5])[:, None]
    key = (near * query + rng.normal(size=(5, 64))).astype(np.float32)
    scorer = "quantized" if bits > 1 else "sign_linear"
    coding = SparseConfig(scorer=scorer, num_rotations=rotations, code_bits=bits).coding()

    @jax.jit
    @jax.vmap
    def estimate(seed):
        planes = codes.draw(seed, coding, 64)
        rounded, unit = codes.round_query(query[None], planes)
        words, factor = codes.code_levels(key, planes, bits)
        levels = codes.unpack_levels(words, bits, len(planes))
        return unit[0] * factor.astype(jnp.float32) * (levels @ rounded[0])

    found = np.asarray(estimate(jax.random.split(jax.random.key(0), 400)), np.float64)
    deviation = found.std(axis=0) / np.sqrt(400)
    exact = key.astype(np.float64) @ query
    assert (np.abs(found.mean(axis=0) - exact) < 4 * deviation).all()
    assert (deviation < 0.01 * np.abs(exact))[2:].all()  # a bias of 4 % would be found


def test_sizes_whose_scores_would_not_be_exact_are_refused():
    """69 rotations of 128 coordinates reach 2^24, and 68 do not."""

    def cache(rotations):
        config = SparseConfig(scorer="quantized", num_rotations=rotations, code_bits=4)
        return SparseCache.init(jax.random.key(0), 1, 8, 1, 128, config=config)

    assert jax.eval_shape(lambda: cache(68)).codes.shape == (1, 1, 8, 68 * 16)
    with pytest.raises(ValueError, match=r"scores up to 16,824,960; below 16,777,216 they are"):
        cache(69)


def test_temperatures_become_sharpness():
    got = [round(socket_sharpness(t, 128), 3) for t in (0.3, 0.4, 1.0)]
    assert got == [0.295, 0.221, 0.088]
    assert SparseConfig(scorer="socket_unit").sharpness_for(128) == socket_sharpness(1.0, 128)
