"""Runs training runs as processes, a few at a time, and stops them all on request.

A run that was stopped goes on from its last checkpoint when it is started again. How each run ended
is kept in its folder, in `outcome.json`. Several commands may share the folders: the one that has
the lock of the file `.command` in a run's folder starts that run and notes its end, and its process
inherits the lock, in case the command is killed.
"""

import collections
import dataclasses
import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol

from benchmarks.scaling import commit
from race_jax.train import summary
from race_jax.train.checkpoint import checkpoint_folder
from race_jax.train.files import in_use, try_lock, write_text
from reproduction.plan import ROOT, SCRIPT, Run

FINISHED, STOPPED = 0, 75  # exit statuses of the training script
PAUSE = 0.1  # seconds between two looks at the processes
GPU_SHARE = 0.9  # of a card's memory; the rest is for what CUDA needs in every process
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


class Display(Protocol):
    """Shows how the work goes on."""

    def started(self, run: Run) -> None:
        """A run has been started."""

    def ended(self, run: Run, outcome: dict[str, Any]) -> None:
        """A run has ended; `outcome["status"]` says how."""

    def progress(self, left: float) -> None:
        """So much work is left, in units of `Run.work`."""

    def waits(self, run: Run) -> None:
        """A run waits for another process that trains it. It is told again and again."""

    def found(self, run: Run) -> None:
        """A run that was waited for has been finished by another process."""

    def say(self, text: str) -> None:
        """Something else has happened."""


@dataclasses.dataclass
class Started:
    """A process that trains, and the lock by which no other command starts its run."""

    run: Run
    process: subprocess.Popen
    since: float
    lock: IO[str]


class Requests:
    """Counts requests to stop: Ctrl-C, SIGTERM and SIGHUP."""

    def __init__(self) -> None:
        self.count = 0
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "Requests":
        heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def work(
    runs: Sequence[Run], environments: Sequence[dict[str, str]], display: Display, *, keep: bool
) -> bool:
    """Runs what is not finished yet.

    The first request to stop is passed on to the processes. They save a checkpoint after the
    current step and end. A second request ends them at once.

    Args:
        runs: the runs, in the order in which they are started.
        environments: the environment variables of each process that runs at the same time.
        display: shows how the work goes on.
        keep: whether the checkpoints of finished runs are kept.

    Returns:
        Whether the work came to its end. It did not if it was stopped.
    """
    waiting = collections.deque(run for run in runs if not is_finished(run))
    slots: list[Started | None] = [None] * len(environments)
    passed_on = 0
    try:
        with Requests() as requests:
            while waiting or any(slots):
                if requests.count > passed_on:
                    passed_on = requests.count
                    waiting.clear()
                    display.say(_stop(slots))
                for index, slot in enumerate(slots):
                    if slot is None and waiting:
                        slots[index] = _start_next(waiting, environments[index], display)
                    elif slot is not None and slot.process.poll() is not None:
                        with slot.lock:
                            outcome = _end(slot, len(environments), keep)
                        display.ended(slot.run, outcome)
                        slots[index] = None
                left = [slot.run.work * _share_left(slot.run) for slot in slots if slot]
                display.progress(sum(left) + sum(run.work for run in waiting))
                time.sleep(PAUSE)
    finally:  # after an error of our own, no process is left over
        for slot in filter(None, slots):
            slot.process.terminate()
            slot.lock.close()
    return passed_on == 0


def is_finished(run: Run) -> bool:
    """Whether a run has been trained and scored to its end."""
    return summary.path(run.directory).is_file()


def outcome_of(run: Run) -> dict[str, Any]:
    """Returns how a run ended; "status" is "missing" if it was never started."""
    path = run.directory / "outcome.json"
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):  # it is not there, or a full disk has cut it short
        return {"status": "missing"}


def environments(
    jobs: int, cards: Sequence[str], data: Path | None, given: dict[str, str]
) -> list[dict[str, str]]:
    """Returns the environment of each process.

    Args:
        jobs: the number of processes at the same time.
        cards: the GPUs, which are dealt out in turn. There may be none.
        data: the folder of the data sets; None leaves it as it is given.
        given: the environment of this process. What it says about the memory of JAX is kept.

    Example:
        >>> for e in environments(3, ["0", "1"], None, {}):
        ...     print(e["CUDA_VISIBLE_DEVICES"], e["XLA_PYTHON_CLIENT_MEM_FRACTION"])
        0 0.45
        1 0.45
        0 0.45
    """
    # The seeds of a method share their compiled programs, the small ones too.
    common = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | given
    if data is not None:
        common["RACE_JAX_DATA"] = str(data)
    if not cards:
        return [common] * jobs
    share = GPU_SHARE / -(-jobs // len(cards))
    # Every process takes its share at its start, so that none can run out of memory because of the
    # others.
    memory = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(math.floor(share * 1000) / 1000),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
    }
    return [
        memory | common | {"CUDA_VISIBLE_DEVICES": cards[slot % len(cards)]} for slot in range(jobs)
    ]


def _start_next(
    waiting: collections.deque[Run], environment: dict[str, str], display: Display
) -> Started | None:
    """Starts the first waiting run that no other process trains."""
    for _ in range(len(waiting)):
        run = waiting.popleft()
        run.directory.mkdir(parents=True, exist_ok=True)
        lock = try_lock(run.directory / ".command")
        # Without a command, the training script may have been started by hand.
        if lock is None or in_use(run.directory):
            waiting.append(run)
            display.waits(run)
        elif is_finished(run):
            display.found(run)
        else:
            display.started(run)
            return _start(run, environment, lock)
        if lock is not None:
            lock.close()
    return None


def _start(run: Run, environment: dict[str, str], lock: IO[str]) -> Started:
    with open(run.log, "a", encoding="utf-8") as log:
        log.write(f"{run.command}\n")
        log.flush()
        process = subprocess.Popen(
            [sys.executable, SCRIPT, *run.words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C in a terminal reaches this command only, which passes it on
            pass_fds=[lock.fileno()],
        )
    return Started(run, process, time.monotonic(), lock)


def _stop(slots: Sequence[Started | None]) -> str:
    running = [slot for slot in slots if slot is not None]
    for slot in running:
        slot.process.send_signal(signal.SIGTERM)
    return (
        f"stopping: {len(running)} run(s) save a checkpoint after the current step; ask again to "
        "stop them at once"
    )


def _end(started: Started, jobs: int, keep: bool) -> dict[str, Any]:
    """Notes how a run ended, and removes the checkpoints of a finished one."""
    run, code = started.run, started.process.returncode
    asked = code in (STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM)
    status = "stopped" if asked else "failed"
    if code == FINISHED and is_finished(run):
        status = "finished"
        if not keep:
            shutil.rmtree(checkpoint_folder(run.directory), ignore_errors=True)
    earlier = outcome_of(run)
    outcome = {
        "status": status,
        "exit_status": code,
        "error": _why(run, code) if status == "failed" else "",
        "seconds": earlier.get("seconds", 0.0) + time.monotonic() - started.since,
        "starts": earlier.get("starts", 0) + 1,
        "jobs": jobs,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
    }
    write_text(run.directory / "outcome.json", json.dumps(outcome, indent=2) + "\n")
    return outcome


def _why(run: Run, code: int) -> str:
    """Returns why a run failed: the signal, its own message, or else its last line."""
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    text = run.log.read_text("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("train_lm: ")]
    return (own or lines)[-1].removeprefix("train_lm: ")[:300]


def _share_left(run: Run) -> float:
    """Returns how much of a run is left, by the last step in its log of metrics."""
    try:
        with open(run.directory / "metrics.jsonl", "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 2000, 0))
            last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return 1 - json.loads(last)["step"] / run.config.run.steps
    except (OSError, ValueError, KeyError):
        return 1.0
