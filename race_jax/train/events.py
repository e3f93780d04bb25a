"""TensorBoard event files, written by tensorboardX in this thread.

The `SummaryWriter` of tensorboardX writes in another thread, where an error such as a full disk is
not noticed. Its `RecordWriter`, which is used here, raises the error in the calling thread.
"""

import importlib.util
import os
import socket
import time
from pathlib import Path
from typing import Any


class Events:
    """The event file of one start of a run.

    Args:
        directory: the run's folder. The file is written to its folder `tensorboard`.
        step: the step that the run continues from. TensorBoard hides the events of later steps that
            an earlier start has written.

    Raises:
        ImportError: tensorboardX is not installed.
        OSError: the file cannot be written. The methods raise it too.
    """

    def __init__(self, directory: Path, step: int):
        records = importlib.import_module("tensorboardX.record_writer")
        self._summary = importlib.import_module("tensorboardX.summary")
        self._event = importlib.import_module("tensorboardX.proto.event_pb2")
        folder = directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._file = records.RecordWriter(str(folder / name))
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._add(file_version="brain.Event:2")
        self._add(step=step + 1, session_log=start)
        self._file.flush()

    def write(self, records: list[dict[str, Any]]) -> None:
        """Adds the numbers of the records, by names of the form `kind/name`."""
        for record in records:
            for name in record.keys() - {"kind", "step"}:
                summary = self._summary.scalar(f"{record['kind']}/{name}", record[name])
                self._add(step=record["step"], summary=summary)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        event = self._event.Event(wall_time=time.time(), **fields)
        self._file.write(event.SerializeToString())


def event_file(directory: Path, step: int) -> Events | None:
    """Opens an event file for a run.

    Args:
        directory: the run's folder.
        step: the step that the run continues from.

    Returns:
        The file, or None if tensorboardX is not installed.

    Raises:
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    return Events(directory, step)
