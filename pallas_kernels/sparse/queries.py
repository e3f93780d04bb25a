"""Rotated queries in 8 bits, laid out as the scores take them.

For rotations R (M, H) and queries q (H),

    z = R q,   unit = max_i |z_i| / 127,   q8_i = round(z_i / unit)

or, for Hamming scores, q8_i = 1 where z_i >= 0 and -1 elsewhere. Products of bfloat16 are exact and
their sums are in float32, so another order of the sums may round a z_i that lies between two
integers to the other one.
"""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.backend import Output
from pallas_kernels.blocks import Block
from pallas_kernels.plan import traced_alike
from pallas_kernels.sparse.attend import ROWS
from pallas_kernels.sparse.scores import Layout
from pallas_kernels.tiles import padded

MOST = 127.0
TO_INTEGER = 1.5 * 2.0**23  # added and subtracted, it rounds a small float32 to an integer


@dataclasses.dataclass(frozen=True)
class _Sizes:
    queries: int  # T
    group: int  # G
    width: int  # H
    coordinates: int  # M
    layout: Layout
    signs: bool

    @property
    def padded_width(self) -> int:
        return padded(self.width)


@traced_alike
def rounded_queries(
    query: jax.Array,
    planes: jax.Array,
    *,
    kv_heads: int,
    bits: int,
    signs: bool = False,
    num_warps: int = 8,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Rotates queries and rounds them to 8 bits.

    Args:
      query: ``(B, T, N, H)`` bfloat16. T G is at most 16.
      planes: rotations ``(M, H)`` bfloat16.
      kv_heads: K.
      bits: b, of a coordinate of the codes.
      signs: whether only the signs are wanted, for Hamming scores.
      num_warps: the warps of a program.
      interpret: whether to run in Pallas's interpreter.

    Returns:
      q8 as `linear_scores` takes it, ``(B, K, 8 / b, columns, bytes)`` int8, and what a one is
      worth, ``(B, T, N)`` float32.
    """
    batch, queries, heads, width = query.shape
    group, count = heads // kv_heads, len(planes)
    layout = Layout.of(queries * group, 4 * (-(-count * bits // 32)), bits)
    sizes = _Sizes(queries, group, width, count, layout, signs)
    shape = layout.parts, layout.columns, layout.padded

    def per_head(*block: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *block), lambda k, b: (b, k, *[0] * len(block)))

    by_head = (None, queries, None, group)
    out = backend.launch(
        functools.partial(_kernel, sizes=sizes),
        name="sparse_queries",
        grid=(kv_heads, batch),
        inputs={
            "query": (
                query.reshape(batch, queries, kv_heads, group, width),
                pl.BlockSpec((*by_head, sizes.padded_width), lambda k, b: (b, 0, k, 0, 0)),
            ),
            "planes": (
                planes,
                pl.BlockSpec((count, sizes.padded_width), lambda k, b: (0, 0)),
            ),
        },
        outputs={
            "rounded": Output((batch, kv_heads, *shape), jnp.int8, per_head(*shape)),
            "unit": Output(
                (batch, queries, kv_heads, group),
                jnp.float32,
                pl.BlockSpec(by_head, lambda k, b: (b, 0, k, 0)),
            ),
        },
        block=Block(ROWS, num_warps, 1),
        interpret=interpret,
    )
    return out.rounded, out.unit.reshape(batch, queries, heads)


def _kernel(refs: SimpleNamespace, sizes: _Sizes) -> None:
    layout = sizes.layout
    row = lax.iota(jnp.int32, ROWS)
    used = row < sizes.queries * sizes.group
    within = jnp.minimum(row, sizes.queries * sizes.group - 1)
    t, g = lax.div(within, sizes.group), lax.rem(within, sizes.group)
    lanes = lax.iota(jnp.int32, sizes.padded_width)
    inside = lanes < sizes.width
    at = t[:, None], g[:, None], lanes[None, :]
    query = backend.load(refs.query, at, used[:, None] & inside[None, :])
    column = lax.iota(jnp.int32, layout.padded)
    projections = []
    for part in range(layout.parts):
        plane = column + part * layout.bytes
        real = (column < layout.bytes) & (plane < sizes.coordinates)
        plane = jnp.minimum(plane, sizes.coordinates - 1)
        planes = backend.load(
            refs.planes, (plane[:, None], lanes[None, :]), real[:, None] & inside[None, :]
        )
        z = lax.dot_general(
            query,
            planes,
            (((1,), (1,)), ((), ())),
            precision=lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        projections.append((jnp.where(real[None, :], z, 0.0), real))
    if sizes.signs:
        unit = jnp.ones((ROWS,), jnp.float32)
        rounded = [jnp.where(real & (z >= 0), 1.0, -1.0) for z, real in projections]
    else:
        largest = functools.reduce(
            jnp.maximum, (jnp.max(jnp.abs(z), axis=1) for z, _ in projections)
        )
        unit = largest / MOST
        divisor = jnp.where(unit > 0, unit, 1.0)[:, None]
        rounded = [(z / divisor + TO_INTEGER) - TO_INTEGER for z, _ in projections]
    kept = row < layout.columns
    for part, (value, (_, real)) in enumerate(zip(rounded, projections, strict=True)):
        value = jnp.where(used[:, None] & real[None, :], value, 0.0).astype(jnp.int32)
        rows, columns = row[:, None], column[None, :]
        mask = jnp.broadcast_to(kept[:, None], value.shape)
        backend.store(
            refs.rounded,
            (part, jnp.broadcast_to(rows, value.shape), jnp.broadcast_to(columns, value.shape)),
            value,
            mask,
        )
    backend.store(refs.unit, (jnp.where(used, t, sizes.queries), g), unit, used)
