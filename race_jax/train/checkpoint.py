"""Checkpoints: the state of a run, and what is needed to use its model.

A checkpoint is either whole, or known not to be. Orbax writes the files, and restores them on any
number of devices. A digest of every file shows whether a checkpoint is damaged.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from flax import nnx

from race_jax.tasks.registry import task_named
from race_jax.train import processes
from race_jax.train.config import Config
from race_jax.train.console import one_line
from race_jax.train.console import say as print_line
from race_jax.train.files import unused_path, write_text
from race_jax.train.state import TrainState, fresh_rngs

_DIGESTS = "digests.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run continues from.

    Attributes:
        state: the training state, on the devices that were asked for.
        about: the JSON values that were saved with it.
    """

    state: TrainState
    about: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run.

    The digests of a checkpoint are written after all its files, and only then does its step count
    as saved. A process that is killed at any moment therefore leaves either a whole checkpoint or
    one that is known not to be whole.

    Args:
        directory: folder of the checkpoints. It is made if it is missing.
        keep: number of checkpoints that are kept, the newest ones.
        read_only: whether the folder stays as it is: nothing is made, moved or removed.
        say: a function that prints the sentences about damaged checkpoints.

    Source: beyond the paper.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int = 2,
        read_only: bool = False,
        say: Callable[[str], None] = print_line,
    ):
        self._directory = directory.absolute()
        self._read_only = read_only
        self._say = say
        if not read_only:
            if processes.is_first():
                self._remove_unfinished()
            processes.wait("what was not finished is removed")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def _remove_unfinished(self) -> None:
        """Removes what saves that were killed or failed have left.

        Orbax would do it in a thread, which may still run when the process ends.
        """
        if self._directory.is_dir():
            for path in self._directory.iterdir():
                if ocp.path.step.TMP_DIR_SUFFIX in path.name:
                    shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Returns the steps that have a folder here, damaged or not, the oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Writes a checkpoint of `state.step`, and removes the oldest ones beyond `keep`.

        Args:
            state: the training state.
            about: JSON values to keep with it: the state of the data iterator, the configuration,
                and the record of the task.

        Raises:
            RuntimeError: it could not be written, for example because the disk is full. The older
                checkpoints are untouched.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        items = ocp.args.Composite(
            model=ocp.args.StandardSave({"params": state.params, "fixed": state.fixed}),
            optimizer=ocp.args.StandardSave({"opt_state": state.opt_state, "step": state.step}),
            about=ocp.args.JsonSave(about),
        )
        try:
            if processes.is_first():
                self._marker.write_text(str(step))
            self._manager.save(step, args=items, force=True)
            self._manager.wait_until_finished()
            if processes.is_first():
                write_text(self._folder(step) / _DIGESTS, json.dumps(self._digests(step)))
                self._marker.unlink()
            processes.wait("the checkpoint is whole")
        except Exception as error:  # Orbax raises many kinds of errors
            if processes.are_several() and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process has died
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written to {self._directory}; those "
                f"of steps {self._whole_steps()} are untouched. The reason: {one_line(error)}"
            ) from error

    def restore(self, like: TrainState) -> Restored | None:
        """Restores the newest whole checkpoint.

        A damaged one is reported and moved away, and the one before it is taken.

        Args:
            like: a state, real or abstract, with the shapes and shardings to restore to.

        Returns:
            The checkpoint, or None if no save was ever finished.

        Raises:
            RuntimeError: there are checkpoints, but all are damaged.
        """
        step = self.newest_whole()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore({"params": abstract.params, "fixed": abstract.fixed}),
            optimizer=ocp.args.StandardRestore(
                {"opt_state": abstract.opt_state, "step": abstract.step}
            ),
            about=ocp.args.JsonRestore(),
        )
        found = self._manager.restore(step, args=items)
        state = TrainState(**found["model"], **found["optimizer"])
        return Restored(state, found["about"])

    def about(self, step: int) -> dict[str, Any]:
        """Reads the JSON values of a checkpoint."""
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["about"]

    def model(self, step: int, like: dict[str, nnx.State]) -> dict[str, nnx.State]:
        """Restores only the parameters and fixed variables of a checkpoint, on one device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        items = ocp.args.Composite(model=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=items)["model"]

    def newest_whole(self) -> int | None:
        """Finds the last step whose checkpoint is whole. Newer ones are reported and moved away.

        Returns:
            The step. It is None if no save was ever finished: the folder is empty, or the process
            was killed during the first save.

        Raises:
            RuntimeError: there are checkpoints, but all are damaged. Nothing is moved.
        """
        if self._read_only or not processes.are_several():
            return self._newest_whole()
        step = processes.of_first((self._newest_whole() or 0) if processes.is_first() else 0)
        self._manager.reload()  # the first process may have moved some away
        return step or None

    def _newest_whole(self) -> int | None:
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self._damage(step)
            if damage is None:
                break
            damaged[step] = damage
        else:
            if damaged.keys() - {self._unfinished()}:
                raise RuntimeError(self._none_whole(damaged))
            step = None
        for bad, damage in damaged.items():
            moved = "" if self._read_only else f"; moved to {self._set_aside(bad)}"
            self._say(f"the checkpoint of step {bad} is damaged ({damage}){moved}")
        return step

    def close(self) -> None:
        """Ends Orbax's threads."""
        self._manager.close()

    @property
    def _marker(self) -> Path:
        """The file that holds the step of a checkpoint while it is written."""
        return self._directory.with_name(f"{self._directory.name}-saving")

    def _unfinished(self) -> int | None:
        """Returns the step whose save was interrupted, or None."""
        text = self._marker.read_text("utf-8", "replace") if self._marker.is_file() else ""
        return int(text) if text.isdecimal() else None

    def _none_whole(self, damaged: dict[int, str]) -> str:
        reasons = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        found = f"no whole checkpoint in {self._directory} ({reasons}). Restore a copy of one; or "
        if self._read_only:
            return f"{found}name the folder of another run"
        run = self._directory.parent
        return (
            f"{found}train anew beside it with --config.run.directory={unused_path(run)}, or from "
            f"step 0 here after removing {self._directory}"
        )

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _whole_steps(self) -> list[int]:
        return [step for step in self.steps() if self._damage(step) is None]

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint away, so that its step can be saved again."""
        aside = self._directory.with_name(f"{self._directory.name}-damaged")
        aside.mkdir(exist_ok=True)
        number = sum(1 for _ in aside.iterdir())
        target = aside / f"{step}-{number}"
        os.replace(self._folder(step), target)
        self._manager.reload()
        return target

    def _digests(self, step: int) -> dict[str, str]:
        """Computes the sha256 of each file of a checkpoint, by its relative name."""
        folder, digests = self._folder(step), {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != _DIGESTS:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                digests[path.relative_to(folder).as_posix()] = digest
        return digests

    def _damage(self, step: int) -> str | None:
        """Says what is wrong with a checkpoint's files; None if nothing is."""
        path = self._folder(step) / _DIGESTS
        if not path.is_file():
            return "it was not written completely"
        try:
            expected = json.loads(path.read_text())
        except ValueError:
            return f"{_DIGESTS} cannot be read"
        found = self._digests(step)
        bad = [name for name in expected if found.get(name) != expected[name]]
        return f"{bad[0]} is missing or changed" if bad else None


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """The model of a checkpoint, before its parameters are read.

    Attributes:
        shapes: the NNX model, with shapes in place of values.
        companion: the companion of the task, for a language model its tokenizer.
        config: the run's configuration.
        load: reads the parameters, and returns the model on the default device.
        record: the record of the task. That of a classifier has the names of the "classes", in the
            order of the model's outputs.
    """

    shapes: nnx.Module
    companion: Any
    config: Config
    load: Callable[[], nnx.Module]
    record: dict[str, Any] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def open_for_inference(directory: str | os.PathLike) -> Iterator[SavedModel]:
    """Opens a run's newest whole checkpoint, so that all else can be checked before it is loaded.

    Args:
        directory: the run's directory; it may start with `~`. The run may still be writing to it.

    Yields:
        The model, which can be loaded until the context ends.

    Raises:
        ValueError: there is no checkpoint in `directory`.
        RuntimeError: all checkpoints there are damaged.

    Source: beyond the paper.
    """
    with _opened(directory) as (checkpoints, step):
        config, record = _origin(checkpoints, step)
        graph, variables = _abstract_model(config, record)

        def load() -> nnx.Module:
            return _merged(graph, checkpoints.model(step, variables))

        companion = task_named(config.task).companion(record)
        yield SavedModel(_merged(graph, variables), companion, config, load, record)


def load_for_inference(directory: str | os.PathLike) -> tuple[nnx.Module, Any, Config]:
    """Loads the model of a run's newest whole checkpoint, ready to be called.

    Args:
        directory: as for `open_for_inference`, which raises the same errors.

    Returns:
        The NNX model on the default device, the companion of the task (for a language model its
        tokenizer) and the run's configuration.

    Source: beyond the paper.
    """
    with open_for_inference(directory) as saved:
        return saved.load(), saved.companion, saved.config


def load_parameters(
    directory: str | os.PathLike, params: nnx.State, fixed: nnx.State, record: dict[str, Any]
) -> tuple[nnx.State, nnx.State, int, Config]:
    """Loads the parameters of a run's newest whole checkpoint into a model of the same shapes.

    Args:
        directory: the run's directory; it may start with `~`.
        params: the trained variables of the model.
        fixed: all other variables of the model.
        record: the record of the task that the model is for.

    Returns:
        The variables of the checkpoint, on one device, its step, and the configuration of its run.

    Raises:
        ValueError: there is no checkpoint in `directory`, a variable has another shape there, or
            a part that both records have differs, such as the tokenizer.
        RuntimeError: all checkpoints there are damaged.

    Source: beyond the paper.
    """
    own = {"params": params, "fixed": fixed}
    with _opened(directory) as (checkpoints, step):
        config, record_there = _origin(checkpoints, step)
        for part in record:
            if part in record_there and record_there[part] != record[part]:
                raise ValueError(
                    f"{directory} differs in its {part}; name a run that has the same {part}"
                )
        _, there = _abstract_model(config, record_there)
        if difference := _difference(_shapes(there), _shapes(own)):
            raise ValueError(f"{directory} holds another model: {difference}")
        found = checkpoints.model(step, own)
    return found["params"], found["fixed"], step, config


@contextlib.contextmanager
def _opened(directory: str | os.PathLike) -> Iterator[tuple[Checkpoints, int]]:
    """Opens the checkpoints of a run to read them, and yields them with the newest whole step."""
    folder = checkpoint_folder(Path(directory).expanduser())
    if not folder.is_dir():
        raise ValueError(f"no checkpoints in {directory}; give the directory of a training run")
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # else Orbax warns that it will not write
    try:
        with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
            step = checkpoints.newest_whole()
            if step is None:
                raise ValueError(
                    f"no checkpoint in {directory} yet; wait until the run has saved one"
                )
            yield checkpoints, step
    finally:
        logging.set_verbosity(verbosity)


def _origin(checkpoints: Checkpoints, step: int) -> tuple[Config, Any]:
    """Returns the configuration of the run that wrote a checkpoint, and the record of its task."""
    about = checkpoints.about(step)
    return Config.from_dict(about["config"]), about["task"]


def _abstract_model(config: Config, record: Any) -> tuple[nnx.GraphDef, dict[str, nnx.State]]:
    """Returns the graph of a run's model, and its trained and fixed variables without values."""
    task = task_named(config.task)
    model = nnx.eval_shape(lambda: task.make_model(config, record, fresh_rngs(0)))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    return graph, {"params": params, "fixed": fixed}


def _merged(graph: nnx.GraphDef, variables: dict[str, nnx.State]) -> nnx.Module:
    """Returns the model of the variables that `_abstract_model` names."""
    return nnx.merge(graph, variables["params"], variables["fixed"])


def _shapes(variables: dict[str, nnx.State]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every variable, by its name."""
    return {
        ".".join(map(str, path)): variable.shape
        for state in variables.values()
        for path, variable in nnx.to_flat_state(state)
    }


def _difference(there: dict[str, tuple[int, ...]], here: dict[str, tuple[int, ...]]) -> str | None:
    """Names the first variable that two models do not share, in words, or returns None."""
    for name in [*here, *(name for name in there if name not in here)]:
        if name not in there:
            return f"it has no {name}, which is {here[name]} here"
        if name not in here:
            return f"it has {name} {there[name]}, which the model here has not"
        if there[name] != here[name]:
            return f"{name} is {there[name]} there, and {here[name]} here"
    return None


def checkpoint_folder(run_directory: Path) -> Path:
    """Returns the folder in which a run keeps its checkpoints."""
    return run_directory / "checkpoints"
