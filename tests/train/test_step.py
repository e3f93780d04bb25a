"""The step is a pure function. Accumulation and the number of devices do not change its result."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from race_jax.tasks.language_model import LanguageModel
from race_jax.train.step import make_eval_step, make_train_step
from tests.train.small import VOCAB, small_batch, small_config, small_parts

KEY = jax.random.key(0)
RATE = 1e-2
SCHEDULE = optax.constant_schedule(RATE)  # reported only


@pytest.fixture(scope="module")
def run():
    """The small run with its step. Tests share it, because it takes seconds to compile."""
    config = small_config()
    config.optimizer.learning_rate = RATE
    mesh, optimizer, graph, state, batch = small_parts(config)
    step = make_train_step(LanguageModel, graph, optimizer, SCHEDULE, mesh)
    return SimpleNamespace(
        mesh=mesh, optimizer=optimizer, graph=graph, state=state, batch=batch, step=step
    )


def fresh(state, **changes):
    """Returns a copy of a state, which a step may donate."""
    return type(state)(**jax.tree.map(jnp.copy, vars(state)) | changes)


def plain_loss(graph, params, fixed, batch):
    """Returns the mean nats from the model's own logits, without chunks."""
    nats = -jax.nn.log_softmax(nnx.merge(graph, params, fixed)(batch["inputs"]))
    picked = jnp.take_along_axis(nats, batch["targets"][..., None], axis=-1)[..., 0]
    return jnp.sum(picked * batch["weights"]) / jnp.sum(batch["weights"])


@pytest.fixture(scope="module")
def plain(run):
    """The plain loss and its gradient norm on the small batch."""
    loss, grads = jax.jit(jax.value_and_grad(plain_loss, argnums=1), static_argnums=0)(
        run.graph, run.state.params, run.state.fixed, run.batch
    )
    return loss, jnp.sqrt(sum(jnp.sum(jnp.square(grad)) for grad in jax.tree.leaves(grads)))


@pytest.mark.parametrize("parts", [1, 2])
def test_loss_and_gradient_are_those_of_the_whole_batch(parts, run, plain, assert_close):
    step = run.step
    if parts > 1:
        step = make_train_step(
            LanguageModel, run.graph, run.optimizer, SCHEDULE, run.mesh, accumulation_steps=parts
        )
    state, metrics = step(fresh(run.state), run.batch, KEY)
    assert_close("loss", metrics["loss"], plain[0], kind="outputs")
    assert_close("grad_norm", metrics["grad_norm"], plain[1], kind="gradients")
    assert float(metrics["weight"]) == small_batch()["weights"].sum()
    assert float(metrics["learning_rate"]) == pytest.approx(RATE)
    assert bool(metrics["finite"])
    assert int(state.step) == 1


def test_training_lowers_the_loss_and_leaves_the_planes_alone(run):
    planes = jax.tree.leaves(run.state.fixed)
    assert planes
    state, losses = fresh(run.state), []
    for _ in range(30):
        state, metrics = run.step(state, run.batch, KEY)
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.05)
    assert losses[-1] < losses[0] - 0.5
    for before, after in zip(planes, jax.tree.leaves(state.fixed), strict=True):
        np.testing.assert_array_equal(before, after)
    sums = make_eval_step(LanguageModel, run.graph, run.mesh)(state.params, state.fixed, run.batch)
    assert float(sums["loss"] / sums["weight"]) < losses[0] - 0.5


def test_a_step_repeats_to_the_bit(run, assert_close):
    first, second = (run.step(fresh(run.state), run.batch, KEY) for _ in range(2))
    assert_close("state and metrics", first, second, kind="rerun")


def test_a_loss_that_is_not_finite_is_flagged(run):
    params = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), run.state.params)
    _, metrics = run.step(fresh(run.state, params=params), run.batch, KEY)
    assert not bool(metrics["finite"])


def test_dropout_draws_by_step_and_evaluation_does_not_drop():
    config = small_config()
    config.model.attention = "softmax"
    config.model.dropout_rate = 0.5
    mesh, optimizer, graph, state, batch = small_parts(config)
    evaluate = make_eval_step(LanguageModel, graph, mesh)
    first, again = (evaluate(state.params, state.fixed, batch)["loss"] for _ in range(2))
    assert first == again
    step = make_train_step(LanguageModel, graph, optimizer, SCHEDULE, mesh)
    losses = [
        float(step(fresh(state, step=jnp.int32(number)), batch, KEY)[1]["loss"])
        for number in (0, 0, 1)
    ]
    assert losses[0] == losses[1]
    assert losses[2] != losses[0]
