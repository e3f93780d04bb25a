"""Checks of the arguments of ``race_attention``, made before any work is done.

Each check returns nothing, or raises an error that shows the value given and how to correct it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import hashing, masking
from race_jax.core.hashing import check_floating
from race_jax.core.shapes import Size
from race_jax.core.state import RACEState, check_normalization

Shaped = jax.Array | jax.ShapeDtypeStruct


def check_inputs(
    query: jax.Array, key: jax.Array, value: jax.Array, planes: jax.Array, options: Any
) -> None:
    """Checks queries, keys, values, planes and the ``attention.Options`` of a call."""
    check_floating(query=query, key=key, value=value, planes=planes)
    _check_rank("query", query, "(B, T, N, H)")
    _check_rank("key", key, "(B, S, K, H)")
    _check_rank("value", value, "(B, S, K, V)")
    if planes.ndim not in (3, 4):
        raise ValueError(f"planes must be (L, P, H) or (K, L, P, H), got shape {planes.shape}")
    if not query.shape[3] == key.shape[3] == planes.shape[-1]:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and planes {planes.shape} must share their last "
            "axis, the head dim H"
        )
    if planes.ndim == 4 and planes.shape[0] != key.shape[2]:
        raise ValueError(
            f"planes {planes.shape} are for {planes.shape[0]} key/value heads, but key {key.shape} "
            f"has {key.shape[2]}; pass (L, P, H) planes, or one set per key/value head"
        )
    _check_heads(query, key, value)
    _check_tables(planes.shape[-3:-1])
    _check_options(query, key, value.shape[3], planes.shape[-3:-1], options)


def check_projections(
    z_q: Shaped,
    z_k: Shaped,
    value: jax.Array,
    options: Any,
) -> None:
    """Checks hash projections, values and the ``attention.Options`` of a call."""
    check_floating(query_projections=z_q, key_projections=z_k, value=value)
    _check_rank("query_projections", z_q, "(B, T, N, L, P)")
    _check_rank("key_projections", z_k, "(B, S, K, L, P)")
    _check_rank("value", value, "(B, S, K, V)")
    if z_q.shape[3:] != z_k.shape[3:]:
        raise ValueError(
            f"query_projections {z_q.shape} and key_projections {z_k.shape} must share tables and "
            "planes, their last two axes (L, P)"
        )
    _check_tables(z_q.shape[3:])
    _check_heads(z_q, z_k, value)
    _check_options(z_q, z_k, value.shape[3], z_q.shape[3:], options)


def _check_rank(name: str, array: Shaped, letters: str) -> None:
    axes = letters.count(",") + 1
    if array.ndim != axes:
        raise ValueError(f"{name} must have {axes} axes {letters}, got shape {array.shape}")


def _check_tables(sizes: tuple[Size, Size]) -> None:
    if min(sizes) < 1 or sizes[1] > hashing.MAX_PLANES:
        raise ValueError(
            f"tables and planes (L, P) = {sizes}: L must be at least 1 and P in "
            f"1..{hashing.MAX_PLANES}; use more tables instead of more planes"
        )


def _check_heads(query: Shaped, key: Shaped, value: jax.Array) -> None:
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if key.shape[:3] != value.shape[:3]:
        raise ValueError(f"key and value must agree in (B, S, K); got {shapes}")
    if query.shape[0] != key.shape[0]:
        raise ValueError(f"query and key must agree in the batch; got {shapes}")
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"query heads must be a multiple of key/value heads, got {heads} and {kv_heads}; "
            f"{shapes}"
        )


def _check_options(
    query: Shaped, key: Shaped, value_dim: Size, tables: tuple[Size, Size], options: Any
) -> None:
    batch, length, kv_heads = key.shape[:3]
    _check_modes(
        is_causal=options.is_causal,
        lengths=(query.shape[1], length),
        gated=options.log_decay is not None,
        packed=options.segment_ids is not None,
        stateful=options.return_state or options.initial_state is not None,
    )
    check_normalization(options.normalization)
    if options.axis_name is not None and (reason := whole_sequence_only(options)):
        raise NotImplementedError(
            f"{reason} needs the whole sequence on every device; leave axis_name out, and gather "
            "the sequence with jax.lax.all_gather"
        )
    masking.check_array("sharpness", options.sharpness)
    _check_sharpness(jnp.asarray(options.sharpness), query.shape[2], kv_heads)
    if options.initial_state is not None:
        features = tables[0] * 2 ** tables[1]
        _check_state(options.initial_state, batch, kv_heads, features, value_dim)
    mask = options.key_value_mask
    masking.check_key_value_mask(mask, (batch, length))
    masking.check_segment_ids(options.segment_ids, (batch, query.shape[1]), mask)
    masking.check_log_decay(options.log_decay, (batch, length, kv_heads), mask)


def whole_sequence_only(options: Any) -> str | None:
    """Returns what keeps the sequence of a call from being split over devices, or None."""
    if options.normalization != "global":
        return f"normalization={options.normalization!r}"
    if options.segment_ids is not None and not options.is_causal:
        return "segment_ids with is_causal=False"
    return None


def _check_modes(
    *,
    is_causal: bool,
    lengths: tuple[int, int],
    gated: bool,
    packed: bool,
    stateful: bool,
) -> None:
    """Checks for arguments that exclude each other."""
    if gated and not is_causal:
        raise ValueError(
            "log_decay needs is_causal=True, because a forgetting gate has a direction in time; "
            "leave log_decay out for bidirectional attention"
        )
    for name, used in (("is_causal", is_causal), ("segment_ids", packed)):
        if used and lengths[0] != lengths[1]:
            raise ValueError(
                f"{name} needs as many queries as keys, got T = {lengths[0]} and S = {lengths[1]}; "
                "to attend to earlier tokens, pass their state as initial_state"
            )
    if packed and stateful and not is_causal:
        raise ValueError(
            "segment_ids with initial_state or return_state needs is_causal=True, because the sums "
            "of a bidirectional call would mix segments"
        )


def _check_sharpness(sharpness: jax.Array, heads: int, kv_heads: int) -> None:
    """Checks that sharpness is a positive scalar, or one positive number per key/value head."""
    if sharpness.shape not in ((), (kv_heads,)):
        hint = ""
        if sharpness.shape == (heads,):
            hint = (
                "; one value per query head is not possible, because the query heads that share "
                "a key also share its hash"
            )
        raise ValueError(
            f"sharpness must be a scalar or of shape (K,) = ({kv_heads},), got shape "
            f"{sharpness.shape}{hint}"
        )
    if not (jnp.issubdtype(sharpness.dtype, jnp.number)):
        raise TypeError(f"sharpness must be a number, got {sharpness.dtype}")
    values = masking.concrete(sharpness)
    if values is not None and not (values > 0).all():
        raise ValueError(f"sharpness must be > 0, got {values.min()}; train its logarithm instead")


def _check_state(
    state: RACEState, batch: Size, kv_heads: Size, features: Size, value_dim: Size
) -> None:
    """Checks that a state has the shapes of this call."""
    if not isinstance(state, RACEState):
        raise TypeError(f"initial_state must be a race_jax.RACEState, got {type(state).__name__}")
    wanted = (batch, kv_heads, features, value_dim)
    if state.numerator.shape != wanted or state.mass.shape != wanted[:3]:
        raise ValueError(
            f"initial_state has numerator {state.numerator.shape} and mass {state.mass.shape}, but "
            f"this call needs (B, K, F, V) = {wanted} and (B, K, F) = {wanted[:3]}; make one with "
            f"RACEState.init{wanted}"
        )
    if state.log_decay.shape != wanted[:2] or state.segment.shape != wanted[:1]:
        raise ValueError(
            f"initial_state has log_decay {state.log_decay.shape} and segment "
            f"{state.segment.shape}, but this call needs (B, K) = {wanted[:2]} and (B,) = "
            f"{wanted[:1]}; make one with RACEState.init{wanted}"
        )
    if not jnp.issubdtype(state.segment.dtype, jnp.integer):
        raise TypeError(f"the segment of initial_state must be integers, got {state.segment.dtype}")
