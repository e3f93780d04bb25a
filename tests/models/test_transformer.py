"""Tests of the language model as a whole: causality, packing, padding, positions and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.layers.planes import HashPlanes
from race_jax.models import Transformer, TransformerLM, parameter_count
from race_jax.models.block import Block
from race_jax.models.decode import Sampling, generate
from tests import quick
from tests.models.small import CONFIGS, STATEFUL, VOCAB, build, compiled, describe, draw, each

DTYPES = {name: changes.get("dtype", "float32") for name, changes in CONFIGS.items()}


@pytest.fixture
def documents(rng):
    """Two documents of 5 and 7 tokens."""
    return rng.integers(0, VOCAB, 5), rng.integers(0, VOCAB, 7)


@pytest.mark.parametrize("name", each(*CONFIGS))
def test_packed_padded_and_plain_documents_give_the_same_logits(documents, assert_close, name):
    first, second = documents
    junk = np.full(7, 3)
    interior = np.array([0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0], bool)
    spread = np.full(12, 8)
    spread[interior] = second
    tokens = np.stack([[*first, *second], [*junk, *first], [*second, *junk[:5]], spread])
    slot = np.arange(12)
    mask = np.stack([slot >= 0, slot >= 7, slot < 7, interior])
    segments = np.where(slot < 5, 2, 6) * np.array([[1], [0], [0], [0]])
    run = compiled(name).logits
    logits = run(tokens, key_value_mask=mask, segment_ids=segments)
    plain = run(np.tile(second, (7, 1)))  # the shape of the test below: one program for both
    assert plain.dtype == jnp.float32
    assert plain.shape == (7, 7, VOCAB)

    def check(label, got, want):
        assert_close(label, got, want, kind="identity", dtype=DTYPES[name])

    check("left padding", logits[1, 7:], logits[0, :5])
    check("second packed document", logits[0, 5:], plain[0])
    check("right padding", logits[2, :7], plain[0])
    check("interior padding", logits[3, interior], plain[0])


@pytest.mark.parametrize("name", each(*CONFIGS))
def test_the_future_does_not_change_the_past(documents, assert_close, name):
    tokens = np.tile(documents[1], (7, 1))
    changed = tokens.copy()
    changed[np.arange(7), np.arange(7)] = (tokens[0] + 1) % VOCAB  # row t differs at token t
    run = compiled(name).logits
    logits, others = run(tokens), run(changed)
    past = np.tri(7, k=-1, dtype=bool)
    assert_close("past", others[past], logits[past], kind="identity", dtype=DTYPES[name])
    now = np.abs(others - logits)[np.arange(7), np.arange(7)]
    assert now.max(axis=-1).min() > 1e-3


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "shift_matters", "stretch_matters"),
    [
        ("race", False, False),
        ("race with everything", True, True),
        ("linear", False, False),
        ("softmax", False, False),
        ("softmax learned", True, True),
        ("softmax rope", False, True),
        ("softmax alibi", False, True),
    ],
)
def test_what_positions_mean(documents, assert_close, name, shift_matters, stretch_matters):
    tokens, run = np.tile(documents[1], (7, 1)), compiled(name).logits
    place = np.tile(np.arange(7), (7, 1))
    logits = run(tokens, positions=place)
    assert_close("by default", run(tokens), logits, kind="identity")

    def changes(positions):
        return np.abs(run(tokens, positions=positions) - logits).max() > 1e-3

    assert changes(place + 3) == shift_matters
    assert changes(place * 2) == stretch_matters


@pytest.mark.parametrize("name", each(*STATEFUL))
def test_a_sequence_may_be_split_anywhere(rng, assert_close, name):
    tokens = rng.integers(0, VOCAB, (3, 12))
    mask = rng.random((3, 12)) < 0.8
    mask[1] = True
    segments = np.sort(rng.integers(0, 3, (3, 12)))
    model, run = compiled(name)
    whole, end = run(tokens, key_value_mask=mask, segment_ids=segments, state=model.init_state(3))
    parts, state = [], model.init_state(3)
    for piece in (slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 12)):
        logits, state = run(
            tokens[:, piece],
            key_value_mask=mask[:, piece],
            segment_ids=segments[:, piece],
            state=state,
        )
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    assert_close("logits", got[mask], np.asarray(whole)[mask], kind="identity")
    assert_close("state", state, end, kind="identity")


@pytest.mark.parametrize(
    "name",
    each(
        *("softmax", "softmax learned", "softmax rope", "softmax alibi", "softmax bfloat16"),
        *("softmax with convolutions", "softmax with a convolution", "softmax with every part"),
        *("sigmoid", "angular"),
    ),
)
def test_a_cache_gives_what_reading_everything_again_gives(rng, assert_close, name):
    """The padding lies anywhere, and the rows have different lengths. The last has no token."""
    tokens, mask = np.zeros((4, 12), int), np.zeros((4, 12), bool)
    tokens[:3] = rng.integers(0, VOCAB, (3, 12))
    mask[:3] = rng.random((3, 12)) < 0.7
    mask[1], mask[2, :5] = True, False
    model, run = compiled(name)
    whole = run(tokens, key_value_mask=mask, segment_ids=np.zeros_like(tokens))
    parts, state = [], model.init_state(4, capacity=16)
    for piece in (slice(0, 1), slice(1, 2), slice(2, 7), slice(7, 12)):
        logits, state = run(tokens[:, piece], key_value_mask=mask[:, piece], state=state)
        parts.append(logits)
    got = np.concatenate(parts, axis=1)
    dtype = DTYPES[name]
    assert_close("logits", got[mask], np.asarray(whole)[mask], kind="outputs", dtype=dtype)
    lengths = mask.sum(axis=1).tolist()
    assert state.position.tolist() == state.layers[0].memory.length.tolist() == lengths


def test_a_cache_says_what_it_cannot_do():
    model, tokens = compiled("softmax alibi").model, jnp.array([[1, 2, 3]])
    state = model.init_state(1, capacity=2)
    with pytest.raises(NotImplementedError, match="one sequence a row; leave out segment_ids"):
        model(tokens, segment_ids=jnp.zeros((1, 3), jnp.int32), state=state)
    logits, full = model(tokens, state=state)
    assert full.layers[0].memory.length.tolist() == [3]
    assert np.isnan(logits).all()
    logits, _ = model(tokens, positions=2 * jnp.arange(3)[None], state=model.init_state(1, 3))
    assert np.isnan(logits[0]).all(axis=-1).tolist() == [False, True, True]


def test_a_block_may_be_recomputed_in_the_backward_pass(rng, assert_close):
    tokens = jnp.asarray(rng.integers(0, VOCAB, (2, 6)))

    def loss_and_gradients(remat):
        model = build(remat=remat, dropout_rate=0.3)
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @quick.jit
        def run(params, key):
            def loss(params):
                hidden = nnx.merge(graph, params, rest).hidden(
                    tokens, deterministic=False, rngs=nnx.Rngs(dropout=key)
                )
                return (hidden**3).mean()

            return jax.value_and_grad(loss)(params)

        return run(params, jax.random.key(5)), run(params, jax.random.key(6))

    (first, other), (again, _) = loss_and_gradients(remat=False), loss_and_gradients(remat=True)
    assert_close("loss and gradients", again, first, kind="gradients")
    assert abs(first[0] - other[0]) > 1e-4  # another seed drops other entries
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(first[1]["trunk"]["norm"]))


def test_the_tied_embedding_gets_the_gradients_of_both_its_uses(assert_close):
    tokens = jnp.asarray([[1, 2, 3, 1]])
    graph, params = nnx.split(build(attention="softmax"))

    def model(table):
        def place(path, leaf):
            return table if "embedding" in jax.tree_util.keystr(path) else leaf

        return nnx.merge(graph, jax.tree_util.tree_map_with_path(place, params))

    def loss(read, written):
        logits = model(written).logits(model(read).hidden(tokens))
        return jax.nn.logsumexp(logits, axis=-1).sum()

    @quick.jit
    def gradients(table):
        both = jax.grad(lambda table: loss(table, table))(table)
        return both, *jax.grad(loss, argnums=(0, 1))(table, table)

    both, read, written = gradients(params["trunk"]["embedding"]["tokens"][...])
    assert_close("sum", both, read + written, kind="gradients")
    assert np.flatnonzero(np.abs(read).max(axis=1)).tolist() == [1, 2, 3]
    assert (np.abs(written).max(axis=1) > 0).all()


def test_bfloat16_is_close_to_float32(documents, assert_close):
    tokens = np.tile(documents[1], (7, 1))
    half = compiled("race bfloat16")
    hidden = nnx.eval_shape(lambda: half.model.hidden(jnp.asarray(tokens)))
    assert hidden.dtype == jnp.bfloat16
    parameters = nnx.state(half.model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(parameters)} == {jnp.dtype("float32")}
    got, want = half.logits(tokens), compiled("race").logits(tokens)
    assert_close("logits", got, want, kind="outputs", dtype="bfloat16")


def test_parameters_are_counted_and_fixed_planes_are_not():
    width, heads, hidden = 16, 4, 64
    attention = 4 * (width * width + width)  # query, key, value, out
    gate = width * heads + heads
    convolutions, out_norm, out_gate = 3 * 4 * width, width // heads, width * width
    attention += convolutions + out_norm + out_gate
    block = attention + gate + heads + (width * hidden + hidden) + (hidden * width + width)
    norms = (2 * 2 + 1) * 2 * width
    want = VOCAB * width + 2 * block + norms
    model = build(num_layers=2)
    assert parameter_count(model) == want
    assert parameter_count(build(num_layers=2, learn_planes=True)) == want + 2 * (2 * 2 * 4)
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, HashPlanes))) == 2 * 2 * 2 * 4


def test_branches_start_smaller_than_what_they_read():
    @quick.jit
    def kernels():
        config = describe(width=64, num_layers=8)
        block = Block(config, "race", is_causal=True, rngs=nnx.Rngs(0))
        layers = block.attention.value, block.mlp.up, block.attention.out, block.mlp.down
        return [layer.kernel[...] for layer in layers]

    want = [0.02, 0.02, 0.02 / 4, 0.02 / 4]  # sqrt(2 * 8) = 4
    np.testing.assert_allclose([np.std(kernel) for kernel in kernels()], want, rtol=0.05)


def test_an_encoder_sees_the_future():
    config = describe(forget_gate=None)
    encoder = draw(lambda: Transformer(config, VOCAB, is_causal=False, rngs=nnx.Rngs(0)))
    graph, variables = nnx.split(encoder)
    run = quick.jit(lambda variables, tokens: nnx.merge(graph, variables)(tokens))
    first, second = run(variables, jnp.array([[1, 2, 3], [1, 2, 4]]))
    assert np.abs(first - second)[0].max() > 1e-3
    with pytest.raises(NotImplementedError, match="this model carries no state"):
        encoder.init_state(1)


def test_an_encoder_has_no_direction():
    with pytest.raises(ValueError, match="forget_gate='data' needs a causal model"):
        Transformer(describe(), VOCAB, is_causal=False, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "tokens", "options", "kind", "words"),
    [
        ("race", [1, 2], {}, ValueError, "tokens must have shape"),
        ("race", [[1.0, 2.0]], {}, TypeError, "tokens must be integers"),
        ("race", [[1, 2]], {"segment_ids": [[0]]}, ValueError, "segment_ids must have the shape"),
        ("race", [[1, 2]], {"positions": [[0]]}, ValueError, "positions must have the shape"),
        ("race", [[1, 2]], {"key_value_mask": [[True]]}, ValueError, "key_value_mask must have"),
        ("softmax learned", [[1] * 17], {}, ValueError, "position 16 is beyond"),
    ],
)
def test_bad_calls_are_refused_in_words(name, tokens, options, kind, words):
    options = {option: jnp.asarray(value) for option, value in options.items()}
    with pytest.raises(kind, match=words):
        compiled(name).model(jnp.asarray(tokens), **options)


def test_states_that_do_not_fit_are_refused():
    race, softmax = (compiled(name).model for name in ("race", "softmax"))
    tokens = jnp.array([[1, 2]])
    with pytest.raises(NotImplementedError, match=r"as in init_state\(1, capacity=1024\)"):
        softmax.init_state(1)
    with pytest.raises(TypeError, match=r"with a cache of keys and values.*got .*LayerState"):
        softmax(tokens, state=race.init_state(1))
    with pytest.raises(ValueError, match="state is for a batch of 3"):
        race(tokens, state=race.init_state(3))


def test_dropout_asks_for_random_numbers():
    config = describe(attention="softmax", dropout_rate=0.1)
    model = TransformerLM(config, VOCAB, rngs=nnx.Rngs(params=0))
    with pytest.raises(ValueError, match=r"pass rngs=nnx.Rngs\(dropout=seed\)"):
        model(jnp.array([[1, 2]]), deterministic=False)


def test_train_and_eval_switch_dropout():
    config = describe(attention="softmax", dropout_rate=0.5)
    model = TransformerLM(config, VOCAB, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3]])
    fresh = model(tokens)
    model.train()
    first, second = model(tokens), model(tokens)
    assert not np.allclose(first, fresh)
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(model(tokens, deterministic=True), fresh)
    np.testing.assert_array_equal(nnx.view(model, deterministic=True)(tokens), fresh)
    drawn = generate(model, np.array([[1, 2, 3]]), max_tokens=3, sampling=Sampling(greedy=True))
    model.eval()
    np.testing.assert_array_equal(model(tokens), fresh)
    again = generate(model, np.array([[1, 2, 3]]), max_tokens=3, sampling=Sampling(greedy=True))
    np.testing.assert_array_equal(drawn, again)
    bare = TransformerLM(config, VOCAB, keep_rngs=False, rngs=nnx.Rngs(0))
    assert not nnx.state(bare, nnx.RngState)
    bare.train()
    with pytest.raises(ValueError, match=r"pass rngs=nnx.Rngs\(dropout=seed\)"):
        bare(tokens)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=["no sequence", "no token"])
@pytest.mark.parametrize("name", ["race with everything", "softmax rope", "sliding window"])
def test_empty_tokens_give_empty_logits(name, shape):
    """Also with a state, which is then what it was."""
    model, tokens = compiled(name).model, jnp.zeros(shape, jnp.int32)
    room = (8,) if "softmax" in name else ()
    state = model.init_state(shape[0], *room)

    def call(state):
        return model(tokens), model(tokens, state=state)

    logits, (again, after) = jax.eval_shape(call, state)
    assert logits.shape == again.shape == (*shape, VOCAB)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)
    if not shape[1]:
        chex.assert_trees_all_equal(model(tokens, state=state)[1], state)


def test_a_token_outside_the_vocabulary_is_not_a_number():
    logits = compiled("softmax").logits(np.array([[1, VOCAB]]))
    assert np.isnan(logits[0, 1]).all()


def test_an_empty_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size=0 must be at least 1"):
        TransformerLM(describe(), 0, rngs=nnx.Rngs(0))


def test_equal_blocks_are_lowered_once():
    """The program of a deep model is not much longer than that of a shallow one."""

    def length(num_layers: int) -> int:
        model = build(num_layers=num_layers)
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        tokens = jnp.zeros((1, 8), jnp.int32)
        loss = lambda params: nnx.merge(graph, params, rest)(tokens).sum()  # noqa: E731
        return len(quick.jit(jax.grad(loss)).lower(params).as_text())

    assert length(6) < 1.5 * length(2)
