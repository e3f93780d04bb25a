"""Train a small softmax model, then decode it densely, sparsely, and by reading everything again.

.venv/bin/python examples/decode_softmax.py
"""

import pathlib
import time

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from race_jax.models import ModelConfig, TransformerLM
from race_jax.models.decode import Sampling, stream
from race_jax.sparse import SparseConfig, kept

TEXT = pathlib.Path(__file__).resolve().parents[1].joinpath("README.md").read_bytes()
CONFIG = ModelConfig(2, width=64, num_heads=4, attention="softmax", positions="rope")
STEPS, BATCH, LENGTH, PROMPT, NEW = 150, 16, 64, 1500, 20
SPARSE = SparseConfig(budget=150, scorer="quantized", sink=4, window=32, dense_below=0)


@nnx.jit
def train_step(model: TransformerLM, optimizer: nnx.Optimizer, tokens: jnp.ndarray) -> jnp.ndarray:
    """One step of gradient descent; returns the loss."""

    def loss_of(model: TransformerLM) -> jnp.ndarray:
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def trained() -> TransformerLM:
    """Returns a model of the bytes of README.md."""
    model = TransformerLM(CONFIG, vocab_size=256, rngs=nnx.Rngs(0))
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
    model = trained()
    prompt = np.frombuffer(TEXT[:PROMPT], np.uint8)[None].astype(int)
    greedy = {"max_tokens": NEW, "sampling": Sampling(greedy=True)}
    dense = timed("from a cache", stream(model, prompt, **greedy))
    timed("the best tokens of it", stream(model, prompt, sparse=SPARSE, **greedy))
    again = timed("reading everything again", read_again(model, prompt))
    print(f"the same text without the cache: {dense == again}")
    print(f"sparse: {kept(SPARSE, PROMPT + NEW)[0]} of {PROMPT + NEW} tokens kept in the last step")


if __name__ == "__main__":
    main()
