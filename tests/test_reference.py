"""The two oracles agree with each other, and with results worked out by hand, in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from race_jax.core import reference
from tests.problems import make_problem, oracle

pytestmark = pytest.mark.once

SHAPE = {"batch": 5, "queries": 9, "heads": 4, "kv_heads": 2, "head_dim": 5, "value_dim": 3}
ALL_TOGETHER = {"gate": 0.3, "padding": True, "state": True, "planes_per_head": True}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ("case", "normalization"),
    [
        ({"is_causal": True, "segments": 3} | ALL_TOGETHER, "global"),
        ({"is_causal": True, "segments": 3} | ALL_TOGETHER, "bucket"),
        ({"is_causal": True} | ALL_TOGETHER, "global"),
        ({"padding": True, "segments": 3, "planes_per_head": True}, "global"),
        ({"padding": True, "segments": 3, "planes_per_head": True}, "bucket"),
        ({"padding": True, "state": True, "keys": 4}, "bucket"),
        ({"keys": 13}, "global"),
    ],
    ids=lambda case: case if isinstance(case, str) else "-".join(case),
)
def test_all_pairs_equals_token_by_token(case, normalization, assert_close):
    problem = make_problem(**SHAPE, **case, normalization=normalization)
    want, want_gradients = oracle(problem, reference.all_pairs)
    got, gradients = oracle(problem, reference.token_by_token)
    assert got["out"].dtype == np.float64
    assert_close("", got, want, kind="outputs", dtype="float64")
    assert_close("", gradients, want_gradients, kind="gradients", dtype="float64")


@pytest.mark.parametrize("form", [reference.all_pairs, reference.token_by_token])
def test_derivatives_match_finite_differences_in_both_modes(form):
    problem = make_problem(
        batch=1, queries=4, head_dim=2, value_dim=2, tables=1, is_causal=True, gate=0.3
    )
    arrays = {name: jnp.asarray(x, jnp.float64) for name, x in problem.arrays.items()}
    check_grads(
        jax.jit(lambda arrays: form(**arrays, is_causal=True)), (arrays,), 1, modes=("fwd", "rev")
    )


def test_forward_mode_equals_reverse_mode(assert_close):
    problem = make_problem(queries=3, batch=1)
    arrays = {name: jnp.asarray(x, jnp.float64) for name, x in problem.arrays.items()}

    def total(planes):
        return jnp.sum(reference.all_pairs(**(arrays | {"planes": planes})) ** 2)

    forward, reverse = (jax.jit(jac(total))(arrays["planes"]) for jac in (jax.jacfwd, jax.jacrev))
    assert_close("d_planes", forward, reverse, kind="gradients", dtype="float64")


def test_weights_by_hand(rng, assert_close):
    """There are three tokens and one head, and a loop for every sum of the definition."""
    q, k, v = rng.normal(size=(3, 3, 4))
    planes, beta, gate = rng.normal(size=(2, 2, 4)), 1.7, -rng.exponential(size=3)

    def phi(x):
        rows = []
        for table in planes:
            corners = itertools.product((-1, 1), repeat=2)
            weights = np.exp([beta * np.dot(np.tanh(table @ x), corner) for corner in corners])
            rows.append(weights / weights.sum())
        return np.concatenate(rows)

    want = np.zeros((3, 4))
    for t in range(3):
        w = [np.exp(gate[s + 1 : t + 1].sum()) * phi(q[t]) @ phi(k[s]) for s in range(t + 1)]
        want[t] = sum(w[s] * v[s] for s in range(t + 1)) / sum(w)

    one_head = [jnp.asarray(x)[None, :, None] for x in (q, k, v)]
    gate = jnp.asarray(gate)[None, :, None]
    for form in (reference.all_pairs, reference.token_by_token):
        out = jax.jit(functools.partial(form, sharpness=beta, is_causal=True))(
            *one_head, jnp.asarray(planes), log_decay=gate
        )
        assert_close(form.__name__, out[0, :, 0], want, kind="outputs", dtype="float64")


@pytest.mark.parametrize("form", [reference.all_pairs, reference.token_by_token])
def test_float32_stays_float32(form):
    x = jax.ShapeDtypeStruct((1, 3, 1, 4), jnp.float32)
    planes = jax.ShapeDtypeStruct((1, 2, 4), jnp.float32)
    attend = functools.partial(form, is_causal=True, return_state=True)
    out, state = jax.eval_shape(attend, x, x, x, planes)
    assert {a.dtype.name for a in (out, state.numerator, state.mass)} == {"float32"}


@pytest.mark.parametrize("form", [reference.all_pairs, reference.token_by_token])
def test_no_queries_and_no_keys(form, assert_close):
    attend = jax.jit(functools.partial(form, return_state=True))
    query, nothing, planes = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 0, 1, 4)), jnp.ones((1, 2, 4))
    out, state = attend(query, nothing, nothing, planes)
    assert_close("out", out, np.zeros((1, 3, 1, 4)), kind="rerun")
    assert int(state.segment[0]) == -1
    no_queries = jax.eval_shape(attend, nothing, query, query, planes)
    assert no_queries[0].shape == (1, 0, 1, 4)


def test_wrong_arguments_are_refused():
    x, planes = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 2, 4))
    with pytest.raises(ValueError, match="is_causal=True"):
        reference.all_pairs(x, x, x, planes, log_decay=jnp.zeros((1, 3, 1)))
    with pytest.raises(ValueError, match="'row' must be 'global' or 'bucket'"):
        reference.all_pairs(x, x, x, planes, normalization="row")
