"""Checkpoints: the state of a run, whole or not at all, and what is needed to use it.

Orbax writes the files, and restores them on any number of devices. A digest of every file tells a
damaged checkpoint.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from race_jax.tasks.registry import task_named
from race_jax.train.config import Config
from race_jax.train.console import one_line
from race_jax.train.console import say as print_line
from race_jax.train.files import unused_path, write_text
from race_jax.train.state import TrainState, fresh_rngs

_DIGESTS = "digests.json"


@dataclasses.dataclass(frozen=True)
class Restored:
    """What a run goes on from.

    Attributes:
        state: the training state, on the devices asked for.
        about: the JSON values saved beside it.
    """

    state: TrainState
    about: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run directory, newest first.

    A step counts as saved once its digests are written, after all its files: a process killed at
    any moment leaves either a whole checkpoint or one that is known not to be.

    Args:
        directory: folder of the checkpoints; made if missing.
        keep: newest checkpoints that stay.
        read_only: nothing is made, moved or dropped.
        say: takes the sentences about damaged checkpoints.

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
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # what a killed or failed save left
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def steps(self) -> list[int]:
        """The steps that have a folder here, damaged or not, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, about: dict[str, Any]) -> None:
        """Writes a checkpoint of `state.step` and drops the oldest beyond `keep`.

        Args:
            state: the training state.
            about: JSON values to keep beside it: data iterator, configuration, tokenizer.

        Raises:
            RuntimeError: it could not be written, as on a full disk; older ones are untouched.
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
            self._marker.write_text(str(step))
            self._manager.save(step, args=items, force=True)
            write_text(self._folder(step) / _DIGESTS, json.dumps(self._digests(step)))
            self._marker.unlink()
        except Exception as error:  # Orbax raises many kinds; none may pass as a saved step
            raise RuntimeError(
                f"the checkpoint of step {step} could not be written to {self._directory}; those "
                f"of steps {self._whole_steps()} are untouched. The reason: {one_line(error)}"
            ) from error

    def restore(self, like: TrainState) -> Restored | None:
        """The newest whole checkpoint, or None where no save was ever finished.

        A damaged one is reported and set aside, and the one before it is taken.

        Args:
            like: a state, real or abstract, with the shapes and shardings to restore to.

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
        """The JSON values of a checkpoint."""
        items = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=items)["about"]

    def model(self, step: int, like: dict[str, nnx.State]) -> dict[str, nnx.State]:
        """Only parameters and fixed variables of a checkpoint, on one device."""
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), like)
        items = ocp.args.Composite(model=ocp.args.StandardRestore(like))
        return self._manager.restore(step, args=items)["model"]

    def newest_whole(self) -> int | None:
        """The last step whose checkpoint is whole; reports newer ones and sets them aside.

        Returns:
            The step; None where there is none and none was lost: the folder is empty, or a kill
            cut off the first save.

        Raises:
            RuntimeError: there were checkpoints, and all are damaged. Nothing is moved.
        """
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
        """Releases Orbax's threads."""
        self._manager.close()

    @property
    def _marker(self) -> Path:
        """Holds the step of a save while it is written."""
        return self._directory.with_name(f"{self._directory.name}-saving")

    def _unfinished(self) -> int | None:
        """The step of a save that a kill cut off, or None."""
        text = self._marker.read_text("utf-8", "replace") if self._marker.is_file() else ""
        return int(text) if text.isdecimal() else None

    def _none_whole(self, damaged: dict[int, str]) -> str:
        reasons = "; ".join(f"step {step}: {damage}" for step, damage in damaged.items())
        run = self._directory.parent
        return (
            f"no whole checkpoint in {self._directory} ({reasons}). Restore a copy of one; or "
            f"train anew beside it with --config.run.directory={unused_path(run)}, or from step 0 "
            f"here after removing {self._directory}"
        )

    def _folder(self, step: int) -> Path:
        return self._directory / str(step)

    def _whole_steps(self) -> list[int]:
        return [step for step in self.steps() if self._damage(step) is None]

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way of a new one of the same step."""
        aside = self._directory.with_name(f"{self._directory.name}-damaged")
        aside.mkdir(exist_ok=True)
        number = sum(1 for _ in aside.iterdir())
        target = aside / f"{step}-{number}"
        os.replace(self._folder(step), target)
        self._manager.reload()
        return target

    def _digests(self, step: int) -> dict[str, str]:
        """The sha256 of each file of a checkpoint, by its relative name."""
        folder, digests = self._folder(step), {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name != _DIGESTS:
                with open(path, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                digests[path.relative_to(folder).as_posix()] = digest
        return digests

    def _damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files; None if nothing is."""
        path = self._folder(step) / _DIGESTS
        if not path.is_file():
            return "it was not written to its end"
        try:
            expected = json.loads(path.read_text())
        except ValueError:
            return f"{_DIGESTS} cannot be read"
        found = self._digests(step)
        bad = [name for name in expected if found.get(name) != expected[name]]
        return f"{bad[0]} is missing or changed" if bad else None


def load_for_inference(directory: str | os.PathLike) -> tuple[nnx.Module, Any, Config]:
    """The model of a run's newest whole checkpoint, ready to be called.

    Args:
        directory: the run's directory, `~` allowed; a run may be writing to it.

    Returns:
        The NNX model on the default device, what the task keeps beside it (for text its
        tokenizer) and the run's configuration.

    Raises:
        ValueError: there is no checkpoint in `directory`.
        RuntimeError: all checkpoints there are damaged.

    Source: beyond the paper.
    """
    folder = checkpoint_folder(Path(directory).expanduser())
    if not folder.is_dir():
        raise ValueError(f"no checkpoints in {directory}; give the directory of a training run")
    checkpoints = Checkpoints(folder, read_only=True)
    try:
        step = checkpoints.newest_whole()
        if step is None:
            raise ValueError(f"no checkpoint in {directory} yet; the run has to save one first")
        about = checkpoints.about(step)
        config = Config.from_dict(about["config"])
        task, record = task_named(config.task), about["task"]
        model = nnx.eval_shape(lambda: task.make_model(config, record, fresh_rngs(0)))
        graph, params, fixed = nnx.split(model, nnx.Param, ...)
        found = checkpoints.model(step, {"params": params, "fixed": fixed})
    finally:
        checkpoints.close()
    return nnx.merge(graph, found["params"], found["fixed"]), task.companion(record), config


def checkpoint_folder(run_directory: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run_directory / "checkpoints"
