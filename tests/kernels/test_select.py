"""The selection kernels choose what `race_jax.sparse.select` chooses, to the last index."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse
from pallas_kernels.sparse.keys import SAMPLE
from pallas_kernels.sparse.select import Plan, plan_for, take_sample
from race_jax.sparse import select

C = 700  # no multiple of a tile
POSITIONS = np.array([[C - 2, C - 1], [0, 1], [333, -1]])
INTERPRETED = functools.partial(
    Plan, tile=64, splits=3, room=128, held=128, chunk=32, final_warps=4
)
COMPILED = pytest.param(False, marks=pytest.mark.gpu, id="compiled")


def draw(kind, rng):
    normal = rng.normal(size=(*POSITIONS.shape, 2, C))
    special = [-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf, np.nan, np.finfo(np.float32).max]
    return {
        "normal": normal,
        "close": 1000 + 1e-3 * normal,
        "ties": np.round(2 * normal),
        "zeros": np.where(normal > 0, 0.0, -0.0),
        "special": rng.choice(special, normal.shape),
        "rising": np.sort(normal, axis=-1),
        "one large": np.where(np.arange(C) == 17, 1e30, normal),
    }[kind].astype(np.float32)


KINDS = ["normal", "close", "ties", "zeros", "special", "rising", "one large"]
CALLS = {
    "fits": (20, 2, 4, INTERPRETED()),
    "list too long": (60, 2, 4, INTERPRETED(room=16)),
    "not all held": (60, 2, 4, INTERPRETED(held=16)),
    "one": (1, 0, 1, INTERPRETED(splits=5)),
    "only forced": (6, 2, 4, INTERPRETED(splits=1)),
    "all": (C, 2, 4, INTERPRETED(room=1024)),
    "more than all": (C + 9, 0, 0, INTERPRETED(room=1024)),
}


def wanted(scores, budget, sink, window):
    slots, positions = np.arange(C), POSITIONS[..., None]
    visible = slots <= positions
    forced = visible & ((slots < sink) | (slots > positions - window))
    arrays = (jnp.asarray(x) for x in (scores, forced, visible))
    scores, forced, visible = arrays
    return select(scores, forced=forced, visible=visible, budget=budget)


def check(call, kinds, rng, assert_close, **options):
    """One compiled call, with scores of many kinds and junk where nothing is visible."""
    budget, sink, window, *_ = call
    sizes = {"budget": budget, "sink": sink, "window": window}
    newest = jnp.asarray(POSITIONS.max(axis=1), jnp.int32)

    @jax.jit
    def run(scores, positions):
        sample = take_sample(jnp.asarray(scores), newest, most=64)
        return sparse.select(scores, positions, sample=sample, **sizes, **options)

    for kind in kinds:
        scores = draw(kind, rng)
        want = wanted(scores, **sizes)
        hidden = np.arange(C) > POSITIONS[..., None, None]
        for junk in (np.nan, np.inf):
            got = run(np.where(hidden, np.float32(junk), scores), jnp.asarray(POSITIONS, jnp.int32))
            assert_close(kind, got, tuple(want), kind="rerun")


@pytest.mark.parametrize("name", CALLS)
def test_interpreted(name, rng, assert_close):
    call = CALLS[name]
    check(call, KINDS, rng, assert_close, plan=call[-1], interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [False, True], ids=["small", "chosen"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiled(call, chosen, rng, assert_close):
    """With the same small sizes, and with those that the heuristic chooses."""
    check(call, KINDS, rng, assert_close, plan=None if chosen else call[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["normal", "equal", "ties", "clustered"])
@pytest.mark.parametrize("budget", [1, 3971, 20_000])
def test_long_rows(budget, kind, rng, assert_close):
    scores = rng.normal(size=(1, 1, 8, 131_071)).astype(np.float32)
    scores = {
        "normal": scores,
        "equal": 0 * scores,
        "ties": np.round(2 * scores),
        "clustered": scores + 3 * (np.arange(131_071) > 110_000),
    }[kind].astype(np.float32)
    positions = jnp.array([[130_000]], jnp.int32)
    visible = jnp.arange(scores.shape[-1]) <= positions[..., None]
    want = select(jnp.asarray(scores), forced=~visible & False, visible=visible, budget=budget)
    run = jax.jit(functools.partial(sparse.select, budget=budget))
    got = run(jnp.asarray(scores), positions)
    assert_close("lists", got, tuple(want), kind="rerun")
    assert_close("again", run(jnp.asarray(scores), positions), got, kind="rerun")


@pytest.mark.parametrize("period", [2, 3, 64, 100])
def test_the_sample_of_a_row_with_a_period_is_that_of_the_row(period):
    """The sample has each of the scores as often as the row has, within 4 deviations."""
    scores = jnp.broadcast_to(jnp.arange(131_072) % period, (1, 1, 1, 131_072)).astype(jnp.float32)
    sample = np.asarray(take_sample(scores, jnp.array([131_071])))[0, 0, 0]
    for cut in {1, period // 2, period - 1}:
        share = 1 - cut / period
        deviation = np.sqrt(share * (1 - share) / sample.size)
        assert abs((sample >= cut).mean() - share) < 4 * deviation


def test_the_lists_in_between_have_room_for_the_budget():
    for rows, capacity, budget in [(1, 1, 1), (32, 131_072, 3971), (8, 5000, 6000), (256, 9, 4)]:
        plan = plan_for(rows, capacity, budget)
        assert plan.splits * plan.length(capacity) >= min(capacity, budget)
        assert plan.held & (plan.held - 1) == 0
        assert plan.held >= 32 * 4


@pytest.mark.parametrize(("budget", "rank"), [(16, 3), (512, 7), (65_536, 176)])
def test_the_lists_hold_what_a_small_rank_in_the_sample_lets_through(budget, rank):
    """Half of a full sample of a million tokens has less than one of 16 wanted tokens."""
    plan = plan_for(600, 2**20, budget)
    expected = rank * 2**20 // (SAMPLE // 2)
    assert plan.splits == 1
    assert plan.room >= 3 * expected
    assert plan.held >= min(expected, 16_384)


@pytest.mark.parametrize("rows", [8, 256])
def test_they_lower_for_cuda(rows, on_h200):
    scores = jax.ShapeDtypeStruct((rows // 8, 1, 8, 131_072), jnp.float32)
    positions = jax.ShapeDtypeStruct((rows // 8, 1), jnp.int32)
    run = jax.jit(functools.partial(sparse.select, budget=1024, sink=16, window=128))
    with on_h200():
        program = run.trace(scores, positions).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("sparse_threshold", "sparse_gather", "sparse_finish"):
        assert program.count(f'name = "{name}"') == 1, name
