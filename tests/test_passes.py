"""The steps of plain XLA with a scan between them, as on a TPU, against the float64 oracle."""

import pytest

import race_jax
from race_jax.core import implementations
from race_jax.core.xla import bidirectional, causal
from tests.problems import evaluate, make_problem, oracle

PROBLEMS = {
    "causal": {"is_causal": True, "queries": 150, "kv_heads": 1},
    "causal, all": {
        "is_causal": True, "queries": 150, "batch": 4, "heads": 4, "kv_heads": 2,
        "gate": 0.2, "padding": True, "segments": 3, "state": True,
    },
    "one span": {"is_causal": True, "queries": 30, "state": True, "gate": 0.1},
    "bidirectional": {"queries": 150, "keys": 70, "padding": True, "state": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "scan_by"),
    [(name, "scan") for name in PROBLEMS] + [("causal", "product"), ("causal, all", "product")],
)
def test_spans_side_by_side_match_the_oracle(name, scan_by, monkeypatch, assert_close):
    monkeypatch.setattr(implementations, "_by_platform", lambda plan, cpu, wide, pallas: wide)
    monkeypatch.setattr(causal, "BLOCK", 32)
    monkeypatch.setattr(bidirectional, "PARALLEL_BLOCK", 32)
    monkeypatch.setattr(implementations, "CAUSAL_WIDE", 16)
    monkeypatch.setattr(causal.XLASteps, "scan_by", scan_by)
    # A function of its own: the compiled ones of other tests took another path.
    own = lambda *arguments, **options: race_jax.race_attention(*arguments, **options)  # noqa: E731
    problem = make_problem(**PROBLEMS[name])
    want, want_gradients = oracle(problem)
    got, gradients = evaluate(problem, own)
    assert_close("", got, want, kind="outputs")
    assert_close("", gradients, want_gradients, kind="gradients")
