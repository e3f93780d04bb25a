"""A run starts with the parameters of another one."""

import shutil

import numpy as np
import pytest
from flax import nnx

from race_jax.train.checkpoint import load_for_inference
from race_jax.train.config import Config
from race_jax.train.loop import train
from tests.train.small import small_config

pytestmark = pytest.mark.once

TEXT = "the cat sees the dog and the dog sees a tree\n" * 60


def config_of(folder, name: str, **values) -> Config:
    """A run of four steps on a text, with fields of other sections as section__field."""
    (folder / "t.txt").write_text(TEXT)
    config = small_config()
    config.data.source, config.data.train_files = "files", (str(folder / "t.txt"),)
    config.run.directory, config.run.tensorboard = str(folder / name), False
    config.run.steps, config.run.checkpoint_every = 4, 2
    for field, value in values.items():
        section, _, rest = field.partition("__")
        setattr(getattr(config, section), rest, value)
    return config


def values_of(folder, name: str) -> dict:
    model, _, _ = load_for_inference(folder / name)
    state = nnx.to_flat_state(nnx.split(model)[1])
    return {path: np.asarray(value[...]) for path, value in state}


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a run that others start from."""
    folder = tmp_path_factory.mktemp("other")
    train(config_of(folder, "short"))
    return folder / "short"


def test_parameters_and_planes_are_those_of_the_other_run(short, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in short.rglob("*")}
    longer = {"data__sequence_length": 48, "run__seed": 7, "run__start_from": str(short)}
    steps_that_change_nothing = {
        "optimizer__learning_rate": 1e-30,
        "optimizer__end_learning_rate": 0.0,
    }
    train(config_of(tmp_path, "long", **longer, **steps_that_change_nothing))
    assert f"parameters those of step 4 of {short}" in capsys.readouterr().out
    first, second = values_of(short.parent, "short"), values_of(tmp_path, "long")
    assert first.keys() == second.keys()
    for name in first:  # another seed would not draw the same numbers
        np.testing.assert_array_equal(first[name], second[name])
    after = {path: path.stat().st_mtime_ns for path in short.rglob("*")}
    assert before == after  # nothing is written there


def test_a_resume_goes_on_without_the_other_run(short, tmp_path):
    shutil.copytree(short, tmp_path / "short")
    options = {"run__start_from": str(tmp_path / "short")}
    options |= {"optimizer__schedule": "constant", "optimizer__warmup_steps": 1}
    whole = config_of(tmp_path, "whole", **options)
    train(whole)
    train(config_of(tmp_path, "halved", **options, run__steps=2))
    shutil.rmtree(tmp_path / "short")
    result = train(config_of(tmp_path, "halved", **options))
    assert result.step == 4
    for name, value in values_of(tmp_path, "whole").items():
        np.testing.assert_array_equal(value, values_of(tmp_path, "halved")[name])
    same = str(tmp_path / "halved" / ".." / "short")  # another way to write the same folder
    assert train(config_of(tmp_path, "halved", **(options | {"run__start_from": same}))).step == 4
    with pytest.raises(ValueError, match=r"start_from was .*short and is now None"):
        train(config_of(tmp_path, "halved", **(options | {"run__start_from": None})))


def test_a_form_of_the_model_that_changes_is_named(short, tmp_path, capsys):
    other = config_of(tmp_path, "other", run__start_from=str(short))
    other.model.race.use_tanh = not other.model.race.use_tanh
    train(other)
    was, now = not other.model.race.use_tanh, other.model.race.use_tanh
    assert f"config.model.race.use_tanh was {was} and is now {now}" in capsys.readouterr().out


def test_damage_and_the_own_folder_are_told_in_words(short, tmp_path):
    with pytest.raises(ValueError, match=r"start_from=.*own is the folder of this run"):
        train(config_of(tmp_path, "own", run__start_from=str(tmp_path / "own")))
    shutil.copytree(short, tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "checkpoints").rglob("digests.json"):
        path.write_text("junk")
    with pytest.raises(RuntimeError, match=r"start_from: no whole .* name the folder of another"):
        train(config_of(tmp_path, "from", run__start_from=str(tmp_path / "damaged")))


def test_what_cannot_be_is_refused(short, tmp_path):
    short = str(short)
    with pytest.raises(ValueError, match=r"start_from: no checkpoints in .*nothing"):
        train(config_of(tmp_path, "a", run__start_from=str(tmp_path / "nothing")))
    wide = config_of(tmp_path, "b", run__start_from=short, model__width=32)
    with pytest.raises(
        ValueError, match=r"another model: .* is \(.*16.*\) there, and \(.*32.*\) here"
    ):
        train(wide)
    deep = config_of(tmp_path, "c", run__start_from=short, model__num_layers=2)
    with pytest.raises(ValueError, match=r"another model: it has no .*blocks.1"):
        train(deep)
    words = config_of(tmp_path, "d", run__start_from=short, data__tokenizer="words")
    with pytest.raises(ValueError, match=r"short differs in its tokenizer; name a run"):
        train(words)
    several = config_of(tmp_path, "e", run__start_from=short, mesh__coordinator="auto")
    with pytest.raises(ValueError, match="start_from is read by one process"):
        several.validate()
