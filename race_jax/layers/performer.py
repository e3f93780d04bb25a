"""Performer attention, which approximates softmax attention by random features.

With the positive features phi of `race_jax.core.favor`,

    out_t = sum_s w_ts v_s / sum_s w_ts
    w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s),   E[w_ts] ~ exp(q_t . k_s / sqrt(H))
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core import favor
from race_jax.core.linear import linear_attention
from race_jax.core.state import RACEState
from race_jax.layers.planes import planes_stream
from race_jax.layers.self_attention import AttentionConfig, Call, SelfAttention


class RandomDirections(nnx.Variable):
    """The directions of random features, which are saved with a model but not trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformerConfig(AttentionConfig):
    """Options of Performer attention, and the sizes of a layer.

    Attributes:
        num_features: the number of random features M.
        redraw: whether every training step draws new directions for the features. Evaluation, and
            calls with a state, use those of the layer.

    Raises:
        ValueError: if a value is not allowed.
    """

    NAME: ClassVar[str] = "performer"

    num_features: int = 256
    redraw: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features < 1:
            raise ValueError(f"num_features must be at least 1, got {self.num_features}.")


class PerformerAttention(SelfAttention):
    """Self-attention by positive orthogonal random features of queries and keys.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed. The directions are drawn from "planes" if there is
            such a stream or a default one.

    Source: Choromanski et al. 2021 (arXiv 2009.14794), sections 2.3 and 2.4. The forget gate goes
    beyond it.
    """

    config_class = PerformerConfig

    def __init__(self, config: PerformerConfig, *, rngs: nnx.Rngs, **initializers: Any):
        super().__init__(config, rngs=rngs, **initializers)
        key = planes_stream(rngs)()
        self.directions = RandomDirections(
            favor.draw_directions(key, config.num_features, config.head_dim)
        )

    @property
    def needs_rngs(self) -> bool:
        """Whether a training step needs random numbers."""
        return self.config.redraw

    def init_memory(self, batch: int) -> RACEState:
        """Returns the sums before any token, whose size does not depend on the length."""
        sizes = self.config.num_kv_heads, self.config.num_features, self.config.head_dim
        return RACEState.init(batch, *sizes, jnp.float32)

    def attend(
        self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call
    ) -> jax.Array | tuple[jax.Array, RACEState]:
        """Returns the heads' outputs, and the sums if the call has some."""
        directions = self._directions(call)
        return linear_attention(
            favor.query_features(query, directions),
            favor.key_features(key, directions),
            value,
            log_decay=call.log_decay,
            initial_state=call.memory,
            return_state=call.memory is not None,
            **call.masks(),
        )

    def _directions(self, call: Call) -> jax.Array:
        """Returns new directions in a training step, if so configured, and else the layer's."""
        if not self.config.redraw or call.rngs is None or call.memory is not None:
            return self.directions[...]
        rngs = call.rngs.planes if isinstance(call.rngs, nnx.Rngs) else call.rngs
        key = rngs() if callable(rngs) else rngs
        return favor.draw_directions(key, self.config.num_features, self.config.head_dim)
