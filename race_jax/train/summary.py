"""The summary of a finished run: `summary.json`, with its scores and what they cost."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from race_jax.tasks.task import Task
from race_jax.train.files import write_text
from race_jax.train.metrics import Record
from race_jax.train.state import TrainState

SPLITS = {"final": "valid", "test": "test"}


def write(
    directory: Path,
    task: Task,
    mesh: Mesh,
    state: TrainState,
    step_memory: int | None,
    records: Sequence[Record],
) -> None:
    """Writes the summary of a run that is finished. A run without the file is not finished.

    The file holds

    steps           the number of optimizer steps
    scores          for each split, the numbers of the last evaluation
    parameters      the number of trained parameters
    speed           the medians of the speeds that were logged: how many "units" "per_second", and
                    "steps_per_second"
    peak_bytes      on a GPU, the most memory that JAX has allocated on one card; where the platform
                    does not say, the state, the batch and the temporaries of a training step as XLA
                    plans them; None if neither is known
    device, platform, devices, jax    what the run ran on
    digests         the digests of the data

    Args:
        directory: the run's folder.
        task: the task that was trained.
        mesh: the devices.
        state: the state at the end.
        step_memory: bytes that a training step needs on a device, as XLA plans them, if known.
        records: what the run has logged.

    Raises:
        OSError: the file cannot be written.
    """
    devices = list(mesh.devices.flat)
    content = {
        "steps": int(state.step),
        "scores": {
            SPLITS[record["kind"]]: {name: record[name] for name in task.metric_names(record)}
            for record in records
            if record["kind"] in SPLITS
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "speed": {"units": task.weight_name, **_speeds(task.weight_name, records)},
        "peak_bytes": max([step_memory or 0, *map(_allocated, mesh.local_devices)]) or None,
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "jax": jax.__version__,
        "digests": task.digests,
    }
    write_text(path(directory), json.dumps(content, indent=2) + "\n")


def read(directory: Path) -> dict[str, Any] | None:
    """Returns the summary of a run, or None if the run is not finished."""
    file = path(directory)
    return json.loads(file.read_bytes()) if file.is_file() else None


def path(directory: Path) -> Path:
    """Returns the file of a run's summary."""
    return directory / "summary.json"


def _speeds(units: str, records: Sequence[Record]) -> dict[str, float | None]:
    """Returns the median speed in units and in steps, each None if no speed was logged."""
    in_units, in_steps, steps = [], [], []
    for record in records:
        if record["kind"] == "train":
            steps.append(record[units])
        elif record["kind"] == "speed":
            in_units.append(record[f"{units}_per_second"])
            in_steps.append(in_units[-1] * len(steps) / sum(steps))
            steps = []
    found = {"per_second": in_units, "steps_per_second": in_steps}
    return {name: statistics.median(speeds) if speeds else None for name, speeds in found.items()}


def _allocated(device: jax.Device) -> int:
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
