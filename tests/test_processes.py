"""A run of two processes with four CPU devices each: its steps, one's death, and a restart."""

import argparse
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import launch_local
from race_jax.data.token_file import write_token_file
from race_jax.data.tokenizer import ByteTokenizer
from race_jax.train.config import Config
from race_jax.train.loop import train
from tests import quick
from tests.test_commands import shell_commands
from tests.train.small import small_config

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAVED = 6  # the first step with a checkpoint
CONFIG = """
from tests import test_processes
def get_config():
    return test_processes.configuration("tokens", "npy")
"""


def configuration(source: str, ending: str) -> Config:
    config = small_config()
    config.model.race.short_conv, config.model.race.forget_gate = "before", "data"
    config.data.source, config.data.train_files = source, (f"train.{ending}",)
    config.data.valid_files = (f"valid.{ending}",)
    config.data.sequence_length = 23  # which two devices do not divide
    config.optimizer.segment_length, config.optimizer.schedule = 12, "constant"
    config.run.checkpoint_every, config.run.log_every, config.run.tensorboard = SAVED, 1, False
    config.run.eval_every = SAVED
    return config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The text, in files of text and of tokens, and the programs that are compiled."""
    text = np.random.default_rng(0).choice(list(b"abcdefgh \n"), 2000).astype(np.uint8)
    for name, ids in {"train": text[:1900], "valid": text[1900:]}.items():
        (tmp_path / f"{name}.txt").write_bytes(ids.tobytes())
        write_token_file(tmp_path / f"{name}.npy", [ids], ByteTokenizer())
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.setenv("XLA_FLAGS", quick.FLAGS)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def launch(folder, steps, *words) -> subprocess.Popen:
    """Starts the command of docs/sharding.md with the configuration of this file.

    The mesh is data x seq x fsdp = 2 x 2 x 2, unless words change it. Each process has half of the
    sequences, and parameters of its own.
    """
    page = (ROOT / "docs" / "sharding.md").read_text("utf-8")
    (command,) = (line for line in shell_commands(page) if "launch_local.py" in line)
    assert command.startswith(".venv/bin/python scripts/launch_local.py --processes 2 --devices 4")
    assert command.endswith("--config.mesh.data=2 --config.mesh.seq=2 --config.mesh.fsdp=2")
    command = command.replace("configs/lm_default.py", str(folder / "config.py"))
    command = [sys.executable, *shlex.split(command)[1:], f"--config.data.root={folder}"]
    command += [f"--config.run.directory={folder / 'two'}", f"--config.run.steps={steps}", *words]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)


def records(folder, run="two", kind="train") -> dict[int, dict[str, float]]:
    """The metrics of each step that are written so far."""
    path = folder / run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {r["step"]: r for r in found if r["kind"] == kind}


@pytest.mark.once
def test_two_processes_are_one_run(folder, assert_close):
    running = launch(folder, 10**6)
    end = time.monotonic() + 300
    while running.poll() is None and len(records(folder)) < SAVED + 2 and time.monotonic() < end:
        time.sleep(0.05)
    log = (folder / "log.txt").read_text()
    pids = re.search(r"processes (\d+) (\d+)$", log, re.MULTILINE)
    assert running.poll() is None, log
    os.kill(int(pids[2]), signal.SIGKILL)
    assert running.wait(60) == 128 + signal.SIGKILL
    log = (folder / "log.txt").read_text()
    assert "process 1 was ended by SIGKILL; the others have 10 seconds to end" in log
    assert "devices    8 x cpu" in log
    assert log.count("step       1/") == 1  # one process prints

    shutil.copytree(folder / "two", folder / "resumed")
    before, evaluated = records(folder), records(folder, kind="eval")
    last = max(before) + 1
    assert launch(folder, last).wait(300) == 0, (folder / "log.txt").read_text()
    log = (folder / "log.txt").read_text()
    resumed = int(re.search(r"resuming +after step (\d+)", log)[1])
    after = records(folder)
    assert SAVED <= resumed < max(before)
    assert len(after) == last
    assert {step: after[step] for step in before} == before
    assert "held out" in log
    # On this mesh the stretches of a sequence lie in different processes.
    done = launch(folder, last + 2, "--config.mesh.data=1", "--config.mesh.seq=4").wait(300)
    assert done == 0, (folder / "log.txt").read_text()
    two = records(folder)
    assert len(two) == last + 2

    def here(run, steps, *data):
        """Trains in this process, on one device."""
        config = configuration(*data)
        config.data.root, config.run.directory = str(folder), str(folder / run)
        config.run.steps = steps
        train(config)

    here("resumed", last + 2, "tokens", "npy")  # goes on from a checkpoint of two processes
    here("one", SAVED, "files", "txt")
    again = records(folder, "resumed")
    one = records(folder, "one") | {step: again[step] for step in range(resumed + 1, last + 3)}
    assert len(one) == SAVED + last + 2 - resumed
    for name in ("loss", "grad_norm"):
        got, want = (np.array([x[step][name] for step in one]) for x in (two, one))
        assert_close(name, got, want, kind="gradients")
    (got,), (want,) = (records(folder, run, "final").values() for run in ("two", "resumed"))
    assert_close("held out", got["loss"], want["loss"], kind="gradients")
    got, want = evaluated[SAVED], records(folder, "one", "eval")[SAVED]
    assert_close("held out", got["loss"], want["loss"], kind="gradients")


def start_alone(folder, index, port, *words) -> subprocess.Popen:
    """Starts one of two processes, with words of its own."""
    mesh = {"coordinator": f"127.0.0.1:{port}", "processes": 2, "process": index, "data": 2}
    command = [sys.executable, "scripts/train_lm.py", "--config", str(folder / "config.py")]
    command += [f"--config.mesh.{name}={value}" for name, value in mesh.items()]
    command += [f"--config.data.root={folder}", f"--config.run.directory={folder / 'run'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen([*command, *words], cwd=ROOT, env=environment, **pipes)


@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "own", "said", "by_the_first"),
    [
        (
            "values and files",
            ("--config.optimizer.learning_rate=0.5", "--config.data.root={other}"),
            r"process 1 differs from the first one: config\.optimizer\.learning_rate is 0\.001 "
            r"there and 0\.5 here; the training text has the sha256 \w+ there and \w+ here",
            "another process of this run has other values or files",
        ),
        (
            "the folder",
            ("--config.run.directory={other}",),
            r"process 1 does not find what the first one has written to config\.run\.directory",
            "another process does not share config.run.directory",
        ),
    ],
)
def test_processes_must_agree_before_they_train(folder, what, own, said, by_the_first):
    other = folder / "other"
    other.mkdir()
    text = np.frombuffer(b"another text, but as long as is needed " * 50, np.uint8)
    for name, ids in {"train": text[:1900], "valid": text[-100:]}.items():
        write_token_file(other / f"{name}.npy", [ids], ByteTokenizer())
    port = launch_local.free_port()
    words = [word.format(other=other) for word in own]
    running = [start_alone(folder, 0, port), start_alone(folder, 1, port, *words)]
    outputs = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [2, 2], outputs
    assert re.search(said, outputs[1]), outputs[1]
    assert by_the_first in outputs[0], outputs[0]
    assert not list(folder.glob("run/.seen-*"))


def test_each_process_gets_a_gpu_of_its_own(monkeypatch, capsys):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    gpus = launch_local.gpus_of(2)
    assert gpus == ["4", "6"]
    options = argparse.Namespace(gpus=gpus, devices=1)
    assert launch_local.devices_of(1, options) == {"CUDA_VISIBLE_DEVICES": "6"}
    with pytest.raises(SystemExit):
        launch_local.main(["--processes", "3", "--gpus", "--", "train.py"])
    said = capsys.readouterr().err
    assert "a GPU for each of 3 processes, and found 2: ['4', '6']; lower --processes" in said


def test_what_does_not_fit_is_refused():
    for fields, words in (
        ({"coordinator": "here"}, r'must be HOST:PORT or "auto", got \'here\''),
        ({"coordinator": "here:1"}, r"needs config\.mesh\.processes .* got None and None"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, r"got 2 and 2"),
        ({"processes": 2}, r"need config\.mesh\.coordinator=HOST:PORT, got None"),
    ):
        config = small_config()
        for name, value in fields.items():
            setattr(config.mesh, name, value)
        with pytest.raises(ValueError, match=words):
            config.validate()
