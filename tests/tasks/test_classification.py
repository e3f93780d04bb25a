"""What all classifications check of their labels. Their own tests train them."""

import numpy as np
import pytest

from race_jax.data.examples import Examples
from race_jax.tasks.classification import Classification
from tests.train.small import small_config

pytestmark = pytest.mark.once


def labeled(*labels):
    return Examples([np.array([1, 2])] * len(labels), np.array(labels, np.int32))


@pytest.mark.parametrize(
    ("train", "valid", "message"),
    [
        ((1, 1), (1,), "all 2 training examples have the class 'b'; at least two classes are"),
        ((0, 1), (2, 1, 2), "^2 of the 3 valid examples have the class 'c', and no .* has it; add"),
        ((0, 1, 3), (1,), "the train examples have the label 3, and there are 3 classes, counted"),
        ((0, 1), (-1,), "the valid examples have the label -1, .*; correct the label, or add its"),
    ],
)
def test_labels_that_cannot_be_learned_are_named(train, valid, message):
    config = small_config()
    config.task, config.model.attention = "listops", "softmax"
    splits = {"train": labeled(*train), "valid": labeled(*valid)}
    with pytest.raises(ValueError, match=message):
        Classification(config.validate(), splits, classes="abc", vocab_size=3)
    splits = {"train": labeled(0, 1), "valid": labeled(1)}
    task = Classification(config, splits, classes="abc", vocab_size=3)
    assert task.description.endswith(
        "3 classes (1 of them without a training example), mean length 2; training examples by "
        "class: a (1), b (1), c (0)"
    )


@pytest.mark.parametrize(
    ("valid_files", "message"),
    [
        (
            (),
            r"^t\.txt: 1 of the 2 valid .*, lower config\.data\.valid_fraction=0\.05, which holds",
        ),
        (
            ("v.txt",),
            r"^v\.txt: 1 of the 2 valid examples .* it; add some .* leave them out of the",
        ),
    ],
)
def test_a_class_that_is_not_trained_is_told_with_its_file_and_what_to_change(valid_files, message):
    config = small_config()
    config.task, config.model.attention, config.data.source = "listops", "softmax", "files"
    config.data.train_files, config.data.valid_files = ("t.txt",), valid_files
    splits = {"train": labeled(0, 1), "valid": labeled(2, 1)}
    with pytest.raises(ValueError, match=message):
        Classification(config.validate(), splits, classes="abc", vocab_size=3)
    splits["valid"] = labeled(7)
    with pytest.raises(ValueError, match=rf"^{(valid_files or ('t.txt',))[0]}: the valid examples"):
        Classification(config, splits, classes="abc", vocab_size=3)


def test_a_declared_class_may_occur_in_held_out_examples_only():
    config = small_config()
    config.task, config.model.attention = "listops", "softmax"
    splits = {"train": labeled(0, 1), "valid": labeled(2)}
    options = {"classes": "abc", "vocab_size": 3, "declared": True}
    task = Classification(config.validate(), splits, **options)
    assert next(iter(task.held_out["valid"]))["labels"][0] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"valid": None}, r"splits must have 'valid', got \['train'\]"),
        (
            {"train": Examples([np.array([1])] * 2, np.array([0.0, 1.0]))},
            "be integers, got float64",
        ),
        (
            {"train": Examples([np.array([1]), np.array([1, 3])], [0, 1])},
            "example 1 has the .* 1 to 3",
        ),
        (
            {"valid": Examples([np.array([-1, 2])], [0])},
            "valid example 0 .* -1 to 2, and vocab_size=3",
        ),
    ],
)
def test_examples_that_a_classifier_cannot_read_are_named(changes, message):
    config = small_config()
    config.task, config.model.attention = "listops", "softmax"
    splits = {"train": labeled(0, 1), "valid": labeled(1)} | changes
    splits = {name: split for name, split in splits.items() if split is not None}
    with pytest.raises(ValueError, match=message):
        Classification(config.validate(), splits, classes="ab", vocab_size=3)
