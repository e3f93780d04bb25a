"""Exact selection of the best tokens of every row of scores, in three kernels.

Scores (B, T, M, C) and the positions of the queries give, for every row, the `budget` best of the
visible tokens in ascending order. A score becomes an integer key of the same order, and a forced
token has the largest key. The kernels are

    count     takes thresholds t_i from a sample, and counts the keys >= t_i in each split of a row
    gather    writes the tokens with a key >= t, the largest t_i that `budget` keys reach, to a list
    finish    finds the key of rank `budget` in that list by bisection, and writes the final list

The sample decides only how long the list in between is, never what is selected. If it is longer
than its buffer, as where most scores are equal, `finish` reads the row itself, which takes longer.
"""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backend import Output, launch, load, store
from pallas_kernels.blocks import Block
from pallas_kernels.plan import traced_alike
from pallas_kernels.sparse.attend import share
from pallas_kernels.sparse.keys import LEAST, MOST, mean, ranks, tile_of_row

DIGITS = 16  # the parts into which a step of the search in the sample cuts an interval
STEPS = 5  # of that search, which leaves 2**12 of 2**32 keys
DEVIATIONS = 4  # by how many standard deviations the rank in a sample is overestimated


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels are cut. Every plan selects the same tokens."""

    splits: int  # of a row
    room: int  # the length of the list in between, a power of two
    thresholds: int = 8
    sample: int = 512
    tile: int = 1024  # tokens that a program reads at once
    final_tile: int = 8192  # the same for `finish`, which has one program a row
    num_warps: int = 4
    final_warps: int = 8


PROGRAMS = 528  # two to four for each multiprocessor of an H200
TOKENS_OF_A_SPLIT = 2048
MAX_SPLITS = 64


def plan_for(rows: int, capacity: int, budget: int) -> Plan:
    """Returns the plan for so many rows of scores."""
    most = min(MAX_SPLITS, -(-capacity // TOKENS_OF_A_SPLIT))
    splits = max(1, min(PROGRAMS // max(rows, 1), most))
    room = min(budget + max(1024, capacity // 64), capacity)
    return Plan(splits, max(16, _power_of_two(room)))


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of a call, as the kernels see it."""

    capacity: int
    budget: int
    sink: int
    window: int
    plan: Plan


@traced_alike
def select(
    scores: jax.Array,
    positions: jax.Array,
    *,
    budget: int,
    sink: int = 0,
    window: int = 0,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the forced tokens and the best others, `budget` in all.

    Args:
      scores: ``(B, T, M, C)`` float32. Larger is better, NaN is worst, and of equal scores the
        earlier token is the better one. Those after the position of the query are not read.
      positions: ``(B, T)`` int32 below C, or -1 for a query that sees nothing.
      budget: the length of a list.
      sink: how many of the first tokens are forced.
      window: how many of the last visible tokens are forced; with ``sink`` at most ``budget``.
      plan: how to cut the call, or None for the heuristic.
      interpret: whether to run in the interpreter, on any device.

    Returns:
      ``(B, T, M, budget)`` int32, the positions in ascending order, and 0 after ``count``; and
      ``(B, T, M)`` int32, how many of them there are.

    Source: beyond the paper.
    """
    batch, times, lists, capacity = scores.shape
    rows = batch * times * lists
    cut = plan_for(rows, capacity, budget) if plan is None else plan
    problem = Problem(capacity, budget, sink, window, cut)
    given = {
        "scores": (scores.reshape(rows, capacity), _row(capacity)),
        "positions": (
            positions.reshape(batch * times),
            pl.BlockSpec((None,), lambda _, s, r: (lax.div(r, lists),)),
        ),
    }
    given = _counted(problem, given, rows, interpret)
    given = _gathered(problem, given, rows, interpret)
    indices, count = _finished(problem, given, rows, interpret)
    return indices.reshape(*scores.shape[:3], budget), count.reshape(scores.shape[:3])


# Block specifications, for the grid (1, splits, rows).


def _row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda _, s, r: (r, *(0,) * len(shape)))


def _part(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), lambda _, s, r: (r, s, *(0,) * len(shape)))


def _counted(problem: Problem, given: dict, rows: int, interpret: bool) -> dict:
    """Returns the inputs, with the counts and thresholds of all splits, (rows, splits, n) each."""
    cut = problem.plan
    shape = cut.splits, cut.thresholds
    out = Output((rows, *shape), jnp.int32, _part(cut.thresholds))
    results = launch(
        lambda refs: _count_kernel(problem, refs),
        name="sparse_count",
        grid=(1, cut.splits, rows),
        inputs=given,
        outputs={"counts": out, "thresholds": out},
        block=Block(cut.tile, cut.num_warps),
        interpret=interpret,
    )
    return given | {name: (array, _row(*shape)) for name, array in vars(results).items()}


def _count_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    cut, end = problem.plan, refs.positions[...] + 1
    thresholds = _thresholds(problem, refs.scores, end)

    def body(index, counts):
        _, keys = tile_of_row(problem, refs.scores, index * cut.tile, cut.tile, end)
        return counts + (keys[None, :] >= thresholds[:, None]).astype(jnp.int32)

    counts = jnp.zeros((cut.thresholds, cut.tile), jnp.int32)
    counts = lax.fori_loop(*share(end, cut.tile, cut.splits), body, counts)
    refs.counts[...] = jnp.sum(counts, axis=1)
    refs.thresholds[...] = thresholds


def _thresholds(problem: Problem, scores: Any, end: jax.Array) -> jax.Array:
    """Returns ascending thresholds. The first is below all keys, and the second below enough.

    If p of the tokens are wanted, about p n of a sample of n are among them, give or take
    sqrt(p n). The second threshold is a key that safely more than p n of the sample reach.
    """
    cut, number = problem.plan, problem.plan.sample
    spread = lax.iota(jnp.int32, number)
    whole, rest = lax.div(end, number), lax.rem(end, number)
    slots = spread * whole + lax.div(spread * rest, number)
    sample = ranks(problem, load(scores, (slots,), slots < end), slots, end)
    share_of = problem.budget / jnp.maximum(end, 1).astype(jnp.float32)
    expected = jnp.minimum(share_of, 1.0) * number
    rank = expected + DEVIATIONS * jnp.sqrt(expected) + 2.0
    rank = jnp.minimum(rank, float(number)).astype(jnp.int32)
    digits = lax.iota(jnp.int32, DIGITS)

    def narrow(_, interval):
        low, step = interval
        reached = (sample[None, :] >= (low + digits * step)[:, None]).astype(jnp.int32)
        enough = jnp.sum(reached, axis=1) >= rank
        low = low + step * jnp.maximum(jnp.sum(enough.astype(jnp.int32)) - 1, 0)
        return low, step >> 4

    start = jnp.int32(LEAST), jnp.int32(1 << 28)
    low, _ = lax.fori_loop(0, STEPS, narrow, start)
    candidates = jnp.where(sample == MOST, LEAST, sample)
    high = jnp.maximum(jnp.max(candidates), low)
    step = lax.div((high >> 1) - (low >> 1), cut.thresholds - 1) * 2
    order = lax.iota(jnp.int32, cut.thresholds)
    return jnp.where(order == 0, LEAST + 1, jnp.maximum(low + (order - 1) * step, LEAST + 1))


def _gathered(problem: Problem, given: dict, rows: int, interpret: bool) -> dict:
    """Returns the inputs, with the list in between: slots and keys, (rows, room) each."""
    cut = problem.plan
    out = Output((rows, cut.room), jnp.int32, _row(cut.room))
    results = launch(
        lambda refs: _gather_kernel(problem, refs),
        name="sparse_gather",
        grid=(1, cut.splits, rows),
        inputs=given,
        outputs={"found": out, "keys": out},
        block=Block(cut.tile, cut.num_warps),
        interpret=interpret,
    )
    return given | {name: (array, _row(cut.room)) for name, array in vars(results).items()}


def _gather_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    cut, end = problem.plan, refs.positions[...] + 1
    low, _, before, _ = _border(problem, refs, end)

    def body(index, before):
        slots, keys = tile_of_row(problem, refs.scores, index * cut.tile, cut.tile, end)
        chosen = keys >= low
        places = before + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        here = chosen & (places < cut.room)
        places = jnp.where(here, places, cut.room)
        store(refs.found, (places,), slots, here)
        store(refs.keys, (places,), keys, here)
        return before + jnp.sum(chosen.astype(jnp.int32))

    lax.fori_loop(*share(end, cut.tile, cut.splits), body, before)


def _border(problem: Problem, refs: SimpleNamespace, end: jax.Array):
    """Returns the interval that holds the key of the last selected token, and two counts.

    The counts are of the keys that reach the lower end, in the splits before this program's and in
    all of them.
    """
    cut = problem.plan
    splits = lax.iota(jnp.int32, _power_of_two(cut.splits))
    order = lax.iota(jnp.int32, cut.thresholds)
    at = jnp.minimum(splits, cut.splits - 1)[:, None], order[None, :]
    counts = load(refs.counts, at, splits < cut.splits)
    totals = jnp.sum(counts, axis=0)
    thresholds = refs.thresholds[0, :]
    enough = totals >= jnp.minimum(end, problem.budget)
    low = jnp.max(jnp.where(enough, thresholds, LEAST))
    high = jnp.min(jnp.where(enough, MOST, thresholds))
    # Thresholds may be equal. The last of those that are has the same counts as the others.
    chosen = jnp.max(jnp.where(enough, order, 0))
    of_chosen = jnp.sum(jnp.where(order[None, :] == chosen, counts, 0), axis=1)
    before = jnp.sum(jnp.where(splits < pl.program_id(1), of_chosen, 0))
    return low, high, before, jnp.sum(of_chosen)


def _finished(problem: Problem, given: dict, rows: int, interpret: bool):
    """Returns the final lists (rows, budget), and how long they are."""
    cut = problem.plan
    results = launch(
        lambda refs: _finish_kernel(problem, refs),
        name="sparse_finish",
        grid=(1, 1, rows),
        inputs=given,
        outputs={
            "indices": Output((rows, problem.budget), jnp.int32, _row(problem.budget)),
            "count": Output((rows,), jnp.int32, _row()),
        },
        block=Block(cut.final_tile, cut.final_warps, 1),
        interpret=interpret,
    )
    return results.indices, results.count


def _finish_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    cut, end = problem.plan, refs.positions[...] + 1
    low, high, _, number = _border(problem, refs, end)
    wanted = jnp.minimum(end, problem.budget)
    refs.count[...] = wanted
    over = _source(problem, refs, end, number)

    def reaching(key):
        def add(counts, slots, keys, real):
            return counts + ((keys >= key) & real).astype(jnp.int32)

        return jnp.sum(over(add, jnp.zeros((_final_tile(problem),), jnp.int32)))

    def halve(interval):
        low, high = interval
        middle = mean(low, high)
        enough = reaching(middle) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    # All tokens of the list are wanted if there are no more of them.
    high = jnp.where(number <= wanted, low, high)
    last, _ = lax.while_loop(lambda x: mean(*x) > x[0], halve, (low, high))
    ties = wanted - reaching(last + 1)
    ties = jnp.where(number <= wanted, number, ties)

    def write(carry, slots, keys, real):
        before, ties_before = carry
        tied = ((keys == last) & real).astype(jnp.int32)
        in_time = ties_before + jnp.cumsum(tied) <= ties
        chosen = real & ((keys > last) | ((keys == last) & in_time))
        places = before + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        chosen = chosen & (places < problem.budget)
        store(refs.indices, (jnp.where(chosen, places, problem.budget),), slots, chosen)
        return before + jnp.sum(chosen.astype(jnp.int32)), ties_before + jnp.sum(tied)

    written, _ = over(write, (jnp.int32(0), jnp.int32(0)))

    def clear(index, _):
        slots = index * cut.tile + lax.iota(jnp.int32, cut.tile)
        empty = (slots >= written) & (slots < problem.budget)
        store(
            refs.indices, (jnp.where(empty, slots, problem.budget),), jnp.zeros_like(slots), empty
        )

    lax.fori_loop(lax.div(written, cut.tile), pl.cdiv(problem.budget, cut.tile), clear, None)


def _final_tile(problem: Problem) -> int:
    return min(problem.plan.final_tile, problem.plan.room)


def _source(problem: Problem, refs: SimpleNamespace, end: jax.Array, number: jax.Array):
    """Returns a function that folds over tiles of the list in between, or else of the row.

    A list that fits in one tile is read once, and kept in registers.
    """
    room, tile = problem.plan.room, _final_tile(problem)
    fits = number <= room
    listed = jnp.where(fits, number, 0)

    def tile_of_list(start):
        slots = start + lax.iota(jnp.int32, tile)
        real = slots < listed
        return *(
            load(ref, (jnp.minimum(slots, room - 1),), real) for ref in (refs.found, refs.keys)
        ), real

    held = tile_of_list(0) if room == tile else None

    def over(add, carry):
        def of_list(index, carry):
            return add(carry, *tile_of_list(index * tile))

        def of_row(index, carry):
            slots, keys = tile_of_row(problem, refs.scores, index * tile, tile, end)
            return add(carry, slots, keys, slots < end)

        if held is None:
            carry = lax.fori_loop(0, lax.div(listed + (tile - 1), tile), of_list, carry)
        else:
            carry = add(carry, *held)
        tiles = jnp.where(fits, 0, lax.div(end + (tile - 1), tile))
        return lax.fori_loop(0, tiles, of_row, carry)

    return over


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
