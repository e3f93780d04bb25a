"""The operation works under jit, vmap, scan, remat and shard_map. Forward mode raises an error."""

import functools

import jax
import jax.numpy as jnp
import pytest

import race_jax
from tests.problems import (
    call,
    call_and_differentiate,
    evaluate,
    make_problem,
    outputs,
    to_device,
)

SMALL = {"queries": 6, "batch": 2, "kv_heads": 2, "tables": 1, "value_dim": 3, "state": True}
GATED = {"is_causal": True, "gate": 0.3, "segments": 2, "padding": True}
MODES = [pytest.param(GATED, id="causal"), pytest.param({"padding": True}, id="bidirectional")]


def three_problems(**options):
    """Returns problems that differ in all arguments, and the same stacked in a new leading axis."""
    problems = [to_device(make_problem(seed, **SMALL, **options)) for seed in range(3)]
    return problems, jax.tree.map(lambda *x: jnp.stack(x), *problems)


def at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


@pytest.mark.parametrize("mode", MODES)
def test_vmap_over_everything_equals_a_loop(mode, assert_close):
    problems, stacked = three_problems(**mode)
    mapped = jax.vmap(functools.partial(call_and_differentiate, race_jax.race_attention))
    got = jax.device_get(jax.jit(mapped)(stacked))
    for index, problem in enumerate(problems):
        (outs, gradients), (want, want_gradients) = at(got, index), evaluate(problem)
        assert_close(f"{index}", outs, want, kind="resumed")
        assert_close(f"{index}", gradients, want_gradients, kind="gradients")


def test_vmap_over_each_argument_alone_equals_a_loop(assert_close):
    problems, stacked = three_problems(**GATED)

    def named(problem):
        return problem.arrays | problem.masks | {"state.segment": problem.state_segment}

    def with_other(name, x):
        return problems[0].replace(**{name: x})

    @jax.jit  # all of them in one compilation, for the compiler's time
    def mapped(arrays):
        def over(name):
            return jax.vmap(lambda x: call(race_jax.race_attention, with_other(name, x)))

        return {name: over(name)(x) for name, x in arrays.items()}

    got = jax.device_get(mapped(named(stacked)))
    for name, outs in got.items():
        for index, problem in enumerate(problems):
            want = outputs(with_other(name, named(problem)[name]))
            assert_close(f"mapped over {name}, {index}", at(outs, index), want, kind="resumed")


def test_vmap_over_the_projections_op(rng, assert_close):
    z_q, z_k = jnp.asarray(rng.normal(size=(2, 3, 2, 6, 1, 2, 2)), jnp.float32)
    value = jnp.asarray(rng.normal(size=(3, 2, 6, 1, 4)), jnp.float32)
    attend = functools.partial(race_jax.race_attention_from_projections, is_causal=True)
    got = jax.jit(jax.vmap(attend, in_axes=(0, None, 0)))(z_q, z_k[0], value)
    alone = jax.jit(attend)
    want = jnp.stack([alone(z_q[i], z_k[0], value[i]) for i in range(3)])
    assert_close("out", got, want, kind="resumed")


def test_eager_equals_jit(assert_close):
    problem = to_device(make_problem(**SMALL, **GATED))
    got = call(race_jax.race_attention, problem)
    assert_close("", got, outputs(problem), kind="resumed")


LONG = {"queries": 96, "is_causal": True, "gate": 0.1, "state": True}  # two chunks


def test_scan_over_segments_of_a_long_sequence(assert_close):
    """Streaming is a scan whose carry is the state. Its body is rematerialized."""
    problem = make_problem(**LONG)

    def streamed(query, key, value, planes, *, log_decay, initial_state, return_state, **options):
        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0], 6, 16, *x.shape[2:]), 1, 0)

        @jax.checkpoint
        def step(state, xs):
            q, k, v, g = xs
            out, state = race_jax.race_attention(
                q,
                k,
                v,
                planes,
                log_decay=g,
                initial_state=state,
                return_state=return_state,
                **options,
            )
            return state, out

        xs = tuple(map(split, (query, key, value, log_decay)))
        final, outs = jax.lax.scan(step, initial_state, xs)
        return jnp.moveaxis(outs, 0, 1).reshape(*query.shape[:3], -1), final

    (want, want_gradients), (got, gradients) = evaluate(problem), evaluate(problem, streamed)
    assert_close("", got, want, kind="resumed")
    assert_close("", gradients, want_gradients, kind="gradients")


def test_remat_changes_nothing(assert_close):
    problem = make_problem(**LONG)

    def rematerialised(*, is_causal, return_state, **arrays):
        options = {"is_causal": is_causal, "return_state": return_state}
        return jax.checkpoint(functools.partial(race_jax.race_attention, **options))(**arrays)

    got, want = evaluate(problem, rematerialised), evaluate(problem)
    assert_close("", got, want, kind="resumed")


def test_int_leaf_of_the_state_under_grad(assert_close):
    """With allow_int=True, jax.grad takes a state, and gives the gradients of jax.vjp."""
    problem = to_device(make_problem(**SMALL, is_causal=True))
    fields = {n.removeprefix("state."): x for n, x in problem.arrays.items() if "state." in n}
    state = race_jax.RACEState(**fields, segment=problem.state_segment)
    tokens = [problem.arrays[n] for n in ("query", "key", "value", "planes")]

    def total(state):
        return jnp.sum(race_jax.race_attention(*tokens, is_causal=True, initial_state=state) ** 2)

    def of_floats(numerator, mass):
        fields = numerator, mass, state.log_decay
        return total(race_jax.RACEState(*fields, segment=state.segment))

    got = jax.jit(jax.grad(total, allow_int=True))(state)
    want = jax.jit(jax.grad(of_floats, (0, 1)))(state.numerator, state.mass)
    assert_close("", (got.numerator, got.mass), want, kind="resumed")


@pytest.mark.parametrize(("mode", "is_causal"), [("jvp", True), ("jvp", False), ("jacfwd", True)])
def test_forward_mode_is_refused_in_words(mode, is_causal):
    x, planes = jnp.ones((1, 3, 1, 4)), jnp.ones((1, 2, 4))

    def attend(x):
        return race_jax.race_attention(x, x, x, planes, is_causal=is_causal)

    with pytest.raises(
        (NotImplementedError, TypeError), match=r"reverse mode.*race_jax\.core\.reference"
    ):
        jax.jvp(attend, (x,), (x,)) if mode == "jvp" else jax.jacfwd(attend)(x)


def test_shard_map_over_batch_and_heads_on_four_devices(run_python):
    printed = run_python("from tests import sharded; sharded.main()", devices=4)
    assert printed.count("over 2 x 2 devices: equal") == 2


@pytest.mark.once  # the operation of the test before is tried with both versions of JAX
@pytest.mark.first
def test_layers_and_models_on_two_devices(run_python):
    script = "from tests import quick, sharded_layers as layers\n"
    printed = run_python(f"{script}with quick.everywhere(): layers.main()", devices=2)
    assert printed.count(": equal") == 17
