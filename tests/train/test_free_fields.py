"""Every field that may change between two starts of a run is changed, and the run continues.

One short run is stopped after four steps. Each test continues a copy of it with other values, and
compares the losses of the last steps with those of a run that was not stopped.
"""

import pathlib
import shutil

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from race_jax.tasks.registry import TASKS
from race_jax.train.config import Config
from race_jax.train.files import FREE_FIELDS
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config

pytestmark = pytest.mark.once

SENTENCES = "the cat sees the dog and the dog sees a tree\n" * 60
STOP, STEPS = 4, 6

# Fields that change together, and whether the rounding of a step may change with them. "ROOT" is a
# folder with another copy of the text, "RUN" one with a copy of the run, and "CACHE" is empty.
CHANGES = {
    "where": (
        {"data.root": "ROOT", "run.directory": "RUN", "run.compilation_cache": "CACHE"},
        "rerun",
    ),
    "more workers": ({"data.num_workers": 2}, "rerun"),
    "what is reported": (
        {
            "run.max_seconds": 1000.0,
            "run.log_every": 1,
            "run.eval_every": 1,
            "run.eval_batches": 1,
            "run.checkpoint_every": 1,
            "run.keep_checkpoints": 5,
            "run.tensorboard": True,
            "language_model.compare_xz": True,
            "language_model.sample_length": 2,
            "language_model.sample_prompt": "the",
        },
        "rerun",
    ),
    "how it is computed": (
        {"model.implementation": "xla", "model.remat": True, "mesh.data": None},
        "streamed",
    ),
}


# These need several devices: tests/devices/test_training.py tries them.
ELSEWHERE = [
    f"config.mesh.{name}" for name in ("seq", "fsdp", "coordinator", "processes", "process")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a run that was stopped, and the losses of one that was not."""
    folder = tmp_path_factory.mktemp("free")
    for root in ("text", "ROOT"):
        (folder / root).mkdir()
        (folder / root / "t.txt").write_text(SENTENCES)
    config = small_config()
    config.data.source, config.data.train_files = "files", ("t.txt",)
    config.data.root = str(folder / "text")
    config.optimizer.schedule = "constant"
    config.run.log_every, config.run.tensorboard = 2, False
    undisturbed = changed(config, {"run.directory": folder / "whole", "run.steps": STEPS})
    train(undisturbed)
    train(changed(config, {"run.directory": folder / "stopped", "run.steps": STOP}))
    return folder, config, losses(folder / "whole")


def changed(config: Config, values: dict) -> Config:
    """Returns a copy with other values. Paths become text."""
    config = config.validate()
    for name, value in values.items():
        section, field = name.split(".")
        value = str(value) if isinstance(value, pathlib.Path) else value
        setattr(getattr(config, section), field, value)
    return config


def losses(directory: pathlib.Path) -> list[float]:
    records = read_records(directory / "metrics.jsonl")
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_every_free_field_is_tried():
    names = [f"config.{name}" for values, _ in CHANGES.values() for name in values]
    names += ELSEWHERE
    task = TASKS[Config().task].free_fields
    assert sorted(names) == sorted([*FREE_FIELDS, *(f"config.{Config().task}.{n}" for n in task)])


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_another_value(runs, tmp_path, assert_close, change, compiled_programs):
    folder, config, want = runs
    directory = tmp_path / "RUN"
    shutil.copytree(folder / "stopped", directory)
    values, kind = CHANGES[change]
    folders = {"ROOT": folder / "ROOT", "CACHE": str(tmp_path / "cache")}
    values = {name: folders.get(value, value) for name, value in values.items()}
    before = config.validate()
    config = changed(config, values | {"run.directory": directory, "run.steps": STEPS})
    for name in values.keys() - {"run.directory"}:
        section, field = name.split(".")
        old, new = (getattr(getattr(each, section), field) for each in (before, config))
        assert old != new, f"config.{name} was not changed"
    try:
        assert train(config).step == STEPS
    finally:
        jax.config.update("jax_compilation_cache_dir", str(compiled_programs))
        compilation_cache.reset_cache()
    got = losses(directory)
    assert_close("losses", got[:STOP], want[:STOP], kind="rerun")
    assert_close("losses", got[STOP:], want[STOP:], kind=kind)
