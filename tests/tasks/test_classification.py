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
        ((0, 1), (2, 1, 2), "no .* has the class 'c', and 2 of the 3 valid examples have it; add"),
        ((0, 1, 3), (1,), "the train examples have the label 3, and there are 3 classes, counted"),
        ((0, 1), (-1,), "the valid examples have the label -1, and there are 3 classes"),
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
    assert task.description.endswith("3 classes (1 of them without an example), mean length 2")
