"""Streaming as a program: numerics, memory, compilation, transformations and dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import streaming
from tests.streaming.toy import FORMS, in_memory, on_host, scaled, scaled_state, toy, toy_arguments

STEPS = 100_000


def constant(params, state, segment):
    """A toy whose every segment stands for 10^4 tokens with the same gradient."""
    tokens = 1e4 * segment.size
    return state, (params.astype(jnp.float32) * tokens, tokens)


@pytest.mark.parametrize("truncated", [False, True])
def test_sums_and_gradients_grow_correctly_to_a_billion_tokens(truncated):
    run = in_memory(constant, 1, truncated=truncated)
    got = run(jnp.float32(0.3), (), jnp.zeros((1, STEPS)))
    one = float(np.float32(np.float32(0.3) * np.float32(1e4)))
    assert float(got.sums[0]) == pytest.approx(one * STEPS, rel=1e-7)
    assert float(got.sums[1]) == 1e9
    assert float(got.d_params) == pytest.approx(1e9, rel=1e-7)
    plain = jax.jit(lambda: jax.lax.fori_loop(0, STEPS, lambda _, s: s + jnp.float32(one), 0.0))()
    assert abs(float(plain) / (one * STEPS) - 1) > 1e-6  # so the toy can tell


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_sum_that_is_not_finite_stays_what_it_is(bad):
    x = np.ones((1, 6), np.float32)
    x[0, 2] = bad
    for got in (
        in_memory(scaled, 2)(2.0, (), x).sums,
        streaming.fold(scaled, segment_length=2)(2.0, (), x)[1],
    ):
        np.testing.assert_array_equal(got, bad)


def test_gradients_of_bfloat16_parameters_are_accumulated_in_float32():
    scale = jnp.bfloat16(0.5)
    f = lambda scale, state, x: (state, (scale.astype(jnp.float32) * x).sum())  # noqa: E731
    values = jnp.full((1, 1000), 1 / 256)
    for form in FORMS.values():
        got = form(f, 1)(scale, (), np.asarray(values))
        assert got.d_params.dtype == jnp.bfloat16
        assert float(got.d_params) == float(jnp.bfloat16(1000 / 256))


def temporaries(run, length):
    """Bytes of temporaries per state, for a toy whose state is far larger than a token."""
    width = 1024
    arguments = jnp.ones(width), jnp.ones((1, width)), jnp.ones((1, length))

    def f(decay, state, x):
        state = decay * jnp.tanh(state) + x.sum()
        return state, state.sum()

    compiled = jax.jit(run(f)).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * width)


def test_memory_grows_like_the_square_root_of_the_number_of_segments():
    exact = [
        temporaries(lambda f: streaming.value_and_grad(f, segment_length=1), n)
        for n in (16, 64, 256)
    ]
    truncated = [
        temporaries(lambda f: streaming.value_and_grad(f, segment_length=1, truncated=True), n)
        for n in (16, 256)
    ]
    folded = [temporaries(lambda f: streaming.fold(f, segment_length=1), n) for n in (16, 256)]
    every_border = temporaries(
        lambda f: streaming.value_and_grad(f, segment_length=1, group_size=1), 256
    )
    first, second = np.diff(exact)
    assert first == pytest.approx(2 * (8 - 4), abs=1.5)
    assert second == pytest.approx(2 * (16 - 8), abs=1.5)
    assert every_border > exact[2] + 200
    assert truncated[1] == pytest.approx(truncated[0], abs=1.5)
    assert folded[1] == pytest.approx(folded[0], abs=1.5)


def test_two_programs_serve_all_segments_and_calls():
    traces = []

    def f(scale, state, x):
        traces.append(x.shape)
        return state + x.sum(), (scale * state * x.sum(),)

    run = streaming.host_value_and_grad(f)
    segments = streaming.Segments(np.ones((1, 12)), 3)
    run(2.0, jnp.float32(0), segments)
    assert traces == [(1, 3)] * 2
    run(2.0, jnp.float32(0), segments)
    assert traces == [(1, 3)] * 2
    run(2.0, jnp.float32(0), streaming.Segments(np.ones((1, 13)), 3))
    assert sorted(traces) == [(1, 1)] * 2 + [(1, 3)] * 2


def test_integers_and_random_keys_may_be_in_the_state(assert_close):
    def f(scale, state, x):
        key, use = jax.random.split(state["key"])
        noise = jax.random.normal(use, x.shape)
        after = {"key": key, "count": state["count"] + 1, "sum": state["sum"] + (scale * x).sum()}
        return after, (noise * x * scale * state["sum"]).sum()

    state = {"key": jax.random.key(1), "count": jnp.int8(0), "sum": jnp.float32(1)}
    x = np.linspace(0, 1, 12, dtype=np.float32)[None]
    got = in_memory(f, 3)(2.0, state, x)
    host = on_host(f, 3, states_on_host=True)(2.0, state, x)
    assert int(got.state["count"]) == 4
    assert got.d_state["key"].dtype == got.d_state["count"].dtype == jax.dtypes.float0
    assert_close("d_params", host.d_params, got.d_params, kind="streamed")
    assert_close("d_sum", host.d_state["sum"], got.d_state["sum"], kind="streamed")


def test_vmap_over_a_batch(assert_close):
    params, state, sequence, d_state = jax.tree.map(np.float32, toy_arguments())
    state["position"] = state["position"].astype(np.int32)
    run = streaming.value_and_grad(toy, segment_length=4)
    rows = jax.tree.map(lambda x: x[:, None], (state, sequence, {"h": d_state["h"]}))
    got = jax.jit(jax.vmap(run, in_axes=(None, 0, 0, 0)))(params, *rows)
    want = in_memory(toy, 4)(params, state, sequence, d_state)
    summed = jax.tree.map(lambda x: x.sum(0), got.d_params)
    assert_close("d_params", summed, want.d_params, kind="streamed")
    assert_close("d_h", got.d_state["h"][:, 0], want.d_state["h"], kind="streamed")
    assert_close("sum", got.sums[0].sum(), want.sums[0], kind="streamed")


def test_arguments_may_be_donated_and_a_second_run_gives_the_same_bits(assert_close):
    run = streaming.value_and_grad(scaled_state, segment_length=2)
    arguments = lambda: (jnp.arange(3.0), jnp.ones((1, 3)), jnp.linspace(0, 1, 7)[None])  # noqa: E731
    donating = jax.jit(run, donate_argnums=(0, 1))
    state = arguments()[1]
    first = donating(arguments()[0], state, arguments()[2])
    assert state.is_deleted()
    assert_close("rerun", donating(*arguments()), first, kind="rerun")


def test_the_precision_of_products_reaches_both_passes():
    f = lambda w, state, x: (state @ w, jnp.sum(state @ w))  # noqa: E731
    with jax.default_matmul_precision("highest"):
        lowered = in_memory(f, 2).lower(jnp.ones((3, 3)), jnp.ones((1, 3)), jnp.ones((1, 4)))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 4
    assert all("HIGHEST" in line for line in products)


def test_time_may_be_any_axis(assert_close):
    x = np.linspace(0, 1, 21, dtype=np.float32).reshape(7, 3)
    for form in FORMS.values():
        got = form(scaled, 2, axis=0)(2.0, (), x)
        assert_close("sum", np.float32(got.sums), 2 * x.sum(), kind="streamed")
        assert_close("d_params", got.d_params, x.sum(), kind="streamed")


def test_a_sequence_of_no_tokens_adds_nothing():
    params, state, sequence, d_state = jax.tree.map(np.asarray, toy_arguments(np.float32))
    empty = jax.tree.map(lambda x: x[:, :0], sequence)
    for truncated in (False, True):
        given = () if truncated else (d_state,)
        got = in_memory(toy, 4, truncated=truncated)(params, state, empty, *given)
        assert float(got.sums[0]) == int(got.sums[1]["tokens"]) == 0
        assert not np.any(got.d_params["decay"])
        np.testing.assert_array_equal(got.state["h"], state["h"])
        want = np.zeros_like(state["h"]) if truncated else d_state["h"]
        np.testing.assert_array_equal(got.d_state["h"], want)
    with pytest.raises(ValueError, match="there are no segments"):
        on_host(toy, 4)(params, state, empty)


def test_rows_may_be_spread_over_devices(run_python, tolerance):
    out = run_python(
        """
        import jax, jax.numpy as jnp
        from jax.sharding import PartitionSpec as P
        from race_jax import streaming
        from tests.streaming.toy import scaled_state

        run = streaming.value_and_grad(scaled_state, segment_length=4)
        arguments = jnp.float32(0.5), jnp.ones((4, 1)), jnp.linspace(0, 1, 40).reshape(4, 10)
        want = run(*arguments)
        mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        for checked in (False, True):

            def local(*arguments):
                got = run(*arguments)
                add = lambda x: jax.lax.psum(x, "data")
                # JAX adds gradients of replicated parameters itself where it checks replication.
                return add(got.sums), got.d_params if checked else add(got.d_params), got.d_state

            rows, same = P("data"), P()
            specs = {"in_specs": (same, rows, rows), "out_specs": (same, same, rows)}
            spread = jax.jit(jax.shard_map(local, mesh=mesh, check_vma=checked, **specs))
            pairs = zip(spread(*arguments), (want.sums, want.d_params, want.d_state))
            print(*(float(jnp.abs(got / want - 1).max()) for got, want in pairs))
        """,
        devices=2,
    )
    errors = [float(word) for word in out.split()]
    assert len(errors) == 6
    assert max(errors) < tolerance("streamed").rms
