"""The frame of a self-attention layer: projections, the shared parts, and the state.

A layer maps hidden states (B, T, D), with masks as vectors, to hidden states (B, T, D). A method
adds ``attend``, which maps queries, keys and values to the heads' outputs:

    q, k, v = x A_q, x A_k, x A_v
    out = attend(q, k, v) A_out
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core import masking
from race_jax.core.state import EMPTY
from race_jax.layers import gates, parts

default_kernel_init = nnx.initializers.lecun_normal()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig(parts.Parts):
    """Sizes of a layer, and the options that every attention has.

    Attributes:
        num_heads: the number of query heads N.
        in_features: the width D of the input and the output.
        num_kv_heads: the number of key/value heads K, which must divide N.
        head_dim: the width H of a head.
        dtype: the dtype of the computation. Parameters and sums are float32.
        implementation: None or "xla".

    Raises:
        ValueError: if a value is not allowed, or two values exclude each other.
    """

    NAME: ClassVar[str]
    ONLY_CAUSAL: ClassVar[bool] = False
    IMPLEMENTATIONS: ClassVar[tuple[str | None, ...]] = (None, "xla")
    POSITIONS: ClassVar[tuple[str, ...]] = ()
    LAYER_ONLY: ClassVar[tuple[str, ...]] = ()
    MODEL_DEFAULTS: ClassVar[dict[str, Any]] = {}

    num_heads: int
    in_features: int
    num_kv_heads: int
    head_dim: int
    dtype: Any = None
    implementation: str | None = None

    param_dtype: ClassVar[Any] = jnp.float32
    precision: ClassVar[Any] = None

    @property
    def in_kv_features(self) -> int:
        """The width of the input of keys and values."""
        return self.in_features

    @property
    def value_dim(self) -> int:
        """The width of a value."""
        return self.head_dim

    def __post_init__(self) -> None:
        self.check_parts()
        if self.implementation not in self.IMPLEMENTATIONS:
            raise ValueError(
                f"implementation={self.implementation!r} is unknown; {self.NAME} attention takes "
                f"one of {self.IMPLEMENTATIONS}."
            )

    def check_direction(self, is_causal: bool) -> None:
        """Raises ValueError if the method or its gate does not go with the direction."""
        if self.ONLY_CAUSAL and not is_causal:
            raise ValueError(
                f"{self.NAME} attention reads tokens in their order and needs a causal model; use "
                "another attention for an encoder, such as 'linear'."
            )
        gates.check_direction(self.forget_gate, is_causal)

    def own_parameters(self) -> dict[str, Any]:
        """Returns the initializers of the parameters besides the projections."""
        return self.part_parameters()

    def describe(
        self, batch: int, length: int, is_packed: bool, is_causal: bool = True
    ) -> tuple[str, str]:
        """Returns the name of the method, and which implementation runs."""
        del batch, length, is_packed, is_causal
        return self.NAME, f"implementation {self.implementation or 'xla'}"


class AttentionState(NamedTuple):
    """The state that a layer passes from one call to the next, of a size that never grows.

    Attributes:
      memory: what the method keeps of the tokens, with a field ``segment`` ``(B,)``.
      taps: the last tokens that the short convolutions have seen, as `parts.init_taps` returns
        them.
    """

    memory: Any
    taps: Any


class Call(NamedTuple):
    """The arguments of a call that a method may use besides queries, keys and values.

    Attributes:
      x: ``(B, T, D)``, the hidden states that the projections have read.
      log_decay: ``(B, T, K)``, the forget gate, or what the method makes of it, or None.
      memory: the memory of earlier tokens, or None.
      positions: ``(B, T)`` int32, or None.
      mask: ``(B, T)`` bool, True where there is a token, or None.
      segment_ids: ``(B, T)`` int, or None.
      is_causal: whether a token sees only itself and earlier tokens.
      rngs: random numbers of a training step, or None.
    """

    x: jax.Array
    log_decay: jax.Array | None
    memory: Any
    positions: jax.Array | None
    mask: jax.Array | None
    segment_ids: jax.Array | None
    is_causal: bool
    rngs: Any

    def masks(self) -> dict[str, Any]:
        """Returns the masks as the operations of `race_jax.core` take them."""
        return {
            "is_causal": self.is_causal,
            "key_value_mask": self.mask,
            "segment_ids": self.segment_ids,
        }


def unit_vectors(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """Divides vectors (..., H) by their lengths, in float32 or wider."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + epsilon)


class SelfAttention(nnx.Module):
    """Self-attention with projections, whose names and shapes are those of `RACEAttention`.

    A subclass sets ``config_class`` and adds ``attend``, and ``init_memory`` if it carries a state.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.
    """

    config_class: ClassVar[type[AttentionConfig]]

    def __init__(
        self,
        config: AttentionConfig,
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
        for name, init in config.own_parameters().items():
            setattr(self, name, nnx.Param(init(rngs.params())))
        self.config = config

    @classmethod
    def from_config(
        cls, config: AttentionConfig, *, is_causal: bool, **options: Any
    ) -> SelfAttention:
        """Makes the layer that a record describes, or raises ValueError for a wrong direction."""
        config.check_direction(is_causal)
        return cls(config, **options)

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call) -> Any:
        """Returns the heads' outputs (B, T, N, V), and the memory if the call has one."""
        raise NotImplementedError(f"{type(self).__name__} must define attend.")

    def init_memory(self, batch: int) -> Any:
        """Returns the memory before any token, or None if the method carries no state."""
        del batch

    def init_state(self, batch: int) -> AttentionState | None:
        """Returns the state before any token, or None if the method carries no state."""
        memory = self.init_memory(batch)
        return None if memory is None else self._state(memory, batch)

    def log_decay(self, x: jax.Array, params: dict[str, jax.Array]) -> jax.Array | None:
        """Returns the forget gate (B, T, K) of hidden states x, or None without a gate."""
        settings = self.config
        return gates.log_decay(
            x,
            params,
            forget_gate=settings.forget_gate,
            half_life=settings.half_life,
            num_kv_heads=settings.num_kv_heads,
        )

    def project(self, x: jax.Array, taps: Any, span: parts.Span) -> tuple[jax.Array, tuple, Any]:
        """Applies the projections, and the convolutions and the activation if there are any.

        Args:
            x: shape (B, T, D), hidden states.
            taps: the last tokens that the convolutions have seen, `parts.init_taps` at first.
            span: the tokens of the call.

        Returns:
            The hidden states that the projections have read, a tuple of queries (B, T, N, H), keys
            (B, T, K, H) and values (B, T, K, V), and the taps after the call.
        """
        settings, params = self.config, self.parameters()
        x, taps = parts.convolve_inputs(x, params, settings, taps, span)
        heads = self.query(x), self.key(x), self.value(x)
        heads, taps = parts.convolve_heads(heads, params, settings, taps, span)
        return x, heads, taps

    def parameters(self) -> dict[str, jax.Array]:
        """Returns the parameters besides the projections, by name."""
        return {name: getattr(self, name)[...] for name in self.config.own_parameters()}

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        is_causal: bool = False,
        state: AttentionState | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> jax.Array | tuple[jax.Array, AttentionState]:
        """Maps x (B, T, D) to (B, T, D), or to that and the next state if a state is given."""
        settings, params = self.config, self.parameters()
        settings.check_direction(is_causal)
        masking.check_key_value_mask(mask, x.shape[:2])
        x = masking.select_tokens(x, mask)
        fresh = jnp.full(x.shape[0], EMPTY, jnp.int32)
        batch = x.shape[0]
        memory, taps = self._state(None, batch) if state is None else self._checked(state, batch)
        segment = fresh if memory is None else memory.segment
        x, heads, taps = self.project(x, taps, parts.Span(segment, mask, segment_ids))
        call = Call(
            x=x,
            log_decay=self.log_decay(x, params),
            memory=memory,
            positions=positions,
            mask=mask,
            segment_ids=segment_ids,
            is_causal=is_causal,
            rngs=None if deterministic else rngs,
        )
        attended = self.attend(*heads, call)
        if state is None:
            return self.out(parts.finish(attended, x, params, settings))
        attended, memory = attended
        out = self.out(parts.finish(attended, x, params, settings))
        return out, AttentionState(memory, taps)

    def _state(self, memory: Any, batch: int) -> AttentionState:
        return AttentionState(memory, parts.init_taps(self.config, batch))

    def _checked(self, state: AttentionState, batch: int) -> AttentionState:
        """Returns a state that this layer can continue, or raises an error."""
        name = self.config.NAME
        wanted = jax.eval_shape(lambda: self.init_state(batch))
        if wanted is None:
            raise NotImplementedError(
                f"{name} attention carries no state of fixed size; pass the whole sequence instead."
            )
        if not isinstance(state, AttentionState):
            raise TypeError(
                f"state must be an AttentionState, from init_state or an earlier call of {name} "
                f"attention; got {type(state)}"
            )
        check_fits(state, wanted, f"this {name} layer", f"init_state({batch})")
        return state


def check_fits(state: AttentionState, wanted: AttentionState, layer: str, maker: str) -> None:
    """Raises an error unless a state has the arrays, and their shapes, that a layer needs.

    Args:
      state: the state that was given.
      wanted: what the layer makes, as ``jax.eval_shape`` returns it.
      layer: what the message calls the layer.
      maker: the call that makes a fitting state.

    Raises:
      TypeError: if the state is of another method, or of a layer with other parts.
      ValueError: if an array has a wrong shape.
    """
    way_out = f"pass the state of an earlier call of the layer, or {maker}."
    given, needed = jax.tree.structure(state), jax.tree.structure(wanted)
    if given != needed:
        raise TypeError(
            f"state belongs to another layer; it is {given}, and {layer} needs {needed}; {way_out}"
        )
    pairs = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(wanted), strict=True)
    for (path, leaf), array in pairs:
        if jnp.shape(leaf) != array.shape:
            raise ValueError(
                f"state{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}, and {layer} needs "
                f"{array.shape}; {way_out}"
            )
