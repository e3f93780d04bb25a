"""The metrics of a run: `metrics.jsonl`, with one JSON object per line, and TensorBoard events."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from race_jax.train.console import one_line, say
from race_jax.train.events import Events, event_file
from race_jax.train.files import write_text

Record = dict[str, Any]


class MetricsLog:
    """An append-only log with one record of each step, however often the run was killed.

    A record holds `kind` ("train", "speed", "eval", "final" or "test"), `step` and numbers. When a
    run continues from a checkpoint, the records of later steps are removed, and so are those of an
    earlier end. They are written again.

    If the file cannot be written, for example because the disk is full, no records are lost. They
    are kept, and the next call that can write them does so.

    Args:
        directory: the run's folder.
        step: the step that the run continues from; 0 starts an empty log.
        tensorboard: whether to write TensorBoard events too, if tensorboardX is installed.
        writes: whether anything is written. Of several processes of a run, one writes.

    Attributes:
        records: all records, the oldest first.
    """

    def __init__(
        self, directory: Path, step: int, *, tensorboard: bool = False, writes: bool = True
    ):
        self._path, self._writes = directory / "metrics.jsonl", writes
        self._events: Events | None = None
        self._kept: list[Record] = []  # records that are not in the file yet
        self.records: list[Record] = []
        if not writes:
            return
        self.records = [
            record
            for record in (read_records(self._path) if self._path.is_file() else [])
            if record["step"] <= step and record["kind"] not in ("final", "test")
        ]
        text = "".join(_line(record) for record in self.records)
        write_text(self._path, text)
        self._end = len(text.encode())  # bytes of the file that are known to be whole lines
        if tensorboard:
            self._decorate(lambda: setattr(self, "_events", event_file(directory, step)))

    def write(self, records: list[Record]) -> bool:
        """Adds records and writes them to the disk.

        Args:
            records: the new records.

        Returns:
            False if the file cannot be written, but could be before. A sentence says so.
        """
        if not self._writes:
            return True
        self.records += records
        could = not self._kept
        self._kept += records
        if self._events is not None:
            self._decorate(lambda: self._events.write(records))
        try:
            self._append("".join(_line(record) for record in self._kept).encode())
        except OSError as error:
            if could:
                say(f"{self._path} cannot be written ({error.strerror}); its lines are kept")
            return not could
        self._kept = []
        if not could:
            say(f"{self._path} can be written again; nothing of it is lost")
        return True

    def close(self) -> None:
        """Closes the event file, and says which records could not be written."""
        if self._events is not None:
            self._decorate(self._events.close)
        if self._kept:
            steps = f"{self._kept[0]['step']} to {self._kept[-1]['step']}"
            say(f"{self._path} lacks the records of steps {steps}")

    def _append(self, data: bytes) -> None:
        """Writes `data` after the last whole line. What a failed call left there is overwritten."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        with open(descriptor, "r+b", buffering=0) as file:
            end = min(self._end, os.fstat(descriptor).st_size)
            file.truncate(end)
            file.seek(end)
            while data:
                data = data[file.write(data) :]
            os.fsync(descriptor)
            self._end = file.tell()

    def _decorate(self, act: Callable[[], None]) -> None:
        """Does something for TensorBoard. After an error no more events are written."""
        try:
            act()
        except Exception as error:  # noqa: BLE001 (no such error may end a run)
            events, self._events = self._events, None
            if events is not None:
                with contextlib.suppress(OSError):
                    events.close()
            say(f"TensorBoard events are left out from here on: {one_line(error)}")


def read_records(path: Path) -> list[Record]:
    """Reads the records of a log.

    The last line is left out if it has no line end, because the process was then killed while it
    wrote the line. Other lines that are not records, such as a power failure or
    a full disk leaves, are left out too. A sentence names the file and the first of them.

    Args:
        path: the file, with one JSON object per line.

    Returns:
        The records, the oldest first.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    found = [_record(line) for line in lines]
    damaged = [number for number, record in enumerate(found, start=1) if record is None]
    if damaged:
        say(f"{path}: {len(damaged)} damaged line(s) are left out, the first is line {damaged[0]}")
    return [record for record in found if record is not None]


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _record(line: bytes) -> Record | None:
    """Returns the record of a line, or None if the line is not a record."""
    try:
        record = json.loads(line)
    except ValueError:  # also for text that is not UTF-8
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return record if whole and isinstance(record.get("step"), int) else None
