"""Streaming against the whole sequence at once: sums, states and every gradient by name."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from race_jax import streaming
from race_jax.tasks.losses import chunked_cross_entropy
from tests import quick
from tests.gradients import with_biases_as_rows
from tests.models.small import VOCAB, build
from tests.streaming.toy import FORMS, LENGTH, in_memory, on_host, toy, toy_arguments, toy_whole

CUTS = [1, 4, 22, 23, 40]  # dividing, not dividing, all but one, the whole, longer


def assert_toy(assert_close, got):
    sums, state, d_params, d_h = toy_whole()
    assert_close("state", got.state, state, kind="outputs", dtype="float64")
    assert_close("sum", got.sums[0], sums[0], kind="outputs", dtype="float64")
    assert_close("weight", got.sums[1]["weight"], sums[1]["weight"], kind="outputs")
    assert int(got.sums[1]["tokens"]) == sums[1]["tokens"]
    assert_close("d_params", got.d_params, d_params, kind="gradients", dtype="float64")
    assert_close("d_state.h", got.d_state["h"], d_h, kind="gradients", dtype="float64")
    assert got.d_state["position"].dtype == jax.dtypes.float0
    assert got.d_state["position"].shape == state["position"].shape


@pytest.mark.once
@pytest.mark.parametrize("segment_length", CUTS)
@pytest.mark.parametrize("form", FORMS)
def test_any_cut_gives_what_the_whole_gives(form, segment_length, assert_close):
    with jax.enable_x64(True):
        got = FORMS[form](toy, segment_length)(*toy_arguments())
        assert_toy(assert_close, got)


@pytest.mark.parametrize("group_size", [1, 2, 3, 100])
@pytest.mark.parametrize("form", FORMS)
def test_any_grouping_gives_what_the_whole_gives(form, group_size, assert_close):
    with jax.enable_x64(True):
        got = FORMS[form](toy, 3, group_size=group_size)(*toy_arguments())
        assert_toy(assert_close, got)


def test_states_may_be_kept_on_the_host(assert_close):
    with jax.enable_x64(True):
        assert_toy(assert_close, on_host(toy, 3, states_on_host=True)(*toy_arguments()))


@pytest.mark.parametrize("segment_length", [4, 23])
@pytest.mark.parametrize("form", FORMS)
def test_truncated_stops_the_gradient_at_borders(form, segment_length, assert_close):
    with jax.enable_x64(True):
        params, state, sequence, _ = toy_arguments()
        got = FORMS[form](toy, segment_length, truncated=True)(params, state, sequence)

        @jax.jit
        def value(params):
            total, carried = 0.0, state
            for first in range(0, LENGTH, segment_length):
                here = slice(first, first + segment_length)
                part = {name: x[:, here] for name, x in sequence.items()}
                carried, sums = toy(params, jax.lax.stop_gradient(carried), part)
                total += sums[0]
            return total, carried

        want, after = jax.grad(value, has_aux=True)(params)
        assert_close("d_params", got.d_params, want, kind="gradients", dtype="float64")
        assert_close("state", got.state, after, kind="outputs", dtype="float64")
        assert_close("sum", got.sums[0], toy_whole()[0][0], kind="outputs", dtype="float64")
        assert not np.any(got.d_state["h"])
        whole = quick.jit(jax.grad(lambda params: toy(params, state, sequence)[1][0]))(params)
        is_exact = np.allclose(got.d_params["decay"], whole["decay"], rtol=1e-3)
        assert is_exact == (segment_length == LENGTH)


@pytest.mark.once
@pytest.mark.parametrize("segment_length", CUTS)
def test_fold_reads_the_whole(segment_length, assert_close):
    with jax.enable_x64(True):
        params, state, sequence, _ = toy_arguments()
        segments = streaming.Segments(sequence, segment_length)
        want_sums, want_state = toy_whole()[:2]
        for after, sums in (
            quick.jit(streaming.fold(toy, segment_length=segment_length))(params, state, sequence),
            streaming.host_fold(toy)(params, state, segments),
        ):
            assert_close("state", after, want_state, kind="outputs", dtype="float64")
            assert_close("sum", sums[0], want_sums[0], kind="outputs", dtype="float64")
            assert int(sums[1]["tokens"]) == want_sums[1]["tokens"]


@functools.cache
def language_model(dtype="float32"):
    """A model with everything that crosses borders, its step, arguments and whole gradient."""
    model = build(
        num_layers=2, num_kv_heads=2, short_conv="before", output_gate="silu", dtype=dtype
    )
    graph, params, fixed = nnx.split(model, nnx.Param, ...)

    def nats(params, state, batch):
        model = nnx.merge(graph, params, fixed)
        hidden, state = model.hidden(batch["inputs"], segment_ids=batch["segment_ids"], state=state)
        table = model.embedding[...]
        return state, chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"])

    rng = np.random.default_rng(2)
    tokens = rng.integers(0, VOCAB, (2, 31))
    documents = np.sort(rng.integers(0, 3, (2, 30)), axis=1)
    weights = rng.integers(0, 2, (2, 30)).astype(np.float32)
    sequence = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "segment_ids": documents,
    }
    arguments = params, model.init_state(2), sequence

    @quick.jit
    def whole(params, state, sequence):
        def loss(params):
            state_after, sums = nats(params, state, sequence)
            return sums[0], (sums, state_after)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (sums, state)), d_params = whole(*arguments)
    return nats, arguments, (sums, state, d_params)


@pytest.mark.parametrize(
    ("form", "segment_length"), [("in memory", 8), ("in memory", 10), ("on the host", 8)]
)
def test_a_language_model_gets_its_exact_gradient(form, segment_length, assert_close):
    nats, arguments, (sums, state, d_params) = language_model()
    got = FORMS[form](nats, segment_length)(*arguments)
    assert_close("sums", tuple(map(np.float32, got.sums)), sums, kind="streamed")
    assert_close("state", got.state, state, kind="streamed")
    got, want = with_biases_as_rows(got.d_params), with_biases_as_rows(d_params)
    assert_close("d_params", got, want, kind="streamed")


def test_in_bfloat16_the_cut_matters_less_than_the_dtype():
    nats, arguments, (*_, whole) = language_model("bfloat16")
    exact = language_model()[2][2]
    got = in_memory(nats, 10)(*arguments).d_params

    def distance(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float(np.sum(np.square(x - y))) for x, y in pairs) ** 0.5

    assert 0 < distance(got, whole) < distance(whole, exact)


def test_a_prompt_is_read_in_segments(assert_close):
    nats, arguments, (_, state, _) = language_model()
    got, _ = quick.jit(streaming.fold(nats, segment_length=7))(*arguments)
    assert_close("state", got, state, kind="streamed")
