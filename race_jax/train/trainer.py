"""The parts of a run, and the operations that the loop calls."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from race_jax.data.rows import UnreadRows
from race_jax.data.workers import read_ahead
from race_jax.tasks.task import Task
from race_jax.train import processes, report, summary
from race_jax.train.checkpoint import Checkpoints, checkpoint_folder, load_parameters
from race_jax.train.config import Config
from race_jax.train.console import decorate, say
from race_jax.train.disk_step import DiskStep, make_disk_eval_step
from race_jax.train.files import changes, check_space, claim
from race_jax.train.mesh import (
    SEQ,
    batch_shapes,
    get_whole,
    make_mesh,
    put_batch,
    put_parameters,
    put_rows,
    put_whole,
    whole_stretches,
)
from race_jax.train.metrics import MetricsLog, Record
from race_jax.train.optimizer import make_optimizer, make_schedule
from race_jax.train.plot import plot_losses
from race_jax.train.programs import FirstRuns, compile_together
from race_jax.train.progress import Progress
from race_jax.train.state import init_state
from race_jax.train.step import (
    NO_SEGMENT,
    EvalStep,
    Segments,
    TrainStep,
    make_eval_step,
    make_train_step,
)

# Bytes that a device may hold of a batch that is not needed yet.
MOST_AHEAD = 2**28


class Trainer:
    """A run, ready to take steps.

    The constructor does the following, in this order:

    1. It makes the mesh, the optimizer and a fresh state.
    2. It checks that the folder holds no other run, and restores state and data iterator from the
       newest whole checkpoint, if there is one.
    3. It removes the metrics of steps after that checkpoint.
    4. It prints a description of the run.
    5. It compiles the training step, unless the run is finished.

    Args:
        config: a checked configuration.
        task: the task that is trained.
        directory: the run's folder, opened by `run_directory`.

    Attributes:
        step: number of optimizer steps taken.
    """

    def __init__(self, config: Config, task: Task, directory: Path):
        self._config, self._task, self._directory = config, task, directory
        self._mesh = make_mesh(config)
        optimizer = make_optimizer(config.optimizer, config.run.steps)
        self._graph, self._state = init_state(
            lambda rngs: task.make_model(config, task.record, rngs),
            config.run.seed,
            optimizer,
            self._mesh,
        )
        # If a later line fails, all that was opened is closed, so that no thread is left over.
        with contextlib.ExitStack() as opened:
            self._segments = self._make_segments()
            self._first_runs = FirstRuns()
            self._batches = read_ahead(task.train, self._place)
            opened.callback(self._batches.close)
            self._checkpoints = Checkpoints(
                checkpoint_folder(directory), keep=config.run.keep_checkpoints
            )
            opened.callback(self._checkpoints.close)
            self._resume()
            self._log = MetricsLog(
                directory,
                self.step,
                tensorboard=config.run.tensorboard,
                writes=processes.is_first(),
            )
            opened.callback(self._log.close)
            self._pending: list[tuple[int, dict[str, jax.Array]]] = []
            key = jax.random.key_data(jax.random.key(config.run.seed))
            self._key = jax.random.wrap_key_data(put_whole(self._mesh, key))
            self._eval_step = self._make_eval_step()
            self._train_step = self._make_step(optimizer)
            self._programs: dict[tuple, jax.stages.Compiled] = {}
            self._compile()
            self._progress = Progress(
                self.step,
                config.run.steps,
                task.loss_text,
                task.weight_name,
                parts=self._parts(),
                terminal=None if processes.is_first() else False,
            )
            opened.callback(self._progress.close)
            self._opened = opened.pop_all()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._opened.close()

    def is_due(self, every: int) -> bool:
        """Whether something that is done every `every` steps is due now. 0 means never."""
        return every > 0 and self.step % every == 0

    def take_step(self) -> None:
        """Trains on the next batch."""
        if self._pending:
            # At most one step is in flight. A request to stop would have to wait for more of them.
            jax.block_until_ready(self._pending[-1][1])
        batch = self._on_devices(next(self._batches))
        try:
            program = self._program(batch)
            step = functools.partial(program, self._state, batch, self._key)
            self._state, metrics = self._first_runs.run(program, step)
        except FloatingPointError as error:
            self.log()
            raise FloatingPointError(
                f"{error}. This was in step {self.step + 1}; {self._advice()}"
            ) from None
        self.step += 1
        self._pending.append((self.step, metrics))

    def log(self) -> None:
        """Writes and prints the metrics of the steps since the last call.

        Raises:
            FloatingPointError: a loss or a gradient norm is not finite.
        """
        if not self._pending:
            return
        measured, self._pending = jax.device_get(self._pending), []
        finite = list(itertools.takewhile(lambda pair: pair[1]["finite"], measured))
        unit = self._task.weight_name
        records = [_train_record(step, values, unit) for step, values in finite]
        if records:
            loss = float(np.mean([record["loss"] for record in records]))
            count, step = sum(record[unit] for record in records), records[-1]["step"]
            speed = self._progress.update(step, loss, count)
            records.append({"kind": "speed", "step": step, f"{unit}_per_second": speed})
        written = self._log.write(records)
        if len(finite) < len(measured):
            raise FloatingPointError(self._not_finite(*measured[len(finite)]))
        if not written and not processes.are_several():
            self._save()  # the disk may be full; save now, while a checkpoint may still fit

    def evaluate(self) -> Record:
        """Scores the held-out data, or the part of it that `run.eval_batches` allows."""
        self.log()
        record = self._score("eval", "valid", self._config.run.eval_batches)
        words = self._task.score_text("valid", record)
        self._progress.say(f"step {self.step}: held out {words}")
        self._progress.resume()
        return record

    def save(self) -> None:
        """Writes a checkpoint, after it was checked that all losses are finite."""
        self.log()
        self._save()
        self._progress.resume()

    def _save(self) -> None:
        about = {
            "data": self._batches.get_state(),
            "config": self._config.to_dict(),
            "task": self._task.record,
        }
        self._checkpoints.save(self._state, about)

    def say_stopped(self, reason: str | None) -> None:
        """Prints that the run ended early, and how to continue it."""
        self._progress.say(
            f"stopped at step {self.step} of {self._config.run.steps} ({reason}); checkpoint "
            "saved; the same command goes on from here"
        )

    def finish(self, stop: Callable[[], object] = lambda: None) -> Record | None:
        """Scores all held-out data, prints the result, writes its summary and draws the losses.

        Args:
            stop: a function that is called between two batches. If it returns a true value, the
                work ends.

        Returns:
            The last evaluation, or None if `stop` ended the work.
        """
        self._progress.close()
        say("scoring all held-out data")
        final = self._score("final", "valid", None, stop)
        test = None
        if final is not None and "test" in self._task.held_out:
            test = self._score("test", "test", None, stop)
        if final is None or stop():
            return None
        say("\n".join(report.end_lines(self._task, final, test)))
        whole = get_whole(self._mesh, (self._state.params, self._state.fixed))
        if processes.is_first():
            decorate("the summary", self._summarize)
            decorate("the picture", self._draw)
            decorate("the sample", lambda: self._show_sample(*whole))
        return final

    def _summarize(self) -> None:
        summary.write(
            self._directory,
            self._task,
            self._mesh,
            self._state,
            self._planned_memory,
            self._log.records,
        )

    def _draw(self) -> None:
        picture = self._directory / "loss.png"
        plot_losses(
            self._log.records, picture, title=self._directory.name, unit=self._task.loss_unit
        )
        say(f"{'picture':10} {picture}")

    def _show_sample(self, params: nnx.State, fixed: nnx.State) -> None:
        device = jax.local_devices()[0]
        model = nnx.merge(self._graph, *jax.device_put((params, fixed), device))
        lines = self._task.sample_lines(model, self._directory)
        if lines:
            say("\n".join(lines))

    def _resume(self) -> None:
        """Restores the newest whole checkpoint, unless it belongs to another run."""
        resuming = bool(self._checkpoints.steps())
        if processes.is_first():
            claim(self._directory, self._config, self._task.digests, resuming=resuming)
        processes.wait("the run directory belongs to this run")
        restored = self._checkpoints.restore(self._state)
        if restored is not None:
            self._state = restored.state
            self._batches.set_state(restored.about["data"])
        elif self._config.run.start_from is not None:
            self._take_parameters(self._config.run.start_from)
        self.step = int(self._state.step)
        run = self._config.run
        if self.step < run.steps:
            summary.path(self._directory).unlink(missing_ok=True)  # of an earlier, shorter run
            # A new checkpoint is written before the oldest one is removed. Those that are there
            # already need no more space.
            more = max(1 + run.keep_checkpoints - len(self._checkpoints.steps()), 1)
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(self._state))
            check_space(self._directory, size * more)

    def _take_parameters(self, directory: str) -> None:
        """Starts with the parameters of another run, and says what differs in the two models."""
        if Path(directory).expanduser().resolve() == self._directory.resolve():
            raise ValueError(
                f"config.run.start_from={directory} is the folder of this run, which goes on from "
                "its own checkpoints by itself; leave the field out, or name another run"
            )
        given = self._state.params, self._state.fixed, self._task.record
        try:
            params, fixed, step, config = load_parameters(directory, *given)
        except (ValueError, RuntimeError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(f"config.run.start_from: {error}") from None
        self._state = dataclasses.replace(
            self._state,
            params=put_parameters(self._mesh, params),
            fixed=put_whole(self._mesh, fixed),
        )
        say(f"{'parameters':10} those of step {step} of {directory}")
        there, here = ({"config": {"model": x.to_dict()["model"]}} for x in (config, self._config))
        for change in changes(there, here, self._config):
            say(f"{'':10} {change}")

    def _make_step(self, optimizer: optax.GradientTransformation) -> TrainStep | DiskStep:
        schedule = make_schedule(self._config.optimizer, self._config.run.steps)
        parts = self._config.optimizer.accumulation_steps
        makes = type(self._task), self._graph, optimizer, schedule, self._mesh
        if self._config.reads_from_disk():
            return DiskStep(*makes, self._state.params, self._task.batch, self._segments, parts)
        return make_train_step(*makes, accumulation_steps=parts, segments=self._segments)

    def _make_eval_step(self) -> EvalStep:
        makes = type(self._task), self._graph, self._mesh
        if self._config.reads_from_disk():
            return make_disk_eval_step(*makes, self._state.params, self._task.batch, self._segments)
        return make_eval_step(*makes, self._segments)

    def _program(self, batch: dict[str, Any] | UnreadRows) -> jax.stages.Compiled | DiskStep:
        """Returns the training step for batches of this shape. It is compiled when first needed."""
        if isinstance(self._train_step, DiskStep):
            return self._train_step
        shapes = _shapes(batch)
        if shapes not in self._programs:
            arrays = batch_shapes(self._mesh, batch)
            lowered = self._train_step.lower(self._state, arrays, self._key)
            self._programs[shapes] = compile_together([lowered], self._mesh)[0]
        return self._programs[shapes]

    def _compile(self) -> None:
        """Prints a description of the run, and compiles the step for the largest batches."""
        lines = report.start_lines(
            self._config, self._task, self._mesh, self._state, self._directory
        )
        if self.step:
            lines.append(f"{'resuming':10} after step {self.step}")
        if self.step == self._config.run.steps:
            lines.append(f"{'finished':10} nothing is left to train, only to be scored")
            say("\n".join(lines))
            known = summary.read(self._directory)
            self._planned_memory = known and known["peak_bytes"]
            return
        lines.append(f"{'compiling':10} the training step; Ctrl-C is answered after it")
        say("\n".join(lines))
        start = time.monotonic()
        if isinstance(self._train_step, DiskStep):
            compiled = self._train_step.compile(self._state, self._key)
        else:
            compiled = self._program(batch_shapes(self._mesh, self._task.batch))
        seconds = time.monotonic() - start
        cache = self._config.run.compilation_cache
        say("\n".join(report.compiled_lines(compiled, seconds, cache)))
        planned = report.planned_memory(compiled)
        self._planned_memory = None if planned is None else sum(planned)

    def _make_segments(self) -> Segments | None:
        """Returns how sequences are read, or None if they are read whole."""
        options = self._config.optimizer
        if options.segment_length is None:
            return None
        try:
            model = nnx.merge(self._graph, self._state.params, self._state.fixed)
            jax.eval_shape(lambda: self._task.init_state(model, self._task.batch))
        except NotImplementedError:
            task, attentions = self._config.task, self._config.model.attentions
            raise ValueError(
                "config.optimizer.segment_length needs a task and an attention that carry a state "
                f"from segment to segment; config.task={task!r} with "
                f"{' and '.join(map(repr, attentions))} attention reads whole sequences. Leave it "
                "out."
            ) from None
        length = min(options.segment_length, self._config.data.sequence_length)
        return Segments(
            whole_stretches(self._mesh, length) // self._mesh.shape[SEQ],
            options.truncate_gradient,
            report=lambda: self._progress.part(),
        )

    def _parts(self) -> int:
        """Returns about how many segments the devices read in a training step, in all passes."""
        options, length = self._config.optimizer, self._config.data.sequence_length
        if options.segment_length is None:
            return 0
        segments = -(-length // options.segment_length) * options.accumulation_steps
        reports = 1 if self._config.reads_from_disk() else self._mesh.size
        return segments * reports * (1 if options.truncate_gradient else 2)

    def _place(
        self, batch: dict[str, np.ndarray] | UnreadRows
    ) -> dict[str, np.ndarray] | dict[str, jax.Array] | UnreadRows:
        """Moves a batch to the devices before it is needed, unless that would take much memory."""
        size = sum(math.prod(x.shape) * x.dtype.itemsize for x in self._task.batch.values())
        if size > MOST_AHEAD * self._mesh.size:
            return batch
        return self._first_runs.move(lambda: self._on_devices(batch))

    def _on_devices(
        self, batch: dict[str, np.ndarray] | dict[str, jax.Array] | UnreadRows
    ) -> dict[str, jax.Array] | UnreadRows:
        """Moves a batch to the devices, unless it is there, or is read segment by segment."""
        stretch = self._segments and self._segments.length
        if isinstance(batch, UnreadRows):
            is_whole = not self._config.reads_from_disk()
            return put_rows(self._mesh, batch, stretch) if is_whole else batch
        if isinstance(next(iter(batch.values())), jax.Array):
            return batch
        return put_batch(self._mesh, batch, stretch)

    def _score(
        self,
        kind: str,
        split: str,
        limit: int | None,
        stop: Callable[[], object] = lambda: None,
    ) -> Record | None:
        """Evaluates the model on at most `limit` batches of a split, and logs the result.

        Returns:
            The record, or None if `stop` returned a true value before the end.
        """
        totals: dict[str, float] = {}
        with contextlib.closing(read_ahead(self._task.held_out[split], self._place)) as batches:
            for batch in itertools.islice(batches, limit):
                if stop():
                    return None
                batch = self._on_devices(batch)
                given = self._state.params, self._state.fixed, batch
                score = functools.partial(self._eval_step, *given)
                sums = self._first_runs.run(("score", _shapes(batch)), score)
                for name, value in jax.device_get(sums).items():
                    totals[name] = totals.get(name, 0.0) + float(value)
        record = {"kind": kind, "step": self.step, **self._task.metrics(split, totals)}
        if not self._log.write([record]) and not processes.are_several():
            self._save()
        return record

    def _not_finite(self, step: int, value: dict[str, np.ndarray]) -> str:
        segment = int(value["bad_segment"])
        where = "" if segment == NO_SEGMENT else f", from segment {segment} (counted from 0) on"
        return (
            f"loss {value['loss']} and gradient norm {value['grad_norm']} are not both finite at "
            f"step {step}{where}; {self._advice()}"
        )

    def _advice(self) -> str:
        saved = self._checkpoints.steps()
        stands = f"the checkpoint of step {saved[-1]} is kept" if saved else "nothing was saved yet"
        return (
            f"{stands}; try a lower --config.optimizer.learning_rate, a longer warm-up, or a "
            "smaller clip_norm"
        )


def _shapes(batch: dict[str, Any] | UnreadRows) -> tuple:
    """Returns the names and shapes of a batch, or () if it is read segment by segment."""
    if isinstance(batch, UnreadRows):
        return ()
    return tuple(sorted((name, x.shape) for name, x in batch.items()))


FLAGS = ("finite", "bad_segment")  # metrics that are not written


def _train_record(step: int, values: dict[str, np.ndarray], weight_name: str) -> Record:
    """Returns the record of one step, in which the weight has the name that the task gives it."""
    numbers = {name: float(value) for name, value in values.items() if name not in FLAGS}
    numbers[weight_name] = numbers.pop("weight")
    return {"kind": "train", "step": step, **numbers}
