"""TensorBoard event files, written by tensorboardX in this thread.

tensorboardX's own `SummaryWriter` writes in another thread, where an error such as a full disk
reaches nobody. Its `EventsWriter` raises it here.
"""

import importlib.util
import time
from pathlib import Path
from typing import Any


class Events:
    """The event file of one start of a run.

    Args:
        directory: the run's folder; the file lies in its folder `tensorboard`.
        step: the step that the run goes on from. TensorBoard hides what an earlier start, which was
            killed, wrote of later ones.

    Raises:
        ImportError: tensorboardX is not installed.
        OSError: the file cannot be written; so do the methods.
    """

    def __init__(self, directory: Path, step: int):
        writers = importlib.import_module("tensorboardX.event_file_writer")
        self._summary = importlib.import_module("tensorboardX.summary")
        self._event = importlib.import_module("tensorboardX.proto.event_pb2")
        folder = directory / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._file = writers.EventsWriter(str(folder / "events"))
        start = self._event.SessionLog(status=self._event.SessionLog.START)
        self._file.write_event(self._event.Event(step=step + 1, session_log=start))
        self._file.flush()

    def write(self, records: list[dict[str, Any]]) -> None:
        """Adds the numbers of records, named `kind/name`."""
        for record in records:
            for name in record.keys() - {"kind", "step"}:
                summary = self._summary.scalar(f"{record['kind']}/{name}", record[name])
                event = self._event.Event(
                    step=record["step"], wall_time=time.time(), summary=summary
                )
                self._file.write_event(event)
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def event_file(directory: Path, step: int) -> Events | None:
    """The event file of a run; None where tensorboardX is not installed.

    Args:
        directory: the run's folder.
        step: the step that the run goes on from.

    Raises:
        OSError: the file cannot be written.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    return Events(directory, step)
