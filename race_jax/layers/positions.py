"""Positions of the methods that compare all pairs of tokens: rotary ones, and linear biases.

With the position p of a token, and pair i of a head's numbers,

    RoPE turns pair i by p base^(-2i/H)           ALiBi adds -2^(-8(n+1)/N) |p_t - p_s|
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.rotary import ROPE_BASE, rotate
from race_jax.layers.self_attention import AttentionConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(AttentionConfig):
    """Sizes and options of a method that compares all pairs of tokens.

    Attributes:
        positions: "rope" rotates queries and keys, and "alibi" biases the logits. Other positions
            change neither.
        rope_base: the base of "rope". The pair that turns slowest comes round once in about
            2 pi base tokens.

    Raises:
        ValueError: if a value is not allowed, or a head of odd width has rotary positions.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ("rope", "alibi")

    positions: str = "none"
    rope_base: float = ROPE_BASE

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.rope_base < math.inf:
            raise ValueError(f"rope_base={self.rope_base} must be a number above 1.")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(
                f"positions='rope' rotates pairs and needs an even head_dim; got {self.head_dim}."
            )


def place(
    query: jax.Array, key: jax.Array, positions: jax.Array | None, settings: PairsConfig
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns queries and keys with their positions, and the bias of the logits or None.

    Args:
        query: shape (B, T, N, H).
        key: shape (B, T, K, H).
        positions: shape (B, T) int32. The schemes "rope" and "alibi" need it.
        settings: the layer's sizes and options. Schemes other than these two change nothing.

    Raises:
        ValueError: a scheme needs positions, and there are none.
    """
    scheme = settings.positions
    if scheme in ("rope", "alibi") and positions is None:
        raise ValueError(
            f"positions={scheme!r} of the layer needs the position of every token; pass positions= "
            "of shape (B, T), such as jnp.arange(T)[None]"
        )
    if scheme == "rope":
        query, key = (rotate(x, positions, settings.rope_base) for x in (query, key))
        return query, key, None
    return query, key, alibi_bias(query.shape[2], positions) if scheme == "alibi" else None


def alibi_bias(num_heads: int, positions: jax.Array) -> jax.Array:
    r"""Returns the linear biases :math:`-2^{-8(n+1)/N} \, |p_t - p_s|` of the logits of head n.

    Args:
        num_heads: the number of query heads N.
        positions: shape (B, T) int32, the position p of each token.

    Returns:
        Shape (B, N, T, T) float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.layers.positions import alibi_bias
        >>> alibi_bias(2, jnp.array([[0, 3]]))[0, :, 1, 0].tolist()  # two heads, distance 3
        [-0.1875, -0.01171875]

    Source: Press et al. 2022 (ALiBi), section 3, with the slopes for N a power of two.
    """
    distance = jnp.abs(positions[:, :, None] - positions[:, None, :]).astype(jnp.float32)
    return -alibi_slopes(num_heads)[None, :, None, None] * distance[:, None]


def alibi_slopes(num_heads: int) -> jax.Array:
    """Returns the slopes 2^(-8(n+1)/N) of the heads, shape (N,) float32."""
    return 2.0 ** (-8.0 * jnp.arange(1, num_heads + 1, dtype=jnp.float32) / num_heads)


def decay_bias(log_decay: jax.Array, mask: jax.Array | None, num_heads: int) -> jax.Array:
    """Returns the logarithm of the decay between two tokens, ``G_t - G_s``.

    G is the running sum of the forget gate. Added to the logits of softmax, it makes the weights
    those of a gated sum.

    Args:
        log_decay: shape (B, T, K), <= 0.
        mask: shape (B, T) bool, True where there is a token, or None.
        num_heads: the number of query heads N.

    Returns:
        Shape (B, N, T, T) float32, which is zero for later tokens s.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.layers.positions import decay_bias
        >>> decay_bias(jnp.full((1, 3, 1), -0.5), None, 1)[0, 0].tolist()
        [[0.0, 0.0, 0.0], [-0.5, 0.0, 0.0], [-1.0, -0.5, 0.0]]

    Source: Lin et al. 2025 (Forgetting Transformer), section 3.
    """
    total = jnp.cumsum(masking.bound_log_decay(log_decay, mask), axis=1)
    total = jnp.moveaxis(total, 2, 1)  # (B, K, T)
    bias = jnp.minimum(total[..., :, None] - total[..., None, :], 0.0)
    return jnp.repeat(bias, num_heads // log_decay.shape[2], axis=1)
