"""Streaming through compiled kernels, and sequences over two cards: `pytest -m gpu`."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import race_jax
from race_jax import streaming
from race_jax.models import ModelConfig, TransformerLM
from race_jax.tasks.losses import chunked_cross_entropy
from tests.devices.test_training import one_device, run_steps
from tests.gradients import with_biases_as_rows
from tests.problems import evaluate, make_problem, oracle

pytestmark = pytest.mark.gpu

LENGTH = 4200
STATE = race_jax.RACEState(P(), P(), P(), P())


@pytest.fixture
def two_cards():
    """A mesh of the first two cards along `seq`."""
    if len(jax.devices()) < 2:
        pytest.skip("needs two GPUs")
    return jax.make_mesh((2,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])


@functools.cache
def language_model(dtype="float32", implementation="pallas"):
    """A step over segments of a language model of bytes, with the kernels, and its arguments."""
    config = ModelConfig(
        num_layers=2,
        width=128,
        num_heads=2,
        dtype=dtype,
        positions="none",
        implementation=implementation,
        race={"num_tables": 4, "num_planes": 4, "short_conv": "qkv", "forget_gate": "data"},
    )
    model = TransformerLM(config, vocab_size=256, rngs=nnx.Rngs(0))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)

    def nats(params, state, segment):
        model = nnx.merge(graph, params, fixed)
        hidden, state = model.hidden(segment["inputs"], state=state)
        weights = np.ones(segment["targets"].shape, np.float32)
        return state, chunked_cross_entropy(
            hidden, model.embedding[...], segment["targets"], weights
        )

    tokens = np.random.default_rng(0).integers(0, 256, (1, LENGTH + 1))
    sequence = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
    return nats, params, model.init_state(1), sequence


def gradient(segment_length, *model):
    """The sums and the gradient of `language_model`, in segments."""
    nats, *arguments = language_model(*model)
    run = streaming.value_and_grad(nats, segment_length=segment_length)
    with jax.default_matmul_precision("highest"):
        got = jax.jit(run)(*arguments)
    return tuple(map(np.float32, got.sums)), with_biases_as_rows(got.d_params)


@pytest.mark.parametrize("segment_length", [1024, 1000])
def test_segments_give_what_the_whole_gives(segment_length, assert_close):
    want_sums, want = gradient(LENGTH)
    sums, got = gradient(segment_length)
    assert_close("sums", sums, want_sums, kind="streamed")
    assert_close("d_params", got, want, kind="gradients")


def test_in_bfloat16_the_cut_matters_less_than_the_dtype():
    _, exact = gradient(LENGTH, "float32", "xla")
    _, whole = gradient(LENGTH, "bfloat16")
    _, got = gradient(1000, "bfloat16")

    def distance(a, b):
        pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum(float(np.sum(np.square(x - y))) for x, y in pairs) ** 0.5

    assert 0 < distance(got, whole) < distance(whole, exact)


def over_cards(mesh, check_vma, **arguments):
    """race_attention with tokens and masks split along the sequence."""
    names = ("is_causal", "normalization", "implementation", "return_state")
    static = {name: arguments.pop(name) for name in names if name in arguments}
    tokens = ("query", "key", "value", "log_decay", "key_value_mask", "segment_ids")
    specs = {name: P(None, "seq") if name in tokens else P() for name in arguments}
    if "initial_state" in specs:
        specs["initial_state"] = STATE
    out = (P(None, "seq"), STATE) if static.get("return_state") else P(None, "seq")
    run = jax.shard_map(
        lambda arrays: race_jax.race_attention(**arrays, **static, axis_name="seq"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=out,
        check_vma=check_vma,
    )
    return run(arguments)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_a_sequence_over_two_cards_is_that_of_the_oracle(
    is_causal, check_vma, two_cards, assert_close
):
    sizes = {"queries": 1000, "heads": 4, "kv_heads": 2, "head_dim": 64, "value_dim": 64}
    sizes |= {"tables": 4, "num_planes": 4, "padding": True, "state": True}
    if is_causal:
        sizes |= {"gate": 0.01, "segments": 3}
    problem = make_problem(is_causal=is_causal, implementation="pallas", **sizes)
    problem = problem.astype("bfloat16")
    want, want_gradients = oracle(problem)
    got, gradients = evaluate(problem, functools.partial(over_cards, two_cards, check_vma))
    assert_close("", got, want, kind="outputs", dtype="bfloat16")
    assert_close("", gradients, want_gradients, kind="gradients", dtype="bfloat16")


@pytest.mark.parametrize("segment_length", [None, 8])
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 1), (1, 1, 2)], ids=str)
def test_training_steps_on_two_cards_are_those_of_one(
    sizes, segment_length, two_cards, assert_close
):
    del two_cards
    with jax.default_matmul_precision("highest"):
        metrics, scores, state = run_steps(sizes, segment_length)
        wanted, wanted_scores, one = one_device()
    got, want = jax.device_get((state.opt_state, one.opt_state))
    assert_close("metrics", metrics, wanted, kind="gradients")
    assert_close("scores", scores, wanted_scores, kind="outputs")
    assert_close("optimizer", got, want, kind="gradients")
