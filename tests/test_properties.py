"""Properties that hold for every input, tried on inputs drawn by hypothesis.

Shapes are fixed, so that each property is compiled once.
"""

import hypothesis.extra.numpy as arrays_of
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import race_jax
from race_jax import RACEState, merge
from tests.problems import evaluate, make_problem, outputs

soft_hash = jax.jit(race_jax.soft_hash)

B, T = 2, 13
SEEDS = st.integers(0, 10**6)
MASKS = arrays_of.arrays(bool, (B, T))
SHARPNESS = st.floats(0.0625, 8.0, width=32)
GATES = st.sampled_from([0.0, 0.1, 3.0, 40.0])


@st.composite
def segment_ids(draw):
    """Draws ids in contiguous runs, rising or falling."""
    borders = draw(arrays_of.arrays(np.int32, (B, T), elements=st.integers(0, 1)))
    ids = np.cumsum(borders, axis=1, dtype=np.int32)
    return draw(st.sampled_from([ids, 20 - ids]))


@st.composite
def problems(draw, is_causal=True):
    """Draws problems of one shape, with masks, segments, gates and sharpness."""
    drawn = {
        "sharpness": np.full(1, draw(SHARPNESS), np.float32),
        "key_value_mask": draw(MASKS),
        "segment_ids": draw(segment_ids()),
    }
    problem = make_problem(
        draw(SEEDS),
        batch=B,
        queries=T,
        is_causal=is_causal,
        padding=True,
        segments=1,
        gate=1.0 if is_causal else None,
    )
    if is_causal:
        drawn["log_decay"] = draw(GATES) * problem.arrays["log_decay"]
    return problem.replace(**drawn)


def visibility(problem):
    """Returns visible(t, s) by its definition, in loops: (B, T, S)."""
    mask, ids = problem.masks["key_value_mask"], problem.masks["segment_ids"]
    visible = np.zeros((B, T, T), bool)
    for b in range(B):
        last = -1  # a padded slot has the segment of the token before it
        filled = [last := ids[b, t] if mask[b, t] else last for t in range(T)]
        for t in range(T):
            for s in range(T):
                visible[b, t, s] = mask[b, s] and filled[t] == filled[s]
                if problem.is_causal:
                    visible[b, t, s] &= s <= t and mask[b, t]
    return visible


@given(problems() | problems(is_causal=False))
def test_outputs_are_averages_of_visible_values_and_zero_without(tolerance, problem):
    out, value = outputs(problem)["out"], problem.arrays["value"][:, None]
    visible = visibility(problem)[..., None, None]
    low = np.where(visible, value, np.inf).min(2)
    high = np.where(visible, value, -np.inf).max(2)
    seen, slack = visible.any(2), tolerance("identity").max * np.sqrt(np.mean(value**2))
    assert np.all((out >= low - slack) | ~seen)
    assert np.all((out <= high + slack) | ~seen)
    assert not np.any(np.where(seen, 0, out))


@given(problems() | problems(is_causal=False))
def test_invisible_pairs_have_no_gradient(problem):
    """A cotangent at one query gives gradients to visible values only."""
    visible = visibility(problem)
    for t in (0, 6, T - 1):
        problem.cotangents.update({n: np.zeros_like(x) for n, x in problem.cotangents.items()})
        problem.cotangents["out"][:, t] = 1.0
        _, gradients = evaluate(problem)
        reached = np.any(gradients["d_value"] != 0, axis=(2, 3))
        assert not np.any(reached & ~visible[:, t])
        assert np.all(np.isfinite(gradients["d_key"]))


@given(problems() | problems(is_causal=False), st.floats(-100, 100, width=32))
def test_a_constant_value_comes_back(assert_close, problem, constant):
    value = np.full_like(problem.arrays["value"], constant)
    out = outputs(problem.replace(value=value))["out"]
    seen = visibility(problem).any(2)
    want = np.broadcast_to(np.where(seen[..., None, None], constant, 0), out.shape)
    assert_close("out", out, want, kind="identity")


@given(SEEDS, SHARPNESS)
def test_features_of_every_table_sum_to_one(assert_close, seed, sharpness):
    z = 20 * np.random.default_rng(seed).normal(size=(5, 3, 4))
    phi = soft_hash(jnp.asarray(z, jnp.float32), jnp.float32(sharpness)).reshape(5, 3, 16)
    assert np.all(phi >= 0)
    assert_close("sums", phi.sum(-1), np.ones((5, 3)), kind="identity")


@st.composite
def states(draw, segments):
    """Draws states of one row in the given segments. A state with segment -1 is empty."""
    rng = np.random.default_rng(draw(SEEDS))
    segments = np.asarray(segments, np.int32)
    rows = len(segments)

    def kept(x):
        shape = (rows, *[1] * (x.ndim - 1))
        return jnp.where(segments.reshape(shape) >= 0, jnp.asarray(x, jnp.float32), 0)

    return RACEState(
        kept(rng.normal(size=(rows, 1, 4, 3))),
        kept(rng.exponential(size=(rows, 1, 4))),
        kept(-rng.exponential(size=(rows, 1))),
        segment=jnp.asarray(segments),
    )


@st.composite
def three_states(draw):
    """Draws three adjoining spans. Their segments are contiguous runs, and any may be empty."""
    ids = np.cumsum(draw(arrays_of.arrays(np.int32, (3, 8), elements=st.integers(0, 1))), axis=0)
    empty = draw(arrays_of.arrays(bool, (3, 8)))
    return [draw(states(row)) for row in np.where(empty, -1, ids)]


@jax.jit
def merge_every_way(a, b, c):
    empty = RACEState.init(8, 1, 4, 3)
    return merge(merge(a, b), c), merge(a, merge(b, c)), merge(empty, a), merge(a, empty)


@given(three_states())
def test_merge_is_associative_and_empty_is_neutral(assert_close, three):
    a = three[0]
    left, right, after_empty, before_empty = merge_every_way(*three)
    assert_close("(a b) c", left, right, kind="identity")
    assert_close("empty a", after_empty, a, kind="rerun")
    assert_close("a empty", before_empty, a, kind="rerun")


@given(problems(is_causal=False), st.permutations(range(T)))
def test_keys_have_no_order_without_causality(assert_close, problem, order):
    mask = problem.masks["key_value_mask"]
    # There is one segment, because tokens cannot be moved between several. A padded query belongs
    # to it only if a token comes before.
    mask[:, 0] = True
    problem = problem.replace(segment_ids=np.zeros((B, T), np.int32))
    order = [0, *(i for i in order if i)]
    moved = {n: problem.arrays[n][:, order] for n in ("key", "value")}
    got = outputs(problem.replace(**moved, key_value_mask=mask[:, order]))
    assert_close("", got, outputs(problem), kind="identity")


@given(problems(), st.integers(1, T - 1), SEEDS)
def test_the_future_changes_nothing_before_it(assert_close, problem, t, seed):
    rng = np.random.default_rng(seed)
    changed = {}
    for name in ("query", "key", "value", "log_decay"):
        changed[name] = problem.arrays[name].copy()
        changed[name][:, t:] = -np.abs(rng.normal(size=changed[name][:, t:].shape))
    changed["key_value_mask"] = problem.masks["key_value_mask"].copy()
    changed["key_value_mask"][:, t:] ^= True
    got, want = outputs(problem.replace(**changed))["out"], outputs(problem)["out"]
    assert_close("out", got[:, :t], want[:, :t], kind="rerun")


@given(problems() | problems(is_causal=False), SEEDS)
def test_junk_in_padded_slots_changes_nothing(assert_close, problem, seed):
    rng = np.random.default_rng(seed)
    padded = ~problem.masks["key_value_mask"]
    junk = {}
    for name in ("key", "value", *(("query", "log_decay") if problem.is_causal else ())):
        junk[name] = problem.arrays[name].copy()
        shape = junk[name][padded].shape
        junk[name][padded] = rng.choice([np.nan, np.inf, -np.inf, 1e38, 0.0], shape)
    assert_close("", evaluate(problem.replace(**junk)), evaluate(problem), kind="rerun")
