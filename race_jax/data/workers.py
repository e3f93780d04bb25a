"""Iterators that read batches in other processes, or ahead of their use.

The state of every iterator here counts the batches that were handed out, not those that were read
ahead. It is the same for any number of worker processes.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import grain
from absl import flags

Batch = dict[str, Any]

# Arrays go through a pipe. A process that is killed would leave its shared memory behind.
_NO_SHARED_MEMORY = grain.experimental.DatasetOptions(min_shm_size=1 << 62)


def read_ahead(
    batches: grain.IterDataset[Batch], place: Callable[[Batch], Any] | None = None
) -> grain.DatasetIterator[Any]:
    """Returns an iterator that reads the next batch while the caller works on the present one.

    Args:
        batches: a dataset of batches.
        place: a function that the reading thread calls with each batch before the batch is asked
            for. For example, it puts the batch on a device.

    Returns:
        An iterator over `place(batch)`. Its `get_state` counts the batches that were handed out.
        Close it when it is no longer used.

    Example:
        >>> import numpy as np
        >>> batches = grain.MapDataset.range(3).to_iter_dataset()
        >>> list(read_ahead(batches, place=lambda number: 10 * int(number)))
        [0, 10, 20]
    """
    placed = batches if place is None else batches.map(place)
    return iter(grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=1))


class WorkerDataset(grain.IterDataset[Batch]):
    """The elements of a map dataset in their order, read by worker processes.

    Args:
        batches: the dataset, which is copied to each worker.
        num_workers: the number of processes, at least one.
    """

    def __init__(self, batches: grain.MapDataset[Batch], num_workers: int):
        super().__init__()
        self._batches, self._num_workers = batches, num_workers

    def __iter__(self) -> "WorkerIterator":
        return WorkerIterator(self._batches, self._num_workers)


class WorkerIterator(grain.DatasetIterator[Batch]):
    """Iterates over a `WorkerDataset`. Its state is that of an iterator without workers.

    Grain's own state has the position of each worker. Here the workers start again at the batch
    that a state names, so that a run may continue with another number of them.
    """

    def __init__(self, batches: grain.MapDataset[Batch], num_workers: int):
        super().__init__()
        self._batches, self._num_workers = batches, num_workers
        self._next_index = 0
        self._inner: grain.DatasetIterator[Batch] | None = None

    def __next__(self) -> Batch:
        if self._inner is None:
            with _interrupts_blocked():  # the workers inherit this while they start
                self._inner = self._start()
                batch = next(self._inner)
        else:
            batch = next(self._inner)
        self._next_index += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Returns the index of the next batch."""
        return {"next_index": self._next_index}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues with the batch that `state` names."""
        next_index = state["next_index"]
        self._end()
        self._next_index = next_index

    def close(self) -> None:
        """Ends the workers."""
        super().close()
        self._end()

    def _start(self) -> grain.DatasetIterator[Batch]:
        if not flags.FLAGS.is_parsed():  # the workers read absl's flags, which need a command line
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=self._num_workers)
        remaining = grain.experimental.WithOptionsIterDataset(
            self._batches[self._next_index :].to_iter_dataset(), _NO_SHARED_MEMORY
        )
        return iter(remaining.mp_prefetch(options, worker_init_fn=_depend_on_parent))

    def _end(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Blocks Ctrl-C in this thread and in the threads and processes that it starts meanwhile."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock the signal again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _depend_on_parent(index: int, count: int) -> None:
    """Leaves Ctrl-C to the parent of this worker process, and ends the worker with its parent."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="wait-for-parent").start()
