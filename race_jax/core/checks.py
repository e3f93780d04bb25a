"""Checks of the arguments of ``race_attention``, made before any work is done.

Each check returns nothing, or raises an error that shows the value given and how to correct it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from race_jax.core import hashing, masking
from race_jax.core.hashing import check_floating
from race_jax.core.state import RACEState


def check_inputs(query: jax.Array, key: jax.Array, value: jax.Array, planes: jax.Array) -> None:
    """Checks the ranks, dtypes and head dims of queries, keys, values and planes."""
    check_floating(query=query, key=key, value=value, planes=planes)
    named = {"query": (query, "(B, T, N, H)"), "key": (key, "(B, S, K, H)")}
    named["value"] = (value, "(B, S, K, V)")
    for name, (array, letters) in named.items():
        if array.ndim != 4:
            raise ValueError(f"{name} must have 4 axes {letters}, got shape {array.shape}")
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


def check_projections(z_q: jax.Array, z_k: jax.Array, value: jax.Array) -> None:
    """Checks the ranks, dtypes and table sizes of hash projections and values."""
    check_floating(query_projections=z_q, key_projections=z_k, value=value)
    named = {"query_projections": (z_q, "(B, T, N, L, P)")}
    named["key_projections"] = (z_k, "(B, S, K, L, P)")
    for name, (array, letters) in named.items():
        if array.ndim != 5:
            raise ValueError(f"{name} must have 5 axes {letters}, got shape {array.shape}")
    if value.ndim != 4:
        raise ValueError(f"value must have 4 axes (B, S, K, V), got shape {value.shape}")
    if z_q.shape[3:] != z_k.shape[3:]:
        raise ValueError(
            f"query_projections {z_q.shape} and key_projections {z_k.shape} must share tables and "
            "planes, their last two axes (L, P)"
        )
    if min(z_q.shape[3:]) < 1 or z_q.shape[4] > hashing.MAX_PLANES:
        raise ValueError(
            f"tables and planes (L, P) = {z_q.shape[3:]}: L must be at least 1 and P in "
            f"1..{hashing.MAX_PLANES}; use more tables instead of more planes"
        )
    _check_heads(z_q, z_k, value)


def _check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
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


def check_modes(
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


def check_sharpness(sharpness: jax.Array, heads: int, kv_heads: int) -> None:
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


def check_state(state: RACEState, batch: int, kv_heads: int, features: int, value_dim: int) -> None:
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
