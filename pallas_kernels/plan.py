"""The plan of a call: its static sizes, its blocks, and arrays padded to sizes that products take.

The padding is exact: it adds columns of zeros that no output depends on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backend
from pallas_kernels.blocks import Blocks, choose_blocks, fits_warpgroups, split_length
from pallas_kernels.tiles import Problem, padded, padded_features

# Warpgroups copy values and outputs in tiles of this number of tokens.
TILE_ROWS = 8


def traced_alike(function: Callable) -> Callable:
    """Makes a function trace alike wherever it is called from.

    Kernels are traced with x64 off, so indices are int32. Inside `jax.shard_map`, all arguments are
    made to vary over every mesh axis that any of them varies over.
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
    use_tanh: bool = True,
) -> tuple[Problem, Problem, Blocks]:
    """Returns the problem of the queries, that of the keys, and the blocks.

    The two problems differ in their length.
    """
    batch, length, heads = zq.shape[:3]
    tables, planes = hash_shape or zq.shape[3:]
    kv_length, kv_heads, value_dim = value.shape[1:]
    value_dim, features = padded(value_dim), padded_features(tables, planes)
    sizes = features, padded(tables * planes), value_dim, value.dtype.itemsize
    warpgroups = is_causal and not interpret and backend.has_warpgroups()
    # Inside `jax.shard_map` with check_vma=True, JAX refuses the loops of Mosaic's kernels: the
    # values that they load vary over mesh axes, but the results computed from them are not marked
    # as varying.
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
        use_tanh=use_tanh,
    )
    split = split_length(kv_length, batch * kv_heads, chunk=blocks.chunk)
    return queries, dataclasses.replace(queries, length=kv_length, split=split), blocks


def projection_columns(tables: int, planes: int) -> int:
    """Returns the number of columns of z in the kernels: L·P, padded for the products."""
    return padded(tables * planes)


def flat_projections(problem: Problem, z: jax.Array) -> jax.Array:
    """Returns z (..., L, P) or (..., 1, X) as the kernels take it. Missing columns cost a copy."""
    return pad_to(z.reshape(*z.shape[:3], -1), problem.projections)


def whole_chunks(problem: Problem, z: jax.Array) -> jax.Array:
    """Pads z (B, T, heads, X) to whole chunks, as the warpgroup kernels need it.

    If a head stands alone, Mosaic copies a chunk of z as one contiguous piece of memory, whose
    bound is the end of the array and not of the sequence. A chunk that reaches past its own
    sequence would then read the next sequence, and its gradient would overwrite that of the next
    sequence. `jax.vmap` adds sequences that this code cannot see. Therefore every sequence is
    padded to whole chunks.
    """
    return pad_to(z, problem.chunks * problem.chunk, axis=1)


def unflat(flat: jax.Array, like: jax.Array) -> jax.Array:
    """Returns the gradient of z (B, T, heads, L, P) from that of the padded z."""
    length, size = like.shape[1], like.shape[3] * like.shape[4]
    return flat[:, :length, :, :size].reshape(like.shape).astype(like.dtype)


def padded_state(problem: Problem, numerator: jax.Array, mass: jax.Array) -> tuple:
    """Pads a numerator (..., F, V) and a mass (..., F) to the padded F and V."""
    numerator = pad_to(pad_to(numerator, problem.value_dim), problem.features, axis=-2)
    return numerator, pad_to(mass, problem.features)


def pad_to(x: jax.Array, size: int, axis: int = -1) -> jax.Array:
    """Appends zeros to `x` along an axis, up to `size`. Without any, `x` itself is returned."""
    if x.shape[axis] == size:
        return x
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, size - x.shape[axis])
    return jnp.pad(x, padding)


def like_pair(pair: Any, numerator: jax.Array, mass: jax.Array) -> Any:
    """Returns a numerator and a mass in the kind of pair that the caller uses."""
    return jax.tree.unflatten(jax.tree.structure(pair), (numerator, mass))
