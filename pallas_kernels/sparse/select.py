"""Exact selection of the best tokens of every row of scores, in three kernels.

Scores (B, T, M, C) and the positions of the queries give, for every row, the `budget` best of the
visible tokens in ascending order. A score becomes an integer key of the same order, and a forced
token has the largest key. The kernels are

    threshold   takes a key t from a sample of a row, so low that at least `budget` keys of the row
                almost surely reach it
    gather      lists the tokens with a key >= t in each split of a row
    finish      joins the lists of a row, finds the key of rank `budget` by bisection, and writes
                the final list

The sample decides only how long the lists in between are, never what is selected. If too few keys
reach t, or a list is longer than its room, `finish` reads the row itself, which takes longer.
"""

import dataclasses
import functools
import math
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

STEPS = 20  # of the search in the sample, which leave 2**12 of 2**32 keys
DEVIATIONS = 4  # by how many standard deviations the rank in a sample is overestimated


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels are cut. Every plan selects the same tokens."""

    splits: int  # of a row
    room: int  # the most tokens that the list of a split holds
    # The next four are powers of two. `held` and `chunk` are below 2**15.
    held: int  # entries of the joined lists that `finish` keeps in registers
    sample: int = 2048  # tokens of a row that `threshold` reads
    tile: int = 2048  # tokens that a program of `gather` reads at once
    chunk: int = 1024  # entries that `finish` reads at once if there are more
    sample_warps: int = 8
    num_warps: int = 4
    final_warps: int = 16

    def length(self, capacity: int) -> int:
        """Returns the length of the list of a split."""
        tiles = -(-capacity // (self.tile * self.splits))
        return min(tiles * self.tile, self.room)


PROGRAMS = 528  # two to four for each multiprocessor of an H200
TOKENS_OF_A_SPLIT = 4096
MAX_SPLITS = 16
LEAST_HELD, MOST_HELD = 128, 16384  # the least is one for each thread of four warps


def plan_for(rows: int, capacity: int, budget: int) -> Plan:
    """Returns the plan for so many rows of scores."""
    most = min(MAX_SPLITS, -(-capacity // TOKENS_OF_A_SPLIT))
    splits = max(1, min(PROGRAMS // max(rows, 1), most))
    # The expected number of keys that reach the threshold is the rank that `_threshold_kernel`
    # takes, rounded up, times the tokens for which one of the sample stands. Where the rank is
    # small, single rows have up to three times as many.
    tokens = capacity / Plan.sample
    number = budget + DEVIATIONS * math.sqrt(budget * tokens) + 3.0 * tokens
    number = min(math.ceil(number), capacity)
    held = min(max(_power_of_two(number + number // 16), LEAST_HELD), MOST_HELD)
    warps = 4 if held < 4096 else 8 if held < MOST_HELD else 16  # the fastest on an H100
    return Plan(splits, min(3 * number + 512, capacity), held, final_warps=warps)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static sizes of a call, as the kernels see it."""

    capacity: int
    budget: int
    sink: int
    window: int
    plan: Plan

    @property
    def length(self) -> int:
        """The length of the list of a split."""
        return self.plan.length(self.capacity)


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
        earlier token is the better one. Those after the position of the query may be anything.
      positions: ``(B, T)`` int32 below C, or -1 for a query that sees nothing.
      budget: the length of a list, at least 1.
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
    given |= _thresholds(problem, given, rows, interpret)
    given |= _gathered(problem, given, rows, interpret)
    indices, count = _finished(problem, given, rows, interpret)
    return indices.reshape(*scores.shape[:3], budget), count.reshape(scores.shape[:3])


# Block specifications, for the grid (1, splits, rows).


def _row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda _, s, r: (r, *(0,) * len(shape)))


def _part(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), lambda _, s, r: (r, s, *(0,) * len(shape)))


def _thresholds(problem: Problem, given: dict, rows: int, interpret: bool) -> dict:
    """Returns the threshold of every row."""
    cut = problem.plan
    results = launch(
        lambda refs: _threshold_kernel(problem, refs),
        name="sparse_threshold",
        grid=(1, 1, rows),
        inputs=given,
        outputs={"threshold": Output((rows,), jnp.int32, _row())},
        block=Block(cut.sample, cut.sample_warps, 1),
        interpret=interpret,
    )
    return {"threshold": (results.threshold, _row())}


def _threshold_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    """Writes a threshold that is low enough for almost every row.

    If a share p of the tokens is wanted, about p n of a sample of n are among them, give or take
    sqrt(p n). The threshold is a key that DEVIATIONS times sqrt(p n) more of the sample reach.
    """
    number, end = problem.plan.sample, refs.positions[...] + 1
    spread = lax.iota(jnp.int32, number)
    whole, rest = lax.div(end, number), lax.rem(end, number)
    slots = spread * whole + lax.div(spread * rest, number)
    sample = ranks(problem, load(refs.scores, (slots,)), slots, end)
    share_of = problem.budget / jnp.maximum(end, 1).astype(jnp.float32)
    expected = jnp.minimum(share_of, 1.0) * number
    rank = expected + DEVIATIONS * jnp.sqrt(expected) + 2.0

    def halve(_, interval):
        low, high = interval
        middle = mean(low, high)
        enough = _reaching(sample, middle).astype(jnp.float32) >= rank
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, STEPS, halve, (jnp.int32(LEAST + 1), jnp.int32(MOST)))
    refs.threshold[...] = low


def _reaching(keys: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.sum((keys >= key).astype(jnp.int32))


def _gathered(problem: Problem, given: dict, rows: int, interpret: bool) -> dict:
    """Returns the lists of slots and keys of every split, and how many keys reach the threshold."""
    cut = problem.plan
    listed = Output((rows, cut.splits, problem.length), jnp.int32, _part(problem.length))
    results = launch(
        lambda refs: _gather_kernel(problem, refs),
        name="sparse_gather",
        grid=(1, cut.splits, rows),
        inputs=given,
        outputs={
            "slots": listed,
            "keys": listed,
            "number": Output((rows, cut.splits), jnp.int32, _part()),
        },
        block=Block(cut.tile, cut.num_warps),
        interpret=interpret,
    )
    joined = _row(cut.splits * problem.length)
    return {
        "slots": (results.slots.reshape(rows, -1), joined),
        "keys": (results.keys.reshape(rows, -1), joined),
        "number": (results.number, _row(cut.splits)),
    }


def _gather_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    cut, end = problem.plan, refs.positions[...] + 1
    length, threshold = problem.length, refs.threshold[...]

    def body(index, before):
        slots, keys = tile_of_row(problem, refs.scores, index * cut.tile, cut.tile, end)
        chosen = (keys >= threshold).astype(jnp.int32)
        places = before + jnp.cumsum(chosen) - 1
        here = (chosen > 0) & (places < length)
        places = jnp.where(here, places, length)
        store(refs.slots, (places,), slots, here)
        store(refs.keys, (places,), keys, here)
        return before + jnp.sum(chosen)

    first, last = share(end, cut.tile, cut.splits)
    refs.number[...] = lax.fori_loop(first, last, body, jnp.int32(0))


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
        block=Block(cut.held, cut.final_warps, 1),
        interpret=interpret,
    )
    return results.indices, results.count


def _finish_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    end = refs.positions[...] + 1
    wanted = jnp.minimum(end, problem.budget)
    forced = jnp.minimum(end, jnp.minimum(problem.sink, end) + problem.window)
    refs.count[...] = wanted
    entries = _Entries(problem, refs, end, wanted)

    def reaching(key):
        return entries.fold(lambda number, _, keys: number + _reaching(keys, key), jnp.int32(0))

    def largest(most, _, keys):
        return jnp.maximum(most, jnp.max(jnp.where(keys < MOST, keys, LEAST)))

    # Enough keys reach `low`, and too few reach `high`. The search ends where exactly the wanted
    # keys reach `low`, or where no key lies between the two.
    def halve(search):
        low, high, at_low, at_high = search
        middle = mean(low, high)
        number = reaching(middle)
        enough = number >= wanted
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, number, at_low),
            jnp.where(enough, at_high, number),
        )

    def goes_on(search):
        low, high, at_low, _ = search
        return (at_low > wanted) & (mean(low, high) > low)

    low = jnp.where(entries.listed, refs.threshold[...], LEAST + 1)
    high = entries.fold(largest, jnp.int32(LEAST)) + 1
    only_forced = forced >= wanted
    low, high = jnp.where(only_forced, MOST, low), jnp.where(only_forced, MOST, high)
    number = jnp.where(only_forced, forced, entries.number)
    low, high, number, fewer = lax.while_loop(goes_on, halve, (low, high, number, forced))
    exact = number <= wanted
    high = jnp.where(exact, low, high)
    ties = wanted - jnp.where(exact, number, fewer)

    def write(before, slots, keys):
        above, tied = keys >= high, (keys >= low) & (keys < high)
        # One sum counts both, because there are fewer than 2**15 entries at once.
        both = above.astype(jnp.int32) + (tied.astype(jnp.int32) << 16)
        running = jnp.cumsum(both)
        ties_so_far = before[1] + (running >> 16)
        chosen = above | (tied & (ties_so_far <= ties))
        places = before[0] + (running & 0xFFFF) + jnp.minimum(ties_so_far, ties) - 1
        store(refs.indices, (jnp.where(chosen, places, problem.budget),), slots, chosen)
        total = jnp.sum(both)
        return before[0] + (total & 0xFFFF), before[1] + (total >> 16)

    entries.fold(write, (jnp.int32(0), jnp.int32(0)))
    _clear(problem, refs.indices, wanted)


def _clear(problem: Problem, indices: Any, start: jax.Array) -> None:
    """Writes zeros to the list from `start` on."""
    chunk = problem.plan.chunk

    def body(index, _):
        places = index * chunk + lax.iota(jnp.int32, chunk)
        empty = (places >= start) & (places < problem.budget)
        places = jnp.where(empty, places, problem.budget)
        store(indices, (places,), jnp.zeros_like(places), empty)

    lax.fori_loop(lax.div(start, chunk), pl.cdiv(problem.budget, chunk), body, None)


class _Entries:
    """The tokens that `finish` chooses from: those of the joined lists, or of the whole row.

    Attributes:
      listed: whether the lists hold all wanted tokens.
      number: how many entries there are.
    """

    def __init__(self, problem: Problem, refs: SimpleNamespace, end, wanted):
        cut = problem.plan
        self._problem, self._refs, self._end = problem, refs, end
        self._numbers = [refs.number[split] for split in range(cut.splits)]
        longest, total = self._numbers[0], self._numbers[0]
        for number in self._numbers[1:]:
            longest, total = jnp.maximum(longest, number), total + number
        self.listed = (longest <= problem.length) & (total >= wanted)
        self.number = jnp.where(self.listed, total, end)
        self._held = self._of_lists(lax.iota(jnp.int32, cut.held), self.listed)

    def fold(self, add, carry):
        """Folds `add(carry, slots, keys)` over all entries, in the order of the tokens."""
        cut = self._problem.plan
        start = self.listed.astype(jnp.int32) * cut.held

        def of_chunk(index, carry):
            places = start + index * cut.chunk + lax.iota(jnp.int32, cut.chunk)
            read = functools.partial(self._of_lists, places, True), lambda: self._of_row(places)
            return add(carry, *lax.cond(self.listed, *read))

        chunks = lax.div(jnp.maximum(self.number - start, 0) + (cut.chunk - 1), cut.chunk)
        return lax.fori_loop(0, chunks, of_chunk, add(carry, *self._held))

    def _of_lists(self, places: jax.Array, real) -> tuple[jax.Array, jax.Array]:
        """Returns slots and keys of the joined lists. Places behind them get the key LEAST."""
        length = self._problem.length
        real = real & (places < self.number)
        # Entry i of the joined lists is at i + sum_s (length - number_s), over the lists s before.
        at, before = places, jnp.int32(0)
        for number in self._numbers[:-1]:
            before += number
            at += jnp.where(places >= before, length - number, 0)
        at = jnp.where(real, at, 0)
        keys = jnp.where(real, load(self._refs.keys, (at,)), LEAST)
        return load(self._refs.slots, (at,)), keys

    def _of_row(self, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        last = jnp.minimum(slots, self._problem.capacity - 1)
        return slots, ranks(self._problem, load(self._refs.scores, (last,)), slots, self._end)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
