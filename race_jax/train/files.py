"""Files that are whole or absent, and the folder of a run.

A folder belongs to one process at a time, and to one configuration. The lock is made here and not
by the library `filelock`, because that library raises an error on file systems that answer ENOLCK
or EOPNOTSUPP to a lock, so that the code below would still be needed.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from race_jax.layers.registry import ATTENTIONS
from race_jax.tasks.registry import TASKS
from race_jax.train.config import Config
from race_jax.train.console import say

try:
    import fcntl
except ImportError:  # Windows has no such locks, so two runs in one folder are not noticed there
    fcntl = None

_TAKEN = errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES  # another process has the lock

# Fields that may change between two starts of a run, because they do not affect what is learned. A
# task adds its own ones, `Task.free_fields`.
FREE_FIELDS = frozenset(
    f"config.{name}"
    for name in "model.implementation model.remat data.root data.num_workers mesh.data "
    "mesh.seq mesh.fsdp mesh.coordinator mesh.processes mesh.process "
    "run.directory run.max_seconds run.log_every run.eval_every run.eval_batches "
    "run.checkpoint_every run.keep_checkpoints run.tensorboard run.compilation_cache".split()
)


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Calls `write` on a new file, which replaces `path` once its content is on the disk.

    Args:
        path: the file. If anything fails, it keeps its old content.
        write: writes the content to the binary stream that it is given.

    Raises:
        OSError: the file cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # others may write the same file
    try:
        with open(draft, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8. At any moment `path` holds the whole old text or the whole new one.

    Args:
        path: the file.
        text: its new content.

    Raises:
        OSError: the file cannot be written.
    """
    write_whole(path, lambda stream: stream.write(text.encode()))


@contextlib.contextmanager
def run_directory(path: Path, *, is_first: bool = True) -> Iterator[Path]:
    """Opens the folder of a run for this process alone.

    A folder that was made here and in which nothing was written is removed at the end.

    Args:
        path: the folder. It is made if it is missing.
        is_first: False for the other processes of a run of several, which only read there.

    Yields:
        The folder.

    Raises:
        ValueError: the folder cannot be made or written, or another process uses it.
    """
    where = f"config.run.directory {path}"
    if not is_first:
        yield path
        return
    is_new = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / ".lock", "a")  # noqa: SIM115 (held for the whole run)
    except OSError as error:
        raise ValueError(f"{where} cannot be written: {error.strerror}") from error
    with lock:
        _take(lock, where)
        try:
            yield path
        finally:
            # Other processes do not wait for the lock, so nobody can have the file that is removed.
            with contextlib.suppress(OSError):
                if is_new and os.listdir(path) == [".lock"]:
                    (path / ".lock").unlink()
                    path.rmdir()


def try_lock(path: Path) -> IO[str] | None:
    """Takes the lock of a file, which is made if it is missing.

    Args:
        path: the file.

    Returns:
        The open file, or None if another process has its lock. The lock ends when the file is
        closed here and in all processes that inherited it. Where the file system has no locks,
        the file is returned without one.

    Raises:
        OSError: the file cannot be opened.
    """
    lock = open(path, "a")  # noqa: SIM115 (the caller closes it)
    error = _lock(lock)
    if error is not None and error.errno in _TAKEN:
        lock.close()
        return None
    return lock


def in_use(path: Path) -> bool:
    """Whether another process trains in the folder of a run."""
    if not (path / ".lock").exists():
        return False
    lock = try_lock(path / ".lock")
    if lock is not None:
        lock.close()
    return lock is None


def check_space(path: Path, bytes_needed: int) -> None:
    """Checks that the disk of a folder has enough space.

    Args:
        path: the run's folder.
        bytes_needed: bytes that the run will write there.

    Raises:
        ValueError: there is less space than that.
    """
    free = shutil.disk_usage(path).free
    if free < bytes_needed:
        raise ValueError(
            f"config.run.directory {path} has {free / 1e6:.0f} MB of disk left; the checkpoints of "
            f"this run need about {bytes_needed / 1e6:.0f} MB more: free some, keep fewer with "
            "--config.run.keep_checkpoints, or give another --config.run.directory"
        )


def _take(lock: IO[str], where: str) -> None:
    error = _lock(lock)
    if error is None:
        return
    if error.errno in _TAKEN:
        raise ValueError(
            f"{where} is in use by another process; wait until it ends, or give another folder"
        )
    # Some mounts of Lustre, NFS and FUSE have no locks (ENOLCK, ENOSYS, EOPNOTSUPP).
    say(
        f"{where}: the file system has no locks ({error.strerror}), so the run goes on without "
        "one. Make sure that no second process trains there"
    )


def _lock(file: IO[str]) -> OSError | None:
    """Takes the lock of an open file, or returns the error why it could not."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error
    return None


def claim(path: Path, config: Config, digests: dict[str, str], *, resuming: bool) -> None:
    """Writes the configuration of a run into its folder, unless another run is there.

    Args:
        path: the run's folder.
        config: the checked configuration of this start.
        digests: for all content that affects what is learned, by a name such as "the training
            text", its digest.
        resuming: whether the folder holds a checkpoint. If it does not, nothing is compared,
            because no training is lost by a change.

    Raises:
        ValueError: a field or a digest that affects what is learned differs from that of the
            earlier start. The message names it.
    """
    record = path / "config.json"
    now = {"config": config.to_dict(), "digests": digests}
    if config.run.start_from is not None:  # a folder is the same however it is written
        now["config"]["run"]["start_from"] = str(Path(config.run.start_from).expanduser().resolve())
    changed = []
    if resuming and record.is_file():
        changed = changes(_read_record(record), now, config)
    if changed:
        raise ValueError(
            f"{path} holds another run: {'; '.join(changed)}. Give the same values and files; or, "
            f"to train with the new ones, add --config.run.directory={unused_path(path)} to the "
            "command"
        )
    write_text(record, json.dumps(now, indent=2))


def changes(then: dict[str, Any], now: dict[str, Any], config: Config) -> list[str]:
    """Says what differs between two records, but for the fields that may change.

    Args:
        then: a record with the parts "config" and "digests", or with some of their fields.
        now: the same for the run that `config` describes.
        config: the checked configuration.

    Returns:
        One sentence for each difference, with the name of the field and both values.
    """
    names = (name for name in differences(then, now) if not is_free(name, config))
    return [_change(name, then, now) for name in names]


def unused_path(path: Path) -> Path:
    """Returns the first of `path`-2, `path`-3 and so on that does not exist."""
    number = 2
    while (free := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    return free


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
        reason = "it holds no JSON object"
    except ValueError as error:
        reason = str(error)
    raise ValueError(
        f"{path}, which holds the configuration of the run, cannot be read ({reason}). Restore it "
        "from a copy; or remove it, and the same command goes on without comparing"
    )


def _change(name: str, then: dict[str, Any], now: dict[str, Any]) -> str:
    """Says what has changed since the run began, with both values."""
    old, new = look_up(then, name), look_up(now, name)
    section, _, content = name.partition(".")
    if section == "digests":
        return f"{content} has changed (sha256 {old} then, {new} now)"
    return f"{name} was {old} and is now {new}"


def is_free(name: str, config: Config) -> bool:
    """Whether a field may change between two starts of the run that `config` describes."""
    section, _, field = name.removeprefix("config.").partition(".")
    if section in TASKS:  # only the section of the chosen task counts
        return section != config.task or field in TASKS[section].free_fields
    attention, _, option = field.partition(".")
    if section == "model" and attention in ATTENTIONS:  # likewise for attentions
        return not option or attention not in config.model.attentions
    # A constant learning rate does not depend on the length of the run, so the run may be extended.
    extends = name == "config.run.steps" and config.optimizer.schedule == "constant"
    return name in FREE_FIELDS or extends


def differences(then: Any, now: Any, path: str = "") -> list[str]:
    """Returns the dotted names of the values that differ between two nested dicts.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4})
        ['a.c', 'd']
    """
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return [] if then == now else [path]
    names = [*now, *(name for name in then if name not in now)]
    return [
        found
        for name in names
        for found in differences(then.get(name), now.get(name), f"{path}.{name}".strip("."))
    ]


def look_up(values: Any, name: str) -> Any:
    """Returns the value of a dotted name, or None if there is none."""
    for part in name.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values
