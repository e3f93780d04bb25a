"""The RACE attention layer as a pure function of arrays, shared by the NNX and the Linen module.

Parameters have Flax's names. For every head, with x after a convolution before the projections,

    z_q = W (x A_q),  z_k = W (x A_k),  v = x A_v,  out = race(z_q, z_k, v, g(x)) A_out
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import checks, hashing, masking
from race_jax.core.attention import Options, attend
from race_jax.core.implementations import choose_plan
from race_jax.core.shapes import Axis
from race_jax.core.state import EMPTY, RACEState
from race_jax.layers import parts
from race_jax.layers.attention_fn import key_padding
from race_jax.layers.projections import hash_and_gate, projected
from race_jax.layers.race_config import RACEConfig


class LayerState(NamedTuple):
    """The state that a layer passes from one call to the next, of a size that never grows.

    The state is a value: nothing is written into the module. To go back to an earlier state, keep
    it and pass it again.

    Attributes:
      race: the table sums of the attention, a `race_jax.RACEState`.
      taps: the last three tokens of the current segment that the short convolution has seen,
        oldest first: hidden states ``(B, 3, D)``, a tuple of queries, keys and values
        ``(B, 3, heads, width)``, or None without a convolution.
    """

    race: RACEState
    taps: Any


def init_state(settings: RACEConfig, batch: int) -> LayerState:
    """Returns the state before any token, for `batch` sequences, in float32 or wider."""
    dtype = jnp.promote_types(settings.param_dtype, jnp.float32)
    race = RACEState.init(
        batch, settings.num_kv_heads, settings.features, settings.value_dim, dtype
    )
    return LayerState(race, parts.init_taps(settings, batch, dtype))


def race_layer(
    params: Mapping[str, Any],
    planes: jax.Array,
    inputs_q: jax.Array,
    inputs_k: jax.Array | None = None,
    inputs_v: jax.Array | None = None,
    *,
    settings: RACEConfig,
    mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    is_causal: bool = False,
    state: LayerState | None = None,
    dropout_key: jax.Array | None = None,
    kernel_dtype: Any = None,
    axis_name: Axis | None = None,
) -> jax.Array | tuple[jax.Array, LayerState]:
    """Applies the layer.

    Args:
      params: ``query``, ``key``, ``value`` with ``kernel`` ``(D, heads, H or V)`` and ``bias``;
        ``out`` with ``kernel`` ``(N, V, D)`` and ``bias``; and `RACEConfig.own_parameters`.
        Each of the four may also be a function of its input, such as a Flax module. Planes are not
        folded into such a function. ``query_ln`` and ``key_ln`` are functions of heads
        ``(..., H)``, needed if queries and keys are normalised.
      planes: ``(L, P, H)``.
      inputs_q: ``(B, T, D)``.
      inputs_k: ``(B, S, D)``, or None for self-attention. With `short_conv` it must be None or the
        very array `inputs_q`, and so must `inputs_v`.
      inputs_v: ``(B, S, D)``, or None to use `inputs_k`.
      settings: the static settings of the layer.
      mask: key padding, ``(B, S)`` or ``(B, 1, 1, S)``, True where there is a token.
      segment_ids: ``(B, T)`` int, packed documents.
      is_causal: whether a token sees only itself and earlier tokens.
      state: the state after earlier calls; it needs `is_causal`.
      dropout_key: the key for dropout of the output, or None for no dropout.
      kernel_dtype: the dtype of the projections' kernels if ``query`` is a function. If None,
        ``settings.param_dtype`` is assumed.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.

    Returns:
      The output ``(B, T, D)``, or the output and the state after the call if `state` is given.

    Raises:
      ValueError: if shapes do not fit, or two arguments exclude each other.
      TypeError: if the state is of another type.
    """
    check_static(is_causal=is_causal)
    is_self = inputs_k is None or inputs_k is inputs_q
    inputs = _complete_inputs(inputs_q, inputs_k, inputs_v)
    _check_call(inputs, settings, is_causal=is_causal, has_state=state is not None)
    batch, length = inputs[1].shape[:2]
    if state is not None:
        _check_state(state, settings, batch)
    if mask is not None:
        masking.check_array("mask", mask)
        mask = key_padding(mask[:, None, None] if mask.ndim == 2 else mask, (batch,), length)
    dtype = settings.dtype or _promoted(inputs, params, kernel_dtype or settings.param_dtype)
    with jax.named_scope("race_layer/inputs"):
        x_q, x_k, x_v = (x.astype(dtype) for x in inputs)
        x_k, x_v = masking.select_tokens(x_k, mask), masking.select_tokens(x_v, mask)
        if is_causal:
            x_q = x_k if is_self else masking.select_tokens(x_q, mask)
        segment = jnp.full(batch, EMPTY, jnp.int32) if state is None else state.race.segment
        span = parts.Span(segment, mask, segment_ids, axis_name)
        taps = parts.init_taps(settings, batch) if state is None else state.taps
        if settings.short_conv == "before":
            x_q, taps = parts.convolve_inputs(x_k, params, settings, taps, span)
            x_k = x_v = x_q
        value = projected(x_v, "value", params, settings)
        named = lambda sources: zip(sources, ("query", "key"), strict=True)  # noqa: E731
        sources = x_q, x_k  # of the hash: hidden states, or queries and keys if those are convolved
        if settings.changes_heads:
            heads = *(projected(x, name, params, settings) for x, name in named(sources)), value
            (*sources, value), taps = parts.convolve_heads(heads, params, settings, taps, span)

    options = Options(
        sharpness=settings.current_sharpness(params),
        use_tanh=settings.use_tanh,
        is_causal=is_causal,
        key_value_mask=mask,
        segment_ids=segment_ids,
        normalization=settings.normalization,
        initial_state=None if state is None else state.race,
        return_state=state is not None,
        axis_name=axis_name,
        implementation=settings.implementation,
    )
    shapes = _shapes(x_q, x_k, settings)
    checks.check_projections(*shapes, value, options)
    columns = choose_plan(shapes, value, options).columns
    planes, together = hashing.flat_planes(planes, columns), is_self and (is_causal or mask is None)
    *z, gate = hash_and_gate(x_k, sources, params, planes, settings, together=together)
    heads = attend(lambda columns: tuple(z), shapes, value, options._replace(log_decay=gate))
    if state is not None:
        heads, race = heads
    with jax.named_scope("race_layer/output"):
        heads = parts.finish(heads, x_q, params, settings)
        out = projected(heads, "out", params, settings)
        if dropout_key is not None and axis_name is not None:
            # Every stretch of the sequence has its own mask.
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index(axis_name))
        out = _dropout(out, settings.dropout_rate, dropout_key)
    return out if state is None else (out, LayerState(race, taps))


def check_static(**flags: Any) -> None:
    """Raises TypeError for a flag that a transform such as remat has turned into an array."""
    for name, flag in flags.items():
        if isinstance(flag, jax.Array):
            raise TypeError(
                f"{name} must be a Python bool, got {flag}. A transform such as remat turns the "
                f"arguments of a call into arrays; set it where the layer is made, "
                f"RACEAttention(..., {name}=True)"
            )


def _complete_inputs(
    inputs_q: jax.Array, inputs_k: jax.Array | None, inputs_v: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Applies Flax's defaults: keys default to the queries, and values to the keys."""
    if inputs_k is None:
        if inputs_v is not None:
            raise ValueError(
                "inputs_v without inputs_k is not possible; pass the keys' inputs as inputs_k"
            )
        inputs_k = inputs_q
    return inputs_q, inputs_k, inputs_k if inputs_v is None else inputs_v


def _check_call(
    inputs: tuple[jax.Array, jax.Array, jax.Array],
    settings: RACEConfig,
    *,
    is_causal: bool,
    has_state: bool,
) -> None:
    x_q, x_k, x_v = inputs
    widths = settings.in_features, settings.in_kv_features, settings.in_kv_features
    for name, x, width in zip(("inputs_q", "inputs_k", "inputs_v"), inputs, widths, strict=True):
        if x.ndim != 3 or x.shape[-1] != width:
            raise ValueError(
                f"{name} must be (batch, length, {width}), got shape {x.shape}; use jax.vmap for "
                "more batch axes"
            )
    if x_k.shape[:2] != x_v.shape[:2] or x_q.shape[0] != x_k.shape[0]:
        raise ValueError(
            "inputs must have one batch size, and keys and values one length; got shapes "
            f"{x_q.shape}, {x_k.shape} and {x_v.shape}"
        )
    if is_causal and x_q.shape[1] != x_k.shape[1]:
        raise ValueError(
            f"is_causal=True needs as many keys as queries, got {x_k.shape[1]} keys and "
            f"{x_q.shape[1]} queries; to continue a sequence, pass state="
        )
    if settings.forget_gate is not None and not is_causal:
        raise ValueError(
            f"forget_gate={settings.forget_gate!r} has a direction in time; pass is_causal=True, "
            "or build the layer with forget_gate=None"
        )
    if has_state and not is_causal:
        raise ValueError("a state summarises earlier tokens; pass is_causal=True with state=")
    if settings.short_conv and (x_k is not x_q or x_v is not x_q):
        raise ValueError(
            f"short_conv={settings.short_conv!r} runs along one sequence, and inputs_q, inputs_k "
            "and inputs_v are not one array. A transform such as jit makes three arrays of one "
            "that is passed to it three times; leave inputs_k and inputs_v out for "
            "self-attention, or build the layer with short_conv=None for cross-attention"
        )


def _promoted(
    inputs: tuple[jax.Array, ...], params: Mapping[str, Any], kernel_dtype: jax.typing.DTypeLike
) -> jnp.dtype:
    """Returns the dtype of inputs and kernels together; `kernel_dtype` if query is a function."""
    if isinstance(params["query"], Mapping):
        kernel_dtype = params["query"]["kernel"].dtype
    return jnp.result_type(*inputs, kernel_dtype)


def _check_state(state: LayerState, settings: RACEConfig, batch: int) -> None:
    if not isinstance(state, LayerState):
        raise TypeError(
            f"state must be a LayerState, from init_state or an earlier call; got {type(state)}"
        )
    sums = batch, settings.num_kv_heads, settings.features, settings.value_dim
    taps = jax.eval_shape(lambda: parts.init_taps(settings, batch))
    taps, given_taps = (jax.tree.map(jnp.shape, taps) for taps in (taps, state.taps))
    given = state.race.numerator.shape, given_taps
    if given != (sums, taps):
        raise ValueError(
            f"state must have race.numerator of shape {sums} and taps of shape {taps}, got "
            f"{given[0]} and {given[1]}; make a state with this layer's init_state, for batch "
            f"{batch}"
        )


def _shapes(x_q: jax.Array, x_k: jax.Array, settings: RACEConfig) -> tuple:
    """Returns the shapes and dtypes of the hash projections that `_hash` makes if not flat."""
    dtype = jnp.promote_types(x_q.dtype, jnp.float32)
    heads = settings.num_heads, settings.num_kv_heads
    tables = settings.num_tables, settings.num_planes
    return tuple(
        jax.ShapeDtypeStruct((*x.shape[:2], number, *tables), dtype)
        for x, number in zip((x_q, x_k), heads, strict=True)
    )


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0)
