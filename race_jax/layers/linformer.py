"""Linformer attention, which first mixes all tokens into a fixed number of keys and values.

With trained matrices E and F of the length times the rank, for one head,

    out_t = softmax(q_t (Eᵀ k)ᵀ / sqrt(H)) (Fᵀ v)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.layers.self_attention import AttentionConfig, Call, SelfAttention
from race_jax.layers.softmax import softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinformerConfig(AttentionConfig):
    """Options of Linformer attention, and the sizes of a layer.

    Attributes:
        max_length: the largest length of a sequence. Shorter ones use the first rows of E and F.
        rank: the number of keys and values that the tokens are mixed into.

    Raises:
        ValueError: if a value is not allowed.
    """

    NAME: ClassVar[str] = "linformer"

    max_length: int
    rank: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")

    def check_direction(self, is_causal: bool) -> None:
        """Raises ValueError for a causal model, and for a gate."""
        if is_causal:
            raise ValueError(
                "linformer attention mixes all tokens of a sequence and cannot be causal; use it "
                "in an encoder, or another attention for a causal model, such as 'linear'."
            )
        super().check_direction(is_causal)

    def own_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters besides the projections."""
        dense = jax.nn.initializers.lecun_normal()
        mix = lambda key: dense(key, (self.max_length, self.rank))  # noqa: E731
        return super().own_parameters() | {"key_mix_kernel": mix, "value_mix_kernel": mix}


class LinformerAttention(SelfAttention):
    """Bidirectional self-attention to a fixed number of mixed keys and values.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Wang et al. 2020 (arXiv 2006.04768), section 4, with E and F shared by the heads.
    """

    config_class = LinformerConfig

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call) -> jax.Array:
        """Returns the heads' outputs. Padded slots are mixed in as zeros."""
        length, limit = key.shape[1], self.config.max_length
        if call.segment_ids is not None:
            raise NotImplementedError(
                "linformer attention mixes all tokens of a sequence and cannot keep packed "
                "documents apart; put one document in a row, and pad it."
            )
        if length > limit:
            raise ValueError(
                f"the sequence has {length} tokens, and linformer attention was made for at most "
                f"max_length={limit}; make the model with a larger max_length."
            )

        def mix(x: jax.Array, kernel: jax.Array) -> jax.Array:
            x = masking.select_tokens(x, call.mask)
            return jnp.einsum("bskh,sm->bmkh", x, kernel[:length].astype(x.dtype))

        key, value = mix(key, self.key_mix_kernel[...]), mix(value, self.value_mix_kernel[...])
        return softmax_attention(query, key, value, implementation=self.config.implementation)
