"""Steps over rows that are read from the disk, segment by segment.

They compute what the steps of `race_jax.train.step` do, in the same order on every device. There
one program holds the loop over segments. Here the loop is in Python, and starts one program for
each segment. Between programs every device keeps a state and a gradient of its own, as the part of
an array that has one entry for each device.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from race_jax.data.rows import UnreadRows
from race_jax.streaming import step as one_segment
from race_jax.streaming.host import Programs, ThereAndBack, fold_by
from race_jax.tasks.task import Task
from race_jax.train.mesh import (
    AXES,
    SEQ,
    WHOLE,
    add_over_axes,
    batch_spec,
    checks_devices,
    local_blocks,
    parameter_specs,
    per_device,
    put_batch,
    put_blocks,
    whole_stretches,
)
from race_jax.train.programs import PerLength, compile_together, compiler_options
from race_jax.train.state import TrainState
from race_jax.train.step import (
    Segments,
    group_size,
    segment_sums_of,
    state_before,
    updated,
    whole_model,
)

OWN = P(AXES)  # arrays with one entry for each device


class DiskStep:
    """A training step `(state, batch, key) -> (state, metrics)`, as `make_train_step` makes.

    The batch is `UnreadRows`. A step donates its state only after all segments were read.

    Args:
        task: the task that is trained.
        graph: the model's graph definition.
        optimizer: an optax transformation.
        schedule: the learning rate by step that `optimizer` uses.
        mesh: the mesh of the run.
        params: the parameters, or their shapes.
        shapes: the shape and dtype of every array of a batch.
        segments: how sequences are read.
        accumulation_steps: number of parts that a device's share is split into.

    Source: beyond the paper.
    """

    def __init__(
        self,
        task: type[Task],
        graph: nnx.GraphDef,
        optimizer: optax.GradientTransformation,
        schedule: optax.Schedule,
        mesh: Mesh,
        params: nnx.State,
        shapes: dict[str, jax.ShapeDtypeStruct],
        segments: Segments,
        accumulation_steps: int = 1,
    ):
        self._mesh, self._segments, self._parts = mesh, segments, accumulation_steps
        self._shapes = shapes
        programs = _Programs(task, graph, mesh, params, shapes, accumulation_steps)
        self._begin = jax.jit(programs.begin)
        self._forward = PerLength(mesh, programs.forward)
        self._backward = PerLength(mesh, programs.backward, donated=(5, 6))

        def finish(state, grads, total, weight):
            grads = programs.total_gradient(state.params, grads)
            return updated(state, optimizer, schedule, total, weight, grads)

        self._finish = jax.jit(finish, donate_argnums=0)

    def compile(self, state: TrainState, key: jax.Array) -> jax.stages.Compiled:
        """Compiles the programs of a step, and returns the largest one."""
        rows, length = next(iter(self._shapes.values())).shape[:2]
        length = min(self._segments.length * self._mesh.shape[SEQ], length)
        length = whole_stretches(self._mesh, length)
        shape = rows // self._parts, length
        zeros = {name: np.zeros(shape + x.shape[2:], x.dtype) for name, x in self._shapes.items()}
        segment = put_batch(self._mesh, zeros)
        carry, d_floats, grads = self._begin(state.params, state.fixed)
        keys = key, state.step, np.int32(0)
        d_floats = None if self._segments.truncated else d_floats
        arguments = state.params, state.fixed, keys, carry, segment
        lowered = (
            self._forward.lower(*arguments),
            self._backward.lower(*arguments, d_floats, grads),
            self._finish.lower(state, grads, np.float32(0), np.float32(0)),
        )
        forward, backward, self._finish = compile_together(lowered, self._mesh)
        self._forward.keep(length, forward)
        self._backward.keep(length, backward)
        return backward

    def __call__(
        self, state: TrainState, batch: UnreadRows, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Takes a step.

        Raises:
            FloatingPointError: the numbers of a segment are not finite; the message names it.
            ValueError: the file has changed.
        """
        grads, total, weight = None, 0.0, 0.0
        for part in range(self._parts):
            carry, d_floats, zeros = self._begin(state.params, state.fixed)
            keys = key, state.step, np.int32(part)
            read = RowSegments(batch, self._mesh, self._segments.length, part, self._parts)
            sums, grads = self._there_and_back(
                state, keys, read, carry, d_floats, zeros if grads is None else grads
            )
            total, weight = total + sums[0], weight + sums[1]
        return self._finish(state, grads, np.float32(total), np.float32(weight))

    def _there_and_back(self, state, keys, read, carry, d_floats, grads) -> tuple[Any, Any]:
        """Returns the sums over one part, and `grads` with its gradient added."""
        forward = lambda params, *rest: self._forward(params, state.fixed, keys, *rest)  # noqa: E731
        backward = lambda params, *rest: self._backward(params, state.fixed, keys, *rest)  # noqa: E731
        report = self._segments.report
        carry_bytes = sum(x.nbytes for x in jax.tree.leaves(carry)) // self._mesh.size
        passes = ThereAndBack(
            Programs(forward, backward),
            read,
            group_size(len(read), carry_bytes),
            read.put,
            None if report is None else lambda done, count: report(),
        )
        if self._segments.truncated:
            sums, _, grads = passes.truncated(state.params, carry, grads)
            return sums, grads
        passes.forward(state.params, carry)
        sums, _, grads = passes.backward(state.params, d_floats, grads)
        return sums, grads


def make_disk_eval_step(
    task: type[Task],
    graph: nnx.GraphDef,
    mesh: Mesh,
    params: nnx.State,
    shapes: dict[str, jax.ShapeDtypeStruct],
    segments: Segments,
) -> Callable[[nnx.State, nnx.State, UnreadRows], dict[str, Any]]:
    """Makes a step `(params, fixed, batch) -> sums` that scores a whole batch.

    Args:
        task: the task that is trained.
        graph: the model's graph definition.
        mesh: the mesh of the run.
        params: the parameters, or their shapes.
        shapes: the shape and dtype of every array of a batch.
        segments: how sequences are read.

    Returns:
        The step, whose sums are the loss and the weight.

    Source: beyond the paper.
    """
    programs = _Programs(task, graph, mesh, params, shapes, 1)
    begin = jax.jit(programs.begin)
    score = jax.jit(programs.score, compiler_options=compiler_options(mesh))

    def evaluate(params: nnx.State, fixed: nnx.State, batch: UnreadRows) -> dict[str, Any]:
        carry, _, _ = begin(params, fixed)
        read = RowSegments(batch, mesh, segments.length)
        program = lambda params, *rest: score(params, fixed, *rest)  # noqa: E731
        _, (loss, weight) = fold_by(program, params, carry, read, read.put)
        return {"loss": loss, "weight": weight}

    return evaluate


class RowSegments:
    """The segments of a part of a batch, which are read when they are asked for.

    Args:
        batch: the rows.
        mesh: the mesh of the run.
        stretch: the tokens of a segment on one device.
        part: which part of the share of every device is read.
        parts: the number of parts.
    """

    def __init__(self, batch: UnreadRows, mesh: Mesh, stretch: int, part: int = 0, parts: int = 1):
        self._batch, self._mesh, self._length = batch, mesh, stretch * mesh.shape[SEQ]
        shares = np.arange(len(batch)).reshape(mesh.size // mesh.shape[SEQ], parts, -1)
        self._rows = shares[:, part].reshape(-1).tolist()

    def __len__(self) -> int:
        return -(-self._batch.length // self._length)

    def __getitem__(self, index: int) -> tuple[int, list[dict[str, np.ndarray]]]:
        """Reads what the devices of this process need, and returns it after the length."""
        first = index * self._length
        length = whole_stretches(self._mesh, min(self._length, self._batch.length - first))
        blocks = local_blocks(self._mesh, len(self._rows), length)
        return length, [
            self._batch.piece(first + time.start, first + time.stop, self._rows[rows])
            for rows, time in blocks
        ]

    def put(self, segment: tuple[int, list[dict[str, np.ndarray]]]) -> dict[str, jax.Array]:
        """Moves a segment to the devices."""
        length, blocks = segment
        return put_blocks(self._mesh, len(self._rows), int(length), blocks)


class _Programs:
    """What one segment needs, as functions of arrays that are spread over the devices."""

    def __init__(self, task, graph, mesh, params, shapes, parts):
        self._task, self._graph, self._mesh = task, graph, mesh
        self._specs = parameter_specs(params, mesh)
        rows = next(iter(shapes.values())).shape[0] * mesh.shape[SEQ] // mesh.size // parts
        # The state before any token depends on the number of rows, and not on the tokens.
        self._one_token = {
            name: jax.ShapeDtypeStruct((rows, 1, *x.shape[2:]), x.dtype)
            for name, x in shapes.items()
        }

    def begin(self, params, fixed):
        """Returns the states before any token, and gradients of zero."""

        def on_device(params, fixed):
            batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self._one_token)
            carry = state_before(self._task, self._model(params, fixed), params, batch)
            return carry, one_segment.no_gradient(carry), one_segment.zeros(params)

        return self._spread(on_device, params, (fixed,))[0]

    def forward(self, params, fixed, keys, carry, segment):
        """Returns the states after a segment, and whether they are finite."""

        def on_device(params, fixed, keys, segment, carry):
            f = segment_sums_of(self._task, self._model(params, fixed), _device_key(keys))
            after, finite = one_segment.next_state(f, params, carry, segment)
            return after, jnp.where(finite, 0, 1)

        after, bad = self._spread(on_device, params, (fixed, keys), (segment,), (carry,))
        return after, bad == 0

    def backward(self, params, fixed, keys, carry, segment, d_floats, grads):
        """Returns the states after a segment, its sums, and the gradients before it."""

        def on_device(params, fixed, keys, segment, carry, d_floats, grads):
            f = segment_sums_of(self._task, self._model(params, fixed), _device_key(keys))
            after, sums, d_floats, grads = one_segment.pull_back(
                f, params, carry, segment, d_floats, grads
            )
            return (after, d_floats, grads), sums

        own = carry, d_floats, grads
        (after, d_floats, grads), sums = self._spread(
            on_device, params, (fixed, keys), (segment,), own
        )
        return after, sums, d_floats, grads

    def score(self, params, fixed, carry, segment):
        """Returns the states after a segment, and its sums, without dropout."""

        def on_device(params, fixed, segment, carry):
            f = segment_sums_of(self._task, self._model(params, fixed))
            return one_segment.advance(f, params, carry, segment)

        return self._spread(on_device, params, (fixed,), (segment,), (carry,))

    def total_gradient(self, params, grads):
        """Adds up the gradients of all devices."""

        def on_device(grads, like):
            found = one_segment.rounded(_entry(grads))
            found = jax.tree.map(lambda grad, x: grad.astype(x.dtype), found, like)
            return add_over_axes(self._specs, found)

        return self._shard_map(on_device, (OWN, self._specs), self._specs)(grads, params)

    def _model(self, params, fixed):
        return functools.partial(whole_model, self._graph, fixed, self._specs, self._mesh)

    def _spread(self, function, params, whole, batches=(), own=()):
        """Runs a function on every device.

        Args:
            function: it returns values that every device keeps, and sums that are added over all
                devices, or only the former where `batches` is empty.
            params: the parameters.
            whole: arguments that every device holds whole.
            batches: arguments that are shares of a batch.
            own: arguments that every device keeps.
        """

        def on_device(params, whole, batches, own):
            results = function(*per_device((params, *whole)), *batches, *_entry(own))
            kept, sums = results if batches else (results, ())
            kept = jax.tree.map(lambda x: x[None], per_device(kept))
            return kept, add_over_axes(WHOLE, sums)

        shares = jax.tree.map(batch_spec, batches)
        in_specs, out_specs = (self._specs, WHOLE, shares, OWN), (OWN, WHOLE)
        return self._shard_map(on_device, in_specs, out_specs)(params, whole, batches, own)

    def _shard_map(self, function, in_specs, out_specs):
        return jax.shard_map(
            function,
            mesh=self._mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            check_vma=checks_devices(self._mesh),
        )


def _device_key(keys: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """Returns the key of dropout of this device, from the run's key, the step and the part."""
    key, step, part = keys
    key = jax.random.fold_in(jax.random.fold_in(key, step), jax.lax.axis_index(AXES))
    return jax.random.fold_in(key, part)


def _entry(values: Any) -> Any:
    """Returns the values of this device."""
    return jax.tree.map(lambda x: x[0], values)
