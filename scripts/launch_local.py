r"""Starts one training run as several processes on this machine, each with devices of its own.

    .venv/bin/python scripts/launch_local.py --processes 2 --devices 4 -- \
        scripts/train_lm.py --config configs/lm_default.py --config.mesh.seq=2

A process has CPU devices, or with --gpus one GPU: the first process the first one, and so on.

The words after `--` are a script and its options. Each process gets them, and the fields
config.mesh.coordinator, processes and process. The output of the first process is shown as it is,
and that of the others behind their number.

If one process dies or fails, the others are stopped, and the exit status is that of the first one
that failed. SIGTERM and Ctrl-C are passed on to all.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from gpus import visible_gpus

GRACE = 10.0  # seconds that the others have, to end by themselves
STOPPED = 75  # the exit status of a run that was stopped early and is saved
REFUSED = 2  # the exit status where nothing was started


def free_port() -> int:
    """Returns a port that nobody uses now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def devices_of(index: int, options: argparse.Namespace) -> dict[str, str]:
    """Returns the environment variables that give a process its devices.

    Example:
        >>> devices_of(1, argparse.Namespace(gpus=["2", "3"]))
        {'CUDA_VISIBLE_DEVICES': '3'}
    """
    if options.gpus:
        return {"CUDA_VISIBLE_DEVICES": options.gpus[index]}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(options.devices)}


def gpus_of(processes: int) -> list[str]:
    """Returns the GPU of each process.

    Raises:
        ValueError: there are fewer GPUs than processes.
    """
    known = visible_gpus(os.environ)
    if len(known) < processes:
        raise ValueError(
            f"--gpus needs a GPU for each of {processes} processes, and found {len(known)}: "
            f"{known}; lower --processes, or leave --gpus out to run on the CPU"
        )
    return known[:processes]


def start(command: list[str], index: int, options: argparse.Namespace) -> subprocess.Popen:
    """Starts one process of the run."""
    fields = {
        "coordinator": f"127.0.0.1:{options.port}",
        "processes": options.processes,
        "process": index,
    }
    words = [f"--config.mesh.{name}={value}" for name, value in fields.items()]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "bufsize": 1}
    process = subprocess.Popen(
        [sys.executable, *command, *words],
        env=os.environ | devices_of(index, options),
        start_new_session=True,  # Ctrl-C reaches them through this program only
        **(pipe if index else {}),
    )
    if index:
        threading.Thread(target=forward, args=(process, index), daemon=True).start()
    return process


def forward(process: subprocess.Popen, index: int) -> None:
    """Shows what a process prints, behind its number."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def watch(processes: list[subprocess.Popen]) -> int:
    """Waits until all processes have ended, and stops the others if one fails."""
    failed = None
    while failed is None and any(process.poll() is None for process in processes):
        time.sleep(0.1)
        ended = [(i, p.returncode) for i, p in enumerate(processes) if p.poll() is not None]
        bad = [(i, code) for i, code in ended if code not in (0, STOPPED)]
        # The death of one makes others fail, perhaps before this loop sees it.
        failed = min(bad, key=lambda pair: pair[1] > 0, default=None)
    if failed is None:
        return max(process.returncode for process in processes)
    index, code = failed
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with status {code}"
    say(f"process {index} {how}; the others have {GRACE:.0f} seconds to end")
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    left = [i for i, process in enumerate(processes) if process.poll() is None]
    for i in left:
        processes[i].kill()
        processes[i].wait()
    if left:
        say(f"stopped {', '.join(map(str, left))}")
    codes = ", ".join(str(process.returncode) for process in processes)
    again = "" if code == REFUSED else "; the same command goes on from the last checkpoint"
    say(f"all have ended, with status {codes}{again}")
    return code if code > 0 else 128 - code


def say(text: str) -> None:
    """Prints a line about the processes."""
    print(f"launch_local: {text}", file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2, help="number of processes")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--devices", type=int, default=1, help="CPU devices of each process")
    kinds.add_argument("--gpus", action="store_true", help="one GPU for each process")
    parser.add_argument("--port", type=int, default=0, help="the port of the first; 0 finds one")
    parser.add_argument("command", nargs="+", metavar="-- SCRIPT OPTION", help="what to run")
    options = parser.parse_args(argv)
    if options.processes < 1 or options.devices < 1:
        parser.error("--processes and --devices must be at least 1")
    try:
        options.gpus = gpus_of(options.processes) if options.gpus else []
    except ValueError as error:
        parser.error(str(error))
    options.port = options.port or free_port()
    processes = [start(options.command, index, options) for index in range(options.processes)]
    say("processes " + " ".join(str(process.pid) for process in processes))

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    return watch(processes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
