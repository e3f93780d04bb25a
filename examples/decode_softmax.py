"""Train a small softmax model, then decode with a cache and by reading everything again.

    .venv/bin/python examples/decode_softmax.py

A new token reads the keys and values in the cache, and not the whole sequence. Both ways draw the
same text.
"""

import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from race_jax.models import ModelConfig, TransformerLM
from race_jax.models.decode import Sampling, stream

TEXT = pathlib.Path(__file__).resolve().parents[1].joinpath("README.md").read_bytes()
STEPS, BATCH, LENGTH = 300, 16, 64
PROMPT, NEW = 1500, 40


@nnx.jit
def train_step(model: TransformerLM, optimizer: nnx.Optimizer, tokens: jax.Array) -> jax.Array:
    """One step of gradient descent; returns the loss."""

    def loss_of(model: TransformerLM) -> jax.Array:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def trained() -> TransformerLM:
    """Returns a model of the bytes of README.md."""
    config = ModelConfig(2, width=64, num_heads=4, attention="softmax", positions="rope")
    model = TransformerLM(config, vocab_size=256, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    data, rng = np.frombuffer(TEXT, np.uint8), np.random.default_rng(0)
    for _ in range(STEPS):
        starts = rng.integers(0, len(data) - LENGTH, (BATCH, 1))
        loss = train_step(model, optimizer, data[starts + np.arange(LENGTH + 1)].astype(int))
    print(f"loss after {STEPS} steps: {loss:.2f} nats a byte (chance: {np.log(256):.2f})")
    return model


def timed(name: str, tokens) -> bytes:
    """Draws all tokens, prints their rate, and returns them."""
    drawn, clock = zip(*((int(token[0]), time.perf_counter()) for token in tokens), strict=True)
    rate = (len(clock) - 2) / (clock[-1] - clock[1])  # the first two include compilation
    print(f"{name}: {rate:.0f} tokens/s")
    return bytes(drawn)


def read_again(model: TransformerLM, prompt: np.ndarray):
    """Yields the likeliest tokens, and reads the whole sequence for each."""
    read = nnx.jit(lambda model, tokens, last: model(tokens)[:, last].argmax(axis=-1))
    tokens = jnp.pad(prompt, ((0, 0), (0, NEW)))
    for last in range(PROMPT - 1, PROMPT - 1 + NEW):
        token = read(model, tokens, last)
        tokens = tokens.at[:, last + 1].set(token)
        yield token


def main() -> None:
    """Compares speed and text."""
    model, greedy = trained(), Sampling(greedy=True)
    prompt = np.frombuffer(TEXT[:PROMPT], np.uint8)[None].astype(int)
    first = timed("from a cache", stream(model, prompt, max_tokens=NEW, sampling=greedy))
    second = timed("reading everything again", read_again(model, prompt))
    print(f"the same text: {first == second}: {first!r}")


if __name__ == "__main__":
    main()
