"""Tokenizers that need no other package: bytes, characters and words.

A tokenizer turns text into an array of ids, in the smallest of uint8, uint16 and int32 that holds
the vocabulary. It also has a JSON record, which checkpoints keep.
"""

import abc
import collections
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"
# The number of characters that are encoded at a time. Without it, 100 MB of text would need one
# list of all their words.
PIECE = 1 << 20


class Tokenizer(abc.ABC):
    """The base class of all tokenizers.

    Attributes:
        name: the tokenizer's name in `config.data.tokenizer` and in its record.
        separator: the text between two documents that are joined into one stream.
    """

    name: ClassVar[str]
    separator: ClassVar[str] = "\n"

    @property
    def keeps_text(self) -> bool:
        """Whether every text can be recovered from its ids, if none of them is unknown."""
        return True

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """The number of ids. They start at 0."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`.

        Raises:
            ValueError: the vocabulary lacks a word or character. The error shows it.
        """
        sizes = {np.uint8: 1 << 8, np.uint16: 1 << 16, np.int32: 1 << 31}
        dtype = next(dtype for dtype, size in sizes.items() if self.vocab_size <= size)
        parts = [self._encode_piece(piece).astype(dtype) for piece in pieces(text)]
        return np.concatenate([np.zeros(0, dtype), *parts])

    def encode_all(self, texts: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text. `names` are what errors call the texts."""
        return [self._encode_named(text, name) for text, name in zip(texts, names, strict=True)]

    def _encode_named(self, text: str, name: str) -> np.ndarray:
        try:
            return self.encode(text)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    @abc.abstractmethod
    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the text of `ids`. Raises ValueError for an id outside the vocabulary."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Returns a record of JSON values, from which `from_dict` makes an equal tokenizer."""

    def num_bytes(self, ids: np.ndarray) -> int:
        """Returns the number of UTF-8 bytes of the text that `ids` stand for."""
        return len(self.decode(ids).encode("utf-8"))

    def counted(self, data: bytes) -> bytes:
        """Returns the part of a text that its ids stand for, which is all of it."""
        return data

    def encodes(self, data: bytes, ids: np.ndarray) -> bool:
        """Returns whether the text `counted(data)` can be recovered from its `ids`."""
        return self.decode(ids).encode("utf-8") == data

    def num_unknown(self, ids: np.ndarray) -> int:
        """Returns how many of `ids` stand for text that the vocabulary lacks."""
        return 0

    def _checked(self, ids: np.ndarray | Sequence[int]) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise ValueError(f"ids must lie in [0, {self.vocab_size}), got {ids.min()}…{ids.max()}")
        return ids

    def _encode_piece(self, piece: str) -> np.ndarray:
        """Returns the ids of one piece of a text."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A tokenizer of bytes. It has 256 ids, needs no file, and encodes any text.

    Example:
        >>> ByteTokenizer().encode("é").tolist(), ByteTokenizer().decode([195, 169])
        ([195, 169], 'é')
    """

    name = "bytes"
    separator = "\0"  # a text file does not contain this byte

    @property
    def vocab_size(self) -> int:
        """The number of ids, 256."""
        return 256

    def encode(self, text: str | bytes) -> np.ndarray:
        """Returns the bytes of `text`. If `text` is bytes itself, nothing is copied."""
        data = text.encode("utf-8") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8)

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the text of the bytes. Bytes that are not UTF-8 become U+FFFD."""
        return self._checked(ids).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def num_bytes(self, ids: np.ndarray) -> int:
        """Returns the number of ids, because each stands for one byte."""
        return len(ids)

    def encodes(self, data: bytes, ids: np.ndarray) -> bool:
        """Returns True, because bytes lose nothing."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Returns a record with the name only."""
        return {"name": self.name}


class CharacterTokenizer(Tokenizer):
    """A tokenizer of the characters of a fixed alphabet. Ids follow the order of `alphabet`.

    Example:
        >>> CharacterTokenizer(" ab").encode("abba").tolist()
        [1, 2, 2, 1]
    """

    name = "characters"

    def __init__(self, alphabet: str):
        self.alphabet = alphabet
        codes = _code_points(alphabet)
        # The entry after the highest code point stands for all characters beyond it.
        self._ids = np.full(int(codes.max(initial=0)) + 2, -1, np.int32)
        self._ids[codes] = np.arange(len(codes))
        self._codes = codes

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> "CharacterTokenizer":
        """Returns a tokenizer of the characters that occur in `texts`, in sorted order."""
        found: set[str] = set()
        for text in texts:
            found.update(text)
        return cls("".join(sorted(found)))

    @property
    def vocab_size(self) -> int:
        """The number of characters of the alphabet."""
        return len(self._codes)

    def _encode_piece(self, piece: str) -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(piece), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            raise ValueError(
                f"the character {piece[int(ids.argmin())]!r} does not occur in the training text, "
                "so the alphabet lacks it; --config.data.tokenizer=bytes takes any text"
            )
        return ids

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the text of the characters."""
        return self._codes[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        """Returns a record with the name and the alphabet."""
        return {"name": self.name, "alphabet": self.alphabet}


class WordTokenizer(Tokenizer):
    r"""A tokenizer of words, which are divided by white space.

    With `end_of_line` each line break becomes the token `<eos>`. Otherwise a line break is white
    space like any other. A word outside the vocabulary becomes `<unk>` if the vocabulary has this
    token, and raises an error otherwise.

    Example:
        >>> words = WordTokenizer(["<eos>", "the", "cat"], end_of_line=True)
        >>> words.encode("the cat\n").tolist(), words.decode([1, 2, 0])
        ([1, 2, 0], 'the cat \n')
    """

    name = "words"

    def __init__(self, vocabulary: Sequence[str], end_of_line: bool = False):
        self.vocabulary = tuple(vocabulary)
        self.end_of_line = end_of_line
        self._ids = {word: index for index, word in enumerate(self.vocabulary)}
        self._unknown = self._ids.get(UNKNOWN, -1)

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], *, end_of_line: bool = False, limit: int | None = None
    ) -> "WordTokenizer":
        """Returns a tokenizer of the words of `texts`, the most frequent first.

        Words that are equally frequent are in alphabetical order. With a `limit` on the size of the
        vocabulary, its first word is always `<unk>`, which counts as one of the words.
        """
        counts: collections.Counter[str] = collections.Counter()
        for text in texts:
            for piece in pieces(text):
                counts.update(_words(piece, end_of_line))
        if limit is not None:
            del counts[UNKNOWN]
        words = sorted(counts, key=lambda word: (-counts[word], word))
        if limit is not None:
            words = [UNKNOWN, *words[: limit - 1]]
        return cls(words, end_of_line)

    @property
    def vocab_size(self) -> int:
        """The number of words, including `<unk>` and `<eos>`."""
        return len(self.vocabulary)

    def _encode_piece(self, piece: str) -> np.ndarray:
        words = _words(piece, self.end_of_line)
        known, unknown = self._ids.get, self._unknown
        ids = np.fromiter((known(word, unknown) for word in words), np.int32, count=len(words))
        if ids.size and ids.min() < 0:
            raise ValueError(
                f"the word {words[int(ids.argmin())]!r} does not occur in the training text, and "
                f"the vocabulary has no {UNKNOWN}; --config.data.vocab_limit=SIZE adds one"
            )
        return ids

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the words with spaces between them, and line breaks in place of `<eos>`."""
        words = (self.vocabulary[index] for index in self._checked(ids))
        return " ".join(
            "\n" if self.end_of_line and word == END_OF_LINE else word for word in words
        )

    @property
    def keeps_text(self) -> bool:
        """Returns False, because words do not say what white space was between them."""
        return False

    def counted(self, data: bytes) -> bytes:
        """Returns the text without the spaces at its beginning and at its end."""
        return data.strip(b" ")

    def encodes(self, data: bytes, ids: np.ndarray) -> bool:
        r"""Returns whether all words are known and the white space between them is regular.

        Regular means one space between two words. With `end_of_line`, line breaks have no spaces
        around them, or all have one on each side, as in `" a b \n c \n"`. Spaces at the beginning
        and at the end of the text do not count.
        """
        text, decoded = self.counted(data).decode("utf-8"), self.decode(ids).strip(" ")
        return text in (decoded, re.sub(" ?\n ?", "\n", decoded))

    def num_unknown(self, ids: np.ndarray) -> int:
        """Returns how many of `ids` are `<unk>`, including those that the text itself contains."""
        return int(np.count_nonzero(np.asarray(ids) == self._unknown))

    def to_dict(self) -> dict[str, Any]:
        """Returns a record with the name, the words, and `end_of_line`."""
        return {
            "name": self.name,
            "vocabulary": list(self.vocabulary),
            "end_of_line": self.end_of_line,
        }


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _words(piece: str, end_of_line: bool) -> list[str]:
    return (piece.replace("\n", f" {END_OF_LINE} ") if end_of_line else piece).split()


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """Cuts `text` between words into pieces of `size` characters or a little more.

    If no space follows in time, the piece is cut within a word, at twice that length.
    """
    between_words = re.compile(r"(?<=\S)\s(?=\S)")
    start = 0
    while start < len(text):
        border = between_words.search(text, start + size, start + 2 * size)
        end = border.start() if border else start + 2 * size
        yield text[start:end]
        start = end
