"""Exact selection of the best tokens of every row of scores, in three kernels.

Scores (B, T, M, C) and the positions of the queries give, for every row, the `budget` best of the
visible tokens in ascending order. A score becomes an integer key of the same order, and a forced
token has the largest key. The kernels are

    threshold   takes a key t from a sample of a row, one of every 2^s tokens, so low that at
                least `budget` keys of the row almost surely reach it
    gather      lists the tokens with a key >= t in each split of a row
    finish      joins the lists of a row, finds the key of rank `budget` by bisection, and writes
                the final list

The sample decides only how long the lists in between are, never what is selected. If too few keys
reach t, or a list is longer than its room, `finish` reads the row itself, which takes longer.

Tokens are worked on in granules of a few neighbors: array j of a tile holds the token j of every
granule. A running sum over granules is shorter than one over tokens, and what is added within a
granule stays in a thread.
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
from pallas_kernels.sparse.keys import (
    LEAST,
    MOST,
    SAMPLE,
    mean,
    ranks,
    sample_shift,
    sample_size,
    sampled_slots,
)
from pallas_kernels.tiles import power_of_two

STEPS = 20  # of the search in the sample, which leave 2**12 of 2**32 keys
GRANULE = 4  # a power of two that divides the sizes of all tiles
DEVIATIONS = 4  # by how many standard deviations the rank in a sample is overestimated


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the kernels are cut. Every plan selects the same tokens."""

    splits: int  # of a row
    room: int  # the most tokens that the list of a split holds
    # The next three are powers of two and at least GRANULE. `held` and `chunk` are below 2**15.
    held: int  # entries of the joined lists that `finish` keeps in registers
    tile: int = 2048  # tokens that a program of `gather` reads at once
    chunk: int = 1024  # entries that `finish` reads at once if there are more
    sample_warps: int = 8
    num_warps: int = 4
    final_warps: int = 16

    def length(self, capacity: int) -> int:
        """Returns the length of the list of a split."""
        tiles = -(-capacity // (self.tile * self.splits))
        return _padded(min(tiles * self.tile, self.room))


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
    tokens = max(1.0, capacity / (SAMPLE // 2))  # a sample is at least half full
    number = budget + DEVIATIONS * math.sqrt(budget * tokens) + 3.0 * tokens
    number = min(math.ceil(number), capacity)
    held = min(max(power_of_two(number + number // 16), LEAST_HELD), MOST_HELD)
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
    sample: jax.Array | None = None,
    plan: Plan | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Returns the forced tokens and the best others, `budget` in all.

    Args:
      scores: ``(B, T, M, C)`` float32. Larger is better, NaN is worst, and of equal scores the
        earlier token is the better one. Those after the position of the query may be anything.
      positions: ``(B, T)`` int32 below C, and below 0 for a query that sees nothing.
      budget: the length of a list, at least 1.
      sink: how many of the first tokens are forced.
      window: how many of the last visible tokens are forced; with ``sink`` at most ``budget``.
      sample: the sample of every row that `linear_scores` returns, or None to take it here.
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
    newest = positions.max(axis=1)
    if sample is None:
        sample = take_sample(scores, newest)
    given |= _thresholds(problem, given, sample, newest, interpret)
    given |= _gathered(problem, given, rows, interpret)
    indices, count = _finished(problem, given, rows, interpret)
    return indices.reshape(*scores.shape[:3], budget), count.reshape(scores.shape[:3])


# Block specifications, for the grid (1, splits, rows).


def _row(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, *shape), lambda _, s, r: (r, *(0,) * len(shape)))


def _part(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, *shape), lambda _, s, r: (r, s, *(0,) * len(shape)))


def take_sample(scores: jax.Array, newest: jax.Array, most: int = SAMPLE) -> jax.Array:
    """Returns the sample of every row, as `linear_scores` writes it.

    Args:
      scores: ``(B, T, M, C)``.
      newest: ``(B,)`` int32, the last of the positions of a row.
      most: the most scores of a sample, a power of two.
    """
    capacity = scores.shape[-1]
    size = sample_size(capacity, most)
    shift = sample_shift(newest + 1, size, capacity)[:, None]
    slots = sampled_slots(lax.iota(jnp.int32, size), shift)
    slots = jnp.minimum(slots, capacity - 1)[:, None, None, :]
    return jnp.take_along_axis(scores, slots, axis=-1)


def _thresholds(problem: Problem, given: dict, sample, newest, interpret: bool) -> dict:
    """Returns the threshold of every row."""
    cut, size = problem.plan, sample.shape[-1]
    rows = math.prod(sample.shape[:3])
    of_row = rows // len(newest)  # of the batch
    results = launch(
        lambda refs: _threshold_kernel(problem, refs),
        name="sparse_threshold",
        grid=(1, 1, rows),
        inputs={
            "sample": (sample.reshape(rows, size), _row(size)),
            "positions": given["positions"],
            "newest": (newest, pl.BlockSpec((None,), lambda _, s, r: (lax.div(r, of_row),))),
        },
        outputs={"threshold": Output((rows,), jnp.int32, _row())},
        block=Block(size, cut.sample_warps, 1),
        interpret=interpret,
    )
    return {"threshold": (results.threshold, _row())}


def _threshold_kernel(problem: Problem, refs: SimpleNamespace) -> None:
    """Writes a threshold that is low enough for almost every row.

    If a share p of the tokens is wanted, about p n of a sample of n are among them, give or take
    sqrt(p n). The threshold is a key that DEVIATIONS times sqrt(p n) more of the sample reach.
    """
    size, end = refs.sample.shape[0], _end(refs)
    shift = sample_shift(refs.newest[...] + 1, size, problem.capacity)
    slots = sampled_slots(lax.iota(jnp.int32, size), shift)
    sample = ranks(problem, refs.sample[...], slots, end)
    share_of = problem.budget / jnp.maximum(end, 1).astype(jnp.float32)
    expected = jnp.minimum(share_of, 1.0) * (end >> shift).astype(jnp.float32)
    rank = expected + DEVIATIONS * jnp.sqrt(expected) + 2.0

    def halve(_, interval):
        low, high = interval
        middle = mean(low, high)
        enough = _reaching(sample, middle).astype(jnp.float32) >= rank
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, _ = lax.fori_loop(0, STEPS, halve, (jnp.int32(LEAST + 1), jnp.int32(MOST)))
    refs.threshold[...] = low


def _end(refs: SimpleNamespace) -> jax.Array:
    """Returns how many tokens the query of a row sees."""
    return jnp.maximum(refs.positions[...] + 1, 0)


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
    cut, end = problem.plan, _end(refs)
    length, threshold = problem.length, refs.threshold[...]
    first, last = share(end, cut.tile, cut.splits)

    def read(index):
        return _scores_of(problem, refs, _granules(index * cut.tile, cut.tile))

    def body(index, carry):
        before, scores = carry
        # The next tile is read before this one is worked on, because Triton does not do so itself.
        after = read(jnp.minimum(index + 1, last - 1))
        slots = _granules(index * cut.tile, cut.tile)
        keys = [ranks(problem, *pair, end) for pair in zip(scores, slots, strict=True)]
        chosen = [(one >= threshold).astype(jnp.int32) for one in keys]
        of_granule = sum(chosen)
        places = before + jnp.cumsum(of_granule) - of_granule
        for slot, key, is_chosen in zip(slots, keys, chosen, strict=True):
            here = (is_chosen > 0) & (places < length)
            at = jnp.where(here, places, length)
            store(refs.slots, (at,), slot, here)
            store(refs.keys, (at,), key, here)
            places += is_chosen
        return before + jnp.sum(of_granule), after

    number, _ = lax.fori_loop(first, last, body, (jnp.int32(0), read(first)))
    refs.number[...] = number
    # The list is filled up to a whole number of granules, by which `finish` reads it.
    places = number + lax.iota(jnp.int32, GRANULE)
    behind = places < jnp.minimum(_padded(number), length)
    store(refs.keys, (jnp.where(behind, places, length),), jnp.full((GRANULE,), LEAST), behind)


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
    end = _end(refs)
    wanted = jnp.minimum(end, problem.budget)
    forced = jnp.minimum(end, jnp.minimum(problem.sink, end) + problem.window)
    refs.count[...] = wanted
    entries = _Entries(problem, refs, end, wanted)

    def reaching(key):
        def add(number, _, keys):
            return number + jnp.sum(sum((one >= key).astype(jnp.int32) for one in keys))

        return entries.fold(add, jnp.int32(0))

    def largest(most, _, keys):
        below = [jnp.where(one < MOST, one, LEAST) for one in keys]
        return jnp.maximum(most, jnp.max(functools.reduce(jnp.maximum, below)))

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
    _write(problem, refs.indices, entries, low, high, ties)
    _clear(problem, refs.indices, wanted)


def _write(problem: Problem, indices: Any, entries: "_Entries", low, high, ties) -> None:
    """Writes the slots of the keys from `high` on, and of the first `ties` from `low` to it."""

    def write(before, slots, keys):
        # One number counts those above and those tied, because there are fewer than 2**15 entries
        # at once. A scan over whole granules is shorter than one over entries.
        above = [one >= high for one in keys]
        tied = [(one >= low) & (one < high) for one in keys]
        kinds = [*zip(above, tied, strict=True)]
        both = [a.astype(jnp.int32) + (t.astype(jnp.int32) << 16) for a, t in kinds]
        of_granule = sum(both)
        running = jnp.cumsum(of_granule) - of_granule
        for number, (is_above, is_tied), slot in zip(both, kinds, slots, strict=True):
            running += number
            ties_so_far = before[1] + (running >> 16)
            chosen = is_above | (is_tied & (ties_so_far <= ties))
            places = before[0] + (running & 0xFFFF) + jnp.minimum(ties_so_far, ties) - 1
            store(indices, (jnp.where(chosen, places, problem.budget),), slot, chosen)
        total = jnp.sum(of_granule)
        return before[0] + (total & 0xFFFF), before[1] + (total >> 16)

    entries.fold(write, (jnp.int32(0), jnp.int32(0)))


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
        numbers = [refs.number[split] for split in range(cut.splits)]
        self._sizes = [_padded(number) for number in numbers]
        longest, total = functools.reduce(jnp.maximum, numbers), sum(numbers)
        self.listed = (longest <= problem.length) & (total >= wanted)
        self.number = jnp.where(self.listed, total, end)
        self._places = jnp.where(self.listed, sum(self._sizes), end)
        self._held = self._of_lists(0, cut.held, self.listed)

    def fold(self, add, carry):
        """Folds `add(carry, slots, keys)` over all entries, in the order of the tokens."""
        cut = self._problem.plan
        start = self.listed.astype(jnp.int32) * cut.held

        def of_chunk(index, carry):
            first = start + index * cut.chunk
            of_lists = functools.partial(self._of_lists, first, cut.chunk, True)
            return add(
                carry, *lax.cond(self.listed, of_lists, lambda: self._of_row(first, cut.chunk))
            )

        chunks = lax.div(jnp.maximum(self._places - start, 0) + (cut.chunk - 1), cut.chunk)
        return lax.fori_loop(0, chunks, of_chunk, add(carry, *self._held))

    def _of_lists(self, first, number: int, real) -> tuple[list, list]:
        """Returns slots and keys of the joined lists. Places behind them get the key LEAST."""
        length = self._problem.length
        # Entry i of the joined lists is at i + sum_s (length - size_s), over the lists s before. It
        # is in the same list as its neighbors, because sizes are multiples of GRANULE.
        places = first + GRANULE * lax.iota(jnp.int32, number // GRANULE)
        at, before = places, jnp.int32(0)
        for size in self._sizes[:-1]:
            before += size
            at += jnp.where(places >= before, length - size, 0)
        real = real & (places < self._places)
        at = jnp.where(real, at, 0)
        each = [at + index for index in range(GRANULE)]
        keys = [jnp.where(real, load(self._refs.keys, (one,)), LEAST) for one in each]
        return [load(self._refs.slots, (one,)) for one in each], keys

    def _of_row(self, first, number: int) -> tuple[list, list]:
        slots = _granules(first, number)
        scores = _scores_of(self._problem, self._refs, slots)
        pairs = zip(scores, slots, strict=True)
        return slots, [ranks(self._problem, *pair, self._end) for pair in pairs]


def _granules(first, number: int) -> list[jax.Array]:
    """Returns `number` slots from `first` on. Array j has the slot j of every granule."""
    granule = first + GRANULE * lax.iota(jnp.int32, number // GRANULE)
    return [granule + index for index in range(GRANULE)]


def _scores_of(problem: Problem, refs: SimpleNamespace, slots: list) -> list[jax.Array]:
    """Returns the scores of a row at the slots, and any others for those past the capacity.

    No load has a mask, because Triton waits for each element of a masked load before it asks for
    the next one.
    """
    return [load(refs.scores, (jnp.minimum(one, problem.capacity - 1),)) for one in slots]


def _padded(size):
    """Returns the least multiple of GRANULE that is not below a size."""
    return (size + (GRANULE - 1)) // GRANULE * GRANULE
