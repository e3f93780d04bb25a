"""Texts are classified: their tokens, the loss, the accuracy, and a whole run."""

import math

import numpy as np
import pytest

from race_jax.tasks.text_classification import TextClassification, join
from race_jax.train.flags import help_lines
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config

pytestmark = pytest.mark.once


def text_config(folder, *, count=90, **run):
    """A run on short reviews, in which one word of a few gives the class away."""
    rng = np.random.default_rng(0)
    lines = ["text\tlabel"]
    for i in range(count):
        words = [*rng.choice(list("abcd"), rng.integers(1, 20)), ["bad", "good"][i % 2]]
        lines.append(f"{' '.join(rng.permutation(words))}\t{['no', 'yes'][i % 2]}")
    (folder / "t.tsv").write_text("\n".join(lines))
    config = small_config()
    config.task, config.model.attention = "text_classification", "softmax"
    config.text_classification.num_buckets = 2
    config.data.source, config.data.train_files = "files", (str(folder / "t.tsv"),)
    config.data.tokenizer, config.data.valid_fraction = "words", 0.2
    config.optimizer.learning_rate, config.run.batch_size = 1e-2, 8
    config.run.tensorboard = False
    for field, value in run.items():
        setattr(config.run, field, value)
    return config


def make(config) -> TextClassification:
    return TextClassification(config.validate())


NAMES = ("inputs", "mask", "labels", "weights")


def test_texts_become_tokens_and_classes(tmp_path):
    config = text_config(tmp_path)
    task = make(config)
    words = TextClassification.companion(task.record)
    assert task.record["classes"] == ["no", "yes"]
    assert task.record["vocab_size"] == words.vocab_size == 6
    lines = dict(line.split("\t") for line in (tmp_path / "t.tsv").read_text().split("\n"))
    seen = 0
    for batch in task.held_out["valid"]:
        for tokens, mask, label, weight in zip(*(batch[name] for name in NAMES), strict=True):
            if weight:
                text = words.decode(tokens[mask])
                assert lines[text] == task.record["classes"][label]
                seen += 1
    assert 5 < seen < 40
    assert f"{90 - seen} train, {seen} valid examples of 2 classes" in task.description
    assert {name: x.shape for name, x in task.batch.items()} == {
        "inputs": (8, 24),
        "mask": (8, 24),
        "labels": (8,),
        "weights": (8,),
    }


def test_a_header_that_is_read_as_an_example_is_seen_among_the_classes(tmp_path):
    config = text_config(tmp_path)
    options = config.text_classification
    options.text_columns, options.label_column = ("0",), "1"
    config.data.valid_files = (str(tmp_path / "valid.tsv"),)
    (tmp_path / "valid.tsv").write_text("a bad\tno\n")
    named = "training examples by class: label (1), no (45), yes (45)"
    assert make(config).description.endswith(named)
    with open(tmp_path / "t.tsv", "a") as file:
        file.writelines(f"\na\tclass {i}" for i in range(9))
    assert "class 8 (1)" in make(config).description
    with open(tmp_path / "t.tsv", "a") as file:
        file.write("\na\tthe thirteenth")
    assert "by class" not in make(config).description


def test_a_pair_has_a_separator_and_the_longer_text_is_cut():
    first, second = np.arange(5, dtype=np.uint8), np.arange(10, 13, dtype=np.uint8)
    assert join((first, second), 256, 9).tolist() == [0, 1, 2, 3, 4, 256, 10, 11, 12]
    assert join((first, second), 256, 8).tolist() == [0, 1, 2, 3, 256, 10, 11, 12]
    assert join((first, second), 256, 6).tolist() == [0, 1, 2, 256, 10, 11]
    assert join((second, first), 256, 7).tolist() == [10, 11, 12, 256, 0, 1, 2]
    assert join((first,), 256, 3).tolist() == [0, 1, 2]


def test_pairs_other_spellings_and_other_columns_of_the_test_file(tmp_path):
    config = text_config(tmp_path)
    (tmp_path / "train.tsv").write_text("question\tsentence\tlabel\na\tbc\t0\nd\te\t1\n")
    (tmp_path / "dev.tsv").write_text("question\tsentence\tlabel\nf\tgh\tentailment\n")
    (tmp_path / "test.csv").write_text("not,q,s\n")
    for split, name in (("train", "train.tsv"), ("valid", "dev.tsv"), ("test", "test.csv")):
        setattr(config.data, f"{split}_files", (str(tmp_path / name),))
    config.data.tokenizer = "bytes"
    options = config.text_classification
    options.text_columns, options.classes = ("question", "sentence"), ("entailment|0", "not|1")
    options.test_text_columns, options.test_label_column = ("1", "2"), "0"
    task = make(config)
    assert task.record["classes"] == ["entailment", "not"]
    assert task.record["vocab_size"] == 257
    for name, text, label in (("valid", b"f\0gh", 0), ("test", b"q\0s", 1)):
        batch = next(iter(task.held_out[name]))
        tokens = batch["inputs"][0][batch["mask"][0]].tolist()
        assert [0 if token == 256 else token for token in tokens] == list(text)
        assert batch["labels"][0] == label
        assert batch["weights"].sum() == 1


def test_the_accuracy_counts_every_example_once():
    """By hand: 3 of 4 are right, and the row of weight 0 is not counted."""

    def model(inputs, **options):
        del options
        return np.log(np.asarray(inputs, np.float32))

    batch = {
        "inputs": np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8], [0.7, 0.3], [0.5, 0.5]]),
        "labels": np.array([0, 1, 1, 1, 0], np.int32),
        "weights": np.array([1, 1, 1, 1, 0], np.float32),
    }
    sums = {name: float(x) for name, x in TextClassification.score_sums(model, batch).items()}
    nats = -math.log(0.9 * 0.6 * 0.8 * 0.3)
    assert sums == {"loss": pytest.approx(nats, rel=1e-6), "weight": 4, "right": 3}
    loss, weight = TextClassification.loss_sums(model, batch, None)
    assert (float(loss), float(weight)) == (pytest.approx(nats, rel=1e-6), 4)
    scores = TextClassification.metrics(None, "valid", sums)
    assert scores == {"loss": pytest.approx(nats / 4, rel=1e-6), "accuracy": 0.75}


def test_a_run_learns_and_resumes_to_the_bit(tmp_path, capsys):
    """The batches of this run have two lengths, so two training steps are compiled."""

    def run(name, **changes):
        config = text_config(tmp_path, directory=str(tmp_path / name), steps=32, **changes)
        result = train(config)
        records = read_records(tmp_path / name / "metrics.jsonl")
        return result, [record for record in records if record["kind"] != "speed"]

    result, whole = run("whole")
    losses = [record["loss"] for record in whole if record["kind"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.2
    assert result.evaluation["accuracy"] > 0.7
    out = capsys.readouterr().out
    assert f"accuracy {result.evaluation['accuracy']:.4f}" in out
    assert " nats per example " in out
    assert {record["examples"] for record in whole if record["kind"] == "train"} == {8}
    assert run("stopped", max_seconds=1e-9)[0].step == 1
    assert run("stopped")[1] == whole


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "classes",
            ("no", "maybe"),
            r"t\.tsv:3: the label 'yes' is none of config\.text_classification\.classes=no,maybe; "
            r"add it there, .* of one \(no\|yes\), or leave the text out",
        ),
        ("label_column", "text", r"no training example has the label '.*' of this valid example"),
        ("text_columns", ("body",), r"t\.tsv:1: there is no column 'body'"),
        ("text_columns", ("a", "b", "c"), r"config\.text_classification\.text_columns must be one"),
        ("test_text_columns", ("a", "b"), r"test_text_columns must be as many as text_columns, 1"),
        ("classes", ("no",), r"classes must be at least two, got 'no' only"),
        ("label_column", "", r"label_column must name a column"),
        ("form", "xml", r"form must be one of auto, tsv, csv, jsonl, classes; got 'xml'"),
        ("pooling", "max", r"pooling must be one of mean, cls; got 'max'"),
        ("num_buckets", 0, r"num_buckets must be >= 1, got 0"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, field, value, message):
    config = text_config(tmp_path)
    setattr(config.text_classification, field, value)
    with pytest.raises(ValueError, match=message):
        make(config)


def test_a_rare_class_is_refused_until_it_is_declared(tmp_path):
    config = text_config(tmp_path)
    with open(tmp_path / "t.tsv", "a") as file:
        file.write("\nc a bad\trare")  # its hash is below `valid_fraction`
    message = (
        r"t\.tsv:92: no .* 'rare' of this valid example; list all .* or add .*"
        r"lower config\.data\.valid_fraction=0\.2, which holds out"
    )
    with pytest.raises(ValueError, match=message):
        make(config)
    for split in ("valid", "test"):
        (tmp_path / f"{split}.tsv").write_text("text\tlabel\na bad\tno\nb good\trarest")
        setattr(config.data, f"{split}_files", (str(tmp_path / f"{split}.tsv"),))
        config.text_classification.classes = ()
        with pytest.raises(ValueError, match=rf"{split}\.tsv:3: no .* 'rarest' of this {split} ex"):
            make(config)
        config.text_classification.classes = ("no", "yes", "rare", "rarest")
        assert "(1 of them without a training example)" in make(config).description
        config.data.valid_files = (str(tmp_path / "t.tsv"),)


def test_labels_of_one_kind_only_and_unknown_words_are_refused(tmp_path):
    config = text_config(tmp_path)
    config.data.tokenizer = "bytes"
    (tmp_path / "t.tsv").write_text("text\tlabel\n" + "".join(f"{c}\t1\n" for c in "abcdefgh"))
    with pytest.raises(ValueError, match=r"t\.tsv: all \d training examples have the class '1'; "):
        make(config)
    config.data.tokenizer = "words"
    (tmp_path / "t.tsv").write_text("text\tlabel\na b\t1\nb\t0\n")
    (tmp_path / "v.tsv").write_text("text\tlabel\na\t1\nzebra\t0\n")
    config.data.valid_files = (str(tmp_path / "v.tsv"),)
    with pytest.raises(ValueError, match=r"v\.tsv:3: the word 'zebra' does not occur"):
        make(config)


def test_sequences_are_not_split_over_devices_or_segments(tmp_path):
    config = text_config(tmp_path, directory=str(tmp_path / "run"))
    config.mesh.seq = 2
    with pytest.raises(ValueError, match=r"config\.mesh\.seq must be 1 with config\.task='text_"):
        config.validate()
    config.mesh.seq, config.optimizer.segment_length = 1, 12
    with pytest.raises(ValueError, match=r"config\.optimizer\.segment_length needs a task"):
        train(config)


def test_the_command_line_describes_the_fields():
    text = "\n".join(help_lines([]))
    assert "  --config.text_classification.pooling='mean' (str)\n" in text
    assert "  --config.text_classification.text_columns=('text',) (tuple)\n" in text
