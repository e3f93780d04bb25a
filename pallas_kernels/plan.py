"""From the arrays of a call to its static sizes, and to arrays of the sizes that products take.

In: z, values and states as the caller has them. Out: a Problem and Blocks; arrays padded, exactly:
columns of zeros that no output reads. No equation.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.blocks import Blocks, choose_blocks, fits_warpgroups, split_length
from pallas_kernels.tiles import Problem, padded, padded_features

# Warpgroups copy values and outputs in tiles of so many tokens.
TILE_ROWS = 8


def traced_alike(function: Callable) -> Callable:
    """The function, traced alike wherever it is called from.

    Kernels are traced with 64-bit types off, so that their indices are int32. Inside
    `jax.shard_map` all arguments vary over the same axes, those over which any of them varies.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        with jax.enable_x64(False):
            axes = backend.varying_axes(arguments)
            return function(*backend.vary(arguments, axes), **options)

    return run


def plan(
    zq: jax.Array,
    zk: jax.Array,
    value: jax.Array,
    interpret: bool,
    config: Blocks | None,
    *,
    is_causal: bool,
    hash_shape: tuple[int, int] | None = None,
    gate: bool = False,
    exact: bool = True,
) -> tuple[Problem, Problem, Blocks]:
    """The problem as the queries see it and as the keys do (they differ in length), and blocks."""
    batch, length, heads = zq.shape[:3]
    tables, planes = hash_shape or zq.shape[3:]
    kv_length, kv_heads, value_dim = value.shape[1:]
    value_dim, features = padded(value_dim), padded_features(tables, planes)
    sizes = features, padded(tables * planes), value_dim, value.dtype.itemsize
    warpgroups = is_causal and not interpret and backend.has_warpgroups()
    # Inside `jax.shard_map` with check_vma=True, JAX refuses the loops of Mosaic's kernels: what
    # they load varies over mesh axes, and what they make of it does not say so.
    warpgroups = (
        warpgroups and length % TILE_ROWS == 0 and not backend.varying_axes((zq, zk, value))
    )
    blocks = config or choose_blocks(
        features,
        value_dim,
        value.dtype.itemsize,
        warpgroups=warpgroups and fits_warpgroups(*sizes),
        gate=gate,
        exact=exact,
    )
    queries = Problem(
        batch=batch,
        length=length,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        tables=tables,
        planes=planes,
        value_dim=value_dim,
        split=split_length(length, batch * kv_heads, chunk=blocks.chunk),
        chunk=blocks.chunk,
        value_block=value_dim,
        dtype=value.dtype,
        interpret=interpret,
        exact=exact,
    )
    split = split_length(kv_length, batch * kv_heads, chunk=blocks.chunk)
    return queries, dataclasses.replace(queries, length=kv_length, split=split), blocks


def projection_columns(tables: int, planes: int) -> int:
    """How many columns z has in the kernels: L·P and zeros up to a size that products take."""
    return padded(tables * planes)


def flat_projections(problem: Problem, z: jax.Array) -> jax.Array:
    """z (..., L, P) or (..., 1, X) as the kernels take it, by a copy where columns are missing."""
    return pad_to(z.reshape(*z.shape[:3], -1), problem.projections)


def whole_chunks(problem: Problem, z: jax.Array) -> jax.Array:
    """z (B, T, heads, X) with zeros up to whole chunks, as the kernels of warpgroups take it.

    Where a head is alone, Mosaic copies a chunk of z as one contiguous piece of memory, which ends
    with the array and not with the sequence. A chunk that reaches past its own sequence would then
    read the next one, and its gradient would be written over the next one. `jax.vmap` adds axes of
    which this code knows nothing, so every sequence has room for all of its chunks.
    """
    return pad_to(z, problem.chunks * problem.chunk, axis=1)


def unflat(flat: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of z (B, T, heads, L, P) from that of the padded rows and columns."""
    length, size = like.shape[1], like.shape[3] * like.shape[4]
    return flat[:, :length, :, :size].reshape(like.shape).astype(like.dtype)


def padded_state(problem: Problem, numerator: jax.Array, mass: jax.Array) -> tuple:
    """Numerator (..., F, V) and mass (..., F) at the padded F and V."""
    numerator = pad_to(pad_to(numerator, problem.value_dim), problem.features, axis=-2)
    return numerator, pad_to(mass, problem.features)


def pad_to(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """`x` with zeros after its last element along an axis; itself where nothing is missing."""
    if x.shape[axis] == size:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)
