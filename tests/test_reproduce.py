"""`scripts/reproduce.py`: plans, processes, resuming, failures, and the numbers of its tables.

Most tests let a small script stand for the training script. It writes the files that a run writes,
a step every hundredth of a second. One test trains real models.
"""

import collections
import dataclasses
import doctest
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

import experiments
import reproduce
from experiments.table import Data, Method, Metric, Table
from gpus import visible_gpus
from race_jax.train.files import run_directory, try_lock
from race_jax.train.metrics import read_records
from reproduction import figure, plan, results, work

ROOT = pathlib.Path(__file__).resolve().parents[1]
LOSS = (Metric("valid.loss", "loss", digits=3),)
TABLE = Table(
    "trial",
    "A trial",
    data=(Data("copy", "copying", "configs/lm_default.py", LOSS),),
    methods=(
        Method("good", "good", {"model.attention": "softmax"}),
        Method("bad", "bad", {"model.attention": "linear"}),
    ),
    budgets={"small": {"run.steps": 200, "optimizer.warmup_steps": 1}},
)
# It has the interface of scripts/train_lm.py, as far as `work` uses it.
TRAIN = """
import json, pathlib, signal, sys, time
words = dict(word.removeprefix("--").split("=") for word in sys.argv[3:])
steps, seed = int(words["config.run.steps"]), int(words["config.run.seed"])
folder = pathlib.Path(words["config.run.directory"])
saved = folder / "checkpoints" / "step"
saved.parent.mkdir(exist_ok=True)
step = int(saved.read_text()) if saved.exists() else 0
stops = []
signal.signal(signal.SIGTERM, lambda *_: stops.append(1))
print("from step", step, flush=True)
if words["config.model.attention"] == "linear":
    print("train_lm: the loss is not finite\\nat step 3", flush=True)
    sys.exit(1)
while step < steps and (not stops or (folder / "stubborn").exists()) and len(stops) < 2:
    step += 1
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
    time.sleep(0.01)
if len(stops) == 2:
    sys.exit(128 + signal.SIGTERM)
saved.write_text(str(step))
if step < steps:
    sys.exit(75)
(folder / "summary.json").write_text(json.dumps({
    "steps": steps, "scores": {"valid": {"loss": 1.0 + seed}}, "parameters": 1234,
    "speed": {"units": "examples", "per_second": 500.0, "steps_per_second": 2.0},
    "peak_bytes": 5_000_000,
    "device": "none", "platform": "cpu", "devices": 1, "jax": "0", "digests": {}}))
"""


class Told:
    """A display that keeps what it is told, and can ask for a stop."""

    def __init__(self, stop_after=None):
        self.lines, self.left, self.stop_after = [], [], stop_after

    def started(self, run):
        self.lines.append(("started", run.method.name, run.seed))

    def ended(self, run, outcome):
        self.lines.append((outcome["status"], run.method.name, run.seed))

    def waits(self, run):
        self.lines.append(("waits", run.method.name, run.seed))

    def found(self, run):
        self.lines.append(("found", run.method.name, run.seed))

    def progress(self, left):
        self.left.append(left)
        if self.stop_after and left < self.left[0] * self.stop_after:
            self.stop_after = None
            signal.raise_signal(signal.SIGINT)

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(seeds, methods, jobs, display)`, by the script that stands for the real one."""
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(work, "SCRIPT", str(tmp_path / "train.py"))

    def run(seeds=(0,), methods=("good",), jobs=1, display=None, keep=False):
        runs = plan.make_runs(TABLE, "small", seeds, methods, ["copy"], tmp_path)
        display = display or Told()
        slots = work.environments(jobs, [], None, dict(os.environ))
        return runs, display, work.work(runs, slots, display, keep=keep)

    return run


@pytest.mark.parametrize("module", [plan, work, results, figure, experiments.table])
def test_the_examples_of_the_docstrings_run(module):
    assert doctest.testmod(module).failed == 0


def test_every_table_is_made_of_valid_runs_with_different_folders(tmp_path):
    for name in experiments.NAMES:
        table = experiments.find(name)
        names = [[part.name for part in parts] for parts in (table.methods, table.data)]
        assert table.name == name
        for parts in names:
            assert len(parts) == len(set(parts))
            assert set(parts) & set(table.tiny), "the budget tiny needs methods and data"
        assert set(table.tiny) <= {*names[0], *names[1]}
        for budget in experiments.table.BUDGETS:
            runs = plan.make_runs(table, budget, [0], *names, tmp_path)
            assert len({run.directory for run in runs}) == len(names[0]) * len(names[1])
            own = {method.name: method.settings for method in table.methods}
            for run in runs:
                for field, value in own[run.method.name].items():
                    assert f"--config.{field}={plan.as_word(value)}" in run.words


def test_every_table_has_the_papers_form_as_a_row_of_its_own():
    paper = {
        *(("planes_scale", 1.0), ("sharpness", 1.0), ("shared_sharpness", True)),
        ("forget_gate", None),
    }
    for name in experiments.NAMES:
        rows = {method.name: method.settings for method in experiments.find(name).methods}
        own = {k.removeprefix("model.race."): v for k, v in rows["race_paper"].items()}
        assert paper <= set(own.items()), name


def test_a_row_made_from_another_differs_by_its_change():
    for name in experiments.NAMES:
        rows = {method.name: method for method in experiments.find(name).methods}
        for method in rows.values():
            if method.parent in rows:
                assert method.settings == {**rows[method.parent].settings, **method.change}


def test_the_digest_follows_what_is_learned():
    def digests(**budget):
        table = Table("t", "t", TABLE.data, TABLE.methods[:1], {"small": budget})
        (run,) = plan.make_runs(table, "small", [0], ["good"], ["copy"], pathlib.Path("out"))
        return run.directory.name

    plain = digests()
    assert digests(**{"run.log_every": 7}) == plain
    assert digests(**{"data.root": "elsewhere"}) == plain
    assert digests(**{"optimizer.learning_rate": 1e-4}) != plain


def test_a_setting_that_does_not_exist_is_named_before_anything_runs(tmp_path):
    table = Table("t", "t", TABLE.data, (Method("m", "m", {"model.widht": 3}),))
    with pytest.raises(ValueError, match=r"copy, m: config\.model\.widht.*did you mean width"):
        plan.make_runs(table, "small", [0], ["m"], ["copy"], tmp_path)


def test_finished_runs_are_kept_and_failed_ones_are_shown_and_tried_again(train):
    runs, told, ended = train(seeds=(0, 1), methods=("good", "bad"), jobs=3)
    assert ended
    counts = {word: sum(line[0] == word for line in told.lines) for word in ("finished", "failed")}
    assert counts == {"finished": 2, "failed": 2}
    assert told.left[0] > told.left[-1] == 0
    good = runs[0]
    assert not (good.directory / "checkpoints").exists()
    content = results.collect(TABLE, "small", runs)
    failed = [record for record in content["runs"] if record["status"] == "failed"]
    assert [record["seed"] for record in failed] == [0, 1]
    text = results.markdown(TABLE, content)
    assert "| bad | failed |" in text
    assert f"the loss is not finite (log: {failed[0]['log']})" in text
    assert "train_lm: the loss" in pathlib.Path(failed[0]["log"]).read_text()

    _, told, _ = train(seeds=(0, 1), methods=("good", "bad"))
    assert [line[:2] for line in told.lines] == [("started", "bad"), ("failed", "bad")] * 2


@pytest.mark.parametrize("keep", [True, False])
def test_checkpoints_of_finished_runs_are_kept_on_demand(train, keep):
    (run,), _, _ = train(keep=keep)
    assert (run.directory / "checkpoints").exists() == keep


def test_a_stop_saves_the_runs_and_a_second_call_goes_on(train):
    runs, told, ended = train(seeds=(0, 1, 2), jobs=2, display=Told(stop_after=0.9))
    assert not ended
    assert {line[0] for line in told.lines if line[0] != "started"} - {"stopped"} == {"s"}
    assert sum(line[0] == "started" for line in told.lines) == 2  # the third one was not begun
    assert work.outcome_of(runs[2])["status"] == "missing"
    steps = [int((run.directory / "checkpoints" / "step").read_text()) for run in runs[:2]]
    assert all(0 < step < 200 for step in steps)
    text = results.markdown(TABLE, results.collect(TABLE, "small", runs))
    assert "0 of 3" in text

    runs, told, ended = train(seeds=(0, 1, 2), jobs=2)
    assert ended
    assert [work.outcome_of(run)["status"] for run in runs] == ["finished"] * 3
    for run, step in zip(runs, steps, strict=False):
        assert run.log.read_text().split("from step ")[1:][-1].startswith(f"{step}\n")


def test_a_second_request_stops_at_once(train, tmp_path):
    class Impatient(Told):
        def progress(self, left):
            super().progress(left)
            asked = sum("stopping" in line for line in self.lines)
            if asked == 1 and not getattr(self, "again", False):
                self.again = True
                signal.raise_signal(signal.SIGINT)

    (run,) = plan.make_runs(TABLE, "small", (0,), ["good"], ["copy"], tmp_path)
    run.directory.mkdir(parents=True)
    (run.directory / "stubborn").touch()  # the first request does not stop it
    _, told, ended = train(display=Impatient(stop_after=0.95))
    assert not ended
    assert told.lines[-1][0] == "stopped"
    assert work.outcome_of(run)["exit_status"] == 128 + signal.SIGTERM


def test_a_run_that_another_process_trains_is_waited_for(train, tmp_path):
    (run,) = plan.make_runs(TABLE, "small", (0,), ["good"], ["copy"], tmp_path)
    release = threading.Event()

    def hold():
        with run_directory(run.directory):
            release.wait(10)

    class Patient(Told):
        def waits(self, run):
            super().waits(run)
            release.set()

    holder = threading.Thread(target=hold)
    holder.start()
    while not (run.directory / ".lock").exists():
        time.sleep(0.01)
    time.sleep(0.05)
    _, told, ended = train(display=Patient())
    holder.join()
    assert ended
    assert told.lines[0][0] == "waits"
    assert told.lines[-1][0] == "finished"


def test_runs_are_counted_as_finished_whoever_trained_them(train, tmp_path, capsys):
    options = reproduce.parse(["listops", "--out", str(tmp_path)])
    runs = plan.make_runs(TABLE, "small", (0, 1), ["good"], ["copy"], tmp_path)
    runs[0].directory.mkdir(parents=True)
    lock = try_lock(runs[0].directory / ".command")

    class Shared(reproduce.Progress):
        """Another command finishes the first run as soon as this one has trained the second."""

        def ended(self, run, outcome):
            super().ended(run, outcome)
            shutil.copy(run.directory / "summary.json", runs[0].directory)
            lock.close()

    train(seeds=(0, 1), display=Shared(TABLE, options, runs))
    lines = capsys.readouterr().out.splitlines()
    ends = [line.split("; ")[-1] for line in lines if line.startswith("finished ")]
    assert ends == ["1 of 2 are finished", "2 of 2 are finished"]
    assert ", by another process; " in lines[-1]


def test_a_run_that_another_command_has_just_started_is_waited_for(train, tmp_path):
    (run,) = plan.make_runs(TABLE, "small", (0,), ["good"], ["copy"], tmp_path)

    class Second(Told):
        """At the first sight of the started process, a second command looks for work."""

        def progress(self, left):
            super().progress(left)
            if len(self.left) == 1:
                assert work._start_next(collections.deque([run]), dict(os.environ), self) is None

    _, told, ended = train(display=Second())
    assert ended
    assert [line[0] for line in told.lines] == ["started", "waits", "finished"]
    assert work.outcome_of(run)["starts"] == 1
    with try_lock(run.directory / ".command"):
        pass


def test_a_process_that_outlives_its_command_keeps_the_lock(tmp_path, monkeypatch):
    (run,) = plan.make_runs(TABLE, "small", (0,), ["good"], ["copy"], tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(work, "SCRIPT", str(tmp_path / "train.py"))
    run.directory.mkdir(parents=True)
    path = run.directory / ".command"
    started = work._start(run, dict(os.environ), try_lock(path))
    started.lock.close()  # as at the end of a process that is killed
    assert try_lock(path) is None
    started.process.kill()
    started.process.wait()
    with try_lock(path):
        pass


def test_a_killed_run_is_a_failure_with_its_signal(train):
    own = pathlib.Path(f"/proc/self/task/{os.getpid()}/children")
    if not own.exists():
        pytest.skip("needs /proc to find the process")

    class Killer(Told):
        def progress(self, left):
            super().progress(left)
            for child in own.read_text().split():
                if b"train.py" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), signal.SIGKILL)

    (run,), told, _ = train(display=Killer())
    assert told.lines[-1][0] == "failed"
    assert work.outcome_of(run)["error"] == "its process was ended by SIGKILL"


def test_the_markdown_has_means_and_deviations_of_the_runs(train, tmp_path):
    runs, _, _ = train(seeds=(0, 1, 3), methods=("good", "bad"), jobs=4)
    content = results.collect(TABLE, "small", runs)
    mean = (1.0 + 2.0 + 4.0) / 3
    deviation = math.sqrt(((1 - mean) ** 2 + (2 - mean) ** 2 + (4 - mean) ** 2) / 2)
    path = tmp_path / "trial.json"
    results.write(TABLE, content, path)
    row = next(line for line in path.with_suffix(".md").read_text().splitlines() if "good" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("good", f"{mean:.3f} ± {deviation:.3f}", f"{2 * 16 * 256:,}", "1,234", "5 MB", "3 of 3"),
    ]
    stored = json.loads(path.read_text())
    assert [r["scores"]["valid"]["loss"] for r in stored["runs"] if r["scores"]] == [1.0, 2.0, 4.0]
    keys = "command config seed speed parameters peak_bytes device jax date commit log".split()
    assert all(key in stored["runs"][0] for key in keys)
    assert figure.draw(TABLE, stored, tmp_path / "trial.svg")
    drawn = (tmp_path / "trial.svg").read_text()
    assert "copying" in drawn
    assert "good" in drawn


def test_the_speed_is_in_examples_if_batches_have_several_lengths(train, monkeypatch):
    (run,), _, _ = train()
    config = run.config.task_config()
    monkeypatch.setattr(config, "num_buckets", 3, raising=False)
    text = results.markdown(TABLE, results.collect(TABLE, "small", [run]))
    assert "examples/s" in text
    assert "| 500 |" in text


def test_the_speed_may_be_what_a_table_compares(train):
    runs, _, _ = train(seeds=(0,), methods=("good",))
    data = dataclasses.replace(TABLE.data[0], metrics=experiments.find("speed").data[0].metrics)
    table = dataclasses.replace(TABLE, data=(data,))
    lines = results.markdown(table, results.collect(table, "small", runs)).splitlines()
    heads = next(line for line in lines if line.startswith("| attention"))
    assert heads == "| attention | thousand tokens/s | parameters | peak memory | seeds |"
    row = next(line for line in lines if "good" in line)
    assert row.startswith(f"| good | {2 * 16 * 256 / 1e3:.1f} | 1,234 |")


def test_the_best_mean_is_bold():
    def record(method, loss):
        return {
            **{"data": "copy", "method": method, "seed": 0, "status": "finished"},
            **{"scores": {"valid": {"loss": loss}}, "speed": None, "parameters": 1},
            **{"peak_bytes": 1, "tokens_per_second": None},
        }

    content = {"budget": "small", "runs": [record("good", 2.0), record("bad", 3.0)]}
    assert "| good | **2.000** |" in results.markdown(TABLE, content)
    assert "| bad | 3.000 |" in results.markdown(TABLE, content)


def test_several_runs_share_the_cards_and_their_memory():
    given = {"PATH": "p", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    slots = work.environments(4, ["0", "5"], pathlib.Path("data"), given)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "5", "0", "5"]
    assert {slot["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in slots} == {"0.45"}
    assert {slot["XLA_PYTHON_CLIENT_PREALLOCATE"] for slot in slots} == {"false"}
    assert {slot["RACE_JAX_DATA"] for slot in slots} == {"data"}
    (alone,) = work.environments(1, [], None, given)
    assert "CUDA_VISIBLE_DEVICES" not in alone
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "2, 3"}) == ["2", "3"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert visible_gpus({"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "2"}) == []


def test_a_table_inside_the_project_names_no_folder_of_this_machine():
    (run,) = plan.make_runs(TABLE, "small", [0], ["good"], ["copy"], ROOT / "runs" / "t")
    text = json.dumps(results.collect(TABLE, "small", [run]))
    assert "runs/t/runs/copy-good-seed0-" in text
    assert str(ROOT) not in text


@pytest.mark.once
@pytest.mark.first
def test_a_tiny_table_is_trained_stopped_continued_and_kept(tmp_path):
    out = tmp_path / "out"
    command = [
        *(sys.executable, "scripts/reproduce.py", "causal_lm", "--budget", "tiny"),
        *("--methods", "softmax_rope,race_paper", "--jobs", "2", "--out", str(out)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
        )

    with start() as process:
        for line in process.stdout:
            if line.startswith("start "):
                time.sleep(0.5)
                process.send_signal(signal.SIGINT)
                break
        printed = line + process.communicate(timeout=300)[0]
    assert process.returncode == 75, printed
    assert "the same command goes on" in printed

    with start() as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    content = json.loads((out / "causal_lm.json").read_text())
    assert {run["status"] for run in content["runs"]} == {"finished"}
    for run in content["runs"]:
        metrics = read_records(pathlib.Path(run["log"]).with_name("metrics.jsonl"))
        scored = {record["kind"]: record for record in metrics if record["kind"] != "train"}
        for kind, split in (("final", "valid"), ("test", "test")):
            assert run["scores"][split]["perplexity"] == scored[kind]["perplexity"]
        assert run["speed"]["per_second"] == scored["speed"]["tokens_per_second"]
        assert run["tokens_per_second"] == pytest.approx(run["speed"]["per_second"])
        assert run["peak_bytes"] > 4 * run["parameters"] > 0
        shown = f"{scored['final']['perplexity']:.2f}"
        row = next(line for line in printed.splitlines() if line.startswith(f"| {run['label']}"))
        assert shown in row
        assert f"{run['parameters']:,}" in row
    assert "softmax, RoPE" in (out / "causal_lm.svg").read_text()

    with start() as process:
        printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert "start " not in printed


@pytest.mark.once
def test_a_tiny_table_of_a_classification_is_trained(run_python, tmp_path):
    words = ["long_documents", "--budget", "tiny", "--jobs", "2", "--out", str(tmp_path)]
    printed = run_python(f"""
        import sys; sys.path.insert(0, "scripts"); import reproduce
        print("status", reproduce.main({words}))
    """)
    assert "status 0" in printed
    for run in json.loads((tmp_path / "long_documents.json").read_text())["runs"]:
        row = next(line for line in printed.splitlines() if line.startswith(f"| {run['label']} |"))
        assert f"{100 * run['scores']['test']['accuracy']:.1f}" in row
        assert f"{run['tokens_per_second']:,.0f}" in row
