"""The state of attention without a normalizer: one matrix a head, read chunk by chunk.

With the decay a_t of a token, what it adds u_t, and what the state keeps of the past,

    S_t = a_t S_{t-1} + k_t u_tᵀ,   out_t = S_tᵀ q_t

`gated_linear` and `gated_delta` are two forms of it, which differ in a_t and u_t.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import chunks, masking, shards
from race_jax.core.chunks import CHUNK
from race_jax.core.shapes import check_heads
from race_jax.core.state import EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MatrixState:
    """The matrices of a layer after some tokens.

    Attributes:
      matrix: ``(B, K, H, V)``, float32 or wider.
      segment: ``(B,)`` int32, the segment of the last token, or -1 before the first token.

    Example:
      >>> from race_jax.core.matrix_state import MatrixState
      >>> MatrixState.init(batch=1, kv_heads=2, head_dim=8, value_dim=4).matrix.shape
      (1, 2, 8, 4)
    """

    matrix: jax.Array
    segment: jax.Array

    @classmethod
    def init(
        cls,
        batch: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> MatrixState:
        """Returns the state before any token."""
        matrix = jnp.zeros((batch, kv_heads, head_dim, value_dim), dtype)
        return cls(matrix, jnp.full((batch,), EMPTY, jnp.int32))


STATE_AXES = MatrixState(shards.TABLES, shards.ROWS)
Step = Callable[[MatrixState, dict[str, Any]], tuple[jax.Array, jax.Array]]


def run_chunks(
    step: Step,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    others: dict[str, jax.Array],
    *,
    key_value_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    initial_state: MatrixState | None,
    return_state: bool,
) -> jax.Array | tuple[jax.Array, MatrixState]:
    """Runs a step over the chunks of a sequence.

    Args:
      step: a function of a state and of the arrays of one chunk. It returns the rows
        ``(B, K, G, C, V)`` that the chunk's queries read, and the matrix after the chunk. The
        arrays have heads first, ``(B, K, C, ...)``, and queries ``(B, K, G, C, H)``. Padded slots
        hold zeros. ``visible`` ``(B, 1, C, C)`` says which tokens s a token t sees, and
        ``entering`` ``(B, 1, C)`` whether it sees the state. The matrix after the chunk is made of
        what the last token sees.
      query: ``(B, T, N, H)``. Query head n reads key/value head ``n // (N // K)``.
      key: ``(B, T, K, H)``.
      value: ``(B, T, K, V)``. The output has its dtype.
      others: more arrays ``(B, T, K, ...)`` for the step, by name.
      key_value_mask: ``(B, T)`` bool, True where there is a token, or None.
      segment_ids: ``(B, T)`` int >= 0, in contiguous runs, or None.
      initial_state: the state of earlier tokens, which this call continues, or None.
      return_state: whether to return the state after the last token as well.

    Returns:
      The output ``(B, T, N, V)``, or the output and the state.

    Raises:
      ValueError: if shapes do not fit.
    """
    check_heads(query, key, value)
    for name, x in others.items():
        if x.shape[:3] != key.shape[:3]:
            raise ValueError(f"{name} must start with (B, T, K) = {key.shape[:3]}, got {x.shape}")
    batch, length, kv_heads, value_dim = value.shape
    masking.check_key_value_mask(key_value_mask, (batch, length))
    masking.check_segment_ids(segment_ids, (batch, length), key_value_mask)
    tokens = {"query": query, "key": key, "value": value, **others}
    dtype = jnp.promote_types(jnp.result_type(*tokens.values()), jnp.float32)
    state = initial_state
    if state is None:
        state = MatrixState.init(batch, kv_heads, key.shape[3], value_dim, dtype)
    tokens = {name: x.astype(dtype) for name, x in tokens.items()}
    masks = {"mask": key_value_mask, "segment": segment_ids}
    masks = {name: x for name, x in masks.items() if x is not None}
    kinds = dict.fromkeys(tokens, shards.TOKENS) | dict.fromkeys(masks, shards.SLOTS)
    out, state = shards.over_shards(
        lambda arrays, _: _scan(step, **arrays),
        {"arrays": tokens | masks, "state": state},
        {"arrays": kinds, "state": STATE_AXES},
        (shards.TOKENS, STATE_AXES),
        kv_heads=kv_heads,
        splits_sequence=False,
    )
    out = out.astype(value.dtype)
    return (out, state) if return_state else out


# Compiled as one program, so that a call outside `jax.jit` compiles once, and not its loop anew.
@functools.partial(jax.jit, static_argnames="step")
def _scan(
    step: Step, arrays: dict[str, jax.Array], state: MatrixState
) -> tuple[jax.Array, MatrixState]:
    """Returns the output ``(B, T, N, V)``, and the state after the last token."""
    batch, length, heads = arrays["query"].shape[:3]
    kv_heads, value_dim = arrays["value"].shape[2:]
    mask = arrays.pop("mask", None)
    segment = masking.fill_segments(arrays.pop("segment", None), mask, state.segment)
    last = masking.last_segment(segment, mask, state.segment, length)
    if segment is None:
        segment = jnp.broadcast_to(last[:, None], (batch, length))
        # A state of no segment is empty. It may be read by the first one.
        state = dataclasses.replace(state, segment=last)
    arrays = {name: masking.select_tokens(x, mask) for name, x in arrays.items()}
    grouped = batch, length, kv_heads, heads // kv_heads, arrays["query"].shape[3]
    arrays |= {"query": arrays["query"].reshape(grouped), "segment": segment}
    if not length:
        return jnp.zeros_like(arrays["value"], shape=(batch, 0, heads, value_dim)), state

    @jax.checkpoint
    def one(state: MatrixState, chunk: dict[str, jax.Array]) -> tuple[MatrixState, jax.Array]:
        ids = chunk.pop("segment")
        chunk = {name: jnp.moveaxis(x, 1, -2 if x.ndim > 3 else -1) for name, x in chunk.items()}
        same = ids[:, None, :, None] == ids[:, None, None, :]
        chunk["visible"] = same & jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None]
        chunk["entering"] = (ids == state.segment[:, None])[:, None]
        rows, matrix = step(state, chunk)
        return MatrixState(matrix, ids[:, -1]), jnp.moveaxis(rows, 3, 1)

    state, rows = jax.lax.scan(one, state, chunks.cut(arrays))
    rows = chunks.join(rows, length).reshape(batch, length, heads, value_dim)
    return masking.select_tokens(rows, mask), dataclasses.replace(state, segment=last)
