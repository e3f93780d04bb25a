"""Classify long documents of different lengths, with padding.

    .venv/bin/python examples/long_documents.py

Documents have up to 2,048 tokens and are padded to one length. A document belongs to class 1 if it
contains token 1 more often than token 2. The mask is a vector with one boolean per token: RACE
attention leaves padded tokens out of its sums, and the mean over tokens leaves them out too.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import race_jax

LENGTH, WIDTH, VOCABULARY = 2048, 32, 8


class Classifier(nnx.Module):
    """Embedding, bidirectional RACE attention, masked mean, two logits."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = race_jax.RACEAttention(num_heads=4, in_features=WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 2, rngs=rngs)

    def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits (batch, 2) of tokens (batch, length), mask True where there is a token."""
        x = self.embedding(tokens)
        x = x + self.attention(x, mask=mask)
        weights = mask[..., None] / mask.sum(axis=1)[:, None, None]
        return self.head((x * weights).sum(axis=1))


def documents(key: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Random documents, their masks and their labels."""
    text_key, length_key, label_key = jax.random.split(key, 3)
    labels = jax.random.randint(label_key, (count,), 0, 2)
    favorite = jnp.where(labels == 1, 1, 2)[:, None]
    tokens = jax.random.randint(text_key, (count, LENGTH), 1, VOCABULARY)
    tokens = jnp.where(tokens == VOCABULARY - 1, favorite, tokens)
    lengths = jax.random.randint(length_key, (count, 1), LENGTH // 8, LENGTH + 1)
    mask = jnp.arange(LENGTH) < lengths
    return jnp.where(mask, tokens, 0), mask, labels


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, key: jax.Array) -> jax.Array:
    """One step on fresh documents; returns the loss."""
    tokens, mask, labels = documents(key, 8)

    def loss_of(model: Classifier) -> jax.Array:
        logits = model(tokens, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, gradients)
    return loss


def main() -> None:
    """Trains for 40 steps and prints the accuracy on new documents."""
    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    for step in range(40):
        loss = train_step(model, optimizer, jax.random.key(step))
        if step % 20 == 19:
            print(f"step {step + 1:3}  loss {loss:.3f}")
    tokens, mask, labels = documents(jax.random.key(1000), 32)
    print(f"accuracy on new documents: {(model(tokens, mask).argmax(-1) == labels).mean():.2f}")


if __name__ == "__main__":
    main()
