"""Byte-pair tokenizers, which use the optional package `tokenizers`.

A `BytePairTokenizer` is read from a JSON file of that package, or trained on text.
"""

import functools
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from race_jax.data.sources import read_file
from race_jax.data.vocabulary import Tokenizer, pieces

BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte, in tokenizers with byte fallback
# Letters, marks and white space that a normalizer or a form of words may change.
PROBE = " The  caf\u00e9, cafe\u0301\n\tend\u3000\ufb01 \U00013000\r\n "
# The number of texts that are encoded at a time. The package's records of them are large.
MOST_TEXTS = 1 << 10


class BytePairTokenizer(Tokenizer):
    """A tokenizer of the optional package `tokenizers`, given as its JSON text.

    Special tokens are never added. A long text is encoded in pieces of about a million characters
    that end between two words.
    """

    name = "bpe"

    def __init__(self, json_text: str):
        self.json_text = json_text
        tokenizers = _tokenizers()
        try:
            self._inner = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"not a `tokenizers` JSON file: {error}") from error
        # A file may say that texts are cut or padded to the length that some model takes. Here
        # texts keep their length.
        self._inner.no_truncation()
        self._inner.no_padding()
        # This letter is rare. A tokenizer without an unknown token and without byte fallback drops
        # it.
        if not self._encode_piece("\U00013000").size:
            raise ValueError(
                "this tokenizer silently drops characters that it does not know; take one with "
                "byte-level pieces, byte fallback or an unknown token"
            )

    @classmethod
    def from_texts(cls, texts: Iterable[str], *, vocab_size: int) -> "BytePairTokenizer":
        """Trains byte-level pairs on `texts`. `vocab_size` includes the 256 bytes."""
        if vocab_size < 256:
            raise ValueError(
                f"config.data.vocab_limit must be >= 256 for byte-level pairs, got {vocab_size}"
            )
        tokenizers = _tokenizers()
        inner = tokenizers.Tokenizer(tokenizers.models.BPE())
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator((piece for text in texts for piece in pieces(text)), trainer)
        return cls(inner.to_str())

    @functools.cached_property
    def vocab_size(self) -> int:
        """The highest id plus one."""
        return max(self._inner.get_vocab(with_added_tokens=True).values()) + 1

    def _encode_piece(self, piece: str) -> np.ndarray:
        # The package encodes the parts in parallel, on all cores.
        parts = list(pieces(piece, size=1 << 16))
        encoded = self._inner.encode_batch_fast(parts, add_special_tokens=False)
        return np.array([index for part in encoded for index in part.ids], np.int64)

    def encode_all(self, texts: Sequence[str], names: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text. The package encodes the texts in parallel."""
        del names  # every text can be encoded
        encode = functools.partial(self._inner.encode_batch_fast, add_special_tokens=False)
        starts = range(0, len(texts), MOST_TEXTS)
        parts = (encode(list(texts[start : start + MOST_TEXTS])) for start in starts)
        return [np.array(text.ids, np.int32) for part in parts for text in part]

    def decode(self, ids: np.ndarray | Sequence[int]) -> str:
        """Returns the text, with its special tokens."""
        return self._inner.decode(self._checked(ids).tolist(), skip_special_tokens=False)

    def num_bytes(self, ids: np.ndarray) -> int:
        """Returns the number of UTF-8 bytes that `ids` stand for.

        An id may be a part of a character. Such parts are decoded to U+FFFD, which has 3 bytes
        itself.
        """
        text = self.decode(ids)
        if "\ufffd" not in text:
            return len(text.encode())
        tokens = [self._inner.id_to_token(index) or "" for index in np.asarray(ids).tolist()]
        if self._is_byte_level:
            added = {token.content for token in self._inner.get_added_tokens_decoder().values()}
            return sum(len(x.encode()) if x in added else len(x) for x in tokens)
        return len(text.encode()) - 2 * _broken_bytes(tokens)

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        """Whether each letter of a token stands for one byte."""
        return '"ByteLevel"' in json.dumps(json.loads(self.json_text).get("decoder"))

    @functools.cached_property
    def keeps_text(self) -> bool:
        """Whether a text with all kinds of letters and white space comes back unchanged."""
        # Some vocabularies put a space before a text, which one that begins with a space hides.
        return all(self.decode(self.encode(text)) == text for text in (PROBE, PROBE.strip()))

    def num_unknown(self, ids: np.ndarray) -> int:
        """Returns how many of `ids` are the unknown token, or 0 if the JSON file has none."""
        token = getattr(self._inner.model, "unk_token", None)
        unknown = None if token is None else self._inner.token_to_id(token)
        return 0 if unknown is None else int(np.count_nonzero(np.asarray(ids) == unknown))

    def to_dict(self) -> dict[str, Any]:
        """Returns the name and the whole JSON text, so that a checkpoint needs no other file."""
        return {"name": self.name, "json_text": self.json_text}


def read_or_train(
    path: Path, texts: Iterable[str], *, vocab_limit: int | None
) -> BytePairTokenizer:
    """Reads the JSON file of a tokenizer. If there is no such file, it is trained and written.

    Args:
        path: the file, `config.data.tokenizer_file`.
        texts: the training text, which is read only if a tokenizer is trained.
        vocab_limit: the size of a trained vocabulary, and the most tokens that a file may hold.
            With None nothing is trained.

    Returns:
        The tokenizer of the file.

    Raises:
        ValueError: the file is missing and `vocab_limit` is None, or the file is damaged or holds
            too many tokens.
        ImportError: the package `tokenizers` is not installed.
    """
    _tokenizers()
    if not path.exists():
        if vocab_limit is None:
            raise ValueError(
                f"config.data.tokenizer_file: {path} does not exist; to train it from the "
                "training text give its size, as --config.data.vocab_limit=8192"
            )
        trained = BytePairTokenizer.from_texts(texts, vocab_size=vocab_limit)
        try:
            _write_whole(path, trained.json_text)
        except OSError as error:
            raise ValueError(
                f"config.data.tokenizer_file: {path} cannot be written: {error.strerror}"
            ) from error
    data = read_file(path)
    try:
        tokenizer = BytePairTokenizer(data.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"config.data.tokenizer_file: {path}: {error}") from error
    if vocab_limit is not None and tokenizer.vocab_size > vocab_limit:
        raise ValueError(
            f"config.data.tokenizer_file: {path} holds {tokenizer.vocab_size} tokens, more than "
            f"config.data.vocab_limit={vocab_limit}; leave vocab_limit out to use the file"
        )
    return tokenizer


def _write_whole(path: Path, text: str) -> None:
    """Writes a file in one step, so that no other process can read half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _broken_bytes(tokens: list[str]) -> int:
    """Returns how many byte tokens such as `<0xE2>` are decoded to one U+FFFD each.

    They are those of each run of byte tokens that as a whole is not UTF-8.
    """
    count = 0
    for is_byte, run in itertools.groupby(tokens, lambda token: bool(BYTE.fullmatch(token))):
        if is_byte:
            data = bytes(int(token[3:5], 16) for token in run)
            try:
                data.decode()
            except UnicodeDecodeError:
                count += len(data)
    return count


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ImportError(
            "config.data.tokenizer='bpe' needs the package `tokenizers`; "
            "install it with: pip install 'race-jax[bpe]'"
        ) from error
