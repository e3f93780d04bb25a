"""Image classification: what a model reads, a few steps of training, and what is refused."""

import itertools
import struct

import numpy as np
import pytest

from race_jax.tasks.images import ImageClassification
from tests.tasks.few_steps import few_steps
from tests.train.small import small_config

pytestmark = pytest.mark.once


def write_idx(path, array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def folder(tmp_path):
    """Images of 6 x 6 pixels, whose class is the bright row."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 12)):
        labels = np.arange(count) % 6
        pixels = rng.integers(0, 60, (count, 6, 6))
        pixels[np.arange(count), labels] += 180
        write_idx(tmp_path / f"{split}-images", pixels)
        write_idx(tmp_path / f"{split}-labels", labels)
    return tmp_path


def images_config(folder, **options):
    config = small_config()
    config.task, config.data.sequence_length, config.run.batch_size = "images", 9, 16
    config.model.attention, config.model.positions, config.model.max_length = (
        "softmax",
        "learned",
        9,
    )
    config.data.source, config.data.root = "files", str(folder)
    config.data.train_files = ("train-images", "train-labels")
    config.data.test_files = ("test-images", "test-labels")
    config.data.valid_fraction = 0.2
    for name, value in ({"patch_size": 2, "pad": 1} | options).items():
        setattr(config.images, name, value)
    return config


def test_it_learns(folder):
    config = images_config(folder)
    config.optimizer.learning_rate = 1e-2
    losses, scores = few_steps(config, 20)
    assert losses[-1] < losses[0] - 0.3
    assert 0 <= scores["accuracy"] <= 1


def test_inputs_are_normalized_and_only_training_images_change(folder):
    config = images_config(folder, augment=False, patch_size=1)
    config.data.sequence_length = config.model.max_length = 36
    task = ImageClassification(config.validate())
    batches = list(itertools.islice(task.train, 3))  # one epoch of 48 images
    pixels = np.concatenate([batch["inputs"] for batch in batches])
    assert pixels.shape == (48, 36, 1)
    np.testing.assert_allclose((pixels.mean(), pixels.std()), (0, 1), atol=1e-5)
    valid = next(iter(task.held_out["valid"]))
    assert valid["weights"].sum() == 12
    changed = ImageClassification(images_config(folder).validate())
    same = ImageClassification(images_config(folder, augment=False).validate())
    assert (next(iter(changed.train))["inputs"] != next(iter(same.train))["inputs"]).any()
    for split in ("valid", "test"):
        one, other = (next(iter(task.held_out[split]))["inputs"] for task in (changed, same))
        np.testing.assert_array_equal(one, other)
    again = ImageClassification(images_config(folder).validate())
    np.testing.assert_array_equal(
        next(iter(changed.train))["inputs"], next(iter(again.train))["inputs"]
    )


def test_what_does_not_fit_is_refused(folder):
    for options, length, words in (
        ({"patch_size": 4}, 9, r"config\.images\.patch_size must divide the images' 6 x 6, got 4"),
        ({}, 10, r"sequence_length must be 9 for images of 6 x 6 in patches of 2 x 2, got 10"),
        ({"patch_size": 0}, 9, r"config\.images\.patch_size must be >= 1, got 0"),
    ):
        config = images_config(folder, **options)
        config.data.sequence_length, config.model.max_length = length, 16
        with pytest.raises(ValueError, match=words):
            ImageClassification(config.validate())
    config = images_config(folder)
    write_idx(folder / "test-images", np.zeros((12, 6, 7)))
    with pytest.raises(ValueError, match=r"config\.data\.test_files: images of \(6, 7, 1\)"):
        ImageClassification(config.validate())
    config.data.source = "stdlib"
    with pytest.raises(ValueError, match=r"source must be files .*task=\"images\", got 'stdlib'"):
        ImageClassification(config.validate())


def test_a_class_that_is_only_held_out_and_one_class_only_are_refused(folder):
    config = images_config(folder)
    write_idx(folder / "test-labels", np.arange(12) % 6 + 1)
    message = (
        r"test-labels: 2 of the 12 test examples have the class '6', and no training example has"
    )
    with pytest.raises(ValueError, match=message):
        ImageClassification(config.validate())
    write_idx(folder / "train-labels", np.full(60, 3))
    with pytest.raises(ValueError, match=r"all 48 training examples have the class '3'; at least"):
        ImageClassification(config.validate())
