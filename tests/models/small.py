"""Tiny language models by name. Each is made and compiled once for all tests of this folder."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from race_jax.layers import registry
from race_jax.models import ModelConfig, TransformerLM
from tests import newest, quick

VOCAB = 11
OWN = tuple(field.name for field in dataclasses.fields(registry.options_class("race")))
SIZES = {"num_layers": 1, "width": 16, "num_heads": 4, "num_tables": 2, "num_planes": 2}
CONFIGS = {
    "race": {},
    "race with everything": {
        "num_layers": 2,
        "num_kv_heads": 2,
        "short_conv": "before",
        "output_norm": "rms",
        "output_gate": "silu",
        "fold_planes": False,
        "positions": "learned",
        "max_length": 32,
    },
    "race, convolutions on q, k, v": {"short_conv": "qkv", "output_gate": "sigmoid"},
    "race bfloat16": {"dtype": "bfloat16"},
    "linear": {"attention": "linear", "num_kv_heads": 2, "linear": {"forget_gate": "data"}},
    "linear with every part": {
        "attention": "linear",
        "num_kv_heads": 2,
        "linear": {"short_conv": "qkv", "output_norm": "rms", "output_gate": "sigmoid"},
    },
    "performer": {"attention": "performer", "num_kv_heads": 2, "performer": {"num_features": 6}},
    "sigmoid": {
        "attention": "sigmoid",
        "num_kv_heads": 2,
        "positions": "alibi",
        "sigmoid": {"forget_gate": "learned"},
    },
    "angular": {
        "attention": "angular",
        "num_kv_heads": 2,
        "positions": "rope",
        "rope_base": 30.0,
        "angular": {"forget_gate": "data", "short_conv": "qkv"},
    },
    "gated linear": {"attention": "gated_linear", "num_kv_heads": 2},
    "gated delta": {"attention": "gated_delta", "num_kv_heads": 2},
    "race delta": {
        "attention": "race_delta",
        "num_kv_heads": 2,
        "race_delta": {"num_tables": 3, "forget_gate": "data"},
    },
    "sliding window": {
        "attention": "sliding_window",
        "num_kv_heads": 2,
        "positions": "alibi",
        "sliding_window": {"window": 4, "short_conv": "qkv"},
    },
    "race and sliding windows": {
        "num_layers": 2,
        "hybrid": "sliding_window",
        "hybrid_every": 2,
        "positions": "rope",
        "rope_base": 30.0,
        "sliding_window": {"window": 3},
    },
    "race and softmax": {
        "num_layers": 2,
        "num_kv_heads": 2,
        "hybrid": "softmax",
        "hybrid_every": 2,
        "positions": "alibi",
    },
    "softmax": {"attention": "softmax", "num_kv_heads": 2},
    "softmax with every part": {
        "attention": "softmax",
        "softmax": {"short_conv": "before", "forget_gate": "data", "output_gate": "silu"},
    },
    "softmax with convolutions": {
        "attention": "softmax",
        "num_kv_heads": 2,
        "positions": "alibi",
        "softmax": {"short_conv": "qkv", "output_norm": "rms", "output_gate": "sigmoid"},
    },
    "softmax with a convolution": {
        "attention": "softmax",
        "num_kv_heads": 2,
        "positions": "alibi",
        "softmax": {"short_conv": "before", "output_norm": "rms", "output_gate": "silu"},
    },
    "softmax learned": {"attention": "softmax", "positions": "learned", "max_length": 16},
    "softmax rope": {"attention": "softmax", "positions": "rope", "rope_base": 30.0},
    "softmax alibi": {"attention": "softmax", "positions": "alibi"},
    "softmax bfloat16": {"attention": "softmax", "num_kv_heads": 2, "dtype": "bfloat16"},
}
# The models of CONFIGS whose attention carries a state, each kind of state once.
STATEFUL = (
    *("race", "race with everything", "race, convolutions on q, k, v"),
    *("linear", "linear with every part", "performer", "gated linear", "gated delta"),
    *("race delta", "sliding window", "race and sliding windows"),
)

# What .ci/run tries with both versions of JAX. The others differ by their attention, and the tests
# of the attentions run with both.
ON_BOTH = ("race with everything", "gated delta", "softmax rope")


def each(*names: str) -> list:
    """The names as parameters of a test, of which the newest JAX runs those of ON_BOTH."""
    return newest.examples(names, ON_BOTH)


class Compiled(NamedTuple):
    """A model, and its logits as a compiled function of tokens and keyword arguments."""

    model: TransformerLM
    logits: Callable


def describe(**changes) -> ModelConfig:
    """Returns the record of `SIZES` and the changes. Options of RACE need no section name."""
    fields = SIZES | changes
    own = {name: fields.pop(name) for name in OWN if name in fields}
    return ModelConfig(**fields, race=own)


def draw(make: Callable[[], nnx.Module]) -> nnx.Module:
    """Returns the module that `make` describes, with random numbers for all parameters.

    Every part then has an effect, unlike biases of zero and identity convolutions at the start of
    training. Nothing is compiled to draw the numbers. Matrices are larger than biases, because one
    token would otherwise be the likeliest in most cases, whatever the model has read.
    """
    graph, variables = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(7)  # one with which greedy texts vary

    def drawn(path, leaf):
        center = float("scale" in jax.tree_util.keystr(path))
        spread = 0.5 if leaf.ndim > 1 else 0.1
        return jnp.asarray(rng.normal(center, spread, leaf.shape), leaf.dtype)

    return nnx.merge(graph, jax.tree_util.tree_map_with_path(drawn, variables))


def build(vocab_size: int = VOCAB, **changes) -> TransformerLM:
    """Returns a language model of `SIZES` and the changes."""
    config = describe(**changes)
    return draw(lambda: TransformerLM(config, vocab_size, keep_rngs=False, rngs=nnx.Rngs(0)))


@functools.cache
def compiled(name: str) -> Compiled:
    """Returns one of `CONFIGS`."""
    model = build(**CONFIGS[name])
    graph, variables = nnx.split(model)
    run = quick.jit(lambda variables, tokens, kw: nnx.merge(graph, variables)(tokens, **kw))
    return Compiled(model, lambda tokens, **kw: run(variables, tokens, kw))
