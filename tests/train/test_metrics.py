"""Records survive a kill. Evaluation figures, the picture and the progress line are right."""

import json
import math

import pytest

from race_jax.tasks.language_model import LanguageModel, evaluation_figures
from race_jax.train.metrics import MetricsLog, read_records
from race_jax.train.plot import plot_losses
from race_jax.train.progress import Progress


def train_record(step: int) -> dict:
    return {"kind": "train", "step": step, "loss": 1.0 / step}


def test_going_on_drops_later_steps_and_a_line_cut_off(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write([train_record(step) for step in range(1, 8)])
    log.write([{"kind": "final", "step": 7, "loss": 2.0}])
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "ste')

    log = MetricsLog(tmp_path, 4)
    log.write([train_record(5)])
    log.close()
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", step) for step in (1, 2, 3, 4, 5)
    ]
    assert records == log.records


def test_damaged_lines_are_left_out_with_a_word(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(train_record(step)).encode() for step in (1, 2)]
    bad = [b"\0" * 40, b"\xff\xfe", b"[1]", b'{"kind": "train"}', b'{"kind": 1, "step": 2}']
    path.write_bytes(b"\n".join([whole[0], *bad, whole[1], b""]))
    log = MetricsLog(tmp_path, 2)
    log.close()
    assert log.records == [train_record(1), train_record(2)]
    said = capsys.readouterr().out
    assert said == f"{path}: 5 damaged line(s) are left out, the first is line 2\n"
    assert read_records(path) == log.records


def test_lines_that_could_not_be_written_come_later(tmp_path, monkeypatch, capsys):
    log = MetricsLog(tmp_path, 0)
    assert log.write([train_record(1)])

    def disk_full(*arguments):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write('{"kind": "tr')  # what a full disk leaves of a line
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("race_jax.train.metrics.os.fsync", disk_full)
        assert not log.write([train_record(2)])
        assert log.write([train_record(3)])  # said once
    assert log.write([train_record(4)])
    log.close()
    assert read_records(tmp_path / "metrics.jsonl") == [train_record(n) for n in (1, 2, 3, 4)]
    said = capsys.readouterr().out
    assert said.count("cannot be written (No space left on device)") == 1
    assert "can be written again" in said


def test_tensorboard_is_dropped_where_its_disk_is_full(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path, 0, tensorboard=True)

    def disk_full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("tensorboardX.record_writer.RecordWriter.flush", disk_full)
        assert log.write([train_record(1)])
    assert log.write([train_record(2)])
    log.close()
    said = capsys.readouterr()
    assert said.out.count("TensorBoard events are left out from here on: [Errno 28]") == 1
    assert said.err == ""
    assert read_records(tmp_path / "metrics.jsonl") == [train_record(1), train_record(2)]


def test_tensorboard_that_cannot_start_is_left_out(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write([train_record(1)])
    log.close()
    assert "TensorBoard events are left out" in capsys.readouterr().out


def test_a_fresh_run_starts_an_empty_log(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train_record(3)) + "\n")
    log = MetricsLog(tmp_path, 0)
    log.close()
    assert log.records == []
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_tensorboard_gets_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    log = MetricsLog(tmp_path, 0, tensorboard=True)
    log.write([train_record(1)])
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_evaluation_figures():
    record = evaluation_figures(nats=10 * math.log(8), weight=10, num_bytes=15)
    assert record["perplexity"] == pytest.approx(8.0)
    assert record["bits_per_byte"] == pytest.approx(2.0)


def test_a_hopeless_loss_does_not_overflow():
    assert evaluation_figures(nats=1e4, weight=1, num_bytes=1)["perplexity"] == math.inf


def test_picture_is_drawn_or_refused(tmp_path):
    path = tmp_path / "loss.png"
    with pytest.raises(ValueError, match="no training record"):
        plot_losses([], path, title="empty", unit="nats")
    assert not path.exists()
    records = [train_record(step) for step in range(1, 20)]
    records.append({"kind": "final", "step": 19, "loss": 2.0})
    plot_losses(records, path, title="lr_$\\alph$_x 漢", unit="nats")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_progress_prints_a_line_with_the_time_left(capsys, monkeypatch):
    now = iter([0.0, 2.0, 100.0, 101.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    progress = Progress(0, 30, LanguageModel.loss_text, "tokens", terminal=False)
    assert progress.update(10, math.log(2), 10_000) == pytest.approx(5000.0)
    progress.resume()
    progress.update(20, math.log(2), 10_000)
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step 10/30  loss 0.6931 nats = 1.000 bits a token  5,000 tokens/s  4 s left"
    assert second.endswith("10,000 tokens/s  2 s left")


def test_a_terminal_that_closes_ends_the_bar_not_the_run(capsys, monkeypatch):
    progress = Progress(0, 30, LanguageModel.loss_text, "tokens", terminal=True)

    def closed(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(progress._bar, "update", closed)
    progress.update(10, math.log(2), 10_000)
    progress.update(20, math.log(2), 10_000)
    progress.close()
    assert "step 20/30" in capsys.readouterr().out


def test_progress_bar_shows_the_same_words(capsys):
    progress = Progress(0, 30, LanguageModel.loss_text, "tokens", terminal=True)
    progress.update(10, math.log(2), 10_000)
    progress.say("a line of its own")
    progress.close()
    shown = capsys.readouterr()
    assert "10/30" in shown.err
    assert "1.000 bits a token" in shown.err
    assert "a line of its own\n" in shown.out
