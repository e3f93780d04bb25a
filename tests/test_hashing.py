"""The soft hash obeys the identities of the corner softmax, and planes are drawn as documented."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from race_jax.core import reference


@functools.partial(jax.jit, static_argnames="dtype")
def hash_all(x, planes, sharpness, dtype=jnp.float32):
    """Returns z, phi by the library, and phi by the oracle."""
    x, planes = x.astype(dtype), planes.astype(dtype)
    z = race_jax.hash_projections(x, planes)
    return z, race_jax.soft_hash(z, sharpness), reference.corner_softmax(x, planes, sharpness)


@pytest.mark.parametrize("num_planes", [1, 3, 10])
@pytest.mark.parametrize("sharpness", [0.5, 8.0])
def test_factorised_hash_is_the_softmax_over_corners(num_planes, sharpness, rng, assert_close):
    x = rng.normal(size=(2, 3, 8))
    planes = rng.normal(size=(2, num_planes, 8))
    with jax.enable_x64(True):
        z, phi, naive = hash_all(jnp.asarray(x), jnp.asarray(planes), sharpness, jnp.float64)
        assert z.dtype == phi.dtype == jnp.float64
    assert phi.shape == (2, 3, 2 * 2**num_planes)
    assert_close("z", z, np.einsum("bth,lph->btlp", x, planes), kind="identity", dtype="float64")
    assert_close("phi", phi, naive, kind="identity", dtype="float64")
    _, phi32, _ = hash_all(jnp.asarray(x), jnp.asarray(planes), sharpness)
    assert phi32.dtype == jnp.float32
    assert_close("phi in float32", phi32, naive, kind="identity")


def test_corner_order_is_first_plane_slowest_and_minus_before_plus():
    z = jnp.array([[[5.0, -5.0, 5.0]]])  # the signs + - +, corner 0b101
    phi = race_jax.soft_hash(z, 20.0)
    assert phi.shape == (1, 8)
    assert int(jnp.argmax(phi)) == 0b101


def test_each_table_is_a_distribution_whatever_the_sharpness(rng, assert_close):
    z = jnp.asarray(10 * rng.normal(size=(3, 5, 4, 3)), jnp.float32)
    for sharpness in (1e-3, 1.0, 100.0):
        phi = jax.jit(race_jax.soft_hash)(z, jnp.float32(sharpness))
        assert np.all(phi >= 0)
        tables = phi.reshape(3, 5, 4, 8)
        assert_close("sum of a table", tables.sum(-1), np.ones((3, 5, 4)), kind="identity")
        assert_close("sum of all", phi.sum(-1), np.full((3, 5), 4.0), kind="identity")


def test_kernel_of_one_table_is_a_product_over_planes(rng, assert_close):
    with jax.enable_x64(True):
        z_q, z_k = jnp.asarray(rng.normal(size=(2, 6, 1, 4)))
        beta = 2.5
        got = jnp.sum(race_jax.soft_hash(z_q, beta) * race_jax.soft_hash(z_k, beta), -1)
        a, b = jnp.tanh(beta * jnp.tanh(z_q)), jnp.tanh(beta * jnp.tanh(z_k))
        want = jnp.prod((1 + a * b) / 2, -1)[:, 0]
    assert_close("phi(q) . phi(k)", got, want, kind="identity", dtype="float64")


def test_sharpness_and_planes_per_head(rng, assert_close):
    x = jnp.asarray(rng.normal(size=(2, 7, 3, 8)), jnp.float32)
    planes = jnp.asarray(rng.normal(size=(3, 2, 2, 8)), jnp.float32)
    beta = jnp.array([0.5, 2.0, 7.0])
    z = race_jax.hash_projections(x, planes)
    phi = race_jax.soft_hash(z, beta)
    assert z.shape == (2, 7, 3, 2, 2)
    for head in range(3):
        z_one, phi_one, _ = hash_all(x[:, :, head], planes[head], beta[head])
        assert_close(f"z of head {head}", z[:, :, head], z_one, kind="identity")
        assert_close(f"phi of head {head}", phi[:, :, head], phi_one, kind="identity")


def test_projections_accumulate_in_float32(rng, assert_close):
    x = jnp.asarray(rng.normal(size=(64, 128)), jnp.bfloat16)
    planes = jnp.asarray(rng.normal(size=(4, 4, 128)), jnp.bfloat16)
    z = race_jax.hash_projections(x, planes).astype(jnp.float32)
    want = np.einsum("th,lph->tlp", *(np.asarray(a, np.float64) for a in (x, planes)))
    assert_close("z", z, want, kind="outputs", dtype="bfloat16")


def test_folding_planes_into_the_projection(rng, assert_close):
    """z = x (W_query W^T): q and k need not exist, and the projection kernels' gradients agree."""
    hidden = jnp.asarray(rng.normal(size=(2, 9, 16)), jnp.float32)
    kernels = jnp.asarray(rng.normal(size=(2, 16, 2, 8)) / 4, jnp.float32)  # query's, key's
    value = jnp.asarray(rng.normal(size=(2, 9, 2, 5)), jnp.float32)
    planes = jnp.asarray(rng.normal(size=(2, 2, 8)), jnp.float32)

    def unfolded(kernels):
        q, k = jnp.einsum("btd,idnh->ibtnh", hidden, kernels)
        return jnp.sin(race_jax.race_attention(q, k, value, planes, is_causal=True))

    def folded(kernels):
        folded_kernels = jnp.einsum("idnh,lph->idnlp", kernels, planes)
        z_q, z_k = jnp.einsum("btd,idnlp->ibtnlp", hidden, folded_kernels)
        return jnp.sin(race_jax.race_attention_from_projections(z_q, z_k, value, is_causal=True))

    @jax.jit
    def both(kernels):
        return [
            (f(kernels), jax.grad(lambda x, f=f: f(x).sum())(kernels)) for f in (folded, unfolded)
        ]

    got, want = both(kernels)
    assert_close("(out, d_kernels)", got, want, kind="folded")


THETA = 1.1


@pytest.fixture(scope="module")
def saturated_projections():
    """Returns z of two vectors at the angle THETA, for 20,000 tables of 3 planes."""
    basis, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(16, 2)))
    pair = np.array([[1, 0], [np.cos(THETA), np.sin(THETA)]]) @ basis.T
    # The planes are so long that tanh is a sign, as the closed forms assume.
    planes = race_jax.init_planes(
        jax.random.key(2), num_tables=20_000, num_planes=3, head_dim=16, scale=1e4
    )
    return race_jax.hash_projections(jnp.asarray(pair, jnp.float32), planes)


@pytest.mark.parametrize("sharpness", [0.5, 2.0, 50.0])
def test_closed_forms_under_saturation(saturated_projections, sharpness):
    """E phi(q) . phi(k) = (s - (2s - 1) theta/pi)^P, s = sigmoid(2 beta), for a hard-hashed key.

    If the key is hashed softly too, s^2 + (1 - s)^2 takes the place of s. At sharpness 50 both are
    the probability (1 - theta/pi)^P that hard hashes are equal.
    """
    z_q, z_k = saturated_projections
    soft_q, soft_k = (race_jax.soft_hash(z, sharpness).reshape(-1, 8) for z in (z_q, z_k))
    hard_k = race_jax.soft_hash(z_k, 1e4).reshape(-1, 8)
    hard = 1 / (1 + np.exp(-2 * sharpness))
    soft = hard**2 + (1 - hard) ** 2
    for name, phi_k, s in (("hard", hard_k, hard), ("soft", soft_k, soft)):
        kernel = np.asarray(jnp.sum(soft_q * phi_k, -1), np.float64)
        error = kernel.mean() - (s - (2 * s - 1) * THETA / np.pi) ** 3
        assert abs(error) < 4 * kernel.std() / np.sqrt(kernel.size), name


def test_planes_are_standard_normal_times_scale(assert_close):
    draw = functools.partial(
        race_jax.init_planes, jax.random.key(0), num_tables=64, num_planes=8, head_dim=64
    )
    planes = np.asarray(draw())
    assert planes.shape == (64, 8, 64)
    assert planes.dtype == np.float32
    assert abs(planes.mean()) < 4 / np.sqrt(planes.size)
    assert abs(planes.std() - 1) < 4 / np.sqrt(2 * planes.size)
    assert_close("drawn again", draw(), planes, kind="rerun")
    assert_close("scaled", draw(scale=0.125), planes / 8, kind="identity")
    per_head = draw(num_kv_heads=3, dtype=jnp.bfloat16)
    assert per_head.shape == (3, 64, 8, 64)
    assert per_head.dtype == jnp.bfloat16
    assert not np.array_equal(per_head[0], per_head[1])


def test_orthogonal_planes_are_orthogonal_with_chi_norms(assert_close):
    planes = race_jax.init_planes(
        jax.random.key(0), num_tables=500, num_planes=4, head_dim=8, scale=0.5, orthogonal=True
    )
    gram = np.einsum("lph,lqh->lpq", planes, planes)
    squares = np.einsum("lpp->lp", gram)
    assert_close("inner products", gram, squares[:, :, None] * np.eye(4), kind="identity")
    # |row|^2 / scale^2 is chi-squared with H = 8 degrees of freedom: mean 8, variance 16.
    lengths = squares / 0.25
    assert abs(lengths.mean() - 8) < 4 * 4 / np.sqrt(lengths.size)
    assert abs(lengths.var() / 16 - 1) < 0.2


def test_saturation_depends_on_the_scale_of_the_planes(rng):
    """At H = 64 the mean of tanh' is 0.10 with planes of scale 1, and 0.61 with 1/sqrt(H)."""
    x = jnp.asarray(rng.normal(size=(512, 64)), jnp.float32)
    for scale, want in ((1.0, 0.10), (64**-0.5, 0.61)):
        planes = race_jax.init_planes(
            jax.random.key(0), num_tables=8, num_planes=8, head_dim=64, scale=scale
        )
        slope = 1 - jnp.tanh(race_jax.hash_projections(x, planes)) ** 2
        assert abs(float(slope.mean()) - want) < 0.02
