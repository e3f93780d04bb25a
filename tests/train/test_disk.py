"""Runs whose sequences are read from a token file, segment by segment."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from race_jax.data.rows import UnreadRows
from race_jax.data.token_file import write_token_file
from race_jax.data.tokenizer import ByteTokenizer
from race_jax.train.checkpoint import load_for_inference
from race_jax.train.config import Config
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config

TEXT = np.random.default_rng(0).choice(list(b"abcdefgh \n"), 300).astype(np.uint8)


pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same text as text files and as token files."""
    folder = tmp_path_factory.mktemp("text")
    for name, ids in {"train": TEXT[:200], "valid": TEXT[200:]}.items():
        (folder / f"{name}.txt").write_bytes(ids.tobytes())
        write_token_file(folder / f"{name}.npy", [ids[:70], ids[70:]], ByteTokenizer())
    return folder


def configure(files, directory, source) -> Config:
    config = small_config()
    config.model.race.short_conv, config.model.race.forget_gate = "before", "data"
    config.data.source, ending = source, {"files": "txt", "tokens": "npy"}[source]
    config.data.train_files = (str(files / f"train.{ending}"),)
    config.data.valid_files = (str(files / f"valid.{ending}"),)
    config.optimizer.segment_length = 7  # does not divide the 24 tokens of a sequence
    config.optimizer.accumulation_steps = 2
    config.run.directory, config.run.tensorboard = str(directory), False
    config.run.steps = config.run.log_every = 4
    config.run.checkpoint_every = 1
    return config


def losses(directory) -> np.ndarray:
    records = read_records(pathlib.Path(directory) / "metrics.jsonl")
    return np.array([r["loss"] for r in records if r["kind"] in ("train", "final")])


@pytest.fixture(scope="module")
def from_disk(files, tmp_path_factory):
    """A whole run from token files."""
    config = configure(files, tmp_path_factory.mktemp("runs") / "disk", "tokens")
    return config, train(config)


def parameters(directory):
    model, _, _ = load_for_inference(directory)
    return jax.tree.leaves(jax.device_get(nnx.state(model)))


def test_a_run_from_the_disk_is_that_from_memory(files, from_disk, tmp_path, assert_close):
    config, result = from_disk
    memory = configure(files, tmp_path / "memory", "files")
    want = train(memory)
    assert_close(
        "losses", losses(config.run.directory), losses(tmp_path / "memory"), kind="gradients"
    )
    assert result.evaluation["bits_per_byte"] == pytest.approx(want.evaluation["bits_per_byte"])


def test_a_run_that_dies_in_a_step_loses_that_step_only(files, from_disk, tmp_path, monkeypatch):
    config = configure(files, tmp_path / "killed", "tokens")
    calls, piece = [], UnreadRows.piece

    def dies(*arguments, **options):
        calls.append(1)
        if len(calls) == 1 + 2 * 2 * 8 + 5:  # in the third step; the first call is for the shapes
            raise KeyboardInterrupt
        return piece(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(UnreadRows, "piece", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert len(losses(tmp_path / "killed")) == 2
    train(config)
    np.testing.assert_array_equal(losses(tmp_path / "killed"), losses(from_disk[0].run.directory))
    for got, want in zip(
        parameters(tmp_path / "killed"), parameters(from_disk[1].directory), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_other_tokens_are_refused_when_a_run_goes_on(files, from_disk, tmp_path):
    other = tmp_path / "train.npy"
    write_token_file(other, [TEXT[:200][::-1]], ByteTokenizer())
    config = dataclasses.replace(from_disk[0])
    config.data = dataclasses.replace(config.data, train_files=(str(other),))
    with pytest.raises(ValueError, match=r"the training text has changed|train_files was"):
        train(config)


def test_a_file_that_changes_during_a_run_stops_it(files, tmp_path, monkeypatch):
    for name in ("train.npy", "train.npy.json"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    config = configure(files, tmp_path / "run", "tokens")
    config.data.train_files = (str(tmp_path / "train.npy"),)
    calls, piece = [], UnreadRows.piece

    def cut_short(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            with (tmp_path / "train.npy").open("r+b") as stream:
                stream.truncate(150)
        return piece(*arguments, **options)

    monkeypatch.setattr(UnreadRows, "piece", cut_short)
    with pytest.raises(ValueError, match=r"train\.npy had 328 bytes .* 150 bytes now"):
        train(config)


def test_a_loss_that_is_not_finite_names_its_segment(files, tmp_path, monkeypatch):
    config = configure(files, tmp_path / "run", "tokens")
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e30, 0
    with pytest.raises(
        FloatingPointError, match=r"segment \d .*in step 2; the checkpoint of step 1"
    ):
        train(config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("packing", "packed", r"data\.packing must be 'contiguous'"),
        ("train_files", (), "must name a file"),
        ("train_files", ("a.npy", "b.npy"), "must name one token file"),
        ("tokenizer", "characters", "must be that of .*'bytes', got 'characters'"),
        ("sequence_length", 500, "fewer than the 501 of one window"),
    ],
)
def test_what_token_files_cannot_do_is_refused(files, tmp_path, field, value, words):
    config = configure(files, tmp_path / "run", "tokens")
    config.data.root = str(tmp_path)
    setattr(config.data, field, value)
    with pytest.raises(ValueError, match=words):
        train(config)
