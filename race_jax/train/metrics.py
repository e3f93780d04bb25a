"""What a run measures, as records that survive it.

In: values by step. Out: `metrics.jsonl`, one JSON object a line, and TensorBoard events where
tensorboardX is installed. Equations: bits per byte = nats / (ln 2 · bytes); perplexity = exp(nats).
"""

import importlib
import json
import math
import os
from pathlib import Path
from typing import Any

from race_jax.train.files import write_text

Record = dict[str, Any]


class MetricsLog:
    """An append-only log with one truth about each step, however often the run was killed.

    Records hold `kind` ("train", "speed", "eval", "final" or "test"), `step` and numbers. On going
    on from a checkpoint, records of later steps and of an earlier end are dropped: they come again.

    Args:
        directory: the run's folder.
        step: the step that the run goes on from; 0 starts an empty log.
        tensorboard: also write TensorBoard events, if tensorboardX is installed.
    """

    def __init__(self, directory: Path, step: int, *, tensorboard: bool = False):
        self._path = directory / "metrics.jsonl"
        self.records = [
            record
            for record in (read_records(self._path) if self._path.is_file() else [])
            if record["step"] <= step and record["kind"] not in ("final", "test")
        ]
        write_text(self._path, "".join(_line(record) for record in self.records))
        self._events = _event_writer(directory, step) if tensorboard else None

    def write(self, records: list[Record]) -> None:
        """Adds records and puts them on the disk."""
        self.records += records
        with open(self._path, "a") as file:
            file.write("".join(_line(record) for record in records))
            file.flush()
            os.fsync(file.fileno())
        if self._events is not None:
            for record in records:
                for name in record.keys() - {"kind", "step"}:
                    self._events.add_scalar(
                        f"{record['kind']}/{name}", record[name], record["step"]
                    )
            self._events.flush()

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()


def read_records(path: Path) -> list[Record]:
    """The records of a log; a last line that a kill cut off is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def evaluation_record(
    kind: str, step: int, nats: float, weight: float, num_bytes: float | None
) -> Record:
    """What an evaluation says.

    Args:
        kind: "eval", "final" or "test".
        step: optimizer steps taken.
        nats: weighted sum over the scored tokens.
        weight: how many tokens were scored.
        num_bytes: bytes that those tokens stand for; None where the tokens do not encode the text.

    Returns:
        A record with the loss (nats per token), the perplexity and, given `num_bytes`, the bits per
        byte.

    Example:
        >>> record = evaluation_record("eval", 10, nats=80 * math.log(2), weight=40, num_bytes=80)
        >>> round(record["perplexity"], 6), round(record["bits_per_byte"], 6)
        (4.0, 1.0)
    """
    loss = nats / weight
    record = {
        "kind": kind,
        "step": step,
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
    }
    if num_bytes is not None:
        record["bits_per_byte"] = nats / math.log(2) / num_bytes
    return record


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"


def _event_writer(directory: Path, step: int) -> Any:
    try:
        tensorboard = importlib.import_module("tensorboardX")
    except ImportError:
        return None
    # Events of later steps were written by a process that was killed.
    return tensorboard.SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)
