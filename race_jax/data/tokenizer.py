"""The choice of a run's tokenizer.

A tokenizer is made from a `DataConfig` and the training text. A checkpoint keeps it as a JSON
record, from which it is made again.
"""

from collections.abc import Iterable
from typing import Any

from race_jax.data.byte_pairs import BytePairTokenizer, read_or_train
from race_jax.data.config import DataConfig
from race_jax.data.sources import expand, refuse_ignored
from race_jax.data.vocabulary import ByteTokenizer, CharacterTokenizer, Tokenizer, WordTokenizer
from race_jax.records import one_of

__all__ = [
    "BytePairTokenizer",
    "ByteTokenizer",
    "CharacterTokenizer",
    "Tokenizer",
    "WordTokenizer",
    "build_tokenizer",
    "from_dict",
]

_KINDS: dict[str, type[Tokenizer]] = {
    kind.name: kind
    for kind in (ByteTokenizer, CharacterTokenizer, WordTokenizer, BytePairTokenizer)
}


def from_dict(record: dict[str, Any]) -> Tokenizer:
    """Returns the tokenizer that `to_dict` has recorded.

    Args:
        record: JSON values. "name" is one of them.

    Returns:
        A tokenizer that encodes and decodes as the recorded one does.

    Raises:
        ValueError: there is no tokenizer of this name.
        ImportError: the name is "bpe" and `tokenizers` is not installed.

    Example:
        >>> from_dict({"name": "characters", "alphabet": "abc"}).vocab_size
        3

    Source: beyond the paper.
    """
    one_of("the tokenizer's name", str(record.get("name")), tuple(_KINDS))
    return _KINDS[record["name"]](**{key: value for key, value in record.items() if key != "name"})


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """Returns the tokenizer that `config` names, with the vocabulary of the training text.

    Args:
        config: the fields `tokenizer`, `tokenizer_file`, `vocab_limit` and `end_of_line` are used.
        texts: the training documents. They are read only if the tokenizer needs a vocabulary.

    Returns:
        The tokenizer. "bpe" reads `tokenizer_file`. If there is no such file and `vocab_limit` is
        given, byte-level pairs are trained and written to that file first.

    Raises:
        ValueError: the name is unknown, a field does not apply to it, or the file is missing or
            damaged. The error names the field or the file.
        ImportError: the name is "bpe" and the package `tokenizers` is not installed.

    Example:
        >>> build_tokenizer(DataConfig(tokenizer="characters"), ["hello"]).alphabet
        'ehlo'

    Source: beyond the paper.
    """
    name = config.tokenizer
    one_of("config.data.tokenizer", name, tuple(_KINDS))
    owners = {
        "end_of_line": ("words",),
        "vocab_limit": ("words", "bpe"),
        "tokenizer_file": ("bpe",),
    }
    refuse_ignored(config, "tokenizer", owners)
    if name == "words":
        return WordTokenizer.from_texts(
            texts, end_of_line=config.end_of_line, limit=config.vocab_limit
        )
    if name == "bpe":
        if not config.tokenizer_file:
            raise ValueError(
                "config.data.tokenizer_file: tokenizer='bpe' needs the name of a JSON file, "
                f"got {config.tokenizer_file!r}"
            )
        path = expand(config.tokenizer_file, "config.data.tokenizer_file")
        return read_or_train(path, texts, vocab_limit=config.vocab_limit)
    return CharacterTokenizer.from_texts(texts) if name == "characters" else ByteTokenizer()
