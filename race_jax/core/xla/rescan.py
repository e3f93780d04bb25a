"""Rare forms of attention, by one rematerialised scan that JAX differentiates.

They are written for clarity rather than speed:

    bucket normalisation    o_t = 1/L sum_f phi_f(q_t) B_f(t) / (A_f(t) + 1e-6)
    packed, bidirectional   a causal pass that includes the own token, plus a reversed pass that
                            excludes it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import state
from race_jax.core.xla import bidirectional, causal
from race_jax.core.xla import chunk as chunks
from race_jax.core.xla.chunk import Decay, SoftHash, Sums, Tokens
from race_jax.core.xla.sweep import layout, pad_time

CHUNK = 64


class Chunk(NamedTuple):
    """The arguments of ``chunk.forward``."""

    phi_q: jax.Array
    phi_k: jax.Array
    value: jax.Array
    decay: Decay
    sums: Sums


def causal_bucket(operands: causal.Operands, use_tanh: bool) -> tuple[jax.Array, Sums]:
    """Computes causal attention normalised per bucket: the output and the final sums."""

    def rows(chunk: Chunk, tokens: Tokens) -> jax.Array:
        mass = chunks.running_mass(chunk.phi_k, chunk.decay, chunk.sums)
        phi_q = _per_bucket(chunk.phi_q, mass[:, :, None], tokens.z_q.shape[-2])
        out, _ = chunks.forward(phi_q, *chunk[1:])
        return causal.visible_rows(tokens, out).astype(tokens.value.dtype)

    out, final = _causal_scan(operands, use_tanh, rows)
    return _join_heads(out), final


def bidirectional_packed(operands: causal.Operands, use_tanh: bool) -> jax.Array:
    """Computes bidirectional attention within segments, ``(B, T, N, V)``, in linear time."""

    def rows(chunk: Chunk, tokens: Tokens) -> jax.Array:
        numerator, mass = chunks.forward(*chunk)
        return jnp.concatenate([numerator, mass[..., None]], axis=-1)

    both = _join_heads(_both_directions(operands, use_tanh, rows))
    return state.normalize(both[..., :-1], both[..., -1]).astype(operands.value.dtype)


def bidirectional_packed_bucket(operands: causal.Operands, use_tanh: bool) -> jax.Array:
    """Computes bidirectional attention within segments, normalised per bucket.

    A first pass forms, for every token, the bucket masses of its segment.
    """

    def masses(chunk: Chunk, tokens: Tokens) -> jax.Array:
        mass = chunks.running_mass(chunk.phi_k, chunk.decay, chunk.sums)
        return jnp.swapaxes(mass, 2, 3)[:, :, None]

    mass = _both_directions(operands, use_tanh, masses)  # (B, T, K, 1, F)

    def rows(chunk: Chunk, tokens: Tokens, mass: jax.Array) -> jax.Array:
        phi_q = _per_bucket(chunk.phi_q, jnp.moveaxis(mass, 1, -1), tokens.z_q.shape[-2])
        return chunks.forward(phi_q, *chunk[1:])[0]

    out = _join_heads(_both_directions(operands, use_tanh, rows, mass))
    return out.astype(operands.value.dtype)


def bidirectional_bucket(
    operands: bidirectional.Operands, use_tanh: bool
) -> tuple[jax.Array, Sums]:
    """Computes bidirectional attention normalised per bucket: the output and the total sums."""
    soft = SoftHash(operands.sharpness, use_tanh)

    def add(sums: Sums, piece: tuple[jax.Array, ...]) -> tuple[Sums, tuple]:
        phi_k, value = bidirectional.hash_keys(soft, *piece)
        own = Sums(jnp.einsum("bkfs,bksv->bkfv", phi_k, value), phi_k.sum(axis=-1))
        return jax.tree.map(jnp.add, sums, own), ()

    batch, length, kv_heads = operands.value.shape[:3]
    mask = operands.mask
    if mask is None:
        mask = jnp.ones_like(operands.value, bool, shape=(batch, length))
    totals, _ = _scan(add, operands.sums, (operands.z_k, operands.value, mask))

    def read(carry: tuple, z_q: jax.Array) -> tuple[tuple, jax.Array]:
        phi_q = soft.features(z_q)
        phi_q = _per_bucket(phi_q, totals.mass[:, :, None, :, None], z_q.shape[-2])
        return carry, jnp.moveaxis(jnp.einsum("bkgft,bkfv->bkgtv", phi_q, totals.numerator), 3, 1)

    z_q = bidirectional.group(operands.z_q, kv_heads)
    _, out = _scan(read, (), z_q)
    out = out.reshape(*operands.z_q.shape[:3], out.shape[-1])
    return out.astype(operands.value.dtype), totals


def _scan(step: Callable, carry: Any, arrays: Any) -> tuple[Any, Any]:
    """Scans ``step`` over chunks of time with ``lax.scan``, rematerialised when differentiated."""
    length = jax.tree.leaves(arrays)[0].shape[1]
    plan = layout(length, 1, CHUNK)
    arrays = jax.tree.map(lambda x: pad_time(x, plan.length), arrays)

    @jax.checkpoint
    def body(carry: Any, index: jax.Array) -> tuple[Any, Any]:
        at = index * plan.chunk
        piece = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, at, plan.chunk, axis=1), arrays
        )
        return step(carry, piece)

    carry, out = jax.lax.scan(body, carry, jnp.arange(plan.chunks))
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], plan.length, *x.shape[3:])  # noqa: E731
    return carry, jax.tree.map(lambda x: join(x)[:, :length], out)


def _causal_scan(
    operands: causal.Operands,
    use_tanh: bool,
    rows: Callable,
    *extra: jax.Array,
    inclusive: bool = True,
) -> tuple[jax.Array, Sums]:
    """Returns ``rows(chunk, tokens, *extra)`` of all chunks, and the final sums.

    The rows have the shape ``(B, T, K, G, ..)``.
    """
    soft = SoftHash(operands.sharpness, use_tanh)
    length = operands.value.shape[1]
    tokens = causal.pad_operands(operands, layout(length, 1, CHUNK))
    extra = jax.tree.map(lambda x: pad_time(x, tokens.value.shape[1]), extra)

    def step(sums: Sums, piece: tuple) -> tuple[Sums, jax.Array]:
        tokens, *extra = piece
        decay = chunks.decay_factors(tokens, inclusive=inclusive)
        chunk = Chunk(*causal.features(soft, tokens), decay, sums)
        out = rows(chunk, tokens, *extra)
        return chunks.add_keys(chunk.phi_k, chunk.value, decay, sums), jnp.moveaxis(out, 3, 1)

    final, out = _scan(step, operands.sums, (tokens, *extra))
    return out[:, :length], final


def _both_directions(
    operands: causal.Operands, use_tanh: bool, rows: Callable, *extra: jax.Array
) -> jax.Array:
    """Adds a causal pass that includes the own token and a reversed pass that excludes it."""
    flip = lambda tree: jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)  # noqa: E731
    before, _ = _causal_scan(operands, use_tanh, rows, *extra)
    arrays = {name: getattr(operands, name) for name in ("z_q", "z_k", "value", "mask", "segment")}
    flipped = operands._replace(**flip(arrays))
    after, _ = _causal_scan(flipped, use_tanh, rows, *flip(extra), inclusive=False)
    return before + flip(after)


def _join_heads(rows: jax.Array) -> jax.Array:
    """Reshapes ``(B, T, K, G, V)`` to ``(B, T, N, V)``."""
    return rows.reshape(*rows.shape[:2], rows.shape[2] * rows.shape[3], rows.shape[-1])


def _per_bucket(phi_q: jax.Array, mass: jax.Array, tables: int) -> jax.Array:
    return phi_q / (tables * (mass + state.BUCKET_EPSILON))
