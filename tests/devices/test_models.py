"""A language model on an Explicit mesh that splits batch and sequence equals one device."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from race_jax.models import ModelConfig, TransformerLM

RACE = {"num_tables": 2, "num_planes": 2, "short_conv": True, "output_gate": True}


@pytest.mark.parametrize("packed", [False, True])
def test_loss_and_gradients_are_those_of_one_device(packed, assert_close):
    config = ModelConfig(num_layers=2, width=16, num_heads=2, race=RACE)
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    batch = {"tokens": jnp.arange(96, dtype=jnp.int32).reshape(4, 24) * 7 % 20}
    if packed:
        batch["segment_ids"] = (jnp.arange(24)[None] // jnp.array([5, 9, 24, 3])[:, None]).astype(
            jnp.int32
        )
        batch["key_value_mask"] = jnp.arange(24)[None] < jnp.array([24, 20, 13, 24])[:, None]

    def loss(params, fixed, batch):
        logits = nnx.merge(graph, params, fixed)(**batch)
        weight = batch["key_value_mask"][..., None] if packed else 1.0
        return (weight * logits**2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    want = jax.device_get(step(params, fixed, batch))
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "seq"))):
        params, fixed = jax.device_put((params, fixed), P())
        batch = jax.device_put(batch, P("data", "seq"))
        got = jax.device_get(step(params, fixed, batch))
    assert_close("language model", got, want, kind="gradients")
