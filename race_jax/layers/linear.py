"""Linear attention with the feature map elu(x) + 1.

The layer maps hidden states (B, T, D), with masks as vectors, to hidden states (B, T, D). A state
continues a sequence. With phi(x) = elu(x) + 1, the weights are

    w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core import linear, masking
from race_jax.core.state import RACEState
from race_jax.layers import gates

default_kernel_init = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Options of linear attention, and the sizes of a layer.

    Attributes:
        num_heads: the number of query heads N.
        in_features: the width D of the input and the output.
        num_kv_heads: the number of key/value heads K, which must divide N.
        head_dim: the width H of a head.
        dtype: the dtype of the computation. Parameters and sums are float32.
        implementation: None or "xla".
        forget_gate: how old tokens decay. None is not at all, "fixed" and "learned" are one
            constant per head, and "data" is a value per token and head. A gate needs a causal
            model.
        half_life: the longest initial half-life in tokens, at least 2. A "fixed" gate needs it. For
            other gates, None means initial logits from 1 to 6.

    Raises:
        ValueError: if a value is not allowed, or two values exclude each other.
    """

    POSITIONS: ClassVar[tuple[str, ...]] = ()
    LAYER_ONLY: ClassVar[tuple[str, ...]] = ()
    MODEL_DEFAULTS: ClassVar[dict[str, Any]] = {}

    num_heads: int
    in_features: int
    num_kv_heads: int
    head_dim: int
    dtype: Any = None
    implementation: str | None = None
    forget_gate: str | None = None
    half_life: float | None = None

    def __post_init__(self) -> None:
        gates.check_gate(self.forget_gate, self.half_life)
        if self.implementation not in (None, "xla"):
            raise ValueError(
                f"implementation={self.implementation!r} is unknown; linear attention takes None "
                "or 'xla'."
            )

    def describe(
        self, batch: int, length: int, is_packed: bool, is_causal: bool = True
    ) -> tuple[str, str]:
        """Returns the name of the method, and which implementation runs."""
        del batch, length, is_packed, is_causal
        return "linear", "implementation xla"


class LinearAttention(nnx.Module):
    r"""Self-attention by the features :math:`\phi(x) = elu(x) + 1` of queries and keys.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.

    Source: Katharopoulos et al. 2020, section 3.2. The gate goes beyond it.
    """

    config_class = LinearConfig

    def __init__(
        self,
        config: LinearConfig,
        *,
        kernel_init: nnx.Initializer = default_kernel_init,
        out_kernel_init: nnx.Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        width, heads = config.in_features, (config.num_heads, config.head_dim)
        kv_heads = config.num_kv_heads, config.head_dim
        dense = functools.partial(
            nnx.LinearGeneral, dtype=config.dtype, kernel_init=kernel_init, rngs=rngs
        )
        self.query, self.key, self.value = (
            dense(width, shape) for shape in (heads, kv_heads, kv_heads)
        )
        self.out = dense(heads, width, axis=(-2, -1), kernel_init=out_kernel_init or kernel_init)
        if config.forget_gate in ("learned", "data"):
            bias = gates.initial_bias(config.num_kv_heads, config.half_life)
            self.gate_bias = nnx.Param(jnp.asarray(bias, jnp.float32))
        if config.forget_gate == "data":
            kernel = nnx.initializers.lecun_normal()(rngs.params(), (width, config.num_kv_heads))
            self.gate_kernel = nnx.Param(kernel)
        self.config = config

    @classmethod
    def from_config(
        cls, config: LinearConfig, *, is_causal: bool, **options: Any
    ) -> LinearAttention:
        """Makes the layer that a record describes. A gate needs a causal layer."""
        gates.check_direction(config.forget_gate, is_causal)
        return cls(config, **options)

    def init_state(self, batch: int) -> RACEState:
        """Returns the state before any token, whose size does not depend on the length."""
        width = self.config.head_dim
        return RACEState.init(batch, self.config.num_kv_heads, width, width, jnp.float32)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        is_causal: bool = False,
        state: RACEState | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> jax.Array | tuple[jax.Array, RACEState]:
        """Maps x (B, T, D) to (B, T, D), or to that and the next state if a state is given."""
        del positions, deterministic, rngs
        x = masking.select_tokens(x, mask)
        names = [name for name in ("gate_bias", "gate_kernel") if hasattr(self, name)]
        attended = linear.linear_attention(
            nnx.elu(self.query(x)) + 1,
            nnx.elu(self.key(x)) + 1,
            self.value(x),
            is_causal=is_causal,
            log_decay=gates.log_decay(
                x,
                {name: getattr(self, name)[...] for name in names},
                forget_gate=self.config.forget_gate,
                half_life=self.config.half_life,
                num_kv_heads=self.config.num_kv_heads,
            ),
            key_value_mask=mask,
            segment_ids=segment_ids,
            initial_state=state,
            return_state=state is not None,
        )
        if state is None:
            return self.out(attended)
        return self.out(attended[0]), attended[1]
