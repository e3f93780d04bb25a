"""Small generated data sets under the names of the real ones, for the budget "tiny".

They let every table run within seconds and without any data. The numbers mean nothing.
"""

import lzma
from pathlib import Path

import numpy as np

WORDS = "the cat a dog my bird sees likes eats fish bread milk".split()


def write(folder: Path) -> None:
    """Writes all data sets into a folder, unless they are there."""
    rng = np.random.default_rng(0)
    for name in ("ptb/ptb", "wikitext/wikitext-2"):
        for split, lines in (("train", 300), ("valid", 60), ("test", 60)):
            _pack(folder / f"{name}.{split}.txt.xz", "\n".join(_sentences(rng, lines)) + "\n")
    text = " ".join(_sentences(rng, 400))
    _pack(folder / "text8" / "text8.first-6877825-bytes.txt.xz", text)


def _sentences(rng: np.random.Generator, count: int) -> list[str]:
    """Returns sentences of 4 to 12 words."""
    lengths = rng.integers(4, 13, count)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def _pack(path: Path, text: str) -> None:
    """Writes a text, packed by xz as the real file is."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(text.encode()))
