"""Named texts and their splits, before they are tokenized.

A text is a string of bytes with the name of its file. Texts form a `Corpus`, whose held-out part
never begins in the middle of a character.
"""

import dataclasses
import hashlib

import numpy as np


@dataclasses.dataclass(frozen=True)
class Document:
    """The bytes `data` of a text, and the `name` that errors call it."""

    name: str
    data: bytes

    def text(self) -> str:
        """Returns the text. Raises ValueError naming the document if the bytes are not UTF-8."""
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
    """The documents of each split. No document is empty. `test` may have no documents."""

    train: tuple[Document, ...]
    valid: tuple[Document, ...]
    test: tuple[Document, ...] = ()

    def digest(self) -> str:
        """Returns the SHA-256 of all splits, without their names.

        The losses of two runs can be compared only if the digests are equal.
        """
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
    r"""Holds out the end of the text.

    If `characters` is positive, exactly that number of characters is held out, from the end of the
    last document. Otherwise about a `fraction` of the text is held out.

    Args:
        documents: the documents in order, at least one.
        characters: the number of characters to hold out, or 0.
        fraction: the share of all bytes to hold out, in (0, 1). Whole documents are taken from the
            end, and then a part of one, which begins at the start of a line.

    Returns:
        The documents that are kept and those that are held out, in order. None of them is empty.

    Raises:
        ValueError: the text is so short that nothing would be kept. The error names the document.

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
    """Holds out about the last `fraction` of the text, as whole documents and a part of one."""
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
    """Returns about where the last `wanted` bytes begin.

    The position is moved back to the start of a line, or else of a word, or else of a character. It
    is moved back by no more than another `wanted` bytes, so that one long line is not taken whole.
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
    """Returns the part of the document before byte `position`, and the part from there on."""
    head = Document(document.name, document.data[:position])
    return head, Document(f"{document.name} (held-out end)", document.data[position:])
