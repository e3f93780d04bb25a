"""A few steps of training without files, as one program that is compiled once."""

import itertools

import jax
import optax
from flax import nnx

from race_jax.tasks.registry import task_named


def few_steps(config, count: int) -> tuple[list[float], dict[str, float]]:
    """Returns the mean losses of `count` steps, and the scores of the first held-out batch."""
    config = config.validate()
    task = task_named(config.task)(config)
    model = task.make_model(config, task.record, nnx.Rngs(params=0, planes=1))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    optimizer = optax.adam(config.optimizer.learning_rate)

    @jax.jit
    def step(params, moments, batch, held_out):
        def loss(params):
            total, weight = task.loss_sums(nnx.merge(graph, params, fixed), batch, None)
            return total / weight

        scores = task.score_sums(nnx.merge(graph, params, fixed), held_out)
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments)
        return optax.apply_updates(params, updates), moments, value, scores

    moments, losses = optimizer.init(params), []
    held_out = next(iter(task.held_out["valid"]))
    for batch in itertools.islice(task.train, count):
        params, moments, value, scores = step(params, moments, batch, held_out)
        losses.append(float(value))
    return losses, task.metrics("valid", {name: float(x) for name, x in scores.items()})
