"""Files that are whole or absent, and the folder of a run.

In: paths, text, a configuration. Out: files written in one stroke; a run directory that only one
process and one configuration use. Equation: none.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from race_jax.train.config import Config

try:
    import fcntl
except ImportError:  # Windows has no such locks; two runs in one folder are then not noticed
    fcntl = None

# Fields that may change between two starts of one run: they do not touch what is learned.
FREE_FIELDS = frozenset(
    f"config.{name}"
    for name in "model.implementation model.remat data.root data.num_workers mesh.data "
    "run.directory run.max_seconds run.log_every run.eval_every run.eval_batches "
    "run.checkpoint_every run.keep_checkpoints run.tensorboard run.compare_xz run.sample_tokens "
    "run.sample_prompt".split()
)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write` on a new file that takes the place of `path` once it is safe on the disk."""
    draft = path.with_name(path.name + ".tmp")
    with open(draft, "wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(draft, path)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8; `path` holds the old text or all of the new one."""
    write_whole(path, lambda stream: stream.write(text.encode()))


@contextlib.contextmanager
def run_directory(path: Path) -> Iterator[Path]:
    """Opens the folder of a run for this process alone.

    Args:
        path: the folder; made if missing.

    Yields:
        The folder.

    Raises:
        ValueError: it cannot be made or written, or another process uses it.
    """
    where = f"config.run.directory {path}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 (held for the whole run)
    except OSError as error:
        raise ValueError(f"{where} cannot be written: {error.strerror}") from error
    with lock:
        _take(lock, where)
        yield path


def check_space(path: Path, bytes_needed: int) -> None:
    """Raises ValueError where the disk of `path` has less than `bytes_needed` left."""
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise ValueError(
            f"config.run.directory {path} has {free / 1e6:.0f} MB of disk left; the checkpoints of "
            f"this run need about {bytes_needed / 1e6:.0f} MB"
        )


def _take(lock: IO[str], where: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{where} is in use by another process; wait or give another") from None


def claim(path: Path, config: Config, about: dict[str, Any], *, resuming: bool) -> None:
    """Writes what a run is into its folder, or refuses to go on with another one.

    Args:
        path: the run's folder.
        config: the checked configuration of this start.
        about: further JSON values that must not change, such as the digest of the text.
        resuming: whether the folder holds a checkpoint; without one, nothing is lost by a change.

    Raises:
        ValueError: a field that decides what is learned differs from the earlier start; names it.
    """
    record = path / "config.json"
    now = {"config": config.to_dict(), **about}
    if resuming and record.is_file():
        then = json.loads(record.read_text())
        changed = [name for name in _differences(then, now) if not _is_free(name, config)]
        if changed:
            values = "; ".join(
                f"{name} was {_look_up(then, name)} and is now {_look_up(now, name)}"
                for name in changed
            )
            raise ValueError(
                f"{path} holds another run: {values}. Give the same values, or another "
                "--config.run.directory"
            )
    write_text(record, json.dumps(now, indent=2))


def _is_free(name: str, config: Config) -> bool:
    # A constant rate does not depend on the length of the run, so such a run may be extended.
    extends = name == "config.run.steps" and config.optimizer.schedule == "constant"
    return name in FREE_FIELDS or extends


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Dotted names of the values that differ between two nested dicts."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [path]
    names = [*now, *(name for name in then if name not in now)]
    return [
        found
        for name in names
        for found in _differences(then.get(name), now.get(name), f"{path}.{name}".strip("."))
    ]


def _look_up(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
