"""Padding and packed segments: invisible tokens change neither outputs nor gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from tests.problems import evaluate, make_problem, outputs

ROWS = 5  # interior, left, right, full and no padding
CAUSAL = {"is_causal": True, "gate": 0.3, "state": True, "segments": 3}
MODES = [
    pytest.param(CAUSAL, id="causal"),
    pytest.param(CAUSAL | {"normalization": "bucket"}, id="causal bucket"),
    pytest.param({"is_causal": False}, id="bidirectional"),
    pytest.param({"is_causal": False, "segments": 3}, id="packed bidirectional"),
]


def with_junk(problem, junk, rng):
    """Returns the problem with NaN, infinities and huge numbers in all padded slots."""
    padded = ~problem.masks["key_value_mask"]
    names = ["key", "value"] + ["query", "log_decay"] * problem.is_causal
    changed = {}
    for name in names:
        x = problem.arrays[name].copy()
        x[padded] = rng.choice(junk, x[padded].shape)
        changed[name] = x
    if "segment_ids" in problem.masks:
        ids = problem.masks["segment_ids"].copy()
        ids[padded] = rng.integers(0, 9, ids[padded].shape)
        changed["segment_ids"] = ids
    return problem.replace(**changed)


@pytest.mark.parametrize("mode", MODES)
def test_junk_in_padded_slots_changes_nothing(mode, rng, assert_close):
    problem = make_problem(batch=ROWS, queries=70, padding=True, **mode)
    want = evaluate(with_junk(problem, [0.0], rng))
    got = evaluate(with_junk(problem, [np.nan, np.inf, -np.inf, 3e38], rng))
    assert_close("", got, want, kind="rerun")
    padded = ~problem.masks["key_value_mask"]
    outs, gradients = got
    names = ["key", "value"] + ["query", "log_decay"] * problem.is_causal
    for name in names:
        assert not np.any(gradients[f"d_{name}"][padded]), f"d_{name} at padded slots"
    if problem.is_causal:
        assert not np.any(outs["out"][padded])
    for x in jax.tree.leaves(got):
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize("segments", [None, 2])
def test_a_row_without_keys_gives_zeros_with_zero_gradients(segments):
    problem = make_problem(batch=4, queries=33, padding=True, segments=segments)
    outs, gradients = evaluate(problem)
    assert not np.any(outs["out"][3])
    for name in ("query", "key", "value"):
        assert not np.any(gradients[f"d_{name}"][3]), f"d_{name}"
        assert np.any(gradients[f"d_{name}"][2]), f"d_{name} of a row with keys"


@pytest.mark.parametrize("is_causal", [True, False])
def test_padding_equals_removing_the_padded_slots(is_causal, assert_close):
    gate = 0.3 if is_causal else None
    problem = make_problem(
        batch=1, queries=70, is_causal=is_causal, gate=gate, state=True, padding=True
    )
    kept = problem.masks["key_value_mask"][0]
    short = {n: problem.arrays[n][:, kept] for n in ("query", "key", "value")}
    if is_causal:
        short["log_decay"] = problem.arrays["log_decay"][:, kept]
    alone = problem.replace(**short, key_value_mask=np.ones((1, kept.sum()), bool))
    got, want = outputs(problem), outputs(alone)
    got["out"] = got["out"][:, kept]
    assert_close("", got, want, kind="resumed")


LENGTHS = (9, 40, 21)  # the second border of 70 tokens lies inside a chunk of any usual size


def separate_runs(query, key, value, planes, *, segment_ids, log_decay=None, **options):
    """Runs the operation on each of three segments by itself."""
    del segment_ids
    borders = np.cumsum(LENGTHS)[:-1]
    runs = []
    for q, k, v, g in zip(
        *(jnp.split(x, borders, axis=1) for x in (query, key, value)),
        [None] * 3 if log_decay is None else jnp.split(log_decay, borders, axis=1),
        strict=True,
    ):
        runs.append(race_jax.race_attention(q, k, v, planes, log_decay=g, **options))
    if not options.get("return_state"):
        return jnp.concatenate(runs, axis=1)
    outs, states = zip(*runs, strict=True)
    last = states[-1]
    total = sum(state.log_decay for state in states)
    last = race_jax.RACEState(last.numerator, last.mass, total, segment=last.segment + 2)
    return jnp.concatenate(outs, axis=1), last


@pytest.mark.parametrize(("is_causal", "normalization"), [(True, "global"), (False, "bucket")])
def test_packing_equals_separate_runs(is_causal, normalization, assert_close):
    problem = make_problem(
        queries=sum(LENGTHS),
        segments=3,
        gate=0.3 if is_causal else None,
        is_causal=is_causal,
        normalization=normalization,
        heads=4,
        kv_heads=2,
    )
    problem = problem.replace(segment_ids=np.tile(np.repeat([0, 1, 2], LENGTHS), (2, 1)))
    (got, gradients), (want, want_gradients) = evaluate(problem), evaluate(problem, separate_runs)
    assert_close("", got, want, kind="resumed")
    assert_close("", gradients, want_gradients, kind="gradients")


@pytest.mark.parametrize("is_causal", [True, False])
def test_segment_ids_are_names_not_numbers(is_causal, assert_close):
    problem = make_problem(queries=70, segments=3, is_causal=is_causal)
    named = np.array([7, 0, 2**31 - 1], np.int32)[problem.masks["segment_ids"]]
    got, want = outputs(problem.replace(segment_ids=named)), outputs(problem)
    got.pop("state.segment", None), want.pop("state.segment", None)
    assert_close("", got, want, kind="rerun")


def test_other_segments_do_not_see_the_initial_state(assert_close):
    problem = make_problem(queries=9, segments=1, state=True, is_causal=True)
    other = problem.replace(segment_ids=problem.masks["segment_ids"] + 1)
    fresh = other.replace(
        **{f"state.{n}": np.zeros_like(problem.arrays[f"state.{n}"]) for n in ("numerator", "mass")}
    )
    same, got, want = (outputs(p)["out"] for p in (problem, other, fresh))
    assert_close("out", got, want, kind="rerun")
    assert np.abs(same - want).max() > 0.01
