"""A selection holds the forced and the best tokens, once each, in ascending order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.sparse import select


def run(scores, visible, forced, budget):
    scores = jnp.asarray(scores, jnp.float32)[None, None, None]
    flags = (jnp.asarray(x)[None, None] for x in (forced, visible))
    forced, visible = flags
    got = select(scores, forced=forced, visible=visible, budget=budget)
    count = int(got.count[0, 0, 0])
    indices = got.indices[0, 0, 0]
    assert indices.dtype == jnp.int32
    assert indices.shape == (budget,)
    assert not indices[count:].any()
    return indices[:count].tolist()


@pytest.mark.parametrize("budget", [1, 2, 7, 20, 25])
def test_it_is_a_ranking_with_ties_by_position(rng, budget):
    values = rng.choice([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf, np.nan], 20)
    visible = np.arange(20) < 17
    forced = np.isin(np.arange(20), [3])
    rank = np.where(np.isnan(values), -np.inf, values)
    order = sorted((s for s in range(17) if s != 3), key=lambda s: (-rank[s], s))
    # -inf and NaN are equally bad, and +inf is as good as the largest number.
    assert run(values, visible, forced, budget) == sorted([3, *order[: min(budget, 17) - 1]])


def test_equal_scores_give_the_first_tokens():
    everything = np.ones(9, bool)
    assert run(np.zeros(9), everything, ~everything, 4) == [0, 1, 2, 3]
    assert run(np.full(9, np.nan), everything, ~everything, 4) == [0, 1, 2, 3]
    assert run(np.zeros(9), ~everything, ~everything, 4) == []
    assert run(np.zeros(9), everything, ~everything, 0) == []


def test_zeros_of_both_signs_are_equal_in_compiled_code():
    """XLA removes an addition of 0.0, so that the signs of zeros would count."""
    zeros = jnp.array([-0.0, 0.0, -0.0, 0.0])[None, None, None]
    everything = jnp.ones((1, 1, 4), bool)
    compiled = jax.jit(select, static_argnames="budget")
    got = compiled(zeros, forced=~everything, visible=everything, budget=2)
    assert got.indices[0, 0, 0].tolist() == [0, 1]


def test_the_values_are_those_of_top_k(rng):
    values = jnp.asarray(rng.normal(size=(2, 3, 4, 50)), jnp.float32)
    everything = jnp.ones((2, 3, 50), bool)
    got = jax.jit(select, static_argnames="budget")(
        values, forced=~everything, visible=everything, budget=9
    )
    found = np.sort(np.take_along_axis(np.asarray(values), np.asarray(got.indices), axis=-1))
    np.testing.assert_array_equal(found[..., ::-1], jax.lax.top_k(values, 9)[0])
    assert (np.diff(got.indices, axis=-1) > 0).all()
