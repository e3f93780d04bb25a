"""Linear attention with the feature map elu(x) + 1.

With phi(x) = elu(x) + 1, the weights of the means are

    w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core.linear import linear_attention
from race_jax.core.state import RACEState
from race_jax.layers.self_attention import AttentionConfig, Call, SelfAttention


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(AttentionConfig):
    """Options of linear attention, and the sizes of a layer."""

    NAME: ClassVar[str] = "linear"


class LinearAttention(SelfAttention):
    r"""Self-attention by the features :math:`\phi(x) = elu(x) + 1` of queries and keys.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Katharopoulos et al. 2020, section 3.2. The gate goes beyond it.
    """

    config_class = LinearConfig

    def init_memory(self, batch: int) -> RACEState:
        """Returns the sums before any token, whose size does not depend on the length."""
        width = self.config.head_dim
        return RACEState.init(batch, self.config.num_kv_heads, width, width, jnp.float32)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call
    ) -> jax.Array | tuple[jax.Array, RACEState]:
        """Returns the heads' outputs, and the sums if the call has some."""
        return linear_attention(
            nnx.elu(query) + 1,
            nnx.elu(key) + 1,
            value,
            log_decay=call.log_decay,
            initial_state=call.memory,
            return_state=call.memory is not None,
            **call.masks(),
        )
