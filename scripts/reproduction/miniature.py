"""Small generated data sets under the names of the real ones, for the budget "tiny".

They let every table run within seconds and without any data. The numbers mean nothing.
"""

import lzma
import struct
from pathlib import Path

import numpy as np

from race_jax.train.files import write_whole

WORDS = "the cat a dog my bird sees likes eats fish bread milk".split()
BOOKS = ("bleak-house", "tom-jones")


def write(folder: Path) -> None:
    """Writes all data sets into a folder, unless they are there."""
    rng = np.random.default_rng(0)
    for name, content in {**_texts(rng), **_labeled(rng), **_images(rng)}.items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            data = lzma.compress(content)
            write_whole(path, lambda stream, data=data: stream.write(data))


def _texts(rng: np.random.Generator) -> dict[str, bytes]:
    """Returns texts of random sentences. Each book has its own words."""
    found = {
        f"{name}.{split}.txt.xz": "\n".join(_sentences(rng, WORDS, lines)) + "\n"
        for name in ("ptb/ptb", "wikitext/wikitext-2")
        for split, lines in (("train", 300), ("valid", 60), ("test", 60))
    }
    found["text8/text8.first-6877825-bytes.txt.xz"] = " ".join(_sentences(rng, WORDS, 400))
    for number, book in enumerate(BOOKS):
        own = WORDS[number :: len(BOOKS)]
        found[f"books/train/{book}.md.xz"] = "\n".join(_sentences(rng, own, 200))
    return {name: text.encode() for name, text in found.items()}


def _labeled(rng: np.random.Generator) -> dict[str, bytes]:
    """Returns tables of sentences, whose label is 1 where they begin with the first word."""
    found = {}
    for split, lines in (("train", 64), ("dev", 16), ("test-labelled", 16)):
        rows = [(text, int(text.startswith(WORDS[0]))) for text in _sentences(rng, WORDS, lines)]
        if split == "test-labelled":
            table = ["label\tcontent", *(f"{label}\t{text}" for text, label in rows)]
        else:
            table = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        found[f"sst2/{split}.tsv.xz"] = ("\n".join(table) + "\n").encode()
    return found


def _images(rng: np.random.Generator) -> dict[str, bytes]:
    """Returns IDX files of images of 8 x 8 pixels, whose class is the bright row."""
    found = {}
    for split, count in (("train", 64), ("t10k", 16)):
        labels = np.arange(count) % 8
        pixels = rng.integers(0, 60, (count, 8, 8))
        pixels[np.arange(count), labels] += 180
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            found[f"fashion-mnist/{split}-{kind}-ubyte.xz"] = _idx(array)
    return found


def _idx(array: np.ndarray) -> bytes:
    """Returns an array of bytes in the format of MNIST."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def _sentences(rng: np.random.Generator, words: list[str], count: int) -> list[str]:
    """Returns sentences of 4 to 12 words."""
    lengths = rng.integers(4, 13, count)
    return [" ".join(rng.choice(words, length)) for length in lengths]
