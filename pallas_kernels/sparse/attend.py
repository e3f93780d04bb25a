"""Attention of a few queries to cached keys and values, split over the keys of every row.

Queries (B, T, N, H) and a cache (B, C, K, H), (B, C, K, V) give outputs (B, T, N, V). One kernel
reads either all slots up to the position of a query, or those of a list. Program (list, split, row)
walks over tiles of its part of the slots. With logits l in base 2 it keeps

    c = max_s l_s,   mass = sum_s 2**(l_s - c),   total = sum_s 2**(l_s - c) v_s

and a second kernel adds those of the splits. A split is a share of the length and not of the
capacity, so that all programs have work at every length.
"""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backend import LOG2_E, Arithmetic, Output, launch, load, store
from pallas_kernels.blocks import Block
from pallas_kernels.plan import traced_alike
from pallas_kernels.tiles import power_of_two

ROWS = 16  # the fewest rows of a matrix product, of which G·T are used
LOWEST = float(jnp.finfo(jnp.float32).min)
TINY = float(jnp.finfo(jnp.float32).tiny)
WIDTHS = (16, 32, 64, 128, 256)  # of keys and values
DTYPES = ("bfloat16",)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernel is cut: slots of a tile, splits of a row, and Triton's warps and stages."""

    splits: int
    tile: int = 64
    num_warps: int = 4
    num_stages: int = 2


# The number of programs to aim for: an H200 has 132 multiprocessors and runs about four programs on
# each. A split has at least so many tiles that its partial sums cost little beside them.
PROGRAMS = 528
TILES_OF_A_SPLIT = 2
MAX_SPLITS = 128


def plan_for(problems: int, slots: int, tile: int = 64) -> Plan:
    """Returns the plan for `problems` lists, or rows times key/value heads, of so many slots."""
    most = max(1, slots // (tile * TILES_OF_A_SPLIT))
    return Plan(max(1, min(PROGRAMS // max(problems, 1), most, MAX_SPLITS)), tile)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of a call, as the kernel sees it."""

    times: int  # queries that share a list: T if dense, else 1
    group: int  # query heads that share a list
    slots: int  # the capacity, or the length of a list
    head_dim: int
    value_dim: int
    plan: Plan
    arithmetic: Arithmetic

    @property
    def queries(self) -> int:
        return self.times * self.group


@traced_alike
def dense_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    slopes: jax.Array | None = None,
    *,
    plan: Plan | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attends to every slot up to the position of each query.

    Args:
      query: ``(B, T, N, H)``, in the dtype of the keys. G·T is at most 16.
      key: ``(B, C, K, H)``.
      value: ``(B, C, K, V)``.
      positions: ``(B, T)`` int32 below C, -1 for a query that sees nothing and gets zeros, or less
        for one that gets NaN.
      slopes: ``(K, G)`` float32, by how much a logit falls per token of distance, or None.
      plan: how to cut the call, or None for the heuristic.
      interpret: whether to run in the interpreter, on any device.

    Returns:
      ``(B, T, N, V)``, in the dtype of the values. Sums are float32.

    Source: beyond the paper.
    """
    batch, times, heads, _ = query.shape
    kv_heads = key.shape[2]
    grouped = query.reshape(batch, times, kv_heads, heads // kv_heads, -1)
    arrays = {"positions": positions, "slopes": slopes, "indices": None, "count": None}
    out = _attend(grouped, key, value, arrays, plan, interpret)
    return out.reshape(batch, times, heads, -1)


@traced_alike
def listed_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    indices: jax.Array,
    count: jax.Array,
    *,
    positions: jax.Array | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attends to the slots of a list, which each query and each selecting head has for itself.

    Args:
      query: ``(B, T, N, H)``, in the dtype of the keys.
      key: ``(B, C, K, H)``.
      value: ``(B, C, K, V)``.
      indices: ``(B, T, M, budget)`` int32, the slots of every list. M is N, or K if the query heads
        of a key/value head share a list.
      count: ``(B, T, M)`` int32, how many of them there are. Those behind are not read.
      positions: ``(B, T)`` int32, below -1 for a query that gets NaN, or None if there is none.
      plan: how to cut the call, or None for the heuristic.
      interpret: whether to run in the interpreter, on any device.

    Returns:
      ``(B, T, N, V)``, in the dtype of the values, and zeros for an empty list. Sums are float32.

    Source: arXiv 2602.06283, its attention to the kept tokens.
    """
    batch, times, heads, _ = query.shape
    lists, budget = indices.shape[2:]
    grouped = query.reshape(batch * times, 1, lists, heads // lists, -1)
    arrays = {
        "positions": None if positions is None else positions.reshape(batch * times, 1),
        "slopes": None,
        "indices": indices.reshape(batch * times, lists, budget),
        "count": count.reshape(batch * times, lists),
    }
    out = _attend(grouped, key, value, arrays, plan, interpret)
    return out.reshape(batch, times, heads, -1)


def _attend(query, key, value, arrays, cut: Plan | None, interpret: bool) -> jax.Array:
    """Returns outputs (Q, T, M, G, V) of queries (Q, T, M, G, H).

    Q is the number of rows, times the queries of each if these have lists of their own.
    """
    rows, times, lists, group, head_dim = query.shape
    batch, capacity, kv_heads, value_dim = value.shape
    indices = arrays["indices"]
    slots = capacity if indices is None else indices.shape[-1]
    cut = plan_for(rows * lists, slots) if cut is None else cut
    arithmetic = Arithmetic(value.dtype, interpret)
    problem = Problem(times, group, slots, head_dim, value_dim, cut, arithmetic)
    per_head, per_row = lists // kv_heads, rows // batch

    def one(*shape: int) -> pl.BlockSpec:
        """One list of an array (Q, M, ...)."""
        return pl.BlockSpec((None, None, *shape), lambda m, s, q: (q, m, *(0,) * len(shape)))

    def cached(width: int) -> pl.BlockSpec:
        shape = (None, capacity, None, width)
        return pl.BlockSpec(shape, lambda m, s, q: (q // per_row, 0, m // per_head, 0))

    def partial(*shape: int) -> Output:
        spec = pl.BlockSpec(
            (None, None, None, *shape), lambda m, s, q: (q, m, s, *(0,) * len(shape))
        )
        return Output((rows, lists, cut.splits, *shape), jnp.float32, spec)

    whole = (None, times, None, group, head_dim)
    sums = launch(
        lambda refs: _kernel(problem, refs),
        name="sparse_attend" if indices is not None else "dense_attend",
        grid=(lists, cut.splits, rows),
        inputs={
            "query": (query, pl.BlockSpec(whole, lambda m, s, q: (q, 0, m, 0, 0))),
            "key": (key, cached(head_dim)),
            "value": (value, cached(value_dim)),
            "positions": (
                arrays["positions"] if indices is None else None,
                pl.BlockSpec((None, times), lambda m, s, q: (q, 0)),
            ),
            "slopes": (arrays["slopes"], pl.BlockSpec((None, group), lambda m, s, q: (m, 0))),
            "indices": (indices, one(slots)),
            "count": (arrays["count"], one()),
        },
        outputs={
            "largest": partial(ROWS),
            "mass": partial(ROWS),
            "total": partial(ROWS, value_dim),
        },
        block=Block(value_dim, cut.num_warps, cut.num_stages),
        interpret=interpret,
    )
    shape = rows, times, lists, group, value_dim
    out = Output(shape, value.dtype, _query_head(problem, value_dim))
    return _merged(problem, vars(sums), arrays["positions"], out)


def _kernel(problem: Problem, refs: SimpleNamespace) -> None:
    cut, math_ = problem.plan, problem.arithmetic
    row = lax.iota(jnp.int32, ROWS)
    used = row < problem.queries
    within = jnp.minimum(row, problem.queries - 1)
    time, head = within // problem.group, within % problem.group
    query = load(refs.query, _cells(problem.head_dim, time, head), used)
    positions = slopes = None
    if refs.indices is None:
        positions = jnp.where(used, refs.positions[time], -1)
        slopes = None if refs.slopes is None else refs.slopes[head] * LOG2_E
        end = jnp.max(positions) + 1
    else:
        end = refs.count[...]

    def body(index, sums):
        largest, mass, total = sums
        slots = index * cut.tile + lax.iota(jnp.int32, cut.tile)
        real = slots < end
        if refs.indices is None:
            read = slots
        else:
            read = load(refs.indices, (pl.ds(index * cut.tile, cut.tile),), real)
        key = load(refs.key, _cells(problem.head_dim, read), real)
        logits = math_.dot(query, key, "nt") * (LOG2_E / math.sqrt(problem.head_dim))
        sees = jnp.broadcast_to(real[None, :], logits.shape)
        if positions is not None:
            distance = positions[:, None] - slots[None, :]
            sees = distance >= 0
            if slopes is not None:
                logits -= slopes[:, None] * distance.astype(jnp.float32)
        logits = jnp.where(sees, logits, -jnp.inf)
        highest = jnp.maximum(largest, jnp.max(logits, axis=1))
        weights, fade = math_.exp2(logits - highest[:, None]), math_.exp2(largest - highest)
        value = load(refs.value, _cells(problem.value_dim, read), real)
        total = total * fade[:, None] + math_.dot(weights, value)
        return highest, mass * fade + jnp.sum(weights, axis=1), total

    zeros = jnp.zeros((ROWS,), jnp.float32)
    start = zeros + LOWEST, zeros, jnp.zeros((ROWS, problem.value_dim), jnp.float32)
    first, last = share(end, cut.tile, cut.splits)
    largest, mass, total = lax.fori_loop(first, last, body, start)
    everything = slice(None)
    store(refs.largest, (everything,), largest, used)
    store(refs.mass, (everything,), mass, used)
    store(refs.total, (everything, everything), total, used)


def _cells(width: int, *rows: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the index of whole rows of a reference whose last axis has this width.

    The interpreter takes either slices or arrays of numbers, but not both in one index.
    """
    columns = lax.iota(jnp.int32, width)[None, :]
    return *(row[:, None] for row in rows), columns


def share(end: jax.Array, tile: int, splits: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first tile of this program's split of `end` slots, and the one after its last."""
    tiles = lax.div(end + (tile - 1), tile)
    each = lax.div(tiles + (splits - 1), splits)
    first = pl.program_id(1) * each
    return first, jnp.minimum(first + each, tiles)


def _query_head(problem: Problem, width: int) -> pl.BlockSpec:
    """One query of one head of an array (Q, T, M, G, width), for the grid (M, T·G, Q)."""
    group = problem.group
    return pl.BlockSpec(
        (None, None, None, None, width),
        lambda m, r, q: (q, lax.div(r, group), m, lax.rem(r, group), 0),
    )


def _merged(problem: Problem, sums: dict, positions: jax.Array | None, out: Output) -> jax.Array:
    """Returns the mean of the values from the sums of the splits, which are axis 2."""
    rows, lists, splits, *_ = sums["mass"].shape
    number = pl.BlockSpec((None, None, splits, None), lambda m, r, q: (q, m, 0, r))
    vector = (None, None, splits, None, problem.value_dim)
    whole = pl.BlockSpec(vector, lambda m, r, q: (q, m, 0, r, 0))
    given = {name: (x, whole if name == "total" else number) for name, x in sums.items()}
    time = pl.BlockSpec((None, None), lambda m, r, q: (q, lax.div(r, problem.group)))
    return launch(
        lambda refs: _merge_kernel(problem, refs),
        name="attend_merge",
        grid=(lists, problem.queries, rows),
        inputs=given | {"positions": (positions, time)},
        outputs={"out": out},
        block=Block(problem.value_dim, num_warps=8, num_stages=1),
        interpret=problem.arithmetic.interpret,
    ).out


def _merge_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    splits = problem.plan.splits
    split = lax.iota(jnp.int32, power_of_two(splits))
    real, split = split < splits, jnp.minimum(split, splits - 1)
    largest = jnp.where(real, load(refs.largest, (split,), real), LOWEST)
    scale = problem.arithmetic.exp2(largest - jnp.max(largest))
    mass = jnp.sum(scale * load(refs.mass, (split,), real))
    total = load(refs.total, _cells(problem.value_dim, split), real)
    out = jnp.sum(scale[:, None] * total, axis=0) / jnp.maximum(mass, TINY)
    if refs.positions is not None:
        out = jnp.where(refs.positions[...] < -1, jnp.nan, out)
    refs.out[...] = out.astype(refs.out.dtype)


def limit(query: Any, key: Any, value: Any, queries: int) -> str | None:
    """Returns why the kernel cannot attend where so many queries read the same keys, or None."""
    for name, array in (("query", query), ("key", key), ("value", value)):
        if str(array.dtype) not in DTYPES:
            return f"the sparse kernels support {' and '.join(DTYPES)}; {name} has {array.dtype}"
    for name, width in (("key", key.shape[-1]), ("value", value.shape[-1])):
        if width not in WIDTHS:
            return f"the sparse kernels support head dims in {WIDTHS}; {name} has {width}"
    if queries > ROWS:
        return (
            f"the sparse kernels support up to {ROWS} queries that read the same keys, which are "
            f"G·T; got {queries}"
        )
    return None
