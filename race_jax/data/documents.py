"""Named texts and their splits, before any tokenizer.

In: bytes with the name of the file they came from. Out: a `Corpus` whose held-out part is cut
without splitting a character. Equation: none.
"""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """A named text: `name` is what errors call it, `data` its bytes."""

    name: str
    data: bytes

    def text(self) -> str:
        """The text of the bytes. Raises ValueError naming the document where not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name}: not UTF-8 text (byte {self.data[error.start]:#04x} at offset "
                f"{error.start}); convert the file, or read it with "
                "--config.data.tokenizer=bytes, which takes any bytes"
            ) from error


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents of each split, none empty; `test` may have none."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]
    test: tuple[Document, ...] = ()

    def digest(self) -> str:
        """SHA-256 of all splits, names left out: losses compare only at an equal digest."""
        total = hashlib.sha256()
        for split in (self.train, self.valid, self.test):
            total.update(f"{len(split)};".encode())
            for document in split:
                total.update(f"{len(document.data)};".encode())
                total.update(document.data)
        return total.hexdigest()


def hold_out(
    documents: list[Document], *, characters: int, fraction: float
) -> tuple[list[Document], list[Document]]:
    r"""Holds the end of the text out: its last `characters` if > 0, else about a `fraction`.

    Args:
        documents: at least one, in order.
        characters: held out exactly, off the end of the last document.
        fraction: in (0, 1), of all bytes; whole documents from the end, then part of one, cut at
            the start of a line.

    Returns:
        (documents that are kept, documents that are held out), in order, none empty.

    Raises:
        ValueError: the text is too short to keep anything; names the document.

    Example:
        >>> poem = Document("poem", b"one\ntwo\n")
        >>> kept, held_out = hold_out([poem], characters=0, fraction=0.5)
        >>> kept[0].data, held_out[0].data
        (b'one\n', b'two\n')

    Source: beyond the paper.
    """
    if characters:
        return _hold_out_characters(documents, characters)
    return _hold_out_fraction(documents, fraction)


def _hold_out_characters(
    documents: list[Document], count: int
) -> tuple[list[Document], list[Document]]:
    """Holds out exactly the last `count` characters of the last document."""
    last = documents[-1]
    first_byte = max(0, len(last.data) - 4 * count)  # a UTF-8 character has at most 4 bytes
    codes = np.frombuffer(last.data, np.uint8)[first_byte:]
    starts = np.flatnonzero((codes & 0xC0) != 0x80)  # not a continuation byte
    if len(starts) < count or first_byte + starts[-count] == 0:
        raise ValueError(
            f"{last.name}: has no more than the {count} characters that config.data.valid_tail "
            "holds out; give valid_files, or a smaller valid_tail"
        )
    head, tail = _cut(last, first_byte + int(starts[-count]))
    return [*documents[:-1], head], [tail]


def _hold_out_fraction(
    documents: list[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """Holds out about the last `fraction` of the text: whole documents, then part of one."""
    kept, held_out = list(documents), []
    wanted = max(1, round(fraction * sum(len(document.data) for document in documents)))
    while len(kept) > 1 and wanted >= len(kept[-1].data):
        held_out.append(kept.pop())
        wanted -= len(held_out[-1].data)
    if wanted > 0:
        head, tail = _cut(kept[-1], _line_start(kept[-1].data, wanted))
        if not head.data:
            raise ValueError(
                f"{tail.name}: too short to hold out a fraction {fraction} "
                "(config.data.valid_fraction) of it; give valid_files"
            )
        kept[-1] = head
        held_out.append(tail)
    return kept, held_out[::-1]


def _line_start(data: bytes, wanted: int) -> int:
    """Where the last `wanted` bytes begin, moved back to a line's, a word's or a character's start.

    The search goes back no further than another `wanted` bytes, so one long line cannot be taken
    whole.
    """
    position = max(0, len(data) - wanted)
    for border in (b"\n", b" "):
        found = data.rfind(border, max(0, position - wanted), position)
        if found >= 0:
            return found + 1
    while position > 0 and data[position] & 0xC0 == 0x80:
        position -= 1
    return position


def _cut(document: Document, position: int) -> tuple[Document, Document]:
    """The document before and from byte `position` on."""
    head = Document(document.name, document.data[:position])
    return head, Document(f"{document.name} (held-out end)", document.data[position:])
