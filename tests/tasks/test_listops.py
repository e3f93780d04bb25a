"""ListOps as a task: it is drawn or read, trains, and refuses what it cannot use."""

import pytest

from race_jax.data.listops import evaluate
from race_jax.tasks.listops import ListOps
from tests.tasks.few_steps import few_steps
from tests.train.small import small_config

pytestmark = pytest.mark.once


def listops_config(**options):
    config = small_config()
    config.task, config.data.sequence_length, config.run.batch_size = "listops", 32, 16
    config.model.attention = "softmax"
    small = {"train_examples": 64, "valid_examples": 20, "test_examples": 16, "longer_than": 3}
    for name, value in (small | {"max_depth": 3, "num_buckets": 1} | options).items():
        setattr(config.listops, name, value)
    return config


def test_it_learns_on_drawn_examples():
    config = listops_config()
    config.optimizer.learning_rate = 1e-2
    losses, scores = few_steps(config, 12)
    assert losses[-1] < losses[0] - 0.1
    assert 0 <= scores["accuracy"] <= 1


def test_splits_are_drawn_apart_and_do_not_depend_on_the_run_s_seed():
    def batch(seed, split="valid"):
        config = listops_config()
        config.run.seed = seed
        return next(iter(ListOps(config.validate()).held_out[split]))

    first = batch(0)
    assert first["inputs"].tolist() == batch(1)["inputs"].tolist()
    assert first["inputs"].tolist() != batch(0, "test")["inputs"].tolist()
    for ids, mask, label in zip(first["inputs"], first["mask"], first["labels"], strict=True):
        assert 3 < mask.sum() < 32
        assert evaluate(ids[mask]) == label


def test_files_are_read_in_place_of_drawing(tmp_path):
    (tmp_path / "some.tsv").write_text("5\t[SM 7 8 ]\n2\t[MIN 2 3 ]\n")
    config = listops_config()
    config.data.source, config.data.root = "files", str(tmp_path)
    config.data.train_files = ("some.tsv", "some.tsv")
    with pytest.raises(ValueError, match=r"config\.data\.valid_files must name a file"):
        ListOps(config.validate())
    config.data.valid_files = ("some.tsv",)
    task = ListOps(config.validate())
    assert set(task.held_out) == {"valid"}
    assert task.description.startswith("ListOps, some.tsv, some.tsv; 4 train, 2 valid examples")
    (tmp_path / "long.tsv").write_text("2\t[MIN" + " 2" * 40 + " ]\n")
    config.data.valid_files = ("some.tsv", "long.tsv")
    with pytest.raises(ValueError, match=r"long\.tsv, line 1: the longest expression has 42 token"):
        ListOps(config.validate())


def test_one_digit_only_and_a_digit_that_is_not_trained_are_refused(tmp_path):
    (tmp_path / "two.tsv").write_text("5\t[SM 7 8 ]\n2\t[MIN 2 3 ]\n")
    (tmp_path / "one.tsv").write_text("2\t[MIN 2 3 ]\n2\t[MAX 2 1 ]\n")
    (tmp_path / "nine.tsv").write_text("9\t[MAX 9 3 ]\n2\t[MIN 2 3 ]\n9\t[MAX 9 1 ]\n")
    config = listops_config()
    config.data.source, config.data.root = "files", str(tmp_path)
    config.data.train_files, config.data.valid_files = ("one.tsv",), ("two.tsv",)
    with pytest.raises(
        ValueError, match=r"one\.tsv: all 2 training examples have the class '2'; at"
    ):
        ListOps(config.validate())
    config.data.train_files, config.data.test_files = ("two.tsv",), ("nine.tsv",)
    message = r"nine\.tsv: 2 of the 3 test .* class '9', and no training example has it; add some"
    with pytest.raises(ValueError, match=message):
        ListOps(config.validate())
    config.data.test_files = ()
    assert (
        "10 classes (8 of them without a training example)"
        in ListOps(config.validate()).description
    )


def test_too_few_drawn_examples_are_refused_by_the_name_of_their_field():
    for count in (1, 4, 16):
        config = listops_config(train_examples=count)
        with pytest.raises(ValueError, match=rf"raise config\.listops\.train_examples={count}$"):
            ListOps(config.validate())


def test_what_cannot_be_drawn_is_refused():
    for name, value, words in (
        ("train_examples", 0, "must be >= 1, got 0"),
        ("max_depth", 1, "must be >= 2, got 1"),
        ("pooling", "max", "must be one of mean, cls; got 'max'"),
    ):
        with pytest.raises(ValueError, match=rf"config\.listops\.{name} {words}"):
            listops_config(**{name: value}).validate()
