"""The loop in one process: what it prints and writes, how it stops, and what it refuses."""

import json
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from race_jax.tasks.language_model import xz_bits_per_byte
from race_jax.train import summary
from race_jax.train.checkpoint import checkpoint_folder
from race_jax.train.config import Config
from race_jax.train.loop import train
from race_jax.train.metrics import MetricsLog, read_records
from tests.train.small import small_config

pytestmark = pytest.mark.once

SENTENCES = "the cat sat on the mat\nthe dog ate the cat food\na bird saw the dog and sang\n"


@pytest.fixture
def config(tmp_path) -> Config:
    """The configuration of a few steps on a little text. Softmax is used: it compiles fastest."""
    rng = np.random.default_rng(0)
    lines = SENTENCES.splitlines(keepends=True)
    text = "".join(lines[i] for i in rng.integers(0, len(lines), 400))
    (tmp_path / "text.txt").write_text(text)
    config = small_config()
    config.model.attention = "softmax"
    config.data.source = "files"
    config.data.train_files = (str(tmp_path / "text.txt"),)
    config.optimizer.learning_rate = 1e-2
    config.run.directory = str(tmp_path / "run")
    config.run.steps = 12
    config.run.log_every = 5
    config.run.checkpoint_every = 4
    config.run.tensorboard = False
    return config


def steps_of(kind: str, directory) -> list[int]:
    records = read_records(directory / "metrics.jsonl")
    return [record["step"] for record in records if record["kind"] == kind]


def saved_steps(directory) -> list[int]:
    return sorted(int(path.name) for path in checkpoint_folder(directory).iterdir())


def test_a_run_says_what_it_is_and_leaves_its_traces(config, capsys):
    config.run.eval_every = 6
    config.run.eval_batches = 1
    config.language_model.compare_xz = True
    config.language_model.sample_length = 4
    config.language_model.sample_prompt = "the "
    result = train(config)
    assert (result.step, result.stopped) == (12, None)
    assert result.evaluation["perplexity"] == pytest.approx(math.exp(result.evaluation["loss"]))
    assert result.evaluation["loss"] < math.log(256) - 0.3

    out = capsys.readouterr().out
    for fact in (
        "attention  softmax",
        " parameters, 1 layers",
        "1 x cpu",
        "4 sequences of 24, 1 part(s)",
        " MB a device",
        "sha256",
        "step 12/12  loss",
        "step 6: held out",
        "held out   ",
        "xz -9e     ",
        "loss.png",
        "4 tokens after 'the '",
        "scripts/generate.py --checkpoint",
        "compiled   the training step in ",
    ):
        assert fact in out, fact
    directory = result.directory
    assert steps_of("train", directory) == list(range(1, 13))
    assert steps_of("eval", directory) == [6, 12]
    assert steps_of("final", directory) == [12]
    assert saved_steps(directory) == [8, 12]
    assert (directory / "loss.png").read_bytes().startswith(b"\x89PNG")

    found = summary.read(directory)
    scores = {k: v for k, v in result.evaluation.items() if k not in ("kind", "step")}
    assert found["scores"] == {"valid": scores}
    assert found["steps"] == 12
    assert f"{found['parameters']:,} parameters, 1 layers" in out
    assert found["peak_bytes"] > 3 * 4 * found["parameters"]  # the state, with Adam's two moments
    speeds = [r for r in read_records(directory / "metrics.jsonl") if r["kind"] == "speed"]
    speed = np.median([record["tokens_per_second"] for record in speeds])
    assert (found["speed"]["units"], found["speed"]["per_second"]) == ("tokens", speed)
    assert found["speed"]["steps_per_second"] == pytest.approx(speed / (4 * 24))
    assert (found["platform"], found["devices"], found["jax"]) == ("cpu", 1, jax.__version__)
    assert found["digests"]

    again = train(config)
    assert again.evaluation == result.evaluation
    out = capsys.readouterr().out
    assert "resuming   after step 12" in out
    assert "compiled" not in out
    assert summary.read(directory)["peak_bytes"] == found["peak_bytes"]
    assert steps_of("final", directory) == [12]

    config.model.width = 32
    with pytest.raises(ValueError, match=r"config\.model\.width was 16 and is now 32"):
        train(config)


def test_every_option_together_and_a_time_limit(config, capsys):
    config.data.packing = "packed"
    config.data.document_separator = "\n"
    config.data.tokenizer = "words"
    config.model.attention = "race"
    config.model.dtype = "bfloat16"
    config.model.dropout_rate = 0.1
    config.model.positions = "learned"
    config.model.remat = True
    config.optimizer.accumulation_steps = 2
    config.optimizer.schedule = "linear"
    config.run.max_seconds = 1e-9  # counted from the first step, so that every start takes one
    result = train(config)
    assert (result.step, result.evaluation) == (1, None)
    assert result.stopped == "config.run.max_seconds=1e-09 is over"
    assert "stopped at step 1 of 12" in capsys.readouterr().out

    config.run.max_seconds = None
    result = train(config)
    assert result.step == 12
    assert steps_of("train", result.directory) == list(range(1, 13))
    assert result.evaluation["loss"] < math.log(20)
    assert "attention  race, implementation" in capsys.readouterr().out


def test_no_bits_per_byte_where_words_are_unknown(config, capsys):
    config.data.tokenizer, config.data.vocab_limit = "words", 4
    config.language_model.compare_xz, config.run.eval_every = True, 6
    result = train(config)
    assert "bits_per_byte" not in result.evaluation
    lines = capsys.readouterr().out.splitlines()
    scores = [line for line in lines if "held out" in line and "perplexity" in line]
    assert len(scores) == 3  # steps 6 and 12, and the end
    assert all(re.search(r"\d tokens, \d+\.\d% of them <unk> \(no bits", line) for line in scores)
    assert not any("same text" in line for line in lines)


def test_a_tokenizer_file_that_changed_is_refused(config, tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "my tokenizer.json"
    config.data.tokenizer, config.data.tokenizer_file = "bpe", str(path)
    config.data.vocab_limit = 260
    config.optimizer.schedule, config.run.steps = "constant", 4
    train(config)
    record = json.loads(path.read_text())
    ids = record["model"]["vocab"]
    record["model"]["vocab"] = {piece: len(ids) - 1 - i for piece, i in ids.items()}
    path.write_text(json.dumps(record))  # of the same size
    config.run.steps = 6
    with pytest.raises(ValueError, match="tokenizer"):
        train(config)


def fail(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_a_run_does_not_need_its_decorations(config, capsys, monkeypatch):
    """TensorBoard and all that follows the scores fail; metrics cannot be written for a while."""
    config.run.tensorboard = True
    config.language_model.sample_length = 5
    config.run.checkpoint_every = 100
    config.run.log_every = 2
    failures = iter([fail, fail, None])
    append = MetricsLog._append
    monkeypatch.setattr(MetricsLog, "_append", lambda *a: (next(failures, None) or append)(*a))
    monkeypatch.setattr("race_jax.train.metrics.event_file", fail)
    monkeypatch.setattr("race_jax.train.trainer.plot_losses", fail)
    monkeypatch.setattr("race_jax.train.summary.write", fail)
    monkeypatch.setattr("race_jax.tasks.language_model.sample_lines", fail)
    result = train(config)
    assert result.evaluation["loss"] > 0
    out = capsys.readouterr().out
    for what in ("TensorBoard events are", "the summary is", "the picture is", "the sample is"):
        assert f"{what} left out" in out
    assert "metrics.jsonl cannot be written (No space left on device)" in out
    assert "held out   " in out
    assert steps_of("train", result.directory) == list(range(1, 13))
    # A checkpoint is tried as soon as the disk seems full, and is written at the end.
    assert saved_steps(result.directory) == [2, 12]


def test_a_full_disk_ends_the_run_where_no_checkpoint_fits(config, monkeypatch):
    monkeypatch.setattr(MetricsLog, "_append", fail)
    monkeypatch.setattr("race_jax.train.checkpoint.write_text", fail)
    with pytest.raises(
        RuntimeError, match=r"step 4 could not be written .*: \[Errno 28\] No space"
    ):
        train(config)


def test_present_checkpoints_count_towards_the_space_that_is_needed(config, monkeypatch):
    config.run.checkpoint_every = 4
    config.run.max_seconds = 1e-9
    asked = []
    monkeypatch.setattr("race_jax.train.trainer.check_space", lambda path, size: asked.append(size))
    for _ in range(3):
        train(config)
    assert [round(size / asked[-1]) for size in asked] == [3, 2, 1]
    config.run.max_seconds = None
    train(config)
    train(config)  # finished: nothing more is written
    assert len(asked) == 4


def test_a_signal_during_the_last_evaluation_leaves_it_to_the_next_start(config, monkeypatch):
    monkeypatch.setattr("race_jax.train.interrupt.StopRequest.signalled", "SIGTERM")
    monkeypatch.setattr("race_jax.train.interrupt.StopRequest.reason", None)
    result = train(config)
    assert (result.step, result.evaluation) == (12, None)
    assert summary.read(result.directory) is None
    monkeypatch.undo()
    result = train(config)
    assert summary.read(result.directory)["steps"] == 12
    assert (result.stopped, result.evaluation["kind"]) == (None, "final")


def test_compiled_programs_are_kept_where_the_flag_says(config, tmp_path, compiled_programs):
    config.run.compilation_cache = str(tmp_path / "cache")
    try:
        before = jax.config.jax_persistent_cache_min_compile_time_secs
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        train(config)
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
        jax.config.update("jax_compilation_cache_dir", str(compiled_programs))
        compilation_cache.reset_cache()
    assert any((tmp_path / "cache").iterdir())


def test_a_loss_that_is_not_finite_stops_and_saves_nothing_more(config):
    config.optimizer.learning_rate = 1e30
    config.optimizer.warmup_steps = 0
    config.run.log_every = 3
    config.run.checkpoint_every = 1
    with pytest.raises(FloatingPointError, match=r"at step 2; the checkpoint of step 1 is kept"):
        train(config)
    directory = pathlib.Path(config.run.directory)
    assert steps_of("train", directory) == [1]
    assert saved_steps(directory) == [1]


def test_bad_text_is_an_error_before_any_training(config, tmp_path):
    config.data.train_files = (str(tmp_path / "nowhere.txt"),)
    with pytest.raises(ValueError, match=r"nowhere\.txt: no such file"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_prompt_that_the_vocabulary_lacks_is_an_error_before_any_training(config, tmp_path):
    config.data.tokenizer = "words"
    config.language_model.sample_length = 5
    config.language_model.sample_prompt = "a zebra"
    with pytest.raises(
        ValueError, match=r"config\.language_model\.sample_prompt 'a zebra': the word 'zebra'"
    ):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_xz_figure():
    assert xz_bits_per_byte(np.random.default_rng(0).bytes(10_000)) > 8.0
    assert xz_bits_per_byte(b"again " * 10_000) < 0.1
