"""Rotary positions, which turn pairs of a head's numbers by angles that grow with the position.

pair i of a token at position p turns by p base^(-2i/H)
"""

import jax
import jax.numpy as jnp

ROPE_BASE = 10_000.0


def rotate(x: jax.Array, positions: jax.Array, base: float = ROPE_BASE) -> jax.Array:
    r"""Applies rotary positions, which turn pair i of a head by :math:`p \cdot base^{-2i/H}`.

    Args:
        x: shape (..., T, N, H), with H even. Pair i is (x[i], x[i + H/2]).
        positions: shape (B, T) or (T,) int32, the position p of each token.
        base: the base of the angles.

    Returns:
        The shape and dtype of x. Angles and products are float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.core.rotary import rotate
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)).tolist()
        [[[[1.0, 1.0]]]]

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
