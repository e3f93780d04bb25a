"""Reading ahead overlaps with work and keeps states exact. Workers end with their parent."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import grain
import jax
import numpy as np
import pytest

from race_jax.data.config import DataConfig
from race_jax.data.text import build_data
from race_jax.data.workers import read_ahead
from race_jax.train import trainer
from race_jax.train.loop import train
from tests.train.small import small_config

pytestmark = pytest.mark.once

LONG = 60  # the longest wait in seconds, which correct code never needs


def test_the_next_batch_is_placed_while_the_caller_holds_the_present_one():
    placed = [threading.Event() for _ in range(5)]

    def place(number):
        placed[number].set()
        return int(number)

    iterator = read_ahead(grain.MapDataset.range(5).to_iter_dataset(), place)
    for number in range(4):
        assert next(iterator) == number
        assert placed[number + 1].wait(LONG), "the next batch is read only when it is asked for"
        assert iterator.get_state() == {"next_index": number + 1}
    iterator.close()


def test_an_error_of_the_reader_reaches_the_caller():
    def place(number):
        if number == 2:
            raise OSError("the disk is gone")
        return int(number)

    iterator = read_ahead(grain.MapDataset.range(5).to_iter_dataset(), place)
    assert [next(iterator), next(iterator)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone"):
        next(iterator)
    iterator.close()


def test_the_trainer_reads_while_a_step_runs(tmp_path, monkeypatch):
    """Each step but the first waits until the next batch is on the device."""
    (tmp_path / "t.txt").write_text("the cat sees the dog\n" * 99)
    config = small_config()
    config.model.attention = "softmax"
    config.data.source, config.data.train_files = "files", (str(tmp_path / "t.txt"),)
    config.run.directory, config.run.steps, config.run.tensorboard = str(tmp_path / "r"), 4, False
    placed, steps, program, put = [], [], trainer.Trainer._program, trainer.put_batch
    more, watching = threading.Condition(), {}

    def put_batch(mesh, batch, *rest):
        with more:
            placed.append(batch)
            more.notify_all()
        return put(mesh, batch, *rest)

    def watched(self, batch):
        step = program(self, batch)
        if isinstance(batch["inputs"], jax.ShapeDtypeStruct):  # it is compiled, and not run
            return step

        def run(*arguments):
            steps.append(None)
            with more:
                overlaps = len(steps) == 1 or more.wait_for(lambda: len(placed) > len(steps), LONG)
                assert overlaps, "no overlap"
            return step(*arguments)

        return watching.setdefault(step, run)  # the same program is the same object

    monkeypatch.setattr(trainer, "put_batch", put_batch)
    monkeypatch.setattr(trainer.Trainer, "_program", watched)
    assert train(config).step == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("grain-thread-prefetch")]


@pytest.mark.parametrize("packing", ["contiguous", "packed"])
def test_another_number_of_workers_continues_with_the_next_batch(tmp_path, rng, packing):
    (tmp_path / "t.txt").write_bytes(bytes(rng.integers(97, 123, size=700, dtype=np.uint8)))

    def iterator(num_workers, state=None):
        config = DataConfig(
            source="files",
            root=str(tmp_path),
            train_files=("t.txt",),
            sequence_length=8,
            packing=packing,
            num_workers=num_workers,
        )
        batches = read_ahead(build_data(config, batch_size=3, seed=0).train)
        if state is not None:
            batches.set_state(state)
        return batches

    if packing == "packed":
        with pytest.raises(ValueError, match=r"config\.data\.num_workers must be 0 with packing="):
            iterator(1)
        return
    undisturbed = iterator(0)
    state = None
    for num_workers in (2, 0, 1):
        part = iterator(num_workers, state)
        for _ in range(5):
            np.testing.assert_array_equal(next(part)["inputs"], next(undisturbed)["inputs"])
        state = json.loads(json.dumps(part.get_state()))
        part.close()
    assert state == undisturbed.get_state()


SCRIPT = """
    import multiprocessing, os, signal, sys, threading, time
    from race_jax.data.config import DataConfig
    from race_jax.data.text import build_data
    from race_jax.data.workers import read_ahead

    if __name__ == "__main__":
        signal.signal(signal.SIGINT, lambda *_: None)
        config = DataConfig(source="files", train_files=(sys.argv[1],), sequence_length=8)
        config.num_workers = 2
        # Ctrl-C goes to the whole group, first while the workers start.
        threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()
        batches = read_ahead(build_data(config, batch_size=2, seed=0).train)
        next(batches)
        os.killpg(0, signal.SIGINT)
        for _ in range(8):
            next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
def test_workers_leave_interrupts_to_the_parent_and_end_with_it(tmp_path):
    (tmp_path / "t.txt").write_text("the cat sees the dog\n" * 99)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "t.txt")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2, parent.communicate()[1]
        os.kill(parent.pid, signal.SIGKILL)
        end = time.monotonic() + LONG
        while any(map(is_alive, workers)) and time.monotonic() < end:
            time.sleep(0.05)
        assert not any(map(is_alive, workers))
        assert "Traceback" not in parent.communicate()[1]
    finally:
        if parent.poll() is None:
            os.killpg(parent.pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Returns whether a process runs. It is False for one that has ended but was not collected."""
    done = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() not in ("", "Z")
