"""The smallest task goes through the whole trainer. It learns, stops, resumes and is scored."""

import pytest

from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config


def test_copying_learns_and_resumes_to_the_bit(tmp_path, capsys):
    def run(name, **changes):
        config = small_config()
        config.task = "copy"
        config.model.attention = "softmax"
        config.data.sequence_length, config.run.batch_size = 7, 16
        config.optimizer.learning_rate, config.optimizer.schedule = 3e-2, "constant"
        config.run.steps, config.run.tensorboard = 60, False
        config.run.directory = str(tmp_path / name)
        for field, value in changes.items():
            setattr(config.run, field, value)
        result = train(config)
        records = read_records(tmp_path / name / "metrics.jsonl")
        return result, [record for record in records if record["kind"] != "speed"]

    result, whole = run("whole")
    losses = [record["loss"] for record in whole if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    assert 0 <= result.evaluation["accuracy"] <= 1
    assert f"accuracy {result.evaluation['accuracy']:.4f}" in capsys.readouterr().out
    assert run("stopped", max_seconds=1e-9)[0].step == 1
    assert run("stopped")[1] == whole


def test_an_unknown_task_is_refused_by_name(tmp_path):
    config = small_config()
    config.task, config.run.directory = "copying", str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.task must be one of language_model, copy"):
        train(config)
