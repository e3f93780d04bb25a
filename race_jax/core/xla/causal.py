"""Causal RACE attention in plain XLA: sweeps over chunks, with spans side by side or in turn.

    [N | z] = ((phi_q phi_kᵀ) . D) [v | 1] + into . (phi_q X),   o = N / z      in chunk.py

The forward pass also returns the sums at the start of every block. They are the residual from which
the backward pass recomputes the rest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import scan, state
from race_jax.core.shapes import Size
from race_jax.core.xla import chunk as chunks
from race_jax.core.xla.chunk import SoftHash, Sums, Tokens
from race_jax.core.xla.sweep import (
    Layout,
    is_known,
    join_blocks,
    layout,
    pad_time,
    split_blocks,
    sweep,
)

# The number of tokens between two saved sums. At F = 64 and V = 128 the saved sums take 2 % of the
# bytes of q, k and v in float32.
BLOCK = 1024
SYMBOLIC_BLOCK = 128  # the same where jax.export gives a symbolic length


class Operands(NamedTuple):
    """The arrays of one causal call. An argument that is not used is None.

    Attributes:
      z_q: ``(B, T, N, L, P)``.
      z_k: ``(B, T, K, L, P)``.
      value: ``(B, T, K, V)``.
      sharpness: ``(K,)``.
      log_decay: ``(B, T, K)``, bounded, and zero in padded slots.
      mask: ``(B, T)`` bool.
      segment: ``(B, T)`` int32, with the ids of padded slots filled in.
      sums: the initial sums.
      initial_segment: ``(B,)`` int32.
    """

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    sharpness: jax.Array
    log_decay: jax.Array | None
    mask: jax.Array | None
    segment: jax.Array | None
    sums: Sums
    initial_segment: jax.Array


class _Written(NamedTuple):
    """Gradients that have a time axis, written chunk by chunk."""

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    log_decay: jax.Array | None


def block_count(length: Size) -> Size:
    """Returns the number of blocks of a sequence.

    It is the same on every platform, because the residuals hold the sums of each block.
    """
    return -(-length // (BLOCK if is_known(length) else SYMBOLIC_BLOCK))


def _layout(length: Size, blocks: Size, chunk: int) -> Layout:
    """Returns the layout of the blocks.

    A block has a known size even if the number of blocks is symbolic.
    """
    return (
        layout(length, blocks, chunk)
        if is_known(length)
        else Layout(blocks, SYMBOLIC_BLOCK // chunk, chunk)
    )


@dataclasses.dataclass(frozen=True)
class XLASteps:
    """The steps of ``passes.py`` in plain XLA, with all spans side by side.

    Attributes:
      length: T.
      count: the number of spans.
      chunk: the largest number of tokens that one step of a sweep takes.
      use_tanh: whether hash projections go through tanh.
    """

    length: int
    count: int
    chunk: int
    use_tanh: bool = True
    scan_by = "scan"

    @property
    def plan(self) -> Layout:
        return layout(self.length, self.count, self.chunk)

    @property
    def size(self) -> int:
        return self.plan.block

    def sums(self, operands: Operands) -> Sums:
        soft = self._hash(operands)

        def step(sums: Sums, tokens: Tokens, index: jax.Array) -> tuple[Sums, tuple]:
            return _add_keys(soft, sums, tokens), ()

        sums, _ = self._sweep(step, self._fresh(operands.sums), self._tokens(operands), ())
        return self._unfold(sums)

    def outputs(self, operands: Operands, starts: Sums) -> jax.Array:
        tokens = self._tokens(operands)
        out = _output_buffer(tokens)
        step = _forward_chunk(self._hash(operands))
        _, out = self._sweep(step, self._fold(starts), tokens, out)
        return _join_outputs(join_blocks(out, self.count), operands)

    def adjoints(
        self, operands: Operands, starts: Sums, final: Sums, d_out: jax.Array, d_final: Sums
    ) -> tuple[Sums, Sums, None]:
        soft = self._hash(operands)

        def step(carry: tuple, piece: tuple[Tokens, jax.Array], index: jax.Array):
            factor, sums, d_start = carry
            tokens, d_out = piece
            phi_q, phi_k, value = features(soft, tokens)
            decay = chunks.decay_factors(tokens)
            d_out = visible_rows(tokens, jnp.moveaxis(d_out, 1, 3).astype(value.dtype))
            rows = chunks.backward_rows(phi_q, phi_k, value, decay, sums, d_out)
            own = chunks.add_rows(rows, decay, chunks.zeros_like(sums))
            _, d_start = scan.combine((factor, own), (factor, d_start))
            factor = chunks.scale(decay.across, factor, 0)
            return (factor, chunks.add_keys(phi_k, value, decay, sums), d_start), ()

        fresh = self._fresh(d_final)
        factor = jnp.ones_like(fresh.mass, shape=fresh.mass.shape[:2])
        arrays = self._tokens(operands), self._d_out(operands, d_out)
        carry = factor, self._fold(starts), fresh
        (_, _, adjoints), _ = self._sweep(step, carry, arrays, ())
        return self._unfold(adjoints), d_final, None

    def gradients(
        self,
        operands: Operands,
        starts: Sums,
        final: Sums,
        d_out: jax.Array,
        d_ends: Sums,
        d_initial: Sums,
        kept: None,
    ) -> Operands:
        tokens = self._tokens(operands)
        loop = self._fold(d_ends), jnp.zeros_like(operands.sharpness), _write_buffers(tokens)
        d_out = self._d_out(operands, d_out)
        _, d_sharpness, written = _backward_block(
            self._hash(operands), self.plan, tokens, d_out, self._fold(starts), loop, 0
        )
        written = jax.tree.map(lambda x: join_blocks(x, self.count), written)
        return _cotangents(operands, written, d_sharpness, d_initial)

    def _hash(self, operands: Operands) -> SoftHash:
        return SoftHash(operands.sharpness, self.use_tanh)

    def _sweep(self, step: Callable, carry: Any, arrays: Any, buffers: Any) -> tuple[Any, Any]:
        return sweep(step, carry, arrays, buffers, chunk=self.plan.chunk, count=self.plan.chunks)

    def _tokens(self, operands: Operands) -> Tokens:
        """Returns the padded tokens, with the spans as rows of the batch."""
        tokens = pad_operands(operands, self.plan)
        return jax.tree.map(lambda x: split_blocks(x, self.count), tokens)

    def _d_out(self, operands: Operands, d_out: jax.Array) -> jax.Array:
        return split_blocks(_pad_d_out(operands, d_out, self.plan), self.count)

    def _fresh(self, sums: Sums) -> Sums:
        """Returns zero sums for every span of every row of the batch."""
        rows = lambda x: jnp.zeros_like(x, shape=(x.shape[0] * self.count, *x.shape[1:]))  # noqa: E731
        return jax.tree.map(rows, sums)

    def _fold(self, sums: Sums) -> Sums:
        """Makes spans rows of the batch: ``(B, K, spans, ...)`` to ``(B * spans, K, ...)``."""
        return jax.tree.map(
            lambda x: jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:]), sums
        )

    def _unfold(self, sums: Sums) -> Sums:
        """Undoes ``_fold``."""
        unfold = lambda x: jnp.moveaxis(x.reshape(-1, self.count, *x.shape[1:]), 1, 2)  # noqa: E731
        return jax.tree.map(unfold, sums)


def forward(
    operands: Operands, *, blocks: Size, chunk: int, use_tanh: bool
) -> tuple[jax.Array, Sums, Sums]:
    """Computes causal attention in one walk over the tokens, block after block.

    On a CPU this is faster than the steps, because it forms the features of the keys only once.

    Args:
      operands: the arrays, with T >= 1.
      blocks: the number of blocks. The sums at the start of each are residuals.
      chunk: the largest number of tokens that one step of the walk takes.
      use_tanh: whether hash projections go through tanh.

    Returns:
      The output ``(B, T, N, V)``, the final sums, and the sums at the start of every block,
      ``(B, K, blocks, F, V)`` and ``(B, K, blocks, F)``.
    """
    plan = _layout(operands.value.shape[1], blocks, chunk)
    tokens = pad_operands(operands, plan)
    step = _forward_chunk(SoftHash(operands.sharpness, use_tanh))

    def block(index: jax.Array, loop: tuple[Sums, Sums, jax.Array]):
        sums, starts, out = loop
        starts = _store(starts, index, sums)
        sums, out = sweep(
            step, sums, tokens, out, chunk=plan.chunk, count=plan.chunks, start=index * plan.block
        )
        return sums, starts, out

    loop = operands.sums, _history(operands.sums, blocks), _output_buffer(tokens)
    final, starts, out = jax.lax.fori_loop(0, blocks, block, loop)
    starts = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), starts)
    return _join_outputs(out, operands), final, starts


def backward(
    operands: Operands,
    starts: Sums,
    d_out: jax.Array,
    d_final: Sums,
    *,
    chunk: int,
    use_tanh: bool,
) -> Operands:
    """Returns the cotangents of the operands, with None for masks and segments.

    Args:
      operands: as given to ``forward``.
      starts: the sums at the start of every block, from ``forward``.
      d_out: ``(B, T, N, V)``.
      d_final: the cotangent of the final sums.
      chunk: as given to ``forward``.
      use_tanh: as given to ``forward``.
    """
    soft = SoftHash(operands.sharpness, use_tanh)
    blocks = starts.mass.shape[2]
    plan = _layout(operands.value.shape[1], blocks, chunk)
    tokens = pad_operands(operands, plan)
    starts = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), starts)
    d_out = _pad_d_out(operands, d_out, plan)

    def block(turn: jax.Array, loop: tuple[Sums, jax.Array, _Written]):
        index = blocks - 1 - turn
        sums = jax.tree.map(lambda x: x[index], starts)
        start = index * plan.block
        return _backward_block(soft, plan, tokens, d_out, sums, loop, start)

    loop = d_final, jnp.zeros_like(operands.sharpness), _write_buffers(tokens)
    d_initial, d_sharpness, written = jax.lax.fori_loop(0, blocks, block, loop)
    return _cotangents(operands, written, d_sharpness, d_initial)


def _output_buffer(tokens: Tokens) -> jax.Array:
    return jnp.zeros_like(tokens.value, shape=(*tokens.z_q.shape[:4], tokens.value.shape[-1]))


def _join_outputs(out: jax.Array, operands: Operands) -> jax.Array:
    """Returns outputs ``(B, T, N, V)`` of padded ones ``(B, .., K, G, V)``."""
    batch, length, heads = operands.z_q.shape[:3]
    return out[:, :length].reshape(batch, length, heads, out.shape[-1])


def _pad_d_out(operands: Operands, d_out: jax.Array, plan: Layout) -> jax.Array:
    kv_heads = operands.value.shape[2]
    grouped = d_out.reshape(*d_out.shape[:2], kv_heads, d_out.shape[2] // kv_heads, d_out.shape[-1])
    return pad_time(grouped, plan.length)


def _write_buffers(tokens: Tokens) -> _Written:
    return _Written(*(x if x is None else jnp.zeros_like(x) for x in tokens[:4]))


def _cotangents(
    operands: Operands, written: _Written, d_sharpness: jax.Array, d_initial: Sums
) -> Operands:
    length = operands.value.shape[1]
    written = jax.tree.map(lambda x: x[:, :length], written)
    return Operands(
        z_q=written.z_q.reshape(operands.z_q.shape),
        z_k=written.z_k,
        value=written.value,
        sharpness=d_sharpness,
        log_decay=written.log_decay,
        mask=None,
        segment=None,
        sums=d_initial,
        initial_segment=None,
    )


def pad_operands(operands: Operands, plan: Layout) -> Tokens:
    """Returns the operands as padded tokens, with query heads grouped by their key/value head."""
    batch, length, kv_heads = operands.value.shape[:3]
    groups = operands.z_q.shape[2] // kv_heads
    z_q = operands.z_q.reshape(batch, length, kv_heads, groups, *operands.z_q.shape[3:])
    mask, segment, before = operands.mask, operands.segment, None
    if mask is None and not (is_known(length) and plan.length == length):
        mask = jnp.ones_like(operands.value, bool, shape=(batch, length))
    if segment is not None:
        segment = pad_time(segment, plan.length, mode="edge")
        before = jnp.concatenate([operands.initial_segment[:, None], segment[:, :-1]], axis=1)
    arrays = (z_q, operands.z_k, operands.value, operands.log_decay, mask)
    arrays = jax.tree.map(lambda x: pad_time(x, plan.length), arrays)
    return Tokens(*arrays, segment, before)


def features(soft: SoftHash, tokens: Tokens) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns phi_q, phi_k and v of a chunk, with the head axes first."""
    phi_q = soft.features(tokens.z_q)
    phi_k = soft.key_features(tokens)
    return phi_q, phi_k, chunks.head_values(tokens.value, phi_k.dtype)


def visible_rows(tokens: Tokens, rows: jax.Array) -> jax.Array:
    """Sets the rows ``(B, K, G, C, V)`` of padded queries to zero."""
    return (
        rows if tokens.mask is None else jnp.where(tokens.mask[:, None, None, :, None], rows, 0.0)
    )


def _forward_chunk(soft: SoftHash) -> Callable:
    def step(sums: Sums, tokens: Tokens, index: jax.Array) -> tuple[Sums, jax.Array]:
        del index
        phi_q, phi_k, value = features(soft, tokens)
        decay = chunks.decay_factors(tokens)
        out = state.normalize(*chunks.forward(phi_q, phi_k, value, decay, sums))
        out = jnp.moveaxis(visible_rows(tokens, out), 3, 1)
        return chunks.add_keys(phi_k, value, decay, sums), out

    return step


def _backward_block(
    soft: SoftHash,
    plan: Layout,
    tokens: Tokens,
    d_out: jax.Array,
    sums: Sums,
    loop: tuple[Sums, jax.Array, _Written],
    start: jax.typing.ArrayLike,
) -> tuple[Sums, jax.Array, _Written]:
    """Recomputes the sums of one block's chunks, then takes their gradients in reverse order."""
    d_sums, d_sharpness, written = loop
    walk = functools.partial(sweep, chunk=plan.chunk, count=plan.chunks, start=start)

    def remember(carry: tuple[Sums, Sums], tokens: Tokens, index: jax.Array):
        sums, history = carry
        return (_add_keys(soft, sums, tokens), _store(history, index, sums)), ()

    (end, history), _ = walk(remember, (sums, _history(sums, plan.chunks)), tokens, ())
    later = None
    if tokens.log_decay is not None:
        # Later tokens depend on the gates of this block only through the sums at its end.
        later = (d_sums.numerator * end.numerator).sum((2, 3)) + (d_sums.mass * end.mass).sum(2)

    def differentiate(carry: tuple, piece: tuple[Tokens, jax.Array], index: jax.Array):
        sums = jax.tree.map(lambda x: x[index], history)
        return _backward_chunk(soft, sums, carry, *piece)

    carry = d_sums, d_sharpness, later
    (d_sums, d_sharpness, _), written = walk(
        differentiate, carry, (tokens, d_out), written, reverse=True
    )
    return d_sums, d_sharpness, written


def _backward_chunk(
    soft: SoftHash,
    sums: Sums,
    carry: tuple[Sums, jax.Array, jax.Array | None],
    tokens: Tokens,
    d_out: jax.Array,
) -> tuple[tuple[Sums, jax.Array, jax.Array | None], _Written]:
    d_sums, d_sharpness, later = carry
    phi_q, phi_k, value = features(soft, tokens)
    decay = chunks.decay_factors(tokens)
    d_out = visible_rows(tokens, jnp.moveaxis(d_out, 1, 3).astype(value.dtype))
    rows = chunks.backward_rows(phi_q, phi_k, value, decay, sums, d_out)
    d_phi_q, d_phi_k, d_value = chunks.backward(phi_q, phi_k, value, decay, rows, d_sums)
    d_log_decay = None
    if later is not None:
        d_log_decay, later = chunks.log_decay_gradient(phi_q, phi_k, d_phi_q, d_phi_k, later)
    d_z_q, d_beta_q = soft.pull(tokens.z_q, phi_q, d_phi_q)
    d_z_k, d_beta_k = soft.pull(tokens.z_k, phi_k, d_phi_k)
    d_sharpness += d_beta_q + d_beta_k
    written = _Written(d_z_q, d_z_k, jnp.moveaxis(d_value, 2, 1), d_log_decay)
    return (chunks.add_rows(rows, decay, d_sums), d_sharpness, later), written


def _add_keys(soft: SoftHash, sums: Sums, tokens: Tokens) -> Sums:
    phi_k = soft.key_features(tokens)
    value = chunks.head_values(tokens.value, phi_k.dtype)
    return chunks.add_keys(phi_k, value, chunks.decay_factors(tokens), sums)


def _history(sums: Sums, count: Size) -> Sums:
    return jax.tree.map(lambda x: jnp.zeros_like(x, shape=(count, *x.shape)), sums)


def _store(history: Sums, index: jax.Array, sums: Sums) -> Sums:
    return jax.tree.map(lambda many, one: many.at[index].set(one), history, sums)
