"""Self-attention by softmax over the last tokens only, as a Flax layer.

    out_t = sum_{t - w < s <= t} softmax_s(q_t . k_s / sqrt(H) + bias_ts) v_s

It remembers nothing older than its window. In a hybrid model it stands between layers that do.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import ClassVar

import jax
import jax.numpy as jnp

from race_jax.core.sliding_window import WindowState, sliding_window_attention
from race_jax.layers.positions import PairsConfig, alibi_slopes
from race_jax.layers.self_attention import Call, SelfAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingWindowConfig(PairsConfig):
    """Options of sliding-window attention, and the sizes of a layer.

    Attributes:
        window: the number of tokens that a token sees, itself included.

    Raises:
        ValueError: if a value is not allowed, or a head of odd width has rotary positions.
    """

    NAME: ClassVar[str] = "sliding_window"
    ONLY_CAUSAL: ClassVar[bool] = True
    FORGET_GATES: ClassVar[tuple[str | None, ...]] = (None,)

    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.window, bool) or not isinstance(self.window, numbers.Integral):
            raise ValueError(f"window must be an integer, got {self.window!r}.")
        if self.window < 1:
            raise ValueError(f"window must be at least 1 token, got {self.window}.")


class SlidingWindowAttention(SelfAttention):
    """Causal self-attention by softmax over the last ``window`` tokens.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Beltagy et al. 2020 (Longformer), section 3.1, in a causal model.
    """

    config_class = SlidingWindowConfig

    def init_memory(self, batch: int) -> WindowState:
        """Returns a window without tokens."""
        sizes = self.config.num_kv_heads, self.config.head_dim, self.config.value_dim
        dtype = self.config.dtype or jnp.float32
        return WindowState.init(batch, self.config.window, *sizes, dtype)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call
    ) -> jax.Array | tuple[jax.Array, WindowState]:
        """Returns the heads' outputs, and the last tokens if the call has some."""
        settings = self.config
        return sliding_window_attention(
            query,
            key,
            value,
            window=settings.window,
            rope_base=settings.rope_base if settings.positions == "rope" else None,
            slopes=alibi_slopes(settings.num_heads) if settings.positions == "alibi" else None,
            key_value_mask=call.mask,
            segment_ids=call.segment_ids,
            initial_state=call.memory,
            return_state=call.memory is not None,
        )
