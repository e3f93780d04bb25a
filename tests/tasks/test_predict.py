"""`scripts/predict.py` and `class_probabilities` say what the evaluation of a run has scored."""

import json

import numpy as np
import pytest

import predict
from race_jax.tasks.text_classification import class_probabilities
from race_jax.train.checkpoint import Checkpoints, open_for_inference
from race_jax.train.loop import train
from tests.tasks.test_text_classification import text_config
from tests.train.small import small_config

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """A run, the file that it holds out, and the scores of this file at its end."""
    folder = tmp_path_factory.mktemp("reviews")
    config = text_config(folder, directory=str(folder / "run"), steps=12)
    header, *lines = (folder / "t.tsv").read_text().split("\n")
    for name, part in (("train", lines[:60]), ("valid", lines[60:])):
        file = folder / f"{name}.tsv"
        file.write_text("\n".join([header, *part]))
        setattr(config.data, f"{name}_files", (str(file),))
    result = train(config)
    return config.run.directory, folder / "valid.tsv", result.evaluation


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A run of a few steps on pairs, in which a token is a byte."""
    folder = tmp_path_factory.mktemp("pairs")
    config = text_config(folder, directory=str(folder / "run"), steps=3)
    rows = [f"who is {i}\tit is {i + i % 2}\t{['same', 'other'][i % 2]}" for i in range(40)]
    (folder / "t.tsv").write_text("\n".join(["question\tanswer\tlabel", *rows]))
    config.text_classification.text_columns = ("question", "answer")
    config.data.tokenizer = "bytes"
    train(config)
    return config.run.directory


def answers(folder, run, *arguments):
    """Returns what the command line writes to its output file."""
    output = folder / "answers.jsonl"
    assert predict.main([f"--checkpoint={run}", *arguments, f"--output={output}"]) == 0
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_accuracy_and_loss_are_those_of_the_evaluation(reviews, tmp_path):
    run, file, scores = reviews
    found = answers(tmp_path, run, f"--file={file}")
    want = [tuple(line.split("\t")) for line in file.read_text().split("\n")[1:]]
    assert [answer["text"] for answer in found] == [text for text, _ in want]
    right = [answer["class"] == label for answer, (_, label) in zip(found, want, strict=True)]
    assert 0 < np.mean(right) == pytest.approx(scores["accuracy"], abs=1e-7)
    chances = [x["probabilities"][label] for x, (_, label) in zip(found, want, strict=True)]
    assert -np.mean(np.log(chances)) == pytest.approx(scores["loss"], rel=1e-5)


def test_a_text_alone_and_files_without_labels_give_the_same(reviews, tmp_path, capsys):
    run, file, _ = reviews
    whole = answers(tmp_path, run, f"--file={file}")
    texts = [answer["text"] for answer in whole]
    files = {
        "lines.txt": "\n".join(texts),
        "table.tsv": "\n".join(["id\ttext", *(f"{i}\t{text}" for i, text in enumerate(texts))]),
        "rows.jsonl": "\n".join(json.dumps({"body": text}) for text in texts),
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    ways = ("--lines=lines.txt",), ("--file=table.tsv",), ("--file=rows.jsonl", "--columns=body")
    for way in ways:
        place = [argument.replace("=", f"={tmp_path}/", 1) for argument in way[:1]]
        assert answers(tmp_path, run, *place, *way[1:]) == whole
    assert predict.main([f"--checkpoint={run}", f"--text={texts[0]}", f"--text={texts[3]}"]) == 0
    header, *rows = (line.split("\t") for line in capsys.readouterr().out.splitlines())
    assert header == ["class", "no", "yes", "text"]
    for row, want in zip(rows, (whole[0], whole[3]), strict=True):
        assert (row[0], row[3]) == (want["class"], want["text"])
        assert [float(p) for p in row[1:3]] == pytest.approx(
            list(want["probabilities"].values()), abs=1e-4
        )


def test_the_classes_are_reachable_from_python(reviews):
    with open_for_inference(reviews[0]) as saved:
        assert saved.record["classes"] == ["no", "yes"]
        model = saved.load()
    found = class_probabilities(model, saved.companion, saved.config, ["a b good", "bad"])
    assert found.shape == (2, 2)
    assert found.sum(axis=1) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"^there is no text to classify; give at least one"):
        class_probabilities(model, saved.companion, saved.config, [])
    with pytest.raises(ValueError, match=r"^text 1: the text is empty; leave it out"):
        class_probabilities(model, saved.companion, saved.config, ["a", " "])


def test_pairs_are_divided_by_a_tab_or_stand_in_two_columns(pairs, tmp_path):
    (tmp_path / "pairs.csv").write_text("answer,question\nit is 7,who is 6\n")
    (tmp_path / "lines.txt").write_text("who is 6\tit is 7\n")
    found = [
        answers(tmp_path, pairs, argument)
        for argument in (
            "--text=who is 6\tit is 7",
            f"--lines={tmp_path / 'lines.txt'}",
            f"--file={tmp_path / 'pairs.csv'}",
        )
    ]
    assert found[0][0]["text"] == ["who is 6", "it is 7"]
    assert found[0][0]["probabilities"].keys() == {"same", "other"}
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text=alone"], "--text='alone': the run reads a pair of texts at a time, got 1"),
        (["--text= \tb"], "--text=' ': the text is empty; leave it out"),
        (["--lines=FOLDER/one.txt"], "one.txt:1: has 1 columns, and column 2 is read"),
        (["--file=FOLDER/one.txt"], "; --columns names other columns of the text, and --lines"),
        (["--file=FOLDER/none.tsv"], "none.tsv: no such file"),
    ],
)
def test_what_cannot_be_classified_is_named(pairs, tmp_path, capsys, arguments, message):
    (tmp_path / "one.txt").write_text("alone\n")
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert predict.main([f"--checkpoint={pairs}", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_run_of_another_task_is_refused_before_its_parameters_are_read(
    tmp_path, monkeypatch, capsys
):
    config = small_config()
    config.data.tokenizer, config.run.directory = "bytes", str(tmp_path)
    config.run.steps, config.run.tensorboard = 3, False
    config.data.source, config.data.train_files = "files", (str(tmp_path / "t.txt"),)
    (tmp_path / "t.txt").write_bytes(b"a line of text\n" * 200)
    train(config)
    monkeypatch.setattr(Checkpoints, "model", lambda *_: pytest.fail("parameters are read"))
    capsys.readouterr()
    assert predict.main([f"--checkpoint={tmp_path}", "--text=a"]) == 2
    assert (
        "is a run of the task 'language_model', which does not classify texts; give the directory "
        "of a run of the task text_classification" in capsys.readouterr().err
    )
