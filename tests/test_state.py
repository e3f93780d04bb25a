"""`RACEState` follows its definition. Splitting or decoding a sequence equals one whole call."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from race_jax import RACEState, merge
from tests.problems import evaluate, make_problem, oracle, outputs, to_device

NAMES = ("numerator", "mass", "log_decay", "segment")
PACKED = {"gate": 0.3, "padding": True, "segments": 3, "batch": 4, "kv_heads": 2, "heads": 4}


def fields(state):
    return {f"state.{name}": getattr(state, name) for name in NAMES}


def features(problem, name):
    """Returns phi of the problem's queries or keys."""
    arrays = problem.arrays
    z = race_jax.hash_projections(arrays[name], arrays["planes"])
    sharpness = arrays["sharpness"]
    return race_jax.soft_hash(z, jnp.repeat(sharpness, z.shape[2] // sharpness.size))


def added(state, problem, start=0, stop=None):
    """Returns the state after the problem's tokens from start to stop."""
    rest = {n: problem.arrays[n] for n in ("log_decay",) if n in problem.arrays} | problem.masks
    rest = {name: x[:, start:stop] for name, x in rest.items()}
    phi_k, value = features(problem, "key"), problem.arrays["value"]
    return state.update(phi_k[:, start:stop], value[:, start:stop], **rest)


def fresh(problem):
    batch, _, kv_heads, value_dim = problem.arrays["value"].shape
    planes = problem.arrays["planes"]
    return RACEState.init(batch, kv_heads, planes.shape[-3] * 2 ** planes.shape[-2], value_dim)


def initial(problem):
    arrays = {n: problem.arrays[f"state.{n}"] for n in NAMES[:-1]}
    return RACEState(**arrays, segment=problem.state_segment)


def test_init_is_empty_and_float32():
    state = RACEState.init(3, 2, 8, 5)
    shapes = {name: getattr(state, name).shape for name in NAMES}
    assert shapes == {
        "numerator": (3, 2, 8, 5),
        "mass": (3, 2, 8),
        "log_decay": (3, 2),
        "segment": (3,),
    }
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"float32", "int32"}
    assert len(jax.tree.leaves(state)) == 4
    assert not any(np.any(x) for x in (state.numerator, state.mass, state.log_decay))
    assert np.all(state.segment == -1)


@pytest.mark.parametrize("is_causal", [True, False])
def test_an_empty_initial_state_is_none(is_causal, assert_close):
    none = make_problem(queries=20, is_causal=is_causal)
    empty = make_problem(queries=20, state=True, is_causal=is_causal)
    arrays = {name: np.zeros_like(x) for name, x in empty.arrays.items()} | none.arrays
    segment = np.full_like(empty.state_segment, -1)
    empty = empty.replace(**arrays, **{"state.segment": segment})
    assert_close("", outputs(empty), outputs(none), kind="resumed")


def test_update_is_what_attention_returns(assert_close):
    problem = make_problem(queries=70, state=True, is_causal=True, **PACKED)
    want = outputs(problem)
    want.pop("out")
    problem = to_device(problem)
    got = fields(jax.jit(lambda p: added(initial(p), p))(problem))
    assert_close("", got, want, kind="resumed")


@pytest.mark.parametrize("stop", [0, 23, 64])
def test_updates_in_pieces_and_merges_equal_one_update(stop, assert_close):
    problem = to_device(make_problem(queries=70, state=True, is_causal=True, **PACKED))

    @jax.jit
    def three_ways(problem):
        start = initial(problem)
        first = added(start, problem, 0, stop)
        in_pieces = added(first, problem, stop)
        merged = merge(first, added(fresh(problem), problem, stop))
        return added(start, problem), in_pieces, merged

    whole, in_pieces, merged = three_ways(problem)
    assert_close("in pieces: ", fields(in_pieces), fields(whole), kind="resumed")
    assert_close("merged: ", fields(merged), fields(whole), kind="resumed")


def test_merge_by_hand(assert_close):
    def state(numerator, mass, log_decay, segment):
        shape = (1, 1, 1, 1)
        return RACEState(
            jnp.full(shape, numerator),
            jnp.full(shape[:3], mass),
            jnp.full(shape[:2], log_decay),
            segment=jnp.array([segment], jnp.int32),
        )

    half = float(np.log(0.5))
    early, empty = state(8.0, 4.0, half, 3), RACEState.init(1, 1, 1, 1)
    same, other = state(1.0, 2.0, half, 3), state(1.0, 2.0, half, 4)
    cases = {
        "the earlier decays by the later's gate": (early, same, state(5.0, 4.0, 2 * half, 3)),
        "another segment keeps the later's sums": (early, other, state(1.0, 2.0, 2 * half, 4)),
        "nothing later": (early, empty, early),
        "nothing earlier": (empty, early, early),
        "nothing": (empty, empty, empty),
    }
    for name, (earlier, later, want) in cases.items():
        assert_close(f"{name}: ", fields(merge(earlier, later)), fields(want), kind="identity")


@pytest.mark.parametrize("normalization", ["global", "bucket"])
def test_read_is_what_queries_get(normalization, assert_close):
    problem = make_problem(
        queries=7, keys=20, padding=True, batch=4, heads=4, kv_heads=2, normalization=normalization
    )
    want = outputs(problem)["out"]

    @jax.jit
    def read(problem):
        state = added(fresh(problem), problem)
        phi_q = features(problem, "query")
        ids = jnp.broadcast_to(state.segment[:, None], phi_q.shape[:2])
        return (
            state.read(phi_q, normalization=normalization),
            state.read(phi_q, normalization=normalization, segment_ids=ids),
            state.read(phi_q, normalization=normalization, segment_ids=ids + 1),
        )

    got, same_segment, other_segment = jax.device_get(read(to_device(problem)))
    assert_close("out", got, want, kind="resumed")
    assert_close("out of the same segment", same_segment[:3], got[:3], kind="rerun")
    assert_close("out of another", other_segment, np.zeros_like(got), kind="rerun")


def carried(*splits):
    """Returns the operation in pieces that carry the state, with the signature of the operation."""

    @functools.wraps(race_jax.race_attention)
    def pieces(query, key, value, planes, *, initial_state=None, return_state, **options):
        per_token = ("log_decay", "key_value_mask", "segment_ids")
        outs, borders = [], [0, *splits, query.shape[1]]
        for start, stop in itertools.pairwise(borders):
            mine = {n: x[:, start:stop] if n in per_token else x for n, x in options.items()}
            out, initial_state = race_jax.race_attention(
                *(x[:, start:stop] for x in (query, key, value)),
                planes,
                initial_state=initial_state,
                return_state=return_state,
                **mine,
            )
            outs.append(out)
        return jnp.concatenate(outs, axis=1), initial_state

    return pieces


@pytest.mark.parametrize("splits", [(1, 64), pytest.param((23,), marks=pytest.mark.once)], ids=str)
def test_splitting_anywhere_equals_the_whole(splits, assert_close):
    problem = make_problem(queries=70, state=True, is_causal=True, **PACKED)
    (want, want_gradients) = evaluate(problem)
    got, gradients = evaluate(problem, carried(*splits))
    assert_close("", got, want, kind="resumed")
    assert_close("", gradients, want_gradients, kind="gradients")


def test_one_token_at_a_time_equals_the_whole(assert_close):
    """Decoding is a scan of calls with one token. Gradients go through the carried states."""
    problem = make_problem(queries=70, state=True, is_causal=True, **PACKED)

    def decode(query, key, value, planes, *, initial_state, return_state, **options):
        per_token = ("log_decay", "key_value_mask", "segment_ids")
        shared = {n: x for n, x in options.items() if n not in per_token}
        tokens = {n: options[n] for n in per_token} | {"query": query, "key": key, "value": value}
        tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0)[:, :, None], tokens)

        def step(state, token):
            out, state = race_jax.race_attention(
                planes=planes, **token, **shared, initial_state=state, return_state=True
            )
            return state, out[:, 0]

        final, outs = jax.lax.scan(step, initial_state, tokens)
        return jnp.moveaxis(outs, 0, 1), final

    (want, want_gradients), (got, gradients) = evaluate(problem), evaluate(problem, decode)
    assert_close("", got, want, kind="resumed")
    assert_close("", gradients, want_gradients, kind="gradients")


def test_bidirectional_totals_carry_on(assert_close):
    """The keys are in two parts. The totals of the first are the initial state of the second."""
    problem = make_problem(queries=7, keys=50, batch=4, padding=True, heads=4, kv_heads=2)

    def in_two_parts(query, key, value, planes, *, key_value_mask, return_state, **options):
        first, rest = slice(0, 19), slice(19, None)
        attend = functools.partial(race_jax.race_attention, planes=planes, **options)
        _, totals = attend(
            query[:, :0],
            key[:, first],
            value[:, first],
            key_value_mask=key_value_mask[:, first],
            return_state=True,
        )
        return attend(
            query,
            key[:, rest],
            value[:, rest],
            key_value_mask=key_value_mask[:, rest],
            initial_state=totals,
            return_state=return_state,
        )

    (want, want_gradients), (got, gradients) = evaluate(problem), evaluate(problem, in_two_parts)
    assert_close("", got, want, kind="resumed")
    assert_close("", gradients, want_gradients, kind="gradients")
    assert not np.any(got["state.log_decay"])


def test_gradients_of_the_returned_state_alone(assert_close):
    problem = make_problem(queries=70, state=True, is_causal=True, **PACKED)
    silent = {"out": np.zeros_like(problem.cotangents["out"])}
    problem.cotangents.update(silent)
    (_, want), (_, gradients) = oracle(problem), evaluate(problem)
    assert_close("", gradients, want, kind="gradients")
    assert not np.any(gradients["d_query"])


def test_a_state_is_a_value():
    """Nothing writes into a state, so an old state can be used again."""
    problem = to_device(make_problem(queries=5, is_causal=True, state=True))
    state = initial(problem)
    before = jax.device_get(fields(state))
    added(state, problem)
    after = jax.device_get(fields(state))
    assert all(np.array_equal(before[name], after[name]) for name in before)
