"""Replace softmax attention in a Flax model by RACE attention.

    .venv/bin/python examples/drop_in.py

The encoder below is an ordinary Flax NNX module. The only line that changes is the one that makes
the attention. Both models are trained for a few steps on the same toy task: every token must report
whether token 0 occurs anywhere in its sequence.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import race_jax

LENGTH, WIDTH, VOCABULARY = 32, 32, 46  # half of the sequences hold token 0


class Encoder(nnx.Module):
    """One transformer block over token embeddings, with any attention module."""

    def __init__(self, attention: nnx.Module, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = attention
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits (batch, tokens, 2) of tokens (batch, tokens)."""
        x = self.embedding(tokens)
        x = x + self.attention(self.norm(x))
        return self.head(x)


def batch(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Random tokens, and for every token whether its sequence holds token 0."""
    tokens = jax.random.randint(key, (32, LENGTH), 0, VOCABULARY)
    found = (tokens == 0).any(axis=1, keepdims=True)
    return tokens, jnp.broadcast_to(found, tokens.shape).astype(jnp.int32)


@nnx.jit
def train_step(model: Encoder, optimizer: nnx.Optimizer, tokens: jax.Array, labels: jax.Array):
    """One step of gradient descent; returns the loss."""

    def loss_of(model: Encoder) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(model(tokens), labels)
        return losses.mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    """Trains both models and prints their losses."""
    rngs = nnx.Rngs(0)
    softmax = nnx.MultiHeadAttention(num_heads=4, in_features=WIDTH, decode=False, rngs=rngs)
    race = race_jax.RACEAttention(num_heads=4, in_features=WIDTH, rngs=rngs)
    for name, attention in (("softmax", softmax), ("RACE", race)):
        model = Encoder(attention, rngs)
        optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
        for step in range(200):
            loss = train_step(model, optimizer, *batch(jax.random.key(step)))
        print(f"{name:8} loss after 200 steps: {loss:.3f} (chance: {jnp.log(2.0):.3f})")


if __name__ == "__main__":
    main()
