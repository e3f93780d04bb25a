"""The command line of `scripts/reproduce.py`: what it refuses, changes and shows."""

import json

import pytest

import reproduce


def test_a_command_line_that_cannot_be_is_refused(tmp_path, capsys):
    for words, text in (
        (
            ["causal_lm", "--methods", "softmx"],
            "--methods: there is no 'softmx'; there are softmax",
        ),
        (["causal_lm", "--data-sets", "ptb,x"], "--data-sets: there is no 'x'"),
        (["causal_lm", "--data", str(tmp_path / "none")], "--data: there is no folder"),
        (["none"], "invalid choice: 'none'"),
        (["causal_lm", "--job", "2"], "unknown argument '--job'"),
        (["recall", "--budget", "paper"], "the table recall has no budget 'paper'; take 'small'"),
        (["causal_lm", "--config.model.width=8"], "a folder of its own (--out)"),
        (["causal_lm", "--config.=8"], "unknown argument '--config.=8'"),
        (["causal_lm", "--config.run.seed=8"], "run.seed is not free"),
    ):
        with pytest.raises(SystemExit) as stop:
            reproduce.parse(words)
        assert stop.value.code == 2
        assert text in capsys.readouterr().err


def test_fields_of_the_command_line_change_every_run_and_are_shown(tmp_path, capsys):
    words = ["listops", "--budget", "tiny", "--show", "--out", str(tmp_path)]
    changes = ["--config.model.dropout_rate=0.25", "--config.run.steps=7"]
    assert reproduce.main([*words, *changes]) == 75
    assert "Changed in every run: `model.dropout_rate=0.25`" in capsys.readouterr().out
    runs = json.loads((tmp_path / "listops.json").read_text())["runs"]
    assert {run["config"]["model"]["dropout_rate"] for run in runs} == {0.25}
    assert {run["config"]["run"]["steps"] for run in runs} == {7}
    assert reproduce.main([*words, "--config.model.widht=3"]) == 2
    assert "did you mean width" in capsys.readouterr().err


def test_missing_data_is_named_before_anything_runs(tmp_path, capsys, monkeypatch):
    words = ["causal_lm", "--data-sets", "ptb", "--out", str(tmp_path / "out")]
    monkeypatch.delenv("RACE_JAX_DATA", raising=False)
    assert reproduce.main(words) == 2
    assert "give the folder of the data with --data, or" in capsys.readouterr().err
    assert reproduce.main([*words, "--data", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"ptb needs {tmp_path}/ptb/ptb.train.txt.xz, which does not exist" in said
    assert "--data" in said


def test_a_table_that_cannot_be_written_is_one_sentence(tmp_path, capsys):
    (tmp_path / "listops.json").mkdir()
    words = ["listops", "--budget", "tiny", "--show", "--out", str(tmp_path)]
    assert reproduce.main(words) == 1
    assert f"reproduce: {tmp_path} cannot be written: " in capsys.readouterr().err


def test_a_table_of_runs_that_were_never_started_is_shown_as_unfinished(tmp_path, capsys):
    words = ["listops", "--budget", "tiny", "--seeds", "2", "--show", "--out", str(tmp_path)]
    assert reproduce.main(words) == 75
    out = capsys.readouterr().out
    assert "0 of 4 runs finished" in out
    assert "These numbers mean nothing" in out
    assert "4 of 4 runs are not finished; the same command goes on" in out
    assert len(json.loads((tmp_path / "listops.json").read_text())["runs"]) == 4
