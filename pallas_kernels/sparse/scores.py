"""Scores of cached keys from their codes: integer products of rounded queries with levels.

A key's code holds b bits u_i for each of its M coordinates, which stand for the odd level
2 u_i - (2^b - 1). For a rounded query q8 and a stored factor f,

    score(q, j) = f_j I(q, j),   I = sum_i q8_i level_i = 2 sum_i q8_i u_i - (2^b - 1) sum_i q8_i

Byte i of a code of m bytes holds the coordinates i, i + m, i + 2 m, ... from its lowest bits on. So
a tile of bytes, shifted right by b and masked, is at once the operand of one product for each
coordinate of a byte. The products are exact integers, whatever their order.

A token behind the position of a query is hidden, and has the score -inf. The first `sink` and the
last `window` tokens are forced, and have the score +inf.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import backend
from pallas_kernels.backend import Output
from pallas_kernels.plan import pad_to, traced_alike
from pallas_kernels.sparse.keys import SAMPLE, sample_shift, sample_size, sampled_slots
from pallas_kernels.tiles import power_of_two

MOST_QUERIES = 16  # of a key/value head, T G
FEWEST_COLUMNS = 8  # of a product
FEWEST_BYTES = 32  # of a code in a product of 8-bit integers


class Forced(NamedTuple):
    """The tokens that every query reads: the first `sink`, and the last `window` with its own."""

    sink: int
    window: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel is cut: the tokens of a program, those of a product, and Triton's options."""

    tokens: int = 512
    chunk: int = 128
    num_warps: int = 4
    num_stages: int = 3


PROGRAMS = 528  # four for each multiprocessor of an H200


def tile_for(heads: int, capacity: int) -> Tile:
    """Returns the tile for so many key/value heads of all rows: smaller ones for short caches."""
    tokens = power_of_two(max(1, heads * capacity // PROGRAMS))
    return Tile(tokens=min(max(tokens, Tile.chunk), Tile.tokens))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes of the rounded queries of a head, as the product takes them."""

    parts: int  # coordinates of a byte
    columns: int  # T G, and more that are not used
    bytes: int  # of a code
    padded: int  # bytes of a code as the product takes them

    @classmethod
    def of(cls, queries: int, code_bytes: int, bits: int) -> "Layout":
        """Returns the layout of so many queries of a head, T G."""
        return cls(
            parts=8 // bits,
            columns=max(FEWEST_COLUMNS, power_of_two(queries)),
            bytes=code_bytes,
            padded=max(FEWEST_BYTES, power_of_two(code_bytes)),
        )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The static sizes of a call."""

    queries: int  # T
    group: int  # G
    capacity: int  # C
    bytes: int  # m, of a code
    bits: int  # b
    coordinates: int  # M
    forced: Forced
    shared: bool  # whether the heads of a group share a score, the largest of theirs
    tile: Tile
    interpret: bool

    @property
    def layout(self) -> Layout:
        """The layout of the queries."""
        return Layout.of(self.queries * self.group, self.bytes, self.bits)

    def held(self, tokens: jax.Array) -> jax.Array | None:
        """Returns which tokens of a chunk are slots of the cache, or None if all are."""
        return tokens < self.capacity if self.capacity % self.tile.chunk else None


@traced_alike
def linear_scores(
    rounded: jax.Array,
    codes: jax.Array,
    factor: jax.Array | None,
    positions: jax.Array,
    unit: jax.Array | None = None,
    *,
    bits: int,
    forced: Forced,
    coordinates: int | None = None,
    group: int | None = None,
    most_sampled: int = SAMPLE,
    tile: Tile | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the scores of the tokens that each query sees.

    Args:
      rounded: q8 ``(B, T, N, M)``, integers from -127 to 127 in any dtype, with T G at most 16; or
        what `rounded_queries` returned, with M and G as `coordinates` and `group`.
      codes: ``(B, K, C, W)`` uint32, the codes of the keys.
      factor: ``(B, K, C)`` float16, or None for Hamming scores, -(number of differing signs), where
        q8 is the signs of the query.
      positions: ``(B, T)`` int32, the position of each query, or below 0 for one that sees nothing.
      unit: ``(B, T, N)`` float32, what a score of each query is worth, or None. If it is given, the
        heads of a group share the largest of their scores in these units.
      bits: b.
      forced: which tokens have the score +inf.
      coordinates: M, if q8 is laid out.
      group: G, if q8 is laid out.
      most_sampled: the most scores of a row that its sample holds, a power of two.
      tile: how the work is cut, or None for the heuristic.
      interpret: whether to run in Pallas's interpreter.

    Returns:
      ``(B, T, N, C)`` float32, or ``(B, T, K, C)`` with units, and a sample of them for `select`,
      ``(B, T, N or K, sample_size(C))``. Slots behind the last position of a row are not written.
    """
    (batch, queries), (_, kv_heads, capacity, words) = positions.shape, codes.shape
    tile = tile_for(batch * kv_heads, capacity) if tile is None else tile
    is_laid_out = rounded.ndim == 5
    count = coordinates if is_laid_out else rounded.shape[3]
    sizes = _Sizes(
        queries=queries,
        group=group if is_laid_out else rounded.shape[2] // kv_heads,
        capacity=capacity,
        bytes=4 * words,
        bits=bits,
        coordinates=count,
        forced=forced,
        shared=unit is not None,
        tile=tile,
        interpret=interpret,
    )
    query = rounded if is_laid_out else _by_head(rounded, kv_heads, sizes)
    if unit is not None:
        unit = unit.reshape(batch, queries, kv_heads, sizes.group)
    lists = 1 if sizes.shared else sizes.group
    by_query = (None, queries, None)

    def scored(length: int) -> Output:
        shape = (batch, queries, kv_heads, lists, length)
        return Output(shape, jnp.float32, _block(*by_query, lists, length))

    found = backend.launch(
        functools.partial(_kernel, sizes=sizes),
        name="sparse_scores",
        grid=(-(-capacity // tile.tokens), kv_heads, batch),
        inputs={
            "query": (query, _block(None, None, *query.shape[2:])),
            "positions": (positions, pl.BlockSpec((None, queries), lambda i, k, b: (b, 0))),
            "codes": (_bytes(codes), _block(None, None, capacity, sizes.layout.padded)),
            "factor": (factor, _block(None, None, capacity)),
            "unit": (unit, _block(*by_query, sizes.group)),
        },
        outputs={
            "scores": scored(capacity),
            "sample": scored(sample_size(capacity, most_sampled)),
        },
        block=tile,
        interpret=interpret,
    )
    shape = batch, queries, kv_heads * lists, -1
    return found.scores.reshape(shape), found.sample.reshape(shape)


def _block(*sizes: int | None) -> pl.BlockSpec:
    """Returns the block of one row and key/value head, which are the axes without a size."""

    def index(_, head: jax.Array, row: jax.Array) -> tuple:
        at = iter((row, head))
        return tuple(next(at) if size is None else 0 for size in sizes)

    return pl.BlockSpec(sizes, index)


def _by_head(rounded: jax.Array, kv_heads: int, sizes: _Sizes) -> jax.Array:
    """Returns q8 as ``(B, K, 8 / b, columns, m)`` int8. Column t G + g is query t of head g."""
    batch, queries = rounded.shape[:2]
    parts = 8 // sizes.bits
    query = pad_to(rounded.astype(jnp.int8), parts * sizes.bytes)
    query = query.reshape(batch, queries, kv_heads, sizes.group, parts, sizes.bytes)
    query = query.transpose(0, 2, 4, 1, 3, 5).reshape(batch, kv_heads, parts, -1, sizes.bytes)
    return pad_to(pad_to(query, sizes.layout.columns, axis=3), sizes.layout.padded)


def _bytes(codes: jax.Array) -> jax.Array:
    """Returns words ``(..., W)`` as signed bytes ``(..., 4 W)``, without a copy."""
    return lax.bitcast_convert_type(codes, jnp.int8).reshape(*codes.shape[:-1], -1)


class _Columns(NamedTuple):
    """What a program holds of its queries."""

    query: list[jax.Array]  # (columns, m) int8, one for each coordinate of a byte
    offset: jax.Array  # (columns,) int32, what is subtracted from a product
    positions: jax.Array  # (columns,) int32, or one for all
    unit: jax.Array | None  # (columns,) float32


def _kernel(refs: SimpleNamespace, sizes: _Sizes) -> None:
    chunk = sizes.tile.chunk
    start = pl.program_id(0) * sizes.tile.tokens
    columns = _columns(refs, sizes)
    seen = jnp.max(columns.positions) + 1
    shift = sample_shift(seen, refs.sample.shape[-1], sizes.capacity)
    end = jnp.minimum(start + sizes.tile.tokens, seen)
    # A program behind the last query has no chunk, so that it neither reads nor writes.
    chunks = lax.div(jnp.maximum(end - start, 0) + chunk - 1, chunk)

    def read(first: jax.Array) -> jax.Array | None:
        tokens = first + jnp.arange(chunk, dtype=jnp.int32)
        if refs.factor is None:
            return None
        return backend.load(refs.factor, (pl.ds(first, chunk),), tokens < end)

    def step(index: jax.Array, factor: jax.Array | None) -> jax.Array | None:
        first = start + index * chunk
        after = read(first + chunk)  # a step ahead, because Triton fetches only operands early
        tokens = first + jnp.arange(chunk, dtype=jnp.int32)
        scores = _scores(refs.codes, first, tokens, columns, factor, sizes)
        scores = _ranked(scores, tokens, columns, sizes)
        held = sizes.held(tokens)
        _store(refs.scores, tokens, scores, held, sizes)
        places = tokens >> shift
        sampled = (tokens == sampled_slots(places, shift)) & (tokens < end)
        # The interpreter writes what a mask hides as well, so hidden places are behind the sample.
        places = jnp.where(sampled, places, refs.sample.shape[-1])
        _store(refs.sample, places, scores, sampled, sizes)
        return after

    lax.fori_loop(0, chunks, step, read(start))


def _columns(refs: SimpleNamespace, sizes: _Sizes) -> _Columns:
    query = [refs.query[part] for part in range(8 // sizes.bits)]
    total = sum(part.astype(jnp.int32).sum(axis=1) for part in query)
    offset = (2**sizes.bits - 1) * total
    if refs.factor is None:
        offset += sizes.coordinates  # -(differing signs) = (I - M) / 2
    t, g = _heads(sizes)
    t = jnp.minimum(t, sizes.queries - 1)
    positions = refs.positions[0] if sizes.queries == 1 else refs.positions[t]
    return _Columns(query, offset, positions, None if refs.unit is None else refs.unit[t, g])


def _heads(sizes: _Sizes) -> tuple[jax.Array, jax.Array]:
    """Returns which query and which head of the group a column is."""
    column = jnp.arange(sizes.layout.columns, dtype=jnp.int32)
    return lax.div(column, sizes.group), lax.rem(column, sizes.group)


def _scores(codes, first: jax.Array, tokens: jax.Array, columns: _Columns, factor, sizes: _Sizes):
    """Returns f I of a chunk, ``(chunk, columns)`` float32."""
    held = sizes.held(tokens)
    if sizes.layout.padded != sizes.bytes:
        inside = jnp.arange(sizes.layout.padded, dtype=jnp.int32) < sizes.bytes
        held = jnp.broadcast_to(
            inside if held is None else held[:, None] & inside, (len(tokens), sizes.layout.padded)
        )
    codes = backend.load(codes, (pl.ds(first, len(tokens)), slice(None)), held)
    products = [
        lax.dot_general(
            backend.bits_of_bytes(codes, part * sizes.bits, sizes.bits, sizes.interpret),
            query,
            (((1,), (1,)), ((), ())),
            preferred_element_type=jnp.int32,
        )
        for part, query in enumerate(columns.query)
    ]
    integers = 2 * sum(products[1:], start=products[0]) - columns.offset
    if factor is None:
        return integers.astype(jnp.float32) * 0.5
    return integers.astype(jnp.float32) * factor.astype(jnp.float32)[:, None]


def _ranked(scores: jax.Array, tokens: jax.Array, columns: _Columns, sizes: _Sizes) -> jax.Array:
    """Returns scores in the units of the queries, +inf for forced and -inf for hidden tokens."""
    if columns.unit is not None:
        scores = scores * columns.unit
    tokens, positions = tokens[:, None], columns.positions
    forced = (tokens < sizes.forced.sink) | (tokens > positions - sizes.forced.window)
    scores = jnp.where(forced, jnp.inf, scores)
    return jnp.where(tokens <= positions, scores, -jnp.inf)


def _store(out, places: jax.Array, scores: jax.Array, held, sizes: _Sizes) -> None:
    """Writes the columns that are queries, or the largest of each group of them."""
    t, g = _heads(sizes)
    if sizes.shared:
        for query in range(sizes.queries):
            largest = jnp.where(t == query, scores, -jnp.inf).max(axis=1)
            backend.store(out, (query, 0, places), largest, held)
        return
    real = jnp.broadcast_to(t < sizes.queries, scores.shape)
    real = real if held is None else real & held[:, None]
    at = tuple(jnp.broadcast_to(x, scores.shape) for x in (t, g, places[:, None]))
    backend.store(out, at, scores, real)
