"""One optimizer step and one evaluation step, as pure functions of arrays.

Both take a batch of arrays (B, T, ...) that is spread over the devices of a mesh. The gradient of a
step is that of the mean loss over the whole batch:
g = (sum over devices and parts of the gradients of the loss sums) / (sum of all weights).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from race_jax import streaming
from race_jax.tasks.task import Task
from race_jax.train.mesh import (
    AXES,
    WHOLE,
    gather,
    parameter_specs,
    per_device,
    split_sequences,
    sum_over_devices,
)
from race_jax.train.programs import compiler_options
from race_jax.train.state import TrainState

Batch = dict[str, jax.Array]

NO_SEGMENT = 2**31 - 1
MOST_STATES = 2**31  # bytes of states that a device keeps at the borders of segments


@dataclasses.dataclass(frozen=True)
class Segments:
    """How the sequences of a batch are read, segment by segment (`race_jax.streaming`).

    Attributes:
        length: number of tokens of a segment on one device.
        truncated: whether the gradient stops at the borders of segments.
        report: a function without arguments, which is called on the host whenever a device has read
            a segment of a training step, in any of its passes; or None.
    """

    length: int
    truncated: bool = False
    report: Callable[[], None] | None = None


TrainStep = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]
EvalStep = Callable[[nnx.State, nnx.State, Batch], dict[str, jax.Array]]


def make_train_step(
    task: type[Task],
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    accumulation_steps: int = 1,
    segments: Segments | None = None,
) -> TrainStep:
    """Makes a jitted step `(state, batch, key) -> (state, metrics)` that donates its state.

    Each device adds up losses, weights and gradients over its own sequences, part after part. These
    sums are added over all devices, and then divided once by the weight. The result is the mean
    over the whole batch, whatever the number of devices and parts.

    Args:
        task: the task that is trained.
        graph: the model's graph definition.
        optimizer: an optax transformation.
        schedule: the learning rate by step that `optimizer` uses. It is only reported.
        mesh: the mesh of the run.
        accumulation_steps: number of parts that a device's share is split into.
        segments: how sequences are read, segment by segment; None reads them whole.

    Returns:
        The step. It takes the run's own key. Dropout uses that key folded with step, device and
        part. The metrics are the float32 scalars loss, grad_norm, learning_rate and weight, the
        bool finite, which is False if the loss or the gradient is not finite, and the int32
        bad_segment: the first segment after which the state is not finite, or NO_SEGMENT.

    Source: beyond the paper.
    """

    def step(state: TrainState, batch: Batch, key: jax.Array):
        specs = parameter_specs(state.params, mesh)

        def device_sums(batch, params, fixed, key):
            key = jax.random.fold_in(key, jax.lax.axis_index(AXES))
            model = functools.partial(whole_model, graph, fixed, specs, mesh)
            return _accumulate(task, model, params, batch, key, accumulation_steps, segments)

        batch_sums = sum_over_devices(
            device_sums,
            mesh,
            specs=(specs, WHOLE, WHOLE),
            out_specs=((WHOLE, WHOLE, specs), P(AXES)),
        )
        key = jax.random.fold_in(key, state.step)
        sums, bad = batch_sums(batch, state.params, state.fixed, key)
        return updated(state, optimizer, schedule, *sums, bad.min())

    return jax.jit(step, donate_argnums=0)


def updated(
    state: TrainState,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    total: jax.Array,
    weight: jax.Array,
    grads: Any,
    bad_segment: jax.typing.ArrayLike = NO_SEGMENT,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step of the optimizer, from sums over the whole batch.

    Args:
        state: the state before the step.
        optimizer: as for `make_train_step`.
        schedule: as for `make_train_step`.
        total: the sum of all losses.
        weight: the sum of all weights.
        grads: the gradient of `total`.
        bad_segment: one of the metrics.

    Returns:
        The state after the step and the metrics that `make_train_step` describes.
    """
    grads = jax.tree.map(lambda grad: grad / jnp.maximum(weight, 1e-30), grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    loss, grad_norm = total / weight, optax.tree.norm(grads)
    metrics = {
        "loss": loss,
        "grad_norm": grad_norm,
        "learning_rate": schedule(state.step),
        "weight": weight,
        "finite": jnp.isfinite(loss) & jnp.isfinite(grad_norm),
        "bad_segment": jnp.int32(bad_segment),
    }
    return TrainState(params, state.fixed, opt_state, state.step + 1), metrics


def make_eval_step(
    task: type[Task], graph: nnx.GraphDef, mesh: Mesh, segments: Segments | None = None
) -> EvalStep:
    """Makes a jitted step `(params, fixed, batch) -> sums` that scores a whole batch.

    Args:
        task: the task that is trained.
        graph: the model's graph definition.
        mesh: the mesh of the run.
        segments: as for `make_train_step`. The scores are then the loss and the weight only.

    Returns:
        The step. It changes nothing and applies no dropout.

    Source: beyond the paper.
    """

    def score(params: nnx.State, fixed: nnx.State, batch: Batch):
        specs = parameter_specs(params, mesh)

        def device_sums(batch, params, fixed):
            model = functools.partial(whole_model, graph, fixed, specs, mesh)
            if segments is None:
                return task.score_sums(model(params), batch)
            run = streaming.fold(segment_sums_of(task, model), segment_length=segments.length)
            _, (loss, weight) = run(params, state_before(task, model, params, batch), batch)
            return {"loss": loss, "weight": weight}

        batch_sums = sum_over_devices(device_sums, mesh, specs=(specs, WHOLE), out_specs=WHOLE)
        return batch_sums(batch, params, fixed)

    return jax.jit(score, compiler_options=compiler_options(mesh))


def whole_model(
    graph: nnx.GraphDef, fixed: nnx.State, specs: Any, mesh: Mesh, params: nnx.State
) -> nnx.Module:
    """Returns the model, from the parameters that this device holds."""
    return split_sequences(nnx.merge(graph, gather(params, specs), fixed), mesh)


def _accumulate(
    task, model, params, batch, key, parts: int, segments: Segments | None
) -> tuple[tuple[Any, Any, Any], jax.Array]:
    """Returns the sums over the parts of one device's share, and the first bad segment, (1,).

    The sums are those of losses, weights and gradients.
    """

    def part_sums(part, index):
        part_key = jax.random.fold_in(key, index)
        if segments is not None:
            return per_device(_streamed(task, model, params, part, part_key, segments))

        def loss(params):
            return task.loss_sums(model(params), part, nnx.Rngs(dropout=part_key))

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return per_device(((total, weight, grads), jnp.full(1, NO_SEGMENT, jnp.int32)))

    if parts == 1:
        return part_sums(batch, 0)
    shares = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
    zeros = jnp.zeros(()), jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
    zeros = per_device((zeros, jnp.full(1, NO_SEGMENT, jnp.int32)))

    def add(before, share):
        (sums, bad), (part, part_bad) = before, part_sums(*share)
        return (jax.tree.map(jnp.add, sums, part), jnp.minimum(bad, part_bad)), None

    return jax.lax.scan(add, zeros, (shares, jnp.arange(parts)))[0]


def _streamed(task, model, params, batch, key, segments: Segments) -> tuple[Any, jax.Array]:
    """Returns the same for one part, whose sequences are read segment by segment."""
    before = state_before(task, model, params, batch)
    count = -(-jax.tree.leaves(batch)[0].shape[1] // segments.length)
    run = streaming.value_and_grad(
        segment_sums_of(task, model, key, segments.report),
        segment_length=segments.length,
        truncated=segments.truncated,
        group_size=group_size(count, sum(x.nbytes for x in jax.tree.leaves(before))),
    )
    found = run(params, before, batch)
    return (*found.sums, found.d_params), found.state[1][None]


def group_size(segments: int, state_bytes: int) -> int | None:
    """Returns how many segments form a group, of whose states only the first is kept.

    If the states at all borders fit, one pass over the segments is saved.
    """
    return 1 if segments * state_bytes <= MOST_STATES else None


def state_before(
    task: type[Task], model: Callable[[Any], nnx.Module], params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns what `segment_sums_of` carries.

    These are the number of segments read, the first one after which the state was not finite, and
    the task's state.
    """
    carry = jnp.int32(0), jnp.int32(NO_SEGMENT), task.init_state(model(params), batch)
    return per_device(carry)


def segment_sums_of(
    task: type[Task],
    model: Callable[[Any], nnx.Module],
    key: jax.Array | None = None,
    report: Callable[[], None] | None = None,
) -> Callable:
    """Returns the function of one segment; `key` is that of dropout, or None for no dropout."""

    def sums(params, carry, segment):
        count, bad, state = carry
        if report is not None:
            jax.debug.callback(report)
        rngs = None if key is None else nnx.Rngs(dropout=jax.random.fold_in(key, count))
        state, (loss, weight) = task.segment_sums(model(params), segment, state, rngs)
        bad = jnp.where(streaming.is_finite(state), bad, jnp.minimum(bad, count))
        return per_device((count + 1, bad, state)), per_device((loss, weight))

    return sums
