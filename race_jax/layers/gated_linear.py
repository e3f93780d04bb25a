"""Gated linear attention, whose state forgets each channel of the keys at a rate of its own.

S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   out_t = S_tᵀ q_t / sqrt(H)
a_t = sigmoid(x_t W_1 W_2 + b)^(1/16)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from race_jax.core.gated_linear import gated_linear_attention
from race_jax.core.matrix_state import MatrixState
from race_jax.layers import gates
from race_jax.layers.self_attention import AttentionConfig, Call, SelfAttention

TEMPERATURE = 16.0  # the gate's logits are divided by it, so that a new layer forgets slowly


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedLinearConfig(AttentionConfig):
    """Options of gated linear attention, and the sizes of a layer.

    Attributes:
        forget_gate: "channel" is a value per token, head and channel of the keys, as in the source.
            None, "fixed", "learned" and "data" are as in other attentions, with one value for all
            channels of a head.
        gate_rank: the rank of the matrix that gives the logits of the "channel" gate.
    """

    NAME: ClassVar[str] = "gated_linear"
    ONLY_CAUSAL: ClassVar[bool] = True
    FORGET_GATES: ClassVar[tuple[str | None, ...]] = ("channel", *gates.FORGET_GATES)

    short_conv: str | None = "qkv"
    qkv_activation: str | None = "silu"
    forget_gate: str | None = "channel"
    output_norm: str | None = "rms"
    output_gate: str | None = "silu"
    gate_rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gate_rank < 1:
            raise ValueError(f"gate_rank must be at least 1, got {self.gate_rank}.")

    def own_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters besides the projections."""
        parameters = super().own_parameters()
        if self.forget_gate == "channel":
            dense = jax.nn.initializers.lecun_normal()
            rank, heads = self.gate_rank, (self.num_kv_heads, self.head_dim)
            parameters |= {
                "gate_down_kernel": lambda key: dense(key, (self.in_features, rank)),
                "gate_up_kernel": lambda key: dense(key, (rank, math.prod(heads))).reshape(
                    rank, *heads
                ),
                "gate_bias": lambda key: jnp.zeros(heads),
            }
        return parameters


class GatedLinearAttention(SelfAttention):
    """Causal self-attention by a matrix a head, whose rows decay by gates of their own.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Yang et al. 2023 (arXiv 2312.06635), sections 4.1 and 4.4. The short convolutions are
    those of later models, and ``short_conv=None``, ``qkv_activation=None`` leave them out. Keys
    are as wide as values here, and half as wide in the source.
    """

    config_class = GatedLinearConfig

    def init_memory(self, batch: int) -> MatrixState:
        """Returns the matrices before any token."""
        width = self.config.head_dim
        return MatrixState.init(batch, self.config.num_kv_heads, width, width)

    def log_decay(self, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
        """Returns the gate (B, T, K, H), or (B, T, K, 1) with one value a head."""
        if self.config.forget_gate != "channel":
            gate = super().log_decay(x, params)
            shape = *x.shape[:2], self.config.num_kv_heads
            return jnp.zeros((*shape, 1)) if gate is None else gate[..., None]
        down, up = (params[f"gate_{name}_kernel"].astype(x.dtype) for name in ("down", "up"))
        low = jnp.tensordot(x, down, axes=1)
        logits = jnp.tensordot(low, up, axes=1, preferred_element_type=jnp.float32)
        bias = jnp.expand_dims(params["gate_bias"], (0, 1))
        return jax.nn.log_sigmoid(logits + bias) / TEMPERATURE

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call
    ) -> jax.Array | tuple[jax.Array, MatrixState]:
        """Returns the heads' outputs, and the matrices if the call has some."""
        return gated_linear_attention(
            query * self.config.head_dim**-0.5,
            key,
            value,
            call.log_decay,
            key_value_mask=call.mask,
            segment_ids=call.segment_ids,
            initial_state=call.memory,
            return_state=call.memory is not None,
        )
