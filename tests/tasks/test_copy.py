"""The smallest task goes through the whole trainer. It learns, stops, resumes and is scored."""

import pytest

from race_jax.train.config import Config
from race_jax.train.files import claim
from race_jax.train.flags import help_lines, parse_config
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config


def copy_config() -> Config:
    config = small_config()
    config.task = "copy"
    config.model.attention = "softmax"
    config.data.sequence_length, config.run.batch_size = 7, 16
    config.optimizer.learning_rate, config.optimizer.schedule = 3e-2, "constant"
    config.run.steps, config.run.tensorboard = 60, False
    return config


def test_copying_learns_and_resumes_to_the_bit(tmp_path, capsys):
    def run(name, **changes):
        config = copy_config()
        config.run.directory = str(tmp_path / name)
        for field, value in changes.items():
            setattr(config.run, field, value)
        result = train(config)
        return result, read_records(tmp_path / name / "metrics.jsonl")

    def measured(records):
        return [record for record in records if record["kind"] != "speed"]

    result, whole = run("whole")
    losses = [record["loss"] for record in whole if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.1
    assert 0 <= result.evaluation["accuracy"] <= 1
    out = capsys.readouterr().out
    assert f"accuracy {result.evaluation['accuracy']:.4f}" in out
    assert f" nats per symbol  {whole[-2]['symbols_per_second']:,.0f} symbols/s" in out
    assert "token" not in out
    assert {record["symbols"] for record in whole if record["kind"] == "train"} == {16 * 3}
    assert run("stopped", max_seconds=1e-9)[0].step == 1
    assert measured(run("stopped")[1]) == measured(whole)


def test_the_command_line_knows_the_task_s_fields(tmp_path):
    file = tmp_path / "plain.py"
    file.write_text("from race_jax.train.config import Config as get_config\n")
    words = [f"--config={file}", "--config.task=copy"]
    config = parse_config([*words, "--config.copy.symbols=5"])
    assert config.task_config().symbols == 5
    assert config.run.directory == "runs/plain-symbols=5-task=copy"
    assert Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"config\.copy\.symbols must be >= 2, got 1"):
        parse_config([*words, "--config.copy.symbols=1"])
    with pytest.raises(ValueError, match=r"config\.copy\.symbol does not .* did you mean symbols"):
        parse_config([*words, "--config.copy.symbol=5"])
    text = "\n".join(help_lines([]))
    assert "  --config.copy.symbols=8 (int)\n      number of different symbols." in text


def test_a_run_is_bound_by_the_fields_of_its_own_task(tmp_path):
    def start(*, task="copy", symbols=8, sample_length=0, resuming=True):
        config = copy_config()
        config.task, config.copy.symbols = task, symbols
        config.language_model.sample_length = sample_length
        claim(tmp_path, config.validate(), {}, resuming=resuming)

    start(resuming=False)
    start(sample_length=5)
    with pytest.raises(ValueError, match=r"config\.copy\.symbols was 8 and is now 9"):
        start(symbols=9)
    start(task="language_model", resuming=False)
    start(task="language_model", symbols=9, sample_length=5)


def test_an_unknown_task_is_refused_by_name(tmp_path):
    config = small_config()
    config.task, config.run.directory = "copying", str(tmp_path)
    with pytest.raises(ValueError, match=r"config\.task must be one of language_model, .*copy"):
        train(config)
