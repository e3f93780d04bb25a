"""Positions that attention itself applies: rotary ones, and the slopes of ALiBi.

Queries and keys (B, T, N, H) with positions (B, T) are turned, pair by pair of their entries, or
logits fall linearly with the distance of two tokens.
"""

import jax
import jax.numpy as jnp

ROPE_BASE = 10_000.0


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    r"""Applies rotary positions, which turn pair i of a head by :math:`p \cdot 10000^{-2i/H}`.

    Args:
        x: shape (B, T, N, H), with H even. Pair i is (x[i], x[i + H/2]).
        positions: shape (B, T) int32, the position p of each token.

    Returns:
        Shape (B, T, N, H), with the dtype of x. Angles and products are float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.layers.rotary import rotate
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)).tolist()
        [[[[1.0, 1.0]]]]

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> jax.Array:
    """Returns the slopes 2^(-8(n+1)/N) of the heads, shape (N,) float32."""
    return 2.0 ** (-8.0 * jnp.arange(1, num_heads + 1, dtype=jnp.float32) / num_heads)
