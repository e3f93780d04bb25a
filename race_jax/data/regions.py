"""Cuts texts into regions for training and for held-out scores, and regions into windows.

Windows of different splits never share a byte: they lie in different regions of a text, and a gap
of one window is left between two regions.
"""

from collections.abc import Sequence

import numpy as np

from race_jax.data.documents import Document

SPLITS = ("train", "valid", "test")


class Windows(Sequence):
    """Windows of equal length, cut out of texts when they are asked for.

    Args:
        texts: the bytes of each text, uint8.
        spans: for each text, the start and the stop of the region that windows come from.
        length: T, the bytes of a window.
        stride: the bytes from the start of a window to the start of the next one.

    Attributes:
        owner: shape (windows,), the text of each window.

    Example:
        >>> windows = Windows([np.arange(9, dtype=np.uint8)], [(1, 9)], length=3, stride=2)
        >>> [window.tolist() for window in windows]
        [[1, 2, 3], [3, 4, 5], [5, 6, 7]]
    """

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        spans: Sequence[tuple[int, int]],
        *,
        length: int,
        stride: int,
    ):
        starts = [np.arange(start, stop - length + 1, stride) for start, stop in spans]
        self.owner = np.repeat(np.arange(len(texts)), [len(part) for part in starts])
        self._starts = np.concatenate(starts)
        self._texts, self._length = texts, length

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> np.ndarray:
        start = self._starts[index]
        return self._texts[self.owner[index]][start : start + self._length]


def regions(size: int, *, length: int, share: float) -> dict[str, tuple[int, int]]:
    """Divides a text into a region for training, one for validation, and one for the test.

    The held-out regions are at the end of the text, and a gap of one window is left before each.

    Args:
        size: the bytes of the text.
        length: the bytes of a window.
        share: the part of the text that each of the held-out regions gets, in (0, 0.5).

    Returns:
        The start and the stop of the region of each split.

    Raises:
        ValueError: a region is shorter than one window.

    Example:
        >>> regions(100, length=10, share=0.25)
        {'train': (0, 30), 'valid': (40, 65), 'test': (75, 100)}
    """
    held_out = round(share * size)
    test = size - held_out
    valid = test - length - held_out
    train = valid - length
    if min(held_out, train) < length:
        raise ValueError(
            f"{size:,} bytes give no three regions of at least {length:,}, with {share} of the "
            "text for each held-out region and gaps between them"
        )
    return {"train": (0, train), "valid": (valid, valid + held_out), "test": (test, size)}


def author_of(document: Document) -> str:
    r"""Returns the author that the first lines of a text name, after "Author:".

    Raises:
        ValueError: no such line is among the first ten. The message names the file.

    Example:
        >>> author_of(Document("emma.md", b"# Title: Emma\n\n## Author: Jane Austen\n"))
        'Jane Austen'
    """
    for line in document.data.split(b"\n", 10)[:10]:
        _, found, name = line.partition(b"Author:")
        if found and name.strip():
            return name.decode("utf-8", "replace").strip()
    raise ValueError(
        f'{document.name}: none of the first ten lines has the form "Author: NAME"; add one'
    )


def without_header(document: Document) -> np.ndarray:
    r"""Returns the bytes of a text after its lines of title, author and year, uint8.

    The header says what is to be found out, so no window may hold it.

    Example:
        >>> bytes(without_header(Document("emma.md", b"# Title: Emma\n\nEmma Woodhouse")))
        b'Emma Woodhouse'
    """
    rest = document.data
    while rest:
        line, _, after = rest.partition(b"\n")
        words = line.strip().lstrip(b"# ")
        if words and not words.startswith((b"Title:", b"Author:", b"Year:")):
            break
        rest = after
    return np.frombuffer(rest, np.uint8)


def letters_only(text: np.ndarray) -> np.ndarray:
    """Returns the small letters a to z of a text, with single spaces between its words, uint8.

    Quotation marks, dashes, accents and headings often tell the files of books apart by
    themselves, because every file has its own conventions.

    Args:
        text: bytes, uint8.

    Example:
        >>> bytes(letters_only(np.frombuffer(b"# Oh -- yes!", np.uint8)))
        b' oh yes '
    """
    table = np.full(256, ord(" "), np.uint8)
    small = np.arange(ord("a"), ord("z") + 1, dtype=np.uint8)
    table[small] = table[small - 32] = small
    letters = table[text]
    is_space = letters == ord(" ")
    return letters[~(is_space & np.roll(is_space, 1) & (np.arange(len(letters)) > 0))]
