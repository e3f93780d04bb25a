"""Which tokenizer a run uses, and how a checkpoint brings it back.

In: a `DataConfig` and the training text, or a tokenizer's JSON record. Out: a `Tokenizer`.
Equation: none.
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
    """The tokenizer that `to_dict` recorded.

    Args:
        record: JSON values, with "name" among them.

    Returns:
        A tokenizer that encodes and decodes as the recorded one.

    Raises:
        ValueError: the name is none of ours.
        ImportError: the name is "bpe" and `tokenizers` is not installed.

    Example:
        >>> from_dict({"name": "characters", "alphabet": "abc"}).vocab_size
        3

    Source: beyond the paper.
    """
    one_of("the tokenizer's name", str(record.get("name")), tuple(_KINDS))
    return _KINDS[record["name"]](**{key: value for key, value in record.items() if key != "name"})


def build_tokenizer(config: DataConfig, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that `config` names, with its vocabulary from the training text.

    Args:
        config: `tokenizer`, and where they apply `tokenizer_file`, `vocab_limit`, `end_of_line`.
        texts: the training documents; consumed only where a vocabulary is needed.

    Returns:
        The tokenizer. "bpe" reads `tokenizer_file`; where that does not exist yet and
        `vocab_limit` is given, byte-level pairs are trained and written there first.

    Raises:
        ValueError: the name is unknown, a field does not apply to it, or the file is missing or
            damaged; the message names field or file.
        ImportError: "bpe" without the package `tokenizers`.

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
            raise ValueError("config.data.tokenizer_file: tokenizer='bpe' needs a JSON file's name")
        path = expand(config.tokenizer_file, "config.data.tokenizer_file")
        return read_or_train(path, texts, vocab_limit=config.vocab_limit)
    return CharacterTokenizer.from_texts(texts) if name == "characters" else ByteTokenizer()
