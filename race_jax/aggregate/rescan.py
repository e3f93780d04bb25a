"""The rare forms by one rematerialised scan, differentiated by JAX: clear rather than fast.

Comes in: the operands of a causal or bidirectional call. Goes out: outputs and final sums of

    bucket normalisation    o_t = 1/L sum_f phi_f(q_t) B_f(t) / (A_f(t) + 1e-6)
    packed, bidirectional   the causal rows, own token included, plus the reversed ones, excluded
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax import state
from race_jax.aggregate import bidirectional, causal
from race_jax.aggregate import chunk as chunks
from race_jax.aggregate.chunk import Decay, Sums, Tokens
from race_jax.aggregate.sweep import layout, pad_time

CHUNK = 64


def causal_bucket(operands: causal.Operands) -> tuple[jax.Array, Sums]:
    """Causal attention normalised per bucket: the output ``(B, T, N, V)`` and the final sums."""
    return _causal_scan(operands, _bucket_rows)


def bidirectional_packed(operands: causal.Operands) -> jax.Array:
    """Bidirectional attention within segments, in linear time: the output ``(B, T, N, V)``."""
    before, _ = _causal_scan(operands, _inclusive_rows)
    flip = lambda tree: jax.tree.map(lambda x: jnp.flip(x, axis=1), tree)  # noqa: E731
    arrays = operands.z_q, operands.z_k, operands.value, operands.mask, operands.segment
    z_q, z_k, value, mask, segment = flip(arrays)
    flipped = operands._replace(z_q=z_q, z_k=z_k, value=value, mask=mask, segment=segment)
    after, _ = _causal_scan(flipped, _exclusive_rows)
    rows = before + flip(after)
    return state.normalize(rows[..., :-1], rows[..., -1]).astype(operands.value.dtype)


def bidirectional_bucket(operands: bidirectional.Operands) -> tuple[jax.Array, Sums]:
    """Bidirectional attention normalised per bucket: the output and the total sums."""

    def add(sums: Sums, piece: tuple[jax.Array, ...]) -> tuple[Sums, tuple]:
        phi_k, value = bidirectional.hash_keys(operands.sharpness, *piece)
        own = Sums(jnp.einsum("bkfs,bksv->bkfv", phi_k, value), phi_k.sum(axis=-1))
        return jax.tree.map(jnp.add, sums, own), ()

    batch, length, kv_heads = operands.value.shape[:3]
    mask = jnp.ones((batch, length), bool) if operands.mask is None else operands.mask
    totals, _ = _scan(add, operands.sums, (operands.z_k, operands.value, mask))

    def read(carry: tuple, z_q: jax.Array) -> tuple[tuple, jax.Array]:
        phi_q = chunks.features(z_q, operands.sharpness)
        phi_q = _per_bucket(phi_q, totals.mass[:, :, None, :, None], z_q.shape[-2])
        return carry, jnp.moveaxis(jnp.einsum("bkgft,bkfv->bkgtv", phi_q, totals.numerator), 3, 1)

    z_q = bidirectional.group(operands.z_q, kv_heads)
    _, out = _scan(read, (), z_q)
    out = out.reshape(*operands.z_q.shape[:3], -1)
    return out.astype(operands.value.dtype), totals


def _scan(step: Callable, carry: Any, arrays: Any) -> tuple[Any, Any]:
    """``step`` over chunks of time under ``lax.scan``, rematerialised when differentiated."""
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
    join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])  # noqa: E731
    return carry, jax.tree.map(lambda x: join(x)[:, :length], out)


def _causal_scan(operands: causal.Operands, rows: Callable) -> tuple[jax.Array, Sums]:
    batch, length, heads = operands.z_q.shape[:3]
    tokens = causal.pad_operands(operands, layout(length, 1, CHUNK))

    def step(sums: Sums, tokens: Tokens) -> tuple[Sums, jax.Array]:
        phi_q, phi_k, value = causal.features(operands.sharpness, tokens)
        out = rows(tokens, phi_q, phi_k, value, sums)
        sums = chunks.add_keys(phi_k, value, chunks.decay_factors(tokens), sums)
        return sums, jnp.moveaxis(out, 3, 1)

    final, out = _scan(step, operands.sums, tokens)
    return out[:, :length].reshape(batch, length, heads, -1), final


def _bucket_rows(
    tokens: Tokens, phi_q: jax.Array, phi_k: jax.Array, value: jax.Array, sums: Sums
) -> jax.Array:
    decay = chunks.decay_factors(tokens)
    mass = _running_mass(phi_k, decay, sums)[:, :, None]
    phi_q = _per_bucket(phi_q, mass, tokens.z_q.shape[-2])
    out, _ = chunks.forward(phi_q, phi_k, value, decay, sums)
    return causal.visible_rows(tokens, out).astype(tokens.value.dtype)


def _running_mass(phi_k: jax.Array, decay: Decay, sums: Sums) -> jax.Array:
    """A_f(t) ``(B, K, F, C)``."""
    within = jnp.broadcast_to(decay.within[:, :, 0], (*phi_k.shape[:2], *decay.within.shape[-2:]))
    own = jnp.einsum("bkts,bkfs->bkft", within, phi_k)
    return own + chunks.scale_tokens(decay.into, jnp.broadcast_to(sums.mass[..., None], own.shape))


def _per_bucket(phi_q: jax.Array, mass: jax.Array, tables: int) -> jax.Array:
    return phi_q / (tables * (mass + state.BUCKET_EPSILON))


def _inclusive_rows(*chunk: Any) -> jax.Array:
    return _rows(*chunk, inclusive=True)


def _exclusive_rows(*chunk: Any) -> jax.Array:
    return _rows(*chunk, inclusive=False)


def _rows(
    tokens: Tokens,
    phi_q: jax.Array,
    phi_k: jax.Array,
    value: jax.Array,
    sums: Sums,
    *,
    inclusive: bool,
) -> jax.Array:
    """Unnormalised [N | z] ``(B, K, G, C, V + 1)``."""
    decay = chunks.decay_factors(tokens, inclusive=inclusive)
    numerator, mass = chunks.forward(phi_q, phi_k, value, decay, sums)
    return jnp.concatenate([numerator, mass[..., None]], axis=-1)
