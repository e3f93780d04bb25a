"""The parts that every attention can take: convolutions, a forget gate, output norm, output gate.

With short convolutions c and the attention's own map, for hidden states x,

    q, k, v = act(c_q(x A_q)), act(c_k(x A_k)), act(c_v(x A_v))
    out = (gate(x W_g) * norm(attention(q, k, v))) A_out

Each part can be left out. An attention declares them by extending `Parts`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.shapes import Axis
from race_jax.layers import gates
from race_jax.layers.short_conv import TAPS, identity_kernel, short_convolution

HEADS = ("query", "key", "value")
CHOICES = {
    "short_conv": (None, "before", "qkv"),
    "qkv_activation": (None, "silu"),
    "output_norm": (None, "rms"),
    "output_gate": (None, "silu", "sigmoid"),
}
FORMER = {"short_conv": "before", "output_gate": "silu"}  # what True meant


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """Options that every attention has.

    Attributes:
        short_conv: where a depthwise causal convolution over 4 tokens stands. None is nowhere,
            "before" is one before the projections, and "qkv" are three, one each on queries, keys
            and values after their projections. Each is the identity at first.
        qkv_activation: the function that queries, keys and values go through after their
            projections and convolutions, None or "silu".
        forget_gate: how old tokens decay. None is not at all, "fixed" and "learned" are one
            constant per head, and "data" is a value per token and head. A gate needs a causal
            model.
        half_life: the longest initial half-life in tokens, at least 2. A "fixed" gate needs it. For
            other gates, None means initial logits from 1 to 6.
        output_norm: None, or "rms" to divide each head's output by its root mean square. One
            trained scale is shared by the heads.
        output_gate: the function of ``x W_g`` that each head's output is multiplied by, None,
            "silu" or "sigmoid".
    """

    FORGET_GATES: ClassVar[tuple[str | None, ...]] = gates.FORGET_GATES

    short_conv: str | None = None
    qkv_activation: str | None = None
    forget_gate: str | None = None
    half_life: float | None = None
    output_norm: str | None = None
    output_gate: str | None = None

    def check_parts(self) -> None:
        """Raises ValueError for a value that is not allowed, or that has no effect."""
        gates.check_gate(self.forget_gate, self.half_life, self.FORGET_GATES)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                hint = f"; write {FORMER[name]!r}" if value is True and name in FORMER else ""
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}{hint}"
                )

    @property
    def changes_heads(self) -> bool:
        """Whether anything stands between the projections and the attention."""
        return self.short_conv == "qkv" or self.qkv_activation is not None

    def part_parameters(self) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """Returns the initializers of the parameters of the parts that are in use.

        They are ``gate_bias`` ``(K,)``, ``gate_kernel`` ``(D, K)``, ``conv_kernel`` ``(4, D)``,
        ``query_conv_kernel`` ``(4, N, H)`` and those of keys and values, ``out_gate_kernel``
        ``(D, N, V)`` and ``out_norm_scale`` ``(V,)``.
        """
        dtype, heads, width = self.param_dtype, self.num_kv_heads, self.in_features
        dense = jax.nn.initializers.lecun_normal()
        gate_shape = width, self.num_heads * self.value_dim
        parameters = {
            "gate_bias": lambda key: jnp.asarray(gates.initial_bias(heads, self.half_life), dtype),
            "gate_kernel": lambda key: dense(key, (self.in_kv_features, heads), dtype),
            "conv_kernel": lambda key: identity_kernel((width,), dtype),
            "out_gate_kernel": lambda key: dense(key, gate_shape, dtype).reshape(
                width, self.num_heads, self.value_dim
            ),
            "out_norm_scale": lambda key: jnp.ones((self.value_dim,), dtype),
        }
        wanted = {
            "gate_bias": self.forget_gate in ("learned", "data"),
            "gate_kernel": self.forget_gate == "data",
            "conv_kernel": self.short_conv == "before",
            "out_gate_kernel": self.output_gate is not None,
            "out_norm_scale": self.output_norm is not None,
        }
        found = {name: init for name, init in parameters.items() if wanted[name]}
        if self.short_conv == "qkv":
            for name, shape in _head_shapes(self).items():
                found[f"{name}_conv_kernel"] = lambda key, s=shape: identity_kernel(s, dtype)
        return found


class Span(NamedTuple):
    """What a convolution needs to know of the tokens of a call.

    Attributes:
      segment: ``(B,)`` int32, the segment of the last token before the call.
      mask: ``(B, T)`` bool, True where there is a token, or None.
      segment_ids: ``(B, T)`` int, or None.
      axis_name: the mesh axis over whose devices the sequence is split, or None.
    """

    segment: jax.Array
    mask: jax.Array | None
    segment_ids: jax.Array | None
    axis_name: Axis | None = None


def init_taps(settings: Any, batch: int, dtype: jax.typing.DTypeLike = jnp.float32) -> Any:
    """Returns the last tokens that the convolutions have seen, before any token.

    Returns:
      Zeros ``(B, 3, D)`` for one convolution before the projections, a tuple of zeros
      ``(B, 3, heads, width)`` for those on queries, keys and values, or None for no convolution.
    """
    if settings.short_conv == "before":
        return jnp.zeros((batch, TAPS, settings.in_features), dtype)
    if settings.short_conv == "qkv":
        shapes = _head_shapes(settings).values()
        return tuple(jnp.zeros((batch, TAPS, *shape), dtype) for shape in shapes)
    return None


def convolve_inputs(
    x: jax.Array, params: Mapping[str, jax.Array], settings: Any, taps: Any, span: Span
) -> tuple[jax.Array, Any]:
    """Applies the convolution before the projections, if there is one.

    Args:
      x: ``(B, T, D)``, hidden states.
      params: ``conv_kernel`` ``(4, D)``.
      settings: a record with the fields of `Parts`.
      taps: the taps before the call.
      span: the tokens of the call.

    Returns:
      The hidden states, and the taps after the call.
    """
    if settings.short_conv != "before":
        return x, taps
    return _convolve(x, params["conv_kernel"], taps, span)


def convolve_heads(
    heads: tuple[jax.Array, jax.Array, jax.Array],
    params: Mapping[str, jax.Array],
    settings: Any,
    taps: Any,
    span: Span,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:
    """Applies the convolutions after the projections and the activation, if there are any.

    Args:
      heads: queries ``(B, T, N, H)``, keys ``(B, T, K, H)`` and values ``(B, T, K, V)``.
      params: ``query_conv_kernel`` ``(4, N, H)``, and those of keys and values.
      settings: a record with the fields of `Parts`.
      taps: the taps before the call.
      span: the tokens of the call.

    Returns:
      Queries, keys and values, and the taps after the call.
    """
    if settings.short_conv == "qkv":
        kernels = [params[f"{name}_conv_kernel"] for name in HEADS]
        pairs = map(_convolve, heads, kernels, taps, [span] * len(HEADS))
        heads, taps = zip(*pairs, strict=True)
    if settings.qkv_activation == "silu":
        heads = tuple(map(jax.nn.silu, heads))
    return heads, taps


def finish(
    heads: jax.Array, x: jax.Array, params: Mapping[str, jax.Array], settings: Any
) -> jax.Array:
    """Applies the output norm and then the output gate, as far as there are any.

    Args:
      heads: ``(B, T, N, V)``, the output of the attention.
      x: ``(B, T, D)``, hidden states of the queries.
      params: ``out_norm_scale`` ``(V,)`` and ``out_gate_kernel`` ``(D, N, V)``.
      settings: a record with the fields of `Parts`.

    Returns:
      ``(B, T, N, V)`` in the dtype of `heads`.
    """
    out = heads
    if settings.output_norm is not None:
        out = gates.rms_norm(out, params["out_norm_scale"])
    if settings.output_gate is not None:
        kernel = params["out_gate_kernel"]
        out = gates.output_gate(out, x, kernel, settings.output_gate, settings.precision)
    return out.astype(heads.dtype)


def _head_shapes(settings: Any) -> dict[str, tuple[int, int]]:
    kv_heads = settings.num_kv_heads
    return {
        "query": (settings.num_heads, settings.head_dim),
        "key": (kv_heads, settings.head_dim),
        "value": (kv_heads, settings.value_dim),
    }


def _convolve(
    x: jax.Array, kernel: jax.Array, taps: jax.Array, span: Span
) -> tuple[jax.Array, jax.Array]:
    masking.check_segment_ids(span.segment_ids, x.shape[:2], span.mask)
    return short_convolution(x, kernel, taps=taps, **span._asdict())
