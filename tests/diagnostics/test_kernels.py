"""The exact kernels against closed forms and plain integrals, and how the error falls with L."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import diagnostics
from race_jax.core.hashing import init_planes
from race_jax.core.reference import corner_softmax

pytestmark = pytest.mark.once


@pytest.fixture
def heads(rng):
    """Queries (2, 5, 4, 8) and keys (2, 7, 2, 8)."""
    query, key = rng.normal(size=(2, 5, 4, 8)), rng.normal(size=(2, 7, 2, 8))
    return jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)


def pair(query, key):
    """One query and one key as arrays of one token and one head."""
    return tuple(jnp.asarray(x, jnp.float32)[None, None, None] for x in (query, key))


def test_the_hash_kernel_is_the_mean_over_tables_of_the_definition(heads, assert_close):
    query, key = heads
    beta = jnp.array([0.7, 3.0])
    planes = init_planes(jax.random.key(0), num_tables=3, num_planes=2, head_dim=8)
    got = diagnostics.hash_kernel(query, key, planes, beta)
    for n in range(4):
        phi_q = corner_softmax(query[:, :, n], planes, beta[n // 2])
        phi_k = corner_softmax(key[:, :, n // 2], planes, beta[n // 2])
        want = jnp.einsum("btf,bsf->bts", phi_q, phi_k, precision="highest") / 3
        assert_close(f"head {n}", got[:, n], want, kind="outputs")


def test_the_soft_kernel_is_the_integral_over_two_correlated_normals(heads, assert_close):
    heads = heads[0][:, :3], heads[1][:, :2]
    query, key = (np.asarray(x, np.float64) for x in heads)
    beta, scale, planes = 2.0, 8**-0.5, 3
    z = np.linspace(-8, 8, 401)
    weight = np.exp(-(z[:, None] ** 2 + z**2) / 2)
    weight /= weight.sum()

    def soft_sign(x):
        return np.tanh(beta * np.tanh(x))

    def integral(q, k):
        along = np.dot(q, k) / np.linalg.norm(q)
        across = math.sqrt(max(np.dot(k, k) - along**2, 0))
        a = soft_sign(scale * np.linalg.norm(q) * z)[:, None]
        b = soft_sign(scale * (along * z[:, None] + across * z))
        return ((1 + (weight * a * b).sum()) / 2) ** planes

    got = diagnostics.soft_kernel(*heads, num_planes=planes, sharpness=beta, scale=scale)
    want = [
        [[[integral(q, k) for k in key[b, :, n // 2]] for q in query[b, :, n]] for n in range(4)]
        for b in range(2)
    ]
    assert_close("soft_kernel", got, np.array(want), kind="outputs")


@pytest.mark.parametrize("beta", [0.5, 2.0, 30.0])
def test_saturated_projections_have_the_closed_form(heads, beta, assert_close):
    """Where signs agree, so do two buckets with s^2 + (1-s)^2, s = sigmoid(2 beta)."""
    query, key = heads
    got = diagnostics.soft_kernel(query, key, num_planes=2, sharpness=beta, scale=1e4)
    hard = diagnostics.angular_kernel(query, key, num_planes=1)  # 1 - angle / pi
    s = 1 / (1 + math.exp(-2 * beta))
    want = ((s**2 + (1 - s) ** 2) * hard + 2 * s * (1 - s) * (1 - hard)) ** 2
    assert_close("soft_kernel", got, want, kind="quadrature")


@pytest.mark.parametrize(
    ("key", "share"), [([0, 3], 0.5), ([-2, 0], 0.0), ([1, 1], 0.75), ([5, 0], 1.0), ([0, 0], 0.5)]
)
def test_the_angular_kernel_of_known_angles(key, share, assert_close):
    got = diagnostics.angular_kernel(*pair([2, 0], key), num_planes=3)
    assert_close("angular_kernel", got[0, 0], np.array([[share**3]]), kind="identity")


def test_the_softmax_kernel_has_the_weights_of_softmax(heads, assert_close):
    query, key = heads
    got = diagnostics.attention_weights(diagnostics.softmax_kernel(query, key))
    logits = jnp.einsum("bthd,bshd->bhts", query, jnp.repeat(key, 2, 2), precision="highest")
    assert_close("weights", got, jax.nn.softmax(logits / math.sqrt(8)), kind="outputs")


def test_weights_and_their_distance_by_hand():
    kernel = jnp.array([[1.0, 3.0], [1.0, 3.0]])
    causal = diagnostics.attention_weights(kernel, is_causal=True)
    assert causal.tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert diagnostics.attention_weights(kernel).tolist() == [[0.25, 0.75]] * 2
    # Rows differ by 0.75 and by 0.
    assert diagnostics.distance(causal, diagnostics.attention_weights(kernel)).item() == 0.375
    several = jnp.stack([causal, diagnostics.attention_weights(kernel)])
    assert diagnostics.distance(several, causal).tolist() == [0.0, 0.375]


@pytest.mark.parametrize(("beta", "scale"), [(1.0, 8**-0.5), (8.0, 1.0)])
def test_the_error_falls_as_one_over_the_root_of_the_number_of_tables(rng, beta, scale):
    query, key = (jnp.asarray(rng.normal(size=(1, 24, 1, 8)), jnp.float32) for _ in range(2))
    found = diagnostics.errors_by_tables(
        jax.random.key(3),
        query,
        key,
        num_planes=2,
        num_tables=(1, 4, 16, 64),
        sharpness=beta,
        scale=scale,
        is_causal=True,
        draws=6,
    )
    assert found.tables.tolist() == [1, 4, 16, 64]
    assert -0.55 < found.slope < -0.45
    assert (found.deviation < found.mean).all()
    # To the limit of hard buckets, an error remains that more tables do not remove.
    angular = diagnostics.angular_kernel(query, key, num_planes=2)
    limit = diagnostics.errors_by_tables(
        jax.random.key(3),
        query,
        key,
        num_planes=2,
        num_tables=(1, 4, 16, 64),
        sharpness=beta,
        scale=scale,
        is_causal=True,
        want=angular,
        draws=2,
    )
    assert (limit.slope > -0.3) == (beta == 1.0)


def test_bad_arguments_are_named(heads):
    query, key = heads
    with pytest.raises(ValueError, match=r"got \(2, 5, 4, 8\) and \(2, 7, 3, 8\)"):
        diagnostics.angular_kernel(query, jnp.zeros((2, 7, 3, 8)), num_planes=1)
    with pytest.raises(ValueError, match="draws must be at least 2"):
        diagnostics.errors_by_tables(jax.random.key(0), query, key, num_planes=1, draws=1)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 queries and 3 keys"):
        diagnostics.attention_weights(jnp.ones((5, 3)), is_causal=True)
