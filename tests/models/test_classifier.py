"""A classifier is the trunk, the mean or the first state, and the head. Padding has no effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.models import Classifier, TransformerLM
from race_jax.models.classifier import masked_mean
from tests import quick
from tests.models.small import VOCAB, describe, draw

pytestmark = pytest.mark.once

CLASSES, LENGTHS = 3, (5, 8)
KINDS = {
    "tokens, mean": {"vocab_size": VOCAB, "forget_gate": None},
    "vectors, cls, learned": {
        "channels": 2,
        "pooling": "cls",
        "positions": "learned",
        "max_length": 8,
        "forget_gate": None,
    },
    "tokens, cls, softmax alibi": {
        "vocab_size": VOCAB,
        "pooling": "cls",
        "attention": "softmax",
        "positions": "alibi",
    },
}


def build(**changes) -> Classifier:
    own = {
        name: changes.pop(name) for name in ("vocab_size", "channels", "pooling") if name in changes
    }
    config = describe(**changes)
    return draw(
        lambda: Classifier(config, num_classes=CLASSES, keep_rngs=False, rngs=nnx.Rngs(0), **own)
    )


def draw_inputs(model: Classifier) -> tuple[jax.Array, jax.Array]:
    """Inputs with junk in the padding, and their mask."""
    rng = np.random.default_rng(1)
    shape = (len(LENGTHS), max(LENGTHS))
    if model.input_rank == 2:
        inputs = rng.integers(0, VOCAB, shape)
    else:
        inputs = rng.normal(size=(*shape, 2)).astype(np.float32)
    return jnp.asarray(inputs), jnp.arange(shape[1]) < np.array(LENGTHS)[:, None]


def by_definition(model: Classifier, inputs: jax.Array) -> jax.Array:
    """The logits of one sequence without padding, from the parts of the model."""
    length, first = inputs.shape[0], model.first is not None
    table = model.max_length and model.embedding.positions[...][:length]
    if model.input_rank == 2:
        x = model.embedding.tokens[...][inputs]
    else:
        x = inputs @ model.embedding.project.kernel[...] + model.embedding.project.bias[...]
    x = x if model.max_length is None else x + table
    if first:
        x = jnp.concatenate([model.first[...][None], x])
    hidden = model.trunk.encode(x[None], positions=jnp.arange(len(x))[None])[0]
    pooled = hidden[0] if first else hidden.mean(axis=0)
    return pooled @ model.head.kernel[...] + model.head.bias[...]


@pytest.mark.parametrize("name", KINDS)
def test_logits_and_gradients_are_those_of_every_sequence_alone(name, assert_close):
    model = build(**KINDS[name])
    inputs, mask = draw_inputs(model)
    graph, variables = nnx.split(model)
    weights = jnp.asarray(np.random.default_rng(2).normal(size=(len(LENGTHS), CLASSES)))

    def padded(variables):
        logits = nnx.merge(graph, variables)(inputs, key_value_mask=mask)
        return jnp.sum(logits * weights), logits

    def alone(variables):
        model = nnx.merge(graph, variables)
        rows = [by_definition(model, row[:n]) for row, n in zip(inputs, LENGTHS, strict=True)]
        return jnp.sum(jnp.stack(rows) * weights), jnp.stack(rows)

    (_, got), grads = quick.jit(jax.value_and_grad(padded, has_aux=True))(variables)
    (_, want), wanted = quick.jit(jax.value_and_grad(alone, has_aux=True))(variables)
    assert got.shape == (len(LENGTHS), CLASSES)
    assert got.dtype == jnp.float32
    assert_close("logits", got, want, kind="outputs")
    if KINDS[name].get("attention") == "softmax":  # a bias of all keys changes no softmax weight
        for found in (grads, wanted):
            del found["trunk"]["blocks"][0]["attention"]["key"]["bias"]
    assert_close("gradients", grads, wanted, kind="gradients")


def test_a_row_without_tokens_has_the_mean_0():
    hidden = jnp.array([[[1.0], [jnp.nan]], [[5.0], [5.0]]])
    mask = jnp.array([[True, False], [False, False]])
    assert masked_mean(hidden, mask).tolist() == [[1.0], [0.0]]
    assert masked_mean(hidden[1:], None).tolist() == [[5.0]]


def test_what_cannot_be_used_is_refused():
    model = build(vocab_size=VOCAB, positions="learned", max_length=8, forget_gate=None)
    for inputs, error, message in (
        (jnp.zeros((1, 3, 2)), ValueError, r"must be token ids \(B, T\); got shape \(1, 3, 2\)"),
        (jnp.zeros((1, 3)), TypeError, r"must be integers; got float32"),
        (jnp.zeros((1, 9), int), ValueError, r"9 tokens are more .* max_length=8"),
    ):
        with pytest.raises(error, match=message):
            model(inputs)
    with pytest.raises(ValueError, match=r"key_value_mask must have shape \(1, 3\); got \(1, 4\)"):
        model(jnp.zeros((1, 3), int), key_value_mask=jnp.ones((1, 4), bool))
    for changes, message in (
        ({"forget_gate": "data", "vocab_size": 3}, r"forget_gate='data' needs a causal model"),
        ({"forget_gate": None}, r"vocab_size=None and channels=None"),
        ({"forget_gate": None, "vocab_size": 3, "channels": 3}, r"vocab_size=3 and channels=3"),
        ({"forget_gate": None, "vocab_size": 3, "pooling": "max"}, r"pooling='max' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**changes)


def test_a_language_model_that_is_not_causal_sees_later_tokens():
    config = describe(forget_gate=None)
    model = draw(
        lambda: TransformerLM(config, VOCAB, is_causal=False, keep_rngs=False, rngs=nnx.Rngs(0))
    )
    tokens = jnp.array([[1, 2, 3]])
    changed = model(tokens.at[0, 2].set(4))
    assert float(jnp.abs(model(tokens)[0, 0] - changed[0, 0]).max()) > 1e-3
    with pytest.raises(NotImplementedError, match="carries no state"):
        model.init_state(1)


def test_the_first_vector_is_beyond_max_length():
    """An attention that is made for a length reads `max_length` tokens and the learned one."""
    model = build(vocab_size=VOCAB, pooling="cls", attention="linformer", max_length=3)
    assert jax.eval_shape(model, jnp.zeros((1, 3), int)).shape == (1, CLASSES)
    with pytest.raises(ValueError, match=r"has 5 tokens, .* at most max_length=4"):
        jax.eval_shape(model, jnp.zeros((1, 4), int))
