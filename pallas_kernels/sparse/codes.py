"""Codes of keys: rotate a tile of keys, quantize the coordinates, and pack them into bytes.

For rotations R (M, H) and b bits a coordinate, with z = R k,

    u_i = clip(floor(z_i sqrt(H) / (|k| step_b)), -2^(b-1), 2^(b-1) - 1) + 2^(b-1)
    factor = |k|^2 / sum_i level_i z_i,   level_i = 2 u_i - (2^b - 1)

Byte i of a code of m bytes holds the coordinates i, i + m, i + 2 m, ... from its lowest bits on.

A program takes a tile of tokens, and its products and sums have the same shape whether one token of
the tile is real or all are. So the code of a key does not depend on how many keys came with it.
"""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.backend import Output
from pallas_kernels.plan import traced_alike
from pallas_kernels.tiles import power_of_two

STEPS = {1: 1.0, 2: 0.9957, 4: 0.3352}  # of a coordinate of standard deviation one
FACTOR_LIMIT = 65504.0  # of float16
NARROWEST = 16  # rows and columns of a product


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut: the tokens of a program, and Triton's options."""

    tokens: int = 64
    num_warps: int = 8
    num_stages: int = 1


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The static sizes of a call."""

    length: int  # T
    width: int  # H
    coordinates: int  # M
    bytes: int  # m
    bits: int  # b
    tile: Tile

    @property
    def padded_width(self) -> int:
        return _padded(self.width)

    @property
    def padded_bytes(self) -> int:
        return _padded(self.bytes)

    @property
    def padded_coordinates(self) -> int:
        return (8 // self.bits - 1) * self.bytes + self.padded_bytes


def _padded(size: int) -> int:
    return max(NARROWEST, power_of_two(size))


@traced_alike
def level_codes(
    key: jax.Array,
    planes: jax.Array,
    *,
    bits: int,
    tile: Tile = Tile(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes keys.

    Args:
      key: ``(B, T, K, H)`` bfloat16.
      planes: rotations ``(M, H)`` bfloat16.
      bits: b, 1, 2 or 4.
      tile: how the work is cut. Other tiles may round z in another way.
      interpret: whether to run in Pallas's interpreter.

    Returns:
      Words ``(B, K, T, W)`` uint32 and factors ``(B, K, T)`` float16, which are 0 for a key of
      zeros.
    """
    batch, length, kv_heads, width = key.shape
    count = len(planes)
    words = -(-count * bits // 32)
    sizes = _Sizes(length, width, count, 4 * words, bits, tile)

    def per_head(*block: int | None) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda i, k, b: (b, k, *[0] * len(block)))

    out = backend.launch(
        functools.partial(_kernel, sizes=sizes),
        name="sparse_codes",
        grid=(-(-length // tile.tokens), kv_heads, batch),
        inputs={
            "key": (
                key,
                pl.BlockSpec(
                    (None, length, None, sizes.padded_width), lambda i, k, b: (b, 0, k, 0)
                ),
            ),
            "planes": (
                planes,
                pl.BlockSpec(
                    (sizes.padded_coordinates, sizes.padded_width), lambda i, k, b: (0, 0)
                ),
            ),
        },
        outputs={
            "codes": Output(
                (batch, kv_heads, length, 4 * words),
                jnp.int8,
                per_head(length, sizes.padded_bytes),
            ),
            "factor": Output((batch, kv_heads, length), jnp.float16, per_head(length)),
        },
        block=tile,
        interpret=interpret,
    )
    codes = out.codes.reshape(*out.codes.shape[:-1], words, 4)
    return lax.bitcast_convert_type(codes, jnp.uint32), out.factor


def _kernel(refs: SimpleNamespace, sizes: _Sizes) -> None:
    first = pl.program_id(0) * sizes.tile.tokens
    tokens = first + jnp.arange(sizes.tile.tokens, dtype=jnp.int32)
    rows = tokens < sizes.length
    lanes = jnp.arange(sizes.padded_width, dtype=jnp.int32) < sizes.width
    at = pl.ds(first, sizes.tile.tokens)
    key = backend.load(refs.key, (at, slice(None)), rows[:, None] & lanes)
    wide = key.astype(jnp.float32)
    square = (wide * wide).sum(axis=1)
    scale = _over(math.sqrt(sizes.width) / STEPS[sizes.bits], jnp.sqrt(square))
    half, largest = 2 ** (sizes.bits - 1), 2**sizes.bits - 1
    packed = jnp.zeros((sizes.tile.tokens, sizes.padded_bytes), jnp.int32)
    product = jnp.zeros_like(square)
    column = jnp.arange(sizes.padded_bytes, dtype=jnp.int32)
    for part in range(8 // sizes.bits):
        row = column + part * sizes.bytes
        real = (column < sizes.bytes) & (row < sizes.coordinates)
        planes = backend.load(
            refs.planes,
            (pl.ds(part * sizes.bytes, sizes.padded_bytes), slice(None)),
            real[:, None] & lanes,
        )
        z = lax.dot_general(
            key,
            planes,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        level = jnp.clip(jnp.floor(z * scale[:, None]), -half, half - 1)
        unsigned = jnp.where(real, level.astype(jnp.int32) + half, 0)
        packed |= unsigned << (part * sizes.bits)
        product += ((2 * unsigned - largest).astype(jnp.float32) * z).sum(axis=1)
    factor = jnp.minimum(_over(square, product), FACTOR_LIMIT)
    inside = rows[:, None] & (column < sizes.bytes)
    backend.store(refs.codes, (at, slice(None)), packed.astype(jnp.int8), inside)
    backend.store(refs.factor, (at,), factor, rows)


def _over(a: jax.Array | float, b: jax.Array) -> jax.Array:
    """Returns a / b, and 0 where b is not positive."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
