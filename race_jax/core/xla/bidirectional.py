"""Bidirectional RACE attention: one pass over the keys, then one over the queries.

    X = X_0 + sum_s phi(k_s) [v_s | 1]       [N | z]_t = phi(q_t) X       o_t = N_t / z_t

X_0 are the initial sums. The total sums X are returned, and they are the only residual that the
backward pass needs beside the operands.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import state
from race_jax.core.shapes import Size
from race_jax.core.xla import chunk as chunks
from race_jax.core.xla.chunk import SoftHash, Sums
from race_jax.core.xla.sweep import Layout, Tiling, is_known, layout, pad_time, sweep

PARALLEL_BLOCK = 4096  # tokens per lane, where lanes run in parallel


class Operands(NamedTuple):
    """The arrays of one bidirectional call.

    Attributes:
      z_q: ``(B, T, N, L, P)``.
      z_k: ``(B, S, K, L, P)``.
      value: ``(B, S, K, V)``.
      sharpness: ``(K,)``.
      mask: ``(B, S)`` bool, or None.
      sums: the initial sums.
    """

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    sharpness: jax.Array
    mask: jax.Array | None
    sums: Sums


@dataclasses.dataclass(frozen=True)
class XLASteps:
    """The steps of ``passes.py`` in plain XLA.

    Attributes:
      tiling: the chunk size, and whether blocks run in parallel.
      use_tanh: whether hash projections go through tanh.
    """

    tiling: Tiling
    use_tanh: bool = True

    def sums(self, operands: Operands) -> Sums:
        soft = self._hash(operands)

        def add(carry: Sums, piece: tuple, index: jax.Array) -> tuple[Sums, tuple]:
            phi_k, value = hash_keys(soft, *piece)
            own = Sums(jnp.einsum("bkfs,bksv->bkfv", phi_k, value), phi_k.sum(axis=-1))
            return jax.tree.map(jnp.add, carry, own), ()

        keys = _key_arrays(operands, self.tiling)
        return _walk(add, chunks.zeros_like(operands.sums), keys, (), self.tiling)[0]

    def outputs(self, operands: Operands, totals: Sums) -> jax.Array:
        soft = self._hash(operands)

        def read(carry: tuple, z_q: jax.Array, index: jax.Array) -> tuple[tuple, jax.Array]:
            phi_q = soft.features(z_q)
            numerator = jnp.einsum("bkgft,bkfv->bkgtv", phi_q, totals.numerator)
            mass = jnp.einsum("bkgft,bkf->bkgt", phi_q, totals.mass)
            return carry, jnp.moveaxis(state.normalize(numerator, mass), 3, 1)

        z_q = group(operands.z_q, operands.value.shape[2])
        shape = (*z_q.shape[:4], operands.value.shape[-1])
        out = jnp.zeros_like(operands.value, shape=shape)
        _, out = _walk(read, (), z_q, out, self.tiling)
        return out.reshape(*operands.z_q.shape[:3], operands.value.shape[-1])

    def adjoints(
        self, operands: Operands, totals: Sums, d_out: jax.Array, d_totals: Sums
    ) -> tuple[Sums, Sums, tuple[jax.Array, jax.Array]]:
        soft = self._hash(operands)

        def rows(carry: tuple[Sums, jax.Array], piece: tuple[jax.Array, jax.Array], index):
            (d_sums, d_sharpness), (z_q, d_out) = carry, piece
            phi_q = soft.features(z_q)
            d_out = jnp.moveaxis(d_out, 1, 3).astype(phi_q.dtype)
            mass = jnp.einsum("bkgft,bkf->bkgt", phi_q, totals.mass)
            seen = mass > state.MIN_MASS
            inverse = jnp.where(seen, 1.0 / jnp.where(seen, mass, 1.0), 0.0)
            along = jnp.einsum("bkfv,bkgtv->bkgft", totals.numerator, d_out)
            d_mass = -((phi_q * along).sum(axis=-2) * inverse) * inverse
            d_phi = along * inverse[..., None, :]
            d_phi += d_mass[..., None, :] * totals.mass[:, :, None, :, None]
            d_numerator = d_out * inverse[..., None]
            own = Sums(
                jnp.einsum("bkgft,bkgtv->bkfv", phi_q, d_numerator),
                jnp.einsum("bkgft,bkgt->bkf", phi_q, d_mass),
            )
            d_z_q, more = soft.pull(z_q, phi_q, d_phi)
            return (jax.tree.map(jnp.add, d_sums, own), d_sharpness + more), d_z_q

        z_q, d_out = (group(x, operands.value.shape[2]) for x in (operands.z_q, d_out))
        carry = chunks.zeros_like(d_totals), jnp.zeros_like(operands.sharpness)
        carry, d_z_q = _walk(rows, carry, (z_q, d_out), jnp.zeros_like(z_q), self.tiling)
        d_sums, d_sharpness = carry
        return d_sums, d_totals, (d_z_q.reshape(operands.z_q.shape), d_sharpness)

    def gradients(
        self,
        operands: Operands,
        totals: Sums,
        d_out: jax.Array,
        d_sums: Sums,
        kept: tuple[jax.Array, jax.Array],
    ) -> Operands:
        soft = self._hash(operands)

        def columns(d_sharpness: jax.Array, piece: tuple, index: jax.Array):
            z_k, value, mask = piece
            phi_k, value = hash_keys(soft, z_k, value, mask)
            d_phi = jnp.einsum("bkfv,bksv->bkfs", d_sums.numerator, value) + d_sums.mass[..., None]
            d_value = jnp.einsum("bkfs,bkfv->bksv", phi_k, d_sums.numerator)
            d_z_k, more = soft.pull(z_k, phi_k, d_phi)
            return d_sharpness + more, (d_z_k, jnp.moveaxis(d_value, 2, 1))

        d_z_q, d_sharpness = kept
        written = jnp.zeros_like(operands.z_k), jnp.zeros_like(operands.value)
        keys = _key_arrays(operands, self.tiling)
        d_sharpness, (d_z_k, d_value) = _walk(columns, d_sharpness, keys, written, self.tiling)
        return Operands(d_z_q, d_z_k, d_value, d_sharpness, None, d_sums)

    def _hash(self, operands: Operands) -> SoftHash:
        return SoftHash(operands.sharpness, self.use_tanh)


def _plan(length: Size, tiling: Tiling) -> Layout:
    parallel = tiling.parallel and is_known(length)
    blocks = -(-length // PARALLEL_BLOCK) if parallel else 1
    return layout(length, blocks, tiling.chunk)


def _walk(step: Callable, carry: Any, arrays: Any, buffers: Any, tiling: Tiling) -> tuple[Any, Any]:
    """Sweeps over the whole length, in parallel lanes if the tiling says so.

    The final carry is the first one plus what every lane adds to a carry of zeros.
    """
    length = jax.tree.leaves(arrays)[0].shape[1]
    if length == 0:
        return carry, buffers
    plan = _plan(length, tiling)
    walk = functools.partial(sweep, step, chunk=plan.chunk, count=plan.chunks)
    arrays, buffers = jax.tree.map(lambda x: pad_time(x, plan.length), (arrays, buffers))
    if plan.blocks == 1:
        carry, buffers = walk(carry, arrays, buffers)
    else:
        arrays, buffers = jax.tree.map(
            lambda x: x.reshape(x.shape[0], plan.blocks, -1, *x.shape[2:]), (arrays, buffers)
        )
        lanes = jax.vmap(walk, in_axes=(None, 1, 1), out_axes=(0, 1))
        added, buffers = lanes(jax.tree.map(jnp.zeros_like, carry), arrays, buffers)
        carry = jax.tree.map(lambda first, lane: first + lane.sum(axis=0), carry, added)
        buffers = jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), buffers)
    return carry, jax.tree.map(lambda x: x[:, :length], buffers)


def _key_arrays(
    operands: Operands, tiling: Tiling
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Returns z of the keys, values and their mask.

    A mask is made if padding will be appended.
    """
    batch, length = operands.value.shape[:2]
    mask = operands.mask
    even = is_known(length) and (not length or _plan(length, tiling).length == length)
    if mask is None and not even:
        mask = jnp.ones_like(operands.value, bool, shape=(batch, length))
    return operands.z_k, operands.value, mask


def group(x: jax.Array, kv_heads: int) -> jax.Array:
    """Groups query heads by their key/value head: ``(B, T, N, ...)`` to ``(B, T, K, G, ...)``."""
    return x.reshape(*x.shape[:2], kv_heads, x.shape[2] // kv_heads, *x.shape[3:])


def hash_keys(
    soft: SoftHash, z_k: jax.Array, value: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns phi_k ``(B, K, F, C)`` of a chunk, zero in padded slots, and v ``(B, K, C, V)``."""
    phi = soft.features(z_k)
    if mask is not None:
        phi = jnp.where(mask[:, None, None], phi, 0.0)
    return phi, chunks.head_values(value, phi.dtype)
