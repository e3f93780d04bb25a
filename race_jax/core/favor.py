"""Positive random features of the softmax kernel (FAVOR+).

For directions w_m drawn from N(0, I), which may be orthogonal to each other,

    phi_m(x) = exp(w_m . x / H^(1/4) - |x|^2 / (2 sqrt(H))) / sqrt(M)
    E[phi(q) . phi(k)] = exp(q . k / sqrt(H))
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

LARGEST_EXPONENT = 60.0  # sums of exp(60) times values are far from float32's end, exp(88)


def draw_directions(key: jax.Array, num_features: int, head_dim: int) -> jax.Array:
    """Draws directions ``(M, H)`` that are orthogonal in every block of H.

    Each one by itself is distributed as N(0, I): a uniform direction, times the length of a
    Gaussian vector.

    Args:
      key: a key of ``jax.random``.
      num_features: M.
      head_dim: H.

    Example:
      >>> import jax
      >>> from race_jax.core.favor import draw_directions
      >>> w = draw_directions(jax.random.key(0), 3, 8)
      >>> w.shape, abs(float(w[0] @ w[1])) < 1e-5
      ((3, 8), True)

    Source: Choromanski et al. 2021 (arXiv 2009.14794), section 2.4.
    """
    blocks = math.ceil(num_features / head_dim)
    key_directions, key_lengths = jax.random.split(key)
    gaussian = jax.random.normal(key_directions, (blocks, head_dim, head_dim))
    orthogonal, upper = jnp.linalg.qr(gaussian)
    # QR leaves the signs open. Those of the diagonal make the rotation uniform.
    signs = jnp.sign(jnp.diagonal(upper, axis1=-2, axis2=-1))
    rows = (orthogonal * signs[:, None]).reshape(blocks * head_dim, head_dim)[:num_features]
    lengths = jnp.linalg.norm(
        jax.random.normal(key_lengths, (num_features, head_dim)), axis=-1, keepdims=True
    )
    return rows * lengths


def query_features(query: jax.Array, directions: jax.Array) -> jax.Array:
    """Returns the features of queries, divided by the largest one of each query.

    The division cancels in a mean whose weights are normalised, and keeps exp from overflowing.

    Args:
      query: ``(B, T, N, H)``.
      directions: ``(M, H)``.

    Returns:
      ``(B, T, N, M)`` in float32 or wider, at most 1.
    """
    exponent = _exponents(query, directions)
    largest = jax.lax.stop_gradient(exponent.max(axis=-1, keepdims=True))
    return jnp.exp(exponent - largest)


def key_features(key: jax.Array, directions: jax.Array) -> jax.Array:
    """Returns the features of keys, which depend on no other token.

    Args:
      key: ``(B, S, K, H)``.
      directions: ``(M, H)``.

    Returns:
      ``(B, S, K, M)`` in float32 or wider. Exponents above 60 count as 60.
    """
    exponent = jnp.minimum(_exponents(key, directions), LARGEST_EXPONENT)
    return jnp.exp(exponent) * directions.shape[0] ** -0.5


def _exponents(x: jax.Array, directions: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * x.shape[-1] ** -0.25
    length = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    return jnp.einsum("btnh,mh->btnm", wide, directions.astype(wide.dtype)) - length / 2
