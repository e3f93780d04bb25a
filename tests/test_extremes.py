"""Extreme inputs work: sharpness at which sums underflow, and gates that forget everything."""

import jax
import numpy as np
import pytest

from tests.problems import evaluate, make_problem


@pytest.mark.parametrize("is_causal", [True, False])
def test_large_sharpness_stays_finite(is_causal):
    """Above beta = 8 a float32 denominator can underflow. The row then counts as seeing no key."""
    gate = 0.3 if is_causal else None
    problem = make_problem(
        queries=70,
        is_causal=is_causal,
        gate=gate,
        tables=4,
        num_planes=4,
        head_dim=128,
        scale=1.0,
        heads=8,
    )
    zero_rows = 0
    for sharpness in (20.0, 30.0, 100.0):
        outs, gradients = evaluate(problem.replace(sharpness=np.full(1, sharpness, np.float32)))
        for name, x in (outs | gradients).items():
            assert np.all(np.isfinite(x)), f"{name} at {sharpness=}"
        zero_rows += np.all(outs["out"] == 0, axis=-1).sum()
        low, high = problem.arrays["value"].min(1), problem.arrays["value"].max(1)
        slack = 1e-6 * np.abs(problem.arrays["value"]).max()
        assert np.all(outs["out"] >= np.minimum(low, 0)[:, None] - slack)
        assert np.all(outs["out"] <= np.maximum(high, 0)[:, None] + slack)
    assert not is_causal or zero_rows, "the case is too easy: no denominator underflows"


def test_a_gate_of_zeros_is_no_gate(assert_close):
    gated = make_problem(queries=70, is_causal=True, gate=0.0)
    without = make_problem(queries=70, is_causal=True)
    without = without.replace(**{n: gated.arrays[n] for n in without.arrays})
    without.cotangents.update(gated.cotangents)
    (got, gradients), (want, want_gradients) = evaluate(gated), evaluate(without)
    gradients.pop("d_log_decay")
    assert_close("", got, want, kind="gate")
    assert_close("", gradients, want_gradients, kind="gate")


def test_a_strong_gate_keeps_only_the_token_s_own_value(assert_close):
    problem = make_problem(queries=70, is_causal=True, gate=1.0)
    strong = problem.replace(log_decay=np.full_like(problem.arrays["log_decay"], -79.0))
    out = evaluate(strong)[0]["out"]  # the program of the test before
    value = np.broadcast_to(problem.arrays["value"], out.shape)
    assert_close("out", out, value, kind="identity")


def test_log_decay_below_minus_80_counts_as_minus_80(assert_close):
    problem = make_problem(queries=70, is_causal=True, gate=1.0, state=True)
    gate = problem.arrays["log_decay"].copy()
    gate[:, ::3] = -80.0
    lower = gate.copy()
    lower[:, ::3] = [[[-200.0]], [[-np.inf]]]
    got, want = (evaluate(problem.replace(log_decay=g)) for g in (lower, gate))
    assert_close("", got[0], want[0], kind="rerun")
    for x in jax.tree.leaves(got):
        assert np.all(np.isfinite(x))
