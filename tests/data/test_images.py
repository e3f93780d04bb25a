"""Images: IDX files and archives of JPEG files, patches, flips and crops, and damaged files."""

import io
import lzma
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from race_jax.data.images import (
    FlipAndCrop,
    Patches,
    cut,
    greyscale,
    joined,
    read_idx,
    read_images,
)


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def jpeg(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


def archive(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def pair(tmp_path, rng):
    """The paths of two packed IDX files, with what they hold."""
    pixels, labels = rng.integers(0, 256, (5, 4, 6)), np.array([3, 0, 9, 3, 1])
    paths = [tmp_path / "images.xz", tmp_path / "labels"]
    paths[0].write_bytes(lzma.compress(idx(pixels)))
    paths[1].write_bytes(idx(labels))
    return paths, pixels, labels


def test_an_idx_pair_is_read(pair):
    paths, pixels, labels = pair
    images = read_images(paths)
    np.testing.assert_array_equal(images.pixels[..., 0], pixels)
    np.testing.assert_array_equal(images.labels, labels)
    assert images.classes == tuple("0123456789")
    assert images.take(np.array([1])).labels.tolist() == [0]
    assert images.digest() != images.take(np.arange(4)).digest()


def test_bad_idx_files_are_named(pair, tmp_path):
    paths, pixels, labels = pair
    whole = idx(pixels)
    packed = lzma.compress(whole)
    bad = tmp_path / "bad"
    for content, words in (
        (whole[:-1], r"announces 5 x 4 x 6 bytes, and 119 follow; .*truncated"),
        (whole + b"0", r"announces 5 x 4 x 6 bytes, and 121 follow"),
        (whole[:9], r"announces 5 x 0 x 0 bytes, and 0 follow"),
        (b"\0\0\x0d\3" + whole[4:], r"begins with the bytes 0 0 8 3, but this one with 0 0 13 3"),
        (idx(labels), r"begins with the bytes 0 0 8 3, but this one with 0 0 8 1"),
        (b"", "the file is empty"),
        (packed[:-20], "its xz data breaks off: the file is truncated"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad: .*{words}"):
            read_idx(bad, 3)
    with pytest.raises(ValueError, match="missing: no such file"):
        read_idx(tmp_path / "missing", 3)
    bad.write_bytes(idx(labels[:4]))
    with pytest.raises(ValueError, match=r"bad: has 4 labels for 5 images"):
        read_images([paths[0], bad])
    bad.write_bytes(idx(labels + np.array([0, 0, 1, 0, 0])))
    with pytest.raises(ValueError, match=r"bad: label 10 of image 2 is not in \[0, 10\)"):
        read_images([paths[0], bad])
    with pytest.raises(ValueError, match=r"images\.xz and 2 more: a split is one archive"):
        read_images([*paths, bad])


def test_an_archive_of_jpeg_files_is_read_and_bad_files_are_named(tmp_path):
    colors = {"red": (250, 0, 0), "blue": (0, 0, 250)}
    files = {
        f"train/{name}/{i}.jpg": jpeg(np.full((8, 8, 3), color, np.uint8))
        for i in range(2)
        for name, color in colors.items()
    }
    path = tmp_path / "images.tar.xz"
    path.write_bytes(lzma.compress(archive(files)))
    images = read_images([path])
    assert images.classes == ("blue", "red")
    assert images.labels.tolist() == [1, 0, 1, 0]
    assert images.pixels.shape == (4, 8, 8, 3)
    assert np.abs(images.pixels[0, 0, 0] - np.array(colors["red"])).max() <= 8
    name, data = "train/red/1.jpg", files["train/red/1.jpg"]
    big = jpeg(np.zeros((8, 9, 3), np.uint8))
    for changed, words in (
        (archive(files | {name: data[: len(data) // 2]}), r", image 2 \(train/red/1\.jpg\): is no"),
        (archive(files | {name: b"text"}), r", image 2 \(train/red/1\.jpg\): is no whole JPEG"),
        (archive(files | {name: big}), r", image 2 .* is of 8 x 9 pixels, .* are of 8 x 8"),
        (archive({"readme.txt": b"none"}), r": the archive holds no file CLASS/NAME\.jpg"),
        (archive(files)[:1500], r": the tar archive is damaged or truncated"),
        (archive(files).rstrip(b"\0")[:-700], r": the tar archive is damaged or truncated"),
        (archive(files).replace(b"train/blue/1", b"train/blue/2"), r": .* \(no entry and no end"),
        (b"no archive" * 100, r": the tar archive is damaged or truncated"),
    ):
        path.write_bytes(lzma.compress(changed))
        with pytest.raises(ValueError, match=rf"images\.tar\.xz{words}"):
            read_images([path])


def test_without_pillow_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"needs pillow, which the extra 'images'"):
        read_images([tmp_path / "images.tar"])


def test_patches_are_squares_in_reading_order_and_can_be_joined(rng):
    pixels = rng.integers(0, 256, (2, 4, 6, 3)).astype(np.uint8)
    mean, deviation = np.array([1.0, 2.0, 3.0]), np.array([2.0, 4.0, 8.0])
    tokens = Patches(pixels, mean, deviation, 2)[1]
    assert tokens.shape == (6, 12)
    assert tokens.dtype == np.float32
    want = (pixels[1, 2:4, 0:2] - mean) / deviation  # the fourth patch begins the second row
    np.testing.assert_allclose(tokens[3], want.ravel(), rtol=1e-6)
    np.testing.assert_array_equal(joined(cut(pixels[0], 2), (4, 6, 3), 2), pixels[0])
    np.testing.assert_array_equal(cut(pixels[0], 1), pixels[0].reshape(24, 3))


def test_brightness_is_that_of_pillow(rng):
    pixels = rng.integers(0, 256, (7, 7, 3)).astype(np.uint8)
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    assert np.abs(greyscale(pixels)[..., 0].astype(int) - grey).max() <= 1
    assert greyscale(pixels[..., :1]) is not None


def test_flips_and_crops_are_shifts_of_the_image_or_of_its_mirror_image(rng):
    """Every result is found among all shifts, and the seed decides which one it is."""
    image = rng.normal(size=(4, 4, 2)).astype(np.float32)
    change = FlipAndCrop((4, 4, 2), 2, (-1.0, -2.0), pad=1)
    allowed = {}
    for flipped in (False, True):
        source = image[:, ::-1] if flipped else image
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                shifted = np.empty_like(image)
                shifted[:] = (-1.0, -2.0)
                for y in range(4):
                    for x in range(4):
                        if 0 <= y + down < 4 and 0 <= x + right < 4:
                            shifted[y, x] = source[y + down, x + right]
                allowed[shifted.tobytes()] = (flipped, down, right)
    seen = {
        allowed[joined(change(cut(image, 2), np.random.default_rng(seed)), (4, 4, 2), 2).tobytes()]
        for seed in range(300)
    }
    assert len(seen) == 18
    still = FlipAndCrop((4, 4, 2), 2, (-1.0, -2.0), pad=0)(cut(image, 2), np.random.default_rng(0))
    assert still.tobytes() in {cut(x, 2).tobytes() for x in (image, image[:, ::-1])}


@pytest.mark.data
def test_the_real_sets_have_the_published_counts(data_root):
    folder = data_root / "fashion-mnist"
    for split, count in (("train", 60_000), ("t10k", 10_000)):
        names = (f"{split}-images-idx3-ubyte.xz", f"{split}-labels-idx1-ubyte.xz")
        images = read_images([folder / name for name in names])
        assert images.pixels.shape == (count, 28, 28, 1)
        assert np.bincount(images.labels).tolist() == [count // 10] * 10
        if split == "train":
            assert images.pixels.mean() / 255 == pytest.approx(0.2860, abs=5e-5)
            assert images.pixels.std() / 255 == pytest.approx(0.3530, abs=5e-5)
    images = read_images([data_root / "cifar10-jpeg" / "test.tar.xz"])
    assert images.pixels.shape == (10_000, 32, 32, 3)
    assert np.bincount(images.labels).tolist() == [1000] * 10
    assert images.classes[0::9] == ("airplane", "truck")
    means = images.pixels.mean((0, 1, 2)) / 255
    np.testing.assert_allclose(means, (0.489, 0.481, 0.447), atol=0.01)  # those of the train split
