"""Several processes of one run: how they find each other, and what they agree on.

Every process runs the same program, on devices of its own, and takes part in every step. The first
one also prints, and writes the files of the run.
"""

import contextlib
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from race_jax.train import console
from race_jax.train.config import Config

# Seconds without a sign of life after which a process counts as dead.
SILENCE = 30


def join(config: Config) -> None:
    """Connects this process to the others of its run, if the configuration asks for it.

    JAX must not have been used before. A second call has no effect.

    Args:
        config: the checked configuration. `mesh.coordinator` asks for several processes.

    Raises:
        RuntimeError: the others cannot be reached.
        ValueError: nothing is known of the others.
    """
    mesh = config.mesh
    if mesh.coordinator is None or jax.distributed.is_initialized():
        return
    known = {
        "coordinator_address": mesh.coordinator,
        "num_processes": mesh.processes,
        "process_id": mesh.process,
        "cluster_detection_method": "deactivate",
    }
    try:
        jax.distributed.initialize(
            **({} if mesh.coordinator == "auto" else known),
            heartbeat_timeout_seconds=SILENCE,
            shutdown_timeout_seconds=SILENCE,
        )
    except ValueError as error:
        raise ValueError(
            f'config.mesh.coordinator="auto" finds no launcher of several processes ({error}); '
            "give config.mesh.coordinator=HOST:PORT, processes and process"
        ) from None
    except Exception as error:  # JAX raises many kinds of errors
        raise RuntimeError(
            f"process {mesh.process} cannot reach the others of its run by "
            f"config.mesh.coordinator={mesh.coordinator!r}: {console.one_line(error)}"
        ) from error


def are_several() -> bool:
    """Whether this run has several processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process prints and writes the files of the run."""
    return not are_several() or jax.process_index() == 0


def wait(name: str) -> None:
    """Waits until all processes have come to this point, which `name` describes."""
    if are_several():
        multihost_utils.sync_global_devices(name)


def any_of(flag: object) -> bool:
    """Whether the flag is true in any of the processes. All of them ask at the same time."""
    if not are_several():
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.array(bool(flag))).any())


def of_first(number: int) -> int:
    """Returns the number that the first process gives. All of them ask at the same time."""
    if not are_several():
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def text_of_first(text: str) -> str:
    """Returns the text that the first process gives. All of them ask at the same time."""
    if not are_several():
        return text
    own = np.frombuffer(text.encode(), np.uint8)
    data = np.zeros(of_first(len(own)), np.uint8)
    data[: len(own)] = own[: len(data)]
    return bytes(multihost_utils.broadcast_one_to_all(data)).decode()


@contextlib.contextmanager
def end_with_others(*, exit_at_once: bool) -> Iterator[None]:
    """Says, where there are several processes, that an error of JAX means the loss of another one.

    Args:
        exit_at_once: whether the process then ends, with status 1. Otherwise it would still wait
            for the others in several places, where JAX ends it after `SILENCE` seconds.

    Raises:
        RuntimeError: another process has died or cannot be reached.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not are_several() or "RESOURCE_EXHAUSTED" in str(error):
            raise
        text = (
            f"process {jax.process_index()} of {jax.process_count()} stops, because another one "
            "has died or cannot be reached; the last checkpoint is kept; start all of them again. "
            f"JAX says: {console.one_line(error)}"
        )
        if exit_at_once:
            console.warn(text)
            os._exit(1)
        raise RuntimeError(text) from error
