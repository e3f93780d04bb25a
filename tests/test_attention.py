"""The XLA implementation equals the float64 oracle: outputs, returned state and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from race_jax.core import reference
from tests import newest
from tests.problems import evaluate, make_problem, oracle, outputs

EVERYTHING = {
    "batch": 4,
    "heads": 4,
    "kv_heads": 2,
    "padding": True,
    "state": True,
    "planes_per_head": True,
}
CAUSAL = {"is_causal": True, "gate": 0.2, "segments": 3} | EVERYTHING

# The cases cover lengths that are multiples of a chunk size or not, head dims, odd and even table
# shapes, each argument alone, and all of them together. The total log decay of a chunk stays above
# about -100, because the tolerances assume it.
GRID = {
    "one token": {"is_causal": True, "queries": 1, "batch": 1, "heads": 1, "num_planes": 1},
    "7, P=10": {"is_causal": True, "queries": 7, "tables": 1, "num_planes": 10, "heads": 3},
    "63, H=24, V=33": {"is_causal": True, "queries": 63, "head_dim": 24, "value_dim": 33},
    "64, H=64, gate": {"is_causal": True, "queries": 64, "head_dim": 64, "gate": 0.1},
    "65, H=128, L=5": {"is_causal": True, "queries": 65, "head_dim": 128, "tables": 5},
    "65, no tanh, beta 1": {
        "is_causal": True,
        "queries": 65,
        "use_tanh": False,
        "sharpness": 1.0,
    },
    "65, strong gate, unit planes, beta 8": {
        "is_causal": True,
        "queries": 65,
        "gate": 1.4,
        "scale": 1.0,
        "sharpness": 8.0,
    },
    "1000, all": {"queries": 1000, "num_planes": 3} | CAUSAL,
    "130, all, bucket": {"queries": 130, "normalization": "bucket"} | CAUSAL,
    "bidirectional, T=65, S=7, no tanh": {
        "queries": 65,
        "keys": 7,
        "head_dim": 24,
        "value_dim": 16,
        "use_tanh": False,
    },
    "bidirectional, T=7, S=1000, all": {"queries": 7, "keys": 1000, "num_planes": 3} | EVERYTHING,
    "bidirectional, all, bucket": {"queries": 65, "normalization": "bucket"} | EVERYTHING,
    "packed, 130": {"queries": 130, "padding": True, "segments": 4, "batch": 4},
    "packed, 70, bucket, no tanh": {
        "queries": 70,
        "padding": True,
        "segments": 3,
        "batch": 4,
        "normalization": "bucket",
        "use_tanh": False,
    },
}


# The newest JAX runs those that have the most options at once.
NEWEST = (
    *("65, strong gate, unit planes, beta 8", "130, all, bucket"),
    *("bidirectional, T=7, S=1000, all", "packed, 70, bucket, no tanh"),
)


@pytest.mark.parametrize("name", newest.examples(GRID, NEWEST))
def test_outputs_and_gradients_match_the_oracle(name, assert_close):
    problem = make_problem(**GRID[name])
    want, want_gradients = oracle(problem)
    got, gradients = evaluate(problem)
    assert_close("", got, want, kind="outputs")
    assert_close("", gradients, want_gradients, kind="gradients")


@pytest.mark.parametrize(
    "name",
    newest.examples(["65, H=128, L=5", "130, all, bucket", "packed, 130"], ["130, all, bucket"]),
)
def test_bfloat16_matches_the_oracle_on_rounded_inputs(name, assert_close):
    problem = make_problem(**GRID[name]).astype(jnp.bfloat16)
    want, want_gradients = oracle(problem)
    got, gradients = evaluate(problem)
    assert got["out"].dtype == gradients["d_query"].dtype == jnp.bfloat16
    assert all(x.dtype.itemsize == 4 for name, x in got.items() if "state" in name)
    assert_close("", got, want, kind="outputs", dtype=jnp.bfloat16)
    assert_close("", gradients, want_gradients, kind="gradients", dtype=jnp.bfloat16)


def test_float64_is_computed_in_float64(assert_close):
    problem = make_problem(queries=70, is_causal=True, gate=0.2, segments=3)
    problem = problem.astype(np.float64, (*problem.arrays, *problem.cotangents))
    want, want_gradients = oracle(problem)
    with jax.enable_x64(True):
        got, gradients = evaluate(problem)
    assert_close("out", got["out"], want["out"], kind="outputs", dtype="float64")
    assert_close("", gradients, want_gradients, kind="gradients", dtype="float64")


def test_many_blocks_match_the_token_by_token_oracle(assert_close):
    """The sequence is so long that blocks are combined, and not only chunks."""
    problem = make_problem(
        queries=9001, batch=1, heads=1, value_dim=3, is_causal=True, gate=0.01, segments=3
    )
    want, want_gradients = oracle(problem, reference.token_by_token)
    got, gradients = evaluate(problem)
    assert_close("", got, want, kind="outputs")
    assert_close("", gradients, want_gradients, kind="gradients")


@pytest.mark.parametrize("is_causal", [True, False])
def test_projections_are_the_same_op(is_causal, assert_close):
    """race_attention_from_projections(hash_projections(q), ...) is race_attention(q, ...)."""
    problem = make_problem(
        queries=65, heads=4, kv_heads=2, state=True, padding=True, is_causal=is_causal
    )

    def from_projections(query, key, value, planes, **options):
        z_q, z_k = (race_jax.hash_projections(x, planes) for x in (query, key))
        return race_jax.race_attention_from_projections(z_q, z_k, value, **options)

    assert_close("", outputs(problem, from_projections), outputs(problem), kind="identity")


def test_output_dtype_is_the_values_dtype():
    x = jnp.ones((1, 3, 1, 4))
    planes = jnp.ones((1, 2, 4))
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        out, state = jax.eval_shape(
            functools.partial(race_jax.race_attention, return_state=True),
            x,
            x,
            x.astype(dtype),
            planes,
        )
        assert out.dtype == dtype
        assert state.numerator.dtype == jnp.float32


@pytest.mark.parametrize("is_causal", [True, False])
def test_query_head_n_uses_key_value_head_n_over_group(is_causal, assert_close):
    grouped = make_problem(queries=20, heads=6, kv_heads=2, is_causal=is_causal)
    repeated = grouped.replace(
        key=np.repeat(grouped.arrays["key"], 3, axis=2),
        value=np.repeat(grouped.arrays["value"], 3, axis=2),
        sharpness=np.repeat(grouped.arrays["sharpness"], 3),
    )
    got, want = outputs(grouped)["out"], outputs(repeated)["out"]
    assert_close("out", got, want, kind="identity")


def test_value_one_gives_one_in_bfloat16():
    """The denominator is a sum of the same rounded features as the numerator."""
    problem = make_problem(queries=130, is_causal=True, gate=0.1).astype(jnp.bfloat16)
    ones = problem.replace(value=np.ones_like(problem.arrays["value"]))
    assert np.all(outputs(ones)["out"].astype(np.float32) == 1)


def test_permuting_tokens_permutes_outputs_without_causality(rng, assert_close):
    problem = make_problem(queries=65)
    order = rng.permutation(65)
    tokens = {name: problem.arrays[name][:, order] for name in ("query", "key", "value")}
    got, want = outputs(problem.replace(**tokens))["out"], outputs(problem)["out"][:, order]
    assert_close("out", got, want, kind="identity")


@pytest.mark.parametrize("name", ["1000, all", "bidirectional, T=7, S=1000, all"])
def test_a_second_run_is_bit_identical(name, assert_close):
    problem = make_problem(**GRID[name])
    assert_close("", evaluate(problem), evaluate(problem), kind="rerun")


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_tokens(is_causal, assert_close):
    """With T = 0 there are no outputs, and a causal state does not change."""
    problem = make_problem(queries=0, state=True, is_causal=is_causal)
    got = outputs(problem)
    assert got["out"].shape == (2, 0, 2, 5)
    names = ["state.numerator", "state.mass"] + ["state.log_decay"] * is_causal
    for name in names:
        assert_close(name, got[name], problem.arrays[name], kind="rerun")
    assert_close("segment", got["state.segment"], problem.state_segment, kind="rerun")


@pytest.mark.parametrize("state", [True, False])
def test_no_keys(state, assert_close):
    """With S = 0 queries read the initial state. Without one they return zeros."""
    problem = make_problem(queries=5, keys=0, state=state)
    (want, want_gradients), (got, gradients) = oracle(problem), evaluate(problem)
    assert_close("", got, want, kind="outputs")
    assert_close("", gradients, want_gradients, kind="gradients")
    assert state or not np.any(got["out"])


def test_scalar_sharpness_is_every_heads(assert_close):
    problem = make_problem(queries=9, heads=2, kv_heads=2, is_causal=True)
    got, want = (
        outputs(problem.replace(sharpness=s)) for s in (np.float32(3), np.full(2, 3, np.float32))
    )
    assert_close("", got, want, kind="rerun")
