"""The linear attention layer equals its definition, written out for all pairs of tokens."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from race_jax.layers.linear import LinearAttention, LinearConfig

B, T, D, N, K, H = 2, 9, 6, 4, 2, 3


def weighted_means(layer, x, mask, segments, gate):
    """Returns the means of values, with weights (elu(q) + 1) . (elu(k) + 1) of visible pairs."""
    x = jnp.where(mask[..., None], x, 0.0)
    project = lambda m: jnp.einsum("btd,dnh->btnh", x, m.kernel[...]) + m.bias[...]  # noqa: E731
    query, key, value = project(layer.query), project(layer.key), project(layer.value)
    phi = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0.0)))  # noqa: E731
    key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
    visible = (segments[:, :, None] == segments[:, None]) & mask[:, None] & mask[:, :, None]
    decay = visible[..., None].astype(x.dtype)
    if gate is not None:
        visible &= jnp.tril(jnp.ones((T, T), bool))
        logits = layer.gate_bias[...] + (x @ layer.gate_kernel[...] if gate == "data" else 0.0)
        log_decay = jnp.where(mask[..., None], -jnp.log1p(jnp.exp(-logits)), 0.0)
        total = jnp.cumsum(jnp.broadcast_to(log_decay, (B, T, K)), axis=1)
        difference = jnp.where(visible[..., None], total[:, :, None] - total[:, None], -jnp.inf)
        decay = jnp.repeat(jnp.exp(difference), N // K, axis=-1)
    weights = jnp.einsum("btnh,bsnh->btsn", phi(query), phi(key)) * decay
    mass = weights.sum(axis=2)[..., None]
    heads = jnp.einsum("btsn,bsnh->btnh", weights, value) / jnp.where(mass > 0, mass, 1.0)
    return jnp.einsum("btnh,nhd->btd", heads, layer.out.kernel[...]) + layer.out.bias[...]


def make(gate):
    config = LinearConfig(num_heads=N, in_features=D, num_kv_heads=K, head_dim=H, forget_gate=gate)
    return LinearAttention.from_config(config, is_causal=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gate", [None, "learned", "data"])
def test_the_layer_is_its_definition(rng, assert_close, gate):
    layer, is_causal = make(gate), gate is not None
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    mask = jnp.asarray(rng.random((B, T)) < 0.8).at[:, 0].set(True)
    segments = jnp.broadcast_to(jnp.arange(T) // 5, (B, T))
    graph, variables = nnx.split(layer)

    # The optimizer of XLA would take most of the time here.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def both(variables, x):
        def run(function):
            # Queries in padded slots are not compared.
            kept = lambda v, x: function(nnx.merge(graph, v), x) * mask[..., None]  # noqa: E731
            out, pull_back = jax.vjp(kept, variables, x)
            return out, pull_back(cotangent)

        return (
            run(lambda layer, x: layer(x, mask=mask, segment_ids=segments, is_causal=is_causal)),
            run(lambda layer, x: weighted_means(layer, x, mask, segments, gate)),
        )

    with jax.default_matmul_precision("highest"):
        (out, gradients), (want, want_gradients) = both(variables, x)
    assert_close("out", out, want, kind="outputs")
    assert_close("gradients", gradients, want_gradients, kind="gradients")


def test_a_gate_needs_a_causal_layer():
    with pytest.raises(ValueError, match="needs a causal model"):
        LinearAttention.from_config(make("data").config, is_causal=False, rngs=nnx.Rngs(0))
