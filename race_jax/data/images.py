"""Reads labeled images: IDX files, such as Fashion-MNIST's, and archives of JPEG files.

The result is pixels (images, height, width, channels) uint8 and labels (images,). Files may be
packed by gzip, bzip2, xz or zip. Every error names the file, and the image where there is one.
"""

import dataclasses
import hashlib
import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from race_jax.data.sources import read_unpacked
from race_jax.extras import require

_UBYTE = 8  # the code of bytes in an IDX header; no other numbers are used for images


@dataclasses.dataclass(frozen=True)
class Images:
    """Labeled images.

    Attributes:
        pixels: shape (images, height, width, channels) uint8.
        labels: shape (images,) int32.
        classes: the names of the classes, in the order of the labels.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Images":
        """Returns some of the images."""
        return dataclasses.replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def digest(self) -> str:
        """Returns the SHA-256 of all pixels and labels."""
        total = hashlib.sha256(f"{self.pixels.shape};".encode())
        total.update(np.ascontiguousarray(self.pixels))
        total.update(np.ascontiguousarray(self.labels))
        return total.hexdigest()


def read_images(paths: Sequence[Path], num_classes: int = 10) -> Images:
    """Reads the images of one split.

    Args:
        paths: an IDX file of images and one of labels, or an archive of JPEG files.
        num_classes: the number of classes of IDX files, whose labels are 0 to num_classes - 1.

    Raises:
        ValueError: a file cannot be read. The message names it.
    """
    if len(paths) == 1:
        return read_jpeg_archive(paths[0])
    if len(paths) != 2:
        raise ValueError(
            f"{paths[0]} and {len(paths) - 1} more: a split is one archive of JPEG files, or one "
            "IDX file of images and one of labels"
        )
    return read_idx_pair(*paths, num_classes)


def read_idx_pair(images: Path, labels: Path, num_classes: int) -> Images:
    """Reads an IDX file of images (images, height, width) and one of labels (images,).

    Raises:
        ValueError: a file is damaged, or the files do not belong together. The message names it.
    """
    pixels, numbers = read_idx(images, 3), read_idx(labels, 1)
    if len(pixels) != len(numbers):
        raise ValueError(f"{labels}: has {len(numbers)} labels for {len(pixels)} images ({images})")
    strange = np.flatnonzero(numbers >= num_classes)
    if len(strange):
        raise ValueError(
            f"{labels}: label {numbers[strange[0]]} of image {strange[0]} is not in "
            f"[0, {num_classes})"
        )
    classes = tuple(map(str, range(num_classes)))
    return Images(pixels[..., None], numbers.astype(np.int32), classes)


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads an IDX file of bytes.

    The header is two bytes 0, the code 8 of bytes, the rank, and each size in 4 bytes, the highest
    byte first.

    Args:
        path: the file.
        rank: the rank that the array must have.

    Raises:
        ValueError: the file is not such a file, or is too short or too long. The message names it.
    """
    data = read_unpacked(path)
    if data[:4] != bytes([0, 0, _UBYTE, rank]):
        raise ValueError(
            f"{path}: an IDX file of bytes with {rank} axes begins with the bytes 0 0 {_UBYTE} "
            f"{rank}, but this one with {' '.join(map(str, data[:4]))}"
        )
    start = 4 + 4 * rank
    header = data[4:start].ljust(4 * rank, b"\0")
    shape = tuple(map(int, np.frombuffer(header, ">u4")))
    if len(data) - start != math.prod(shape) or not math.prod(shape):
        raise ValueError(
            f"{path}: the header announces {' x '.join(map(str, shape))} bytes, and "
            f"{max(len(data) - start, 0):,} follow; the file is damaged or truncated, so fetch it "
            "again"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def read_jpeg_archive(path: Path) -> Images:
    """Reads a tar archive of JPEG files ".../CLASS/NAME.jpg". All images must have one size.

    The classes are in alphabetical order, and the images in the order of the archive.

    Raises:
        ValueError: the archive or a file in it is damaged. The message names both.
        ImportError: Pillow is not installed.
    """
    require("reading JPEG files", "images", {"PIL": "pillow"})
    names, arrays = [], []
    for name, data in _members(path):
        pixels = _decoded(path, len(arrays), name, data)
        if arrays and pixels.shape != arrays[0].shape:
            raise ValueError(
                f"{path}, image {len(arrays)} ({name}): is of {_size(pixels)} pixels, and the "
                f"images before it are of {_size(arrays[0])}"
            )
        names.append(PurePosixPath(name).parent.name)
        arrays.append(pixels)
    if not arrays:
        raise ValueError(f"{path}: the archive holds no file CLASS/NAME.jpg")
    classes, labels = np.unique(names, return_inverse=True)
    return Images(np.stack(arrays), labels.astype(np.int32), tuple(map(str, classes)))


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the names and the contents of the JPEG files of an archive."""
    data = read_unpacked(path)
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            for entry in archive:
                if entry.isfile() and entry.name.lower().endswith((".jpg", ".jpeg")):
                    yield entry.name, archive.extractfile(entry).read()
            # A bad header inside an archive ends the loop as the zeros at its end do.
            rest = data[archive.offset :]
            if len(rest) < tarfile.BLOCKSIZE or any(rest):
                raise tarfile.ReadError(f"no entry and no end at byte {archive.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path}: the tar archive is damaged or truncated ({error}); fetch it again"
        ) from error


def _decoded(path: Path, index: int, name: str, data: bytes) -> np.ndarray:
    """Returns the pixels of a JPEG file, (height, width, 3)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path}, image {index} ({name}): is no whole JPEG file: {error}"
        ) from error


def _size(pixels: np.ndarray) -> str:
    return " x ".join(map(str, pixels.shape[:2]))


def greyscale(pixels: np.ndarray) -> np.ndarray:
    """Returns the brightness of colors, 0.299 R + 0.587 G + 0.114 B, (..., 1) uint8.

    Args:
        pixels: shape (..., 3) uint8, or (..., 1), which are returned unchanged.

    Example:
        >>> greyscale(np.array([[255, 0, 0], [90, 90, 90]], np.uint8)).tolist()
        [[76], [90]]
    """
    if pixels.shape[-1] == 1:
        return pixels
    return np.rint(pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)).astype(np.uint8)


class Patches(Sequence):
    """Images as sequences of square patches, row by row, with numbers of mean 0 and deviation 1.

    Args:
        pixels: shape (images, height, width, channels) uint8.
        mean, deviation: of each channel, shape (channels,).
        size: the side of a patch, which divides height and width. With 1 a token is a pixel.

    Example:
        >>> pixels = np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1)
        >>> Patches(pixels, np.zeros(1), np.ones(1), 2)[0].astype(int).tolist()[:2]
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def __init__(self, pixels: np.ndarray, mean: np.ndarray, deviation: np.ndarray, size: int):
        self.pixels, self.size = pixels, size
        self.mean, self.deviation = mean.astype(np.float32), deviation.astype(np.float32)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> np.ndarray:
        return cut((self.pixels[index] - self.mean) / self.deviation, self.size)


def cut(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts an image (height, width, channels) into patches (tokens, size * size * channels)."""
    height, width, channels = image.shape
    parts = image.reshape(height // size, size, width // size, size, channels)
    return parts.swapaxes(1, 2).reshape(-1, size * size * channels)


def joined(patches: np.ndarray, shape: tuple[int, int, int], size: int) -> np.ndarray:
    """Returns the image (height, width, channels) that was cut into patches."""
    height, width, channels = shape
    parts = patches.reshape(height // size, width // size, size, size, channels)
    return parts.swapaxes(1, 2).reshape(shape)


@dataclasses.dataclass(frozen=True)
class FlipAndCrop:
    """Flips half of the images, and shifts each by up to `pad` pixels in both directions.

    A shift is a crop of the image with a border of black pixels, as wide as `pad`.

    Attributes:
        shape: height, width and channels.
        size: the side of a patch.
        black: the normalized value of black in each channel.
        pad: the width of the border.
    """

    shape: tuple[int, int, int]
    size: int
    black: tuple[float, ...]
    pad: int = 4

    def __call__(self, patches: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns the changed patches of one image."""
        height, width, _ = self.shape
        image = joined(patches, self.shape, self.size)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        canvas = np.empty(
            (height + 2 * self.pad, width + 2 * self.pad, len(self.black)), np.float32
        )
        canvas[:] = self.black
        canvas[self.pad : -self.pad or None, self.pad : -self.pad or None] = image
        top, left = rng.integers(0, 2 * self.pad + 1, 2)
        return cut(canvas[top : top + height, left : left + width], self.size)
