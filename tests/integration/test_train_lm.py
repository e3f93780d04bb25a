"""`scripts/train_lm.py` as a user runs it: to its end, interrupted, killed and continued.

One run is not disturbed. Another with the same command is asked to stop, continues, is killed
without warning, and continues again. It must end with the same numbers to the last bit.
"""

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from race_jax.train.checkpoint import checkpoint_folder
from race_jax.train.flags import parse_config
from race_jax.train.loop import train
from race_jax.train.metrics import read_records

pytestmark = pytest.mark.once

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, EVERY = 480, 60
CONFIG = f"""
from race_jax.train.config import Config

def get_config():
    config = Config()
    config.model.num_layers, config.model.width, config.model.num_heads = 1, 32, 2
    config.model.race.num_tables, config.model.race.num_planes = 2, 2
    config.data.source, config.data.train_files = "files", ("text.txt",)
    config.data.sequence_length = 32
    config.mesh.data = 2
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 10
    config.run.steps, config.run.batch_size, config.run.log_every = {STEPS}, 8, 5
    config.run.checkpoint_every, config.run.keep_checkpoints = {EVERY}, 10
    config.run.eval_every, config.run.tensorboard = 100, False
    return config
"""

# Undoes that `nohup` has set SIGHUP to be ignored, and becomes the command. (tests/conftest.py does
# the same for SIGINT.) A function for Popen's preexec_fn would fork, which JAX warns about.
HEAR_HANGUP = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with a configuration, and a text of sentences from a small grammar."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    words = [rng.choice(part, 2000) for part in (
        ["the cat ", "a dog ", "my bird "], ["sees ", "likes ", "eats "], ["fish\n", "bread\n"]
    )]  # fmt: skip
    (folder / "text.txt").write_text("".join(map("".join, zip(*words, strict=True))))
    (folder / "small.py").write_text(CONFIG)
    return folder


def command(folder: pathlib.Path, run: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "scripts" / "train_lm.py"),
        "--config=small.py",
        f"--config.data.root={folder}",
        f"--config.run.directory={run}",
    ]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """The variables of a process, which reads what the ones before it have compiled."""
    return os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }


def start(folder: pathlib.Path, run: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HEAR_HANGUP, *command(folder, run), *words],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == status, out
    return out


def wait_for_step(process: subprocess.Popen, directory: pathlib.Path, step: int) -> None:
    """Returns once the run has logged `step` or a later one."""
    for _ in range(24_000):
        steps = [r["step"] for r in records(directory) if r["kind"] == "train"]
        if steps and steps[-1] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    raise AssertionError(f"no step {step} in four minutes")


def records(directory: pathlib.Path) -> list[dict]:
    path = directory / "metrics.jsonl"
    return read_records(path) if path.exists() else []


def results(directory: pathlib.Path) -> list[dict]:
    """Returns everything that was measured, except times."""
    return [record for record in records(directory) if record["kind"] != "speed"]


def losses(directory: pathlib.Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in records(directory) if r["kind"] == "train"}


@pytest.fixture(scope="module")
def undisturbed(folder):
    """The output and the files of a run that is not disturbed."""
    out = finish(start(folder, "undisturbed"))
    return out, folder / "undisturbed"


def test_the_main_job_reaches_a_loss(undisturbed):
    out, directory = undisturbed
    final = records(directory)[-1]
    assert final["kind"] == "final"
    # The grammar has 18 sentences, of 4.17 bits, and of 18.3 letters on average: 0.23 bits a byte.
    assert final["bits_per_byte"] < 0.6
    assert f"held out   {final['bits_per_byte']:.3f} bits per byte" in out
    assert "2 x cpu" in out
    assert list(losses(directory)) == list(range(1, STEPS + 1))
    assert (directory / "loss.png").stat().st_size > 10_000


def test_stopped_and_killed_it_goes_on_to_the_bit(folder, undisturbed):
    directory = folder / "disturbed"
    process = start(folder, "disturbed")
    wait_for_step(process, directory, EVERY // 2)
    process.send_signal(signal.SIGTERM)
    out = finish(process, status=75)
    assert "SIGTERM: stopping after this step, saving" in out
    assert "(SIGTERM); checkpoint saved; the same command goes on from here" in out

    process = start(folder, "disturbed")
    wait_for_step(process, directory, 2 * EVERY + 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL

    newest = max(checkpoint_folder(directory).glob("[0-9]*"), key=lambda path: int(path.name))
    (newest / "digests.json").unlink()
    out = finish(start(folder, "disturbed"))
    assert f"the checkpoint of step {newest.name} is damaged" in out
    assert results(directory) == results(undisturbed[1])


def test_a_checkpoint_of_two_devices_goes_on_on_one(
    folder, undisturbed, monkeypatch, capsys, assert_close
):
    directory = folder / "moved"
    shutil.copytree(undisturbed[1], directory)
    last = checkpoint_folder(directory) / str(STEPS)
    shutil.rmtree(last)
    monkeypatch.chdir(folder)
    config = parse_config([*command(folder, "moved")[2:], "--config.mesh.data=1"])
    assert train(config).step == STEPS
    assert "1 x cpu" in capsys.readouterr().out
    two, one = (list(losses(run).values())[-EVERY:] for run in (undisturbed[1], directory))
    assert_close("losses", one, two, kind="streamed")


def test_the_reader_leaves_and_the_terminal_closes(folder):
    """No line can be printed, from the first one on. SIGHUP still saves a checkpoint."""
    process = start(folder, "unread")
    process.stdout.close()
    try:
        wait_for_step(process, folder / "unread", 1)
        process.send_signal(signal.SIGHUP)
        assert process.wait(timeout=240) == 75
    finally:
        process.kill()
    assert list(checkpoint_folder(folder / "unread").glob("[0-9]*/digests.json"))


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--config.run.step=5"], 2, "did you mean steps?"),
        (["--config.run.directory=small.py/run"], 2, "cannot be written"),
        (["--config.run.directory=taken"], 1, "Is a directory"),
    ],
)
def test_what_cannot_start_says_so_in_one_sentence(folder, words, status, said):
    (folder / "taken" / "config.json").mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [*command(folder, "unused"), *words],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_extra_is_a_sentence(folder):
    """The package grain is missing, as after `pip install race-jax` without an extra."""
    program = (
        "import runpy, sys, importlib.util as util\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'grain' else find(name, *rest)\n"
        "sys.argv = sys.argv[1:]\n"
        "sys.path[0] = sys.argv[0].rpartition('/')[0]  # as if it were run directly\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command(folder, "unused")[1:]],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("train_lm: race_jax.train needs grain, which")
    assert "pip install 'race-jax[train]'" in done.stderr
    assert done.stderr.count("\n") == 1
