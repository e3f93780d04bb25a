"""The schedule has the right ends, kernels alone decay, and an update has the right value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.models import TransformerLM
from race_jax.train.config import SCHEDULES, OptimizerConfig
from race_jax.train.optimizer import decay_mask, make_optimizer, make_schedule
from tests.train.small import VOCAB, small_config

STEPS = 101


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)],
)
def test_schedule_rises_then_falls_to_its_end(schedule, middle, last):
    config = OptimizerConfig(
        learning_rate=1.0, end_learning_rate=0.1, schedule=schedule, warmup_steps=20
    )
    rate = jax.jit(make_schedule(config, STEPS))
    rates = [float(rate(step)) for step in (0, 19, 20, 60, STEPS - 1, STEPS + 50)]
    want = [1 / 21, 20 / 21, 1.0, middle, last, last]
    np.testing.assert_allclose(rates, want, rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 1, 20, STEPS - 1])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_rate_is_that_of_the_equation(schedule, warmup, assert_close):
    config = OptimizerConfig(
        learning_rate=0.3, end_learning_rate=0.02, schedule=schedule, warmup_steps=warmup
    )
    steps = np.arange(STEPS + 5)
    x = np.clip((steps - warmup) / max(1, STEPS - 1 - warmup), 0.0, 1.0)
    fall = {"cosine": (1 + np.cos(np.pi * x)) / 2, "linear": 1 - x, "constant": 1}[schedule]
    want = np.where(steps < warmup, 0.3 * (steps + 1) / (warmup + 1), 0.02 + 0.28 * fall)
    got = jax.vmap(make_schedule(config, STEPS))(jnp.asarray(steps))
    assert got.dtype == jnp.float32
    assert_close("rates", got, want.astype(np.float32), kind="outputs")


def test_without_warm_up_the_first_rate_is_the_highest():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0)
    assert float(make_schedule(config, STEPS)(0)) == 0.5


def test_only_the_kernels_of_linear_maps_decay():
    config = small_config().model
    config.race.learn_planes = True
    config.race.short_conv, config.race.output_gate = "qkv", "sigmoid"
    config.race.output_norm = "rms"
    params = nnx.eval_shape(
        lambda: nnx.state(TransformerLM(config, VOCAB, rngs=nnx.Rngs(0)), nnx.Param)
    )
    decays = {
        ".".join(str(key.key) for key in path if hasattr(key, "key"))
        for path, applies in jax.tree_util.tree_leaves_with_path(decay_mask(params))
        if applies
    }
    attention = ("query.kernel", "key.kernel", "value.kernel", "out.kernel")
    gates = ("gate_kernel", "out_gate_kernel")
    assert decays == {
        *(f"trunk.blocks.0.attention.{name}" for name in (*attention, *gates)),
        "trunk.blocks.0.mlp.up.kernel",
        "trunk.blocks.0.mlp.down.kernel",
    }


def test_update_equals_adamw_by_hand_after_clipping(assert_close):
    config = OptimizerConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, clip_norm=1.0
    )
    optimizer = make_optimizer(config, STEPS)
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([3.0, 0.5])}
    grads = {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([0.0, 4.0])}
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    clipped = {name: grad / 5.0 for name, grad in grads.items()}  # their norm is 5
    want = {
        # The first step of Adam divides a gradient by its absolute value.
        name: -0.1 * (grad / (np.abs(grad) + config.eps) + decay * params[name])
        for (name, grad), decay in zip(clipped.items(), (0.5, 0.0), strict=True)
    }
    assert_close("updates", updates, want, kind="outputs")


def test_without_clipping_there_is_no_clip_state():
    config = OptimizerConfig(clip_norm=None)
    params = {"kernel": jnp.ones(3)}
    clipped = make_optimizer(OptimizerConfig(), STEPS).init(params)
    assert len(make_optimizer(config, STEPS).init(params)) != len(clipped)
