"""A causal model does not read future tokens.

A small model is trained on independent random tokens of 16 symbols. Its loss cannot fall below
ln 16 nats unless its attention leaks. A twin whose attention runs backwards in time shows that a
leak would be noticed.
"""

import math

import jax
import jax.numpy as jnp
import optax
import pytest

import race_jax

pytestmark = pytest.mark.once

SYMBOLS, WIDTH, HEADS, LENGTH, BATCH, STEPS = 16, 32, 2, 80, 32, 150
OPTIMIZER = optax.adam(1e-2)


def init(key):
    """Returns the parameters of embeddings, one attention layer, and an MLP after it."""
    keys = jax.random.split(key, 6)

    def normal(key, *shape):
        return jax.random.normal(key, shape) / math.sqrt(shape[0])

    params = {
        "embed": normal(keys[0], SYMBOLS, WIDTH),
        "positions": normal(keys[1], LENGTH, WIDTH),
        "qkv": normal(keys[2], WIDTH, 3, HEADS, WIDTH // HEADS),
        "hidden": normal(keys[3], 2 * WIDTH, 4 * WIDTH),
        "logits": normal(keys[4], 4 * WIDTH, SYMBOLS),
    }
    planes = race_jax.init_planes(keys[5], num_tables=4, num_planes=2, head_dim=WIDTH // HEADS)
    return params, planes


def loss(params, planes, tokens, leaks):
    """Returns the mean nats of each next token. With `leaks`, attention runs backward in time."""
    x = params["embed"][tokens[:, :-1]] + params["positions"]

    def turned(x):
        return jnp.where(leaks, jnp.flip(x, axis=1), x)

    q, k, v = jnp.einsum("btd,dinh->ibtnh", turned(x), params["qkv"])
    # One head forgets nothing, and the other nearly everything. This shows leaks of far tokens and
    # of near ones.
    gate = jnp.broadcast_to(jnp.array([0.0, -1.0]), k.shape[:3])
    attended = turned(
        race_jax.race_attention(q, k, v, planes, sharpness=2.0, is_causal=True, log_decay=gate)
    )
    x = jnp.concatenate([x, attended.reshape(x.shape)], axis=-1)
    logits = jax.nn.gelu(x @ params["hidden"]) @ params["logits"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@jax.jit
def loss_on_fresh_tokens_after_training(leaks):
    """Trains by a scan over steps, with new tokens in each step."""
    params, planes = init(jax.random.key(0))

    def batch(step):
        key = jax.random.fold_in(jax.random.key(1), step)
        return jax.random.randint(key, (BATCH, LENGTH + 1), 0, SYMBOLS)

    def train(carry, step):
        params, optimizer_state = carry
        gradients = jax.grad(loss)(params, planes, batch(step), leaks)
        updates, optimizer_state = OPTIMIZER.update(gradients, optimizer_state)
        return (optax.apply_updates(params, updates), optimizer_state), None

    (params, _), _ = jax.lax.scan(train, (params, OPTIMIZER.init(params)), jnp.arange(STEPS))
    fresh = jnp.arange(STEPS, STEPS + 8)
    return jax.lax.map(lambda step: loss(params, planes, batch(step), leaks), fresh).mean()


def test_a_causal_model_learns_nothing_from_random_tokens():
    honest = float(loss_on_fresh_tokens_after_training(False))
    assert honest > math.log(SYMBOLS) - 0.01
    assert honest < math.log(SYMBOLS) + 0.1, "it has not been trained"


def test_a_leaking_twin_is_seen():
    assert float(loss_on_fresh_tokens_after_training(True)) < math.log(SYMBOLS) - 0.1
