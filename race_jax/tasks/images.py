"""Image classification: pixels, or square patches of them, are the tokens of a sequence.

A model of the kind of ViT reads them in both directions, with a learned first token for the head.
"""

import dataclasses

import numpy as np

from race_jax.data.examples import Examples
from race_jax.data.images import FlipAndCrop, Images, Patches, greyscale, read_images
from race_jax.data.sources import named_paths
from race_jax.records import at_least
from race_jax.tasks.classification import Classification, ClassificationConfig


@dataclasses.dataclass
class ImagesConfig(ClassificationConfig):
    """Image classification.

    `config.data.train_files` names an IDX file of images and one of labels, or an archive of JPEG
    files, and so do `valid_files` and `test_files`. If there are no validation files, a share
    `config.data.valid_fraction` of the training images is held out. It is the same for every seed.

    Attributes:
        pooling: what the head reads: "mean" is the mean over the tokens, and "cls" is a learned
            token before the first one.
        num_buckets: has no effect, because all images have one size.
        patch_size: the side of the square that becomes a token. With 1 a token is a pixel.
        grey: whether the colors are turned into brightness.
        augment: whether training images are flipped and shifted at random.
        pad: the largest shift, in pixels.
    """

    pooling: str = "cls"
    num_buckets: int = 1
    patch_size: int = 1
    grey: bool = False
    augment: bool = True
    pad: int = 4

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        super().validate()
        at_least("patch_size", self.patch_size, 1)
        at_least("pad", self.pad, 0)


class ImageClassification(Classification):
    """The class of an image.

    Source: Dosovitskiy et al. 2021 (ViT); with patches of one pixel, the paper's image tasks.
    """

    config_class = ImagesConfig

    def __init__(self, config):
        options, length = config.task_config(), config.data.sequence_length
        images = _read(config.data, options.grey)
        shape, size = images["train"].pixels.shape[1:], options.patch_size
        _check_sizes(shape, size, length)
        mean, deviation = _channel_statistics(images["train"].pixels)
        splits = {
            name: Examples(
                Patches(split.pixels, mean, deviation, size),
                split.labels,
                np.full(len(split), length),
            )
            for name, split in images.items()
        }
        black = tuple(map(float, -mean / deviation))
        augment = FlipAndCrop(shape, size, black, options.pad) if options.augment else None
        super().__init__(
            config,
            splits,
            classes=images["train"].classes,
            channels=size * size * shape[2],
            record={"mean": mean.tolist(), "deviation": deviation.tolist()},
            digests={f"the {name} images": split.digest() for name, split in images.items()},
            augment=augment,
            description=f"images of {' x '.join(map(str, shape))}, patches of {size} x {size}; ",
        )


def _read(data, grey: bool) -> dict[str, Images]:
    """Reads the images of each split."""
    if data.source != "files":
        raise ValueError(
            f'config.data.source must be files for config.task="images", got {data.source!r}'
        )
    images = {
        name: read_images(named_paths(data, f"{name}_files"))
        for name in ("train", "valid", "test")
        if getattr(data, f"{name}_files")
    }
    first = images["train"]
    for name, split in images.items():
        if split.pixels.shape[1:] != first.pixels.shape[1:] or split.classes != first.classes:
            raise ValueError(
                f"config.data.{name}_files: images of {split.pixels.shape[1:]} and classes "
                f"{', '.join(split.classes)}; the training images have {first.pixels.shape[1:]} "
                f"and {', '.join(first.classes)}"
            )
    if "valid" not in images:
        order = np.random.default_rng(0).permutation(len(first))
        count = max(1, round(data.valid_fraction * len(first)))
        kept, held_out = first.take(order[count:]), first.take(order[:count])
        images = {"train": kept, "valid": held_out} | {
            name: split for name, split in images.items() if name != "train"
        }
    if grey:
        images = {
            name: dataclasses.replace(split, pixels=greyscale(split.pixels))
            for name, split in images.items()
        }
    return images


def _channel_statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of each channel, (channels,) float64."""
    counts = np.stack([np.bincount(x.ravel(), minlength=256) for x in np.moveaxis(pixels, -1, 0)])
    shares, values = counts / counts.sum(axis=1, keepdims=True), np.arange(256)
    mean = shares @ values
    variance = np.sum(shares * (values - mean[:, None]) ** 2, axis=1)
    return mean, np.sqrt(np.maximum(variance, 1.0))  # images of one color stay finite


def _check_sizes(shape: tuple[int, ...], size: int, length: int) -> None:
    height, width, _ = shape
    if height % size or width % size:
        raise ValueError(
            f"config.images.patch_size must divide the images' {height} x {width}, got {size}"
        )
    tokens = height * width // size**2
    if length != tokens:
        raise ValueError(
            f"config.data.sequence_length must be {tokens} for images of {height} x {width} in "
            f"patches of {size} x {size}, got {length}"
        )
