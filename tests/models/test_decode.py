"""Decoding with a carried state draws the tokens that are drawn when everything is read again."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.models import decode
from race_jax.models.decode import Sampling, generate, sample, sparse_state, stream
from race_jax.sparse import SparseConfig
from tests.models.small import CONFIGS, STATEFUL, VOCAB, build, compiled, each

GREEDY = Sampling(greedy=True)
LENGTHS = np.array([2, 4, 5])


@pytest.fixture
def prompts(rng):
    """Prompts of 2, 4 and 5 tokens. By the side of their padding: tokens and mask, each (3, 5)."""
    slot, tokens = np.arange(5), rng.integers(0, VOCAB, (3, 5))
    right = slot < LENGTHS[:, None]
    left = slot >= 5 - LENGTHS[:, None]
    shifted = np.stack([np.roll(row, 5 - n) for row, n in zip(tokens, LENGTHS, strict=True)])
    return {"right": (tokens, right), "left": (shifted, left)}


# Models with a state, with a cache, and with a cache beside convolutions or a gate. The states and
# caches of all models are compared in tests/models/test_transformer.py.
@pytest.mark.parametrize(
    "name",
    each(
        *("race with everything", "gated delta", "softmax rope", "angular"),
        *("softmax with convolutions", "softmax with every part"),
    ),
)
def test_greedy_decoding_equals_reading_everything_again(prompts, name):
    model, logits = compiled(name)
    drawn = {
        side: generate(model, tokens, key_value_mask=mask, max_tokens=7, sampling=GREEDY)
        for side, (tokens, mask) in prompts.items()
    }
    np.testing.assert_array_equal(drawn["left"], drawn["right"])
    tokens = prompts["right"][0]
    whole = np.zeros((4, 12), int)
    for row, length in enumerate(LENGTHS):
        whole[row, :length] = tokens[row, :length]
        whole[row, length : length + 7] = drawn["right"][row]
    # With a mask and ids, the program is that of tests/models/test_transformer.py.
    plain = {"key_value_mask": np.ones_like(whole, bool), "segment_ids": np.zeros_like(whole)}
    choices = np.asarray(logits(whole, **plain).argmax(axis=-1))
    for row, length in enumerate(LENGTHS):
        want = choices[row, length - 1 : length + 6]
        np.testing.assert_array_equal(drawn["right"][row], want)
    assert len(np.unique(drawn["right"])) > 2


def prefill(model, length, tokens, mask):
    """Reads prompts in segments of a length, without the programs of other tests."""
    graph, variables = nnx.split(model)
    plan = decode._Plan(None, None, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "PROMPT_SEGMENT", length)
        read = functools.partial(decode._prefill.__wrapped__, graph)
        program = jax.jit(lambda *arrays: read(*arrays, plan, GREEDY))  # a new one is traced anew
        return program(variables, tokens, mask, jax.random.key(0))


@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_prompt_is_read_in_segments_of_any_length(prompts, side, assert_close):
    model = compiled("race with everything").model
    tokens, mask = prompts["right" if side == "none" else side]
    mask = None if side == "none" else mask
    want, want_state = prefill(model, 5, tokens, mask)
    for length in (1, 2, 3):
        got, state = prefill(model, length, tokens, mask)
        np.testing.assert_array_equal(got, want)
        for mine, theirs in zip(*map(jax.tree.leaves, (state, want_state)), strict=True):
            assert_close("state", mine, theirs, kind="outputs")


def test_the_memory_of_a_prompt_is_that_of_a_segment():
    model = build(**CONFIGS["race"])
    graph, variables = nnx.split(model)
    plan = decode._Plan(None, None, 0)

    def memory(length):
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        key = jax.random.key(0)
        program = decode._prefill.lower(graph, variables, tokens, None, key, plan, GREEDY).compile()
        return program.memory_analysis().temp_size_in_bytes

    short, long = memory(2 * decode.PROMPT_SEGMENT), memory(16 * decode.PROMPT_SEGMENT)
    tokens_bytes = 14 * decode.PROMPT_SEGMENT * 4
    assert long - short < 3 * tokens_bytes


@pytest.mark.parametrize("name", ["softmax rope", "softmax with every part"])
def test_a_model_without_a_state_reads_everything_again(prompts, name):
    model, (tokens, mask) = build(**CONFIGS[name]), prompts["left"]
    options = {"key_value_mask": mask, "max_tokens": 7, "sampling": GREEDY}
    cached = generate(model, tokens, **options)
    model.trunk.carries_state = False
    np.testing.assert_array_equal(generate(model, tokens, **options), cached)


@pytest.mark.parametrize("name", [*STATEFUL, "race bfloat16"])
def test_the_state_keeps_its_size(name):
    model = compiled(name).model
    before = jax.eval_shape(lambda: model.init_state(2))
    for length in (1, 9):
        tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
        _, after = jax.eval_shape(lambda t, s: model(t, state=s), tokens, before)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
            lambda x: (x.shape, x.dtype), before
        )


def test_a_cache_compiles_once():
    """The length grows from 500 to 520 tokens, past a block of 512."""
    model, before = compiled("softmax rope").model, decode._step._cache_size()
    prompt = np.arange(500)[None] % VOCAB
    assert generate(model, prompt, max_tokens=20, sampling=GREEDY).shape == (1, 20)
    assert decode._step._cache_size() - before == 1


@pytest.mark.once
def test_seeds_decide_the_draws():
    model, prompt = compiled("race").model, np.array([[1, 2, 3]])

    def draw(seed):
        return generate(model, prompt, max_tokens=8, seed=seed).tolist()

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


@pytest.mark.parametrize("seed", [2**32, 2**32 + 5, 2**63, -1])
def test_a_seed_that_would_draw_as_another_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed={seed} must lie from 0 to 2\*\*32 - 1"):
        stream(compiled("race").model, np.array([[1]]), max_tokens=1, seed=seed)
    with pytest.raises(TypeError, match=r"seed must be an integer; got 1\.5"):
        stream(compiled("race").model, np.array([[1]]), max_tokens=1, seed=1.5)


@pytest.mark.once
@pytest.mark.parametrize("name", ["race", "softmax learned"])
def test_rows_end_at_their_stop_token_and_are_filled_with_it(name):
    model, prompt = compiled(name).model, np.array([[1, 2, 3], [4, 5, 6]])
    free = generate(model, prompt, max_tokens=8)
    stop = int(free[0, 2])
    got = generate(model, prompt, max_tokens=8, stop_token=[stop])
    for row, whole in zip(got, free, strict=True):
        ends = np.flatnonzero(whole == stop)
        kept = ends[0] + 1 if ends.size else 8
        np.testing.assert_array_equal(row[:kept], whole[:kept])
        assert (row[kept:] == stop).all()
    alone = generate(model, prompt[:1], max_tokens=8)
    ended = generate(model, prompt[:1], max_tokens=8, stop_token=int(alone[0, 2]))
    assert ended.shape[1] == alone[0].tolist().index(alone[0, 2]) + 1


@pytest.mark.parametrize(
    ("stop", "kind", "words"),
    [(VOCAB, ValueError, "stop_token=11 is outside the vocabulary, 0 to 10"),
     ([1.0], TypeError, "stop_token must be a token id")],
)  # fmt: skip
def test_a_stop_token_that_cannot_be_is_refused(stop, kind, words):
    with pytest.raises(kind, match=words):
        stream(compiled("race").model, np.array([[1]]), max_tokens=1, stop_token=stop)


@pytest.mark.once
@pytest.mark.parametrize("name", ["race", "softmax learned"])
@pytest.mark.parametrize("sampling", [Sampling(), GREEDY], ids=["drawn", "greedy"])
def test_a_model_that_is_not_a_number_draws_nothing(name, sampling):
    graph, variables = nnx.split(compiled(name).model)
    model = nnx.merge(graph, jax.tree.map(lambda leaf: leaf * jnp.nan, variables))
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite for row\(s\) \[0, 1\] at token 0"
    ):
        generate(model, np.array([[1], [2]]), max_tokens=2, sampling=sampling)


def test_a_row_that_fails_is_named_and_what_came_before_is_given():
    """A row that has stopped is not checked again."""
    draws = [[3, 4], [5, -1], [-1, -1]]
    given = decode._until_stopped(map(np.array, draws), np.array([4]))
    assert next(given).tolist() == [3, 4]
    assert next(given).tolist() == [5, 4]
    with pytest.raises(FloatingPointError, match=r"row\(s\) \[0\] at token 2"):
        next(given)


@pytest.mark.parametrize("bad", [[0.0, np.nan], [0.0, np.inf], [-np.inf, -np.inf]])
def test_logits_without_a_likeliest_token_give_none(bad):
    rows = jnp.array([[0.0, -jnp.inf], bad])
    for sampling in (Sampling(), GREEDY, Sampling(top_k=1, top_p=0.5)):
        assert sample(rows, jax.random.key(0), sampling).tolist() == [0, -1]


def frequencies(sampling, logits, draws=4000):
    rows = jnp.broadcast_to(jnp.asarray(logits), (draws, len(logits)))
    tokens = jax.jit(sample, static_argnums=2)(rows, jax.random.key(0), sampling)
    return np.bincount(tokens, minlength=len(logits)) / draws


PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (Sampling(), PROBABILITIES),
        (Sampling(temperature=0.5), PROBABILITIES**2),
        (Sampling(top_k=2), PROBABILITIES * [0, 1, 0, 1, 0]),
        (Sampling(top_k=9), PROBABILITIES),
        (Sampling(top_p=0.69), PROBABILITIES * [0, 1, 0, 1, 0]),
        (Sampling(top_p=0.71), PROBABILITIES * [0, 1, 0, 1, 1]),
        (Sampling(top_p=1e-6), PROBABILITIES * [0, 1, 0, 0, 0]),
        (Sampling(top_p=1.0), PROBABILITIES),
        (Sampling(top_k=3, top_p=0.8), PROBABILITIES * [0, 1, 0, 1, 0]),
        (GREEDY, PROBABILITIES * [0, 1, 0, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(sampling, want):
    found = frequencies(sampling, np.log(PROBABILITIES))
    want = want / want.sum()
    assert not found[want == 0].any()
    # The error is at most five standard deviations of a frequency in 4000 draws.
    np.testing.assert_allclose(found, want, atol=5 * 0.5 / np.sqrt(4000))


def test_top_k_keeps_exactly_k_of_equal_tokens():
    assert (frequencies(Sampling(top_k=2), np.zeros(5)) > 0).sum() == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be positive .* greedy decoding"),
        ({"temperature": float("nan")}, "temperature=nan must be positive"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
    ],
)
def test_bad_sampling_is_refused_in_words(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


def test_learned_positions_end_the_continuation():
    model = build(positions="learned", max_length=6)
    prompt = np.array([[1, 2, 3, 4]])
    with pytest.warns(UserWarning, match="end at max_length=6: 3 tokens instead of 9"):
        tokens = stream(model, prompt, max_tokens=9)
    assert len(list(tokens)) == 3
    with pytest.raises(ValueError, match="prompt of 8 tokens does not fit the learned positions"):
        stream(model, np.tile(prompt, 2), max_tokens=1)


@pytest.mark.parametrize(
    ("prompt", "options", "kind", "words"),
    [
        ([1, 2], {}, ValueError, "prompt must have shape"),
        ([[]], {}, ValueError, r"at least one token; got \(1, 0\)"),
        ([[1.0]], {}, TypeError, "prompt must be token ids"),
        ([[VOCAB]], {}, ValueError, "from 11 to 11; the vocabulary is 0 to 10"),
        ([[-1]], {}, ValueError, "from -1 to -1"),
        ([[1]], {"max_tokens": 2.5}, ValueError, "max_tokens=2.5 must be an integer of at least 1"),
        ([[1]], {"max_tokens": 0}, ValueError, "max_tokens=0 must be an integer of at least 1"),
        ([[1]], {"key_value_mask": [[1]]}, ValueError, "key_value_mask must be bool"),
        ([[1]], {"key_value_mask": [[False]]}, ValueError, "every prompt needs at least one token"),
    ],
)
def test_bad_prompts_are_refused_at_the_call(prompt, options, kind, words):
    if "key_value_mask" in options:
        options = {"key_value_mask": np.array(options["key_value_mask"])}
    with pytest.raises(kind, match=words):
        stream(compiled("race").model, np.array(prompt), **{"max_tokens": 1} | options)


SPARSE = SparseConfig(budget=1024, sink=1, window=2, scorer="quantized", dense_below=0)


@pytest.mark.once
def test_sparse_decoding_of_all_tokens_is_dense_and_of_few_is_not(prompts):
    model, (tokens, mask) = compiled("softmax rope").model, prompts["left"]
    options = {"key_value_mask": mask, "max_tokens": 9, "sampling": GREEDY}
    dense = generate(model, tokens, **options)
    np.testing.assert_array_equal(generate(model, tokens, sparse=SPARSE, **options), dense)
    few = dataclasses.replace(SPARSE, budget=3)
    assert (generate(model, tokens, sparse=few, **options) != dense).any()
    first = generate(model, tokens, sparse=few, dense_layers=1, **options)
    np.testing.assert_array_equal(first, dense)


@pytest.mark.once
def test_a_sparse_state_is_coded_anew(assert_close):
    model, key = compiled("softmax rope").model, jax.random.key(3)
    state = model.init_state(1, 64)
    _, state = model(jnp.array([[1, 2, 3]]), state=state, deterministic=True)
    once = sparse_state(state, SPARSE, key)
    other = dataclasses.replace(SPARSE, scorer="hamming")
    again = sparse_state(sparse_state(state, other, key), SPARSE, key)
    assert_close("states", again, once, kind="rerun")
    back = sparse_state(once, SPARSE, key, dense_layers=len(state.layers))
    assert_close("dense states", back, state, kind="rerun")
    with pytest.raises(ValueError, match="dense_layers=9 must be an integer from 0 to the"):
        sparse_state(state, SPARSE, key, dense_layers=9)


@pytest.mark.parametrize(
    ("name", "options", "kind", "words"),
    [
        ("race", {}, ValueError, "keeps no keys, so there is nothing to select from"),
        ("softmax alibi", {}, NotImplementedError, "sparse scores know nothing of a distance bias"),
        ("softmax with every part", {}, NotImplementedError, "know nothing of a forget gate"),
        ("sigmoid", {}, NotImplementedError, "know nothing of a"),
        (
            "softmax",
            {"dense_layers": 2},
            ValueError,
            "dense_layers=2 must be an integer from 0 to the 1",
        ),
        ("softmax", {"sparse": 64}, TypeError, "sparse must be a SparseConfig or None; got int"),
    ],
)
def test_what_cannot_be_sparse_is_refused_at_the_call(name, options, kind, words):
    with pytest.raises(kind, match=words):
        stream(compiled(name).model, np.array([[1]]), max_tokens=1, **{"sparse": SPARSE} | options)
