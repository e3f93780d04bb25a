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


def in_32_bits(function: Callable) -> Callable:
    """The function, traced in 32 bits whatever jax_enable_x64 says: kernels count in no others."""

    @functools.wraps(function)
    def run(*arguments, **options):
        with jax.enable_x64(False):
            return function(*arguments, **options)

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
) -> tuple[Problem, Problem, Blocks]:
    """The problem as the queries see it and as the keys do (they differ in length), and blocks."""
    batch, length, heads = zq.shape[:3]
    tables, planes = hash_shape or zq.shape[3:]
    kv_length, kv_heads, value_dim = value.shape[1:]
    value_dim, features = padded(value_dim), padded_features(tables, planes)
    sizes = features, padded(tables * planes), value_dim, value.dtype.itemsize
    warpgroups = is_causal and not interpret and backend.has_warpgroups()
    warpgroups = warpgroups and whole_tiles(batch, length, kv_heads)
    blocks = config or choose_blocks(
        features,
        value_dim,
        value.dtype.itemsize,
        warpgroups=warpgroups and fits_warpgroups(*sizes),
        gate=gate,
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
    )
    split = split_length(kv_length, batch * kv_heads, chunk=blocks.chunk)
    return queries, dataclasses.replace(queries, length=kv_length, split=split), blocks


def whole_tiles(batch: int, length: int, kv_heads: int) -> bool:
    """Whether warpgroups may copy a sequence tile by tile.

    They fetch 8 tokens at a time. And dz of a single head leaves as one flat piece of memory, which
    is cut off at the end of the array but not of a sequence: the next would be written over.
    """
    return length % 8 == 0 and (length % 64 == 0 or batch == 1 or kv_heads > 1)


def projection_columns(tables: int, planes: int) -> int:
    """How many columns z has in the kernels: L·P and zeros up to a size that products take."""
    return padded(tables * planes)


def flat_projections(problem: Problem, z: jax.Array) -> jax.Array:
    """z (..., L, P) or (..., 1, X) as the kernels take it, by a copy where columns are missing."""
    return pad_to(z.reshape(*z.shape[:3], -1), problem.projections)


def unflat(flat: jax.Array, like: jax.Array) -> jax.Array:
    """The gradient of z (..., L, P) from that of the padded columns."""
    size = like.shape[3] * like.shape[4]
    return flat[..., :size].reshape(like.shape).astype(like.dtype)


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
