"""Sigmoid attention, which weighs every pair of tokens by itself.

With n_t the number of keys that token t sees,

    out_t = sum_s sigmoid(q_t . k_s / sqrt(H) - log n_t) v_s
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from race_jax.core.pairs import pair_attention
from race_jax.layers import cached, positions
from race_jax.layers.positions import PairsConfig
from race_jax.layers.self_attention import Call
from race_jax.sparse.exact import Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidConfig(PairsConfig):
    """Options of sigmoid attention, and the sizes of a layer.

    Attributes:
        bias: the bias of all logits. If None, it is ``-log n`` for a token that sees n keys, so
            that equal logits give the mean of the values, whatever the length.

    Raises:
        ValueError: if a value is not allowed.
    """

    NAME: ClassVar[str] = "sigmoid"

    bias: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias is not None and not math.isfinite(self.bias):
            raise ValueError(f"bias must be finite, or None for -log n; got {self.bias}.")


class SigmoidAttention(cached.CachedAttention):
    """Self-attention whose weights are sigmoids and are not normalised.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Ramapuram et al. 2024 (arXiv 2409.04431), section 2. There n is the length of the
    sequence. In a causal or packed call, it is here the number of keys that a token sees, so that
    the output does not depend on what comes later or stands beside the document.
    """

    config_class = SigmoidConfig

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call) -> Any:
        """Returns the heads' outputs, and the cache if the call has one.

        The positions of the call are needed for RoPE and ALiBi.
        """
        settings = self.config

        def biased(logits: jax.Array, count: jax.Array) -> jax.Array:
            return logits + (-jnp.log(count) if settings.bias is None else settings.bias)

        if call.memory is not None:
            rule = Rule(lambda x, count: jax.nn.log_sigmoid(biased(x, count)), normalized=False)
            return cached.attend_and_keep(query, key, value, call, settings, rule)
        query, key, bias = positions.place(query, key, call.positions, settings)
        return pair_attention(
            query * settings.head_dim**-0.5,
            key,
            value,
            lambda x, count: jax.nn.sigmoid(biased(x, count)),
            normalized=False,
            bias=bias,
            log_decay=call.log_decay,
            **call.masks(),
        )
