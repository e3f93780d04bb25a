"""The gated delta net, whose state replaces what it holds for a key by the new value.

    S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ,   out_t = S_tᵀ q_t
    a_t = exp(-exp(A) softplus(x_t W_a + c)),   b_t = sigmoid(x_t W_b)

Queries and keys have length 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from race_jax.core.gated_delta import gated_delta_attention
from race_jax.core.matrix_state import MatrixState
from race_jax.layers import gates
from race_jax.layers.self_attention import (
    AttentionConfig,
    Call,
    SelfAttention,
    unit_vectors,
)

LARGEST_RATE = 16.0  # exp(A) starts between 0 and it
STEPS = (1e-3, 1e-1)  # softplus(c) starts between them, evenly in its logarithm
EPSILON = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatedDeltaConfig(AttentionConfig):
    """Options of the gated delta net, and the sizes of a layer.

    Attributes:
        forget_gate: "softplus" is a value per token and head, as in the source. None, "fixed",
            "learned" and "data" are as in other attentions. None is the delta net without a gate.
    """

    NAME: ClassVar[str] = "gated_delta"
    ONLY_CAUSAL: ClassVar[bool] = True
    FORGET_GATES: ClassVar[tuple[str | None, ...]] = ("softplus", *gates.FORGET_GATES)

    short_conv: str | None = "qkv"
    qkv_activation: str | None = "silu"
    forget_gate: str | None = "softplus"
    output_norm: str | None = "rms"
    output_gate: str | None = "silu"

    @property
    def key_width(self) -> int:
        """The number of rows of a head's matrix."""
        return self.head_dim

    def own_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters besides the projections."""
        shape = self.in_features, self.num_kv_heads
        dense = jax.nn.initializers.lecun_normal()
        parameters = super().own_parameters()
        parameters["rate_kernel"] = lambda key: dense(key, shape)
        if self.forget_gate == "softplus":
            parameters |= {
                "gate_kernel": lambda key: dense(key, shape),
                "gate_bias": lambda key: _initial_bias(key, shape[1]),
                "gate_log_rate": lambda key: jnp.log(
                    jax.random.uniform(key, shape[1:], minval=EPSILON, maxval=LARGEST_RATE)
                ),
            }
        return parameters


class GatedDeltaAttention(SelfAttention):
    """Causal self-attention by the gated delta rule.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Yang et al. 2024 (arXiv 2412.06464), sections 3.1 and 3.4. Keys are as wide as values
    here.
    """

    config_class = GatedDeltaConfig

    def init_memory(self, batch: int) -> MatrixState:
        """Returns the matrices before any token."""
        config = self.config
        return MatrixState.init(batch, config.num_kv_heads, config.key_width, config.value_dim)

    def log_decay(self, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array | None:
        """Returns the gate (B, T, K), or None without a gate."""
        if self.config.forget_gate != "softplus":
            return super().log_decay(x, params)
        bias, log_rate = (
            jnp.expand_dims(params[name], (0, 1)) for name in ("gate_bias", "gate_log_rate")
        )
        return -jnp.exp(log_rate) * jax.nn.softplus(_logits(x, params["gate_kernel"]) + bias)

    def vectors(self, query: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the vectors of length 1 that read the matrices, and those that write them."""
        return unit_vectors(query), unit_vectors(key)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call
    ) -> jax.Array | tuple[jax.Array, MatrixState]:
        """Returns the heads' outputs, and the matrices if the call has some."""
        return gated_delta_attention(
            *self.vectors(query, key),
            value,
            jax.nn.sigmoid(_logits(call.x, self.rate_kernel[...])),
            call.log_decay,
            key_value_mask=call.mask,
            segment_ids=call.segment_ids,
            initial_state=call.memory,
            return_state=call.memory is not None,
        )


def _initial_bias(key: jax.Array, heads: int) -> jax.Array:
    """Returns biases c (K,) whose softplus lies between `STEPS`."""
    low, high = map(math.log, STEPS)
    step = jnp.exp(jax.random.uniform(key, (heads,), minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))


def _logits(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.tensordot(x, kernel.astype(x.dtype), axes=1, preferred_element_type=jnp.float32)
