r"""Writes a file of token ids, from which training reads sequences of any length.

    .venv/bin/python scripts/write_tokens.py tokens.npy book.txt other.txt.xz
    .venv/bin/python scripts/write_tokens.py tokens.npy text/*.txt --tokenizer characters

It writes tokens.npy and, beside it, tokens.npy.json. Texts are joined by the separator of the
tokenizer. The vocabulary of characters and words is that of the texts. For a validation file give
the training file by --like, whose tokenizer is then used. To train on it:

    .venv/bin/python scripts/train_lm.py --config.data.source=tokens --config.data.root=. \
        --config.data.train_files=tokens.npy --config.data.sequence_length=1000000 \
        --config.optimizer.segment_length=65536 --config.run.batch_size=1
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from command_line import main_of
from race_jax.data.config import DataConfig
from race_jax.data.documents import Document
from race_jax.data.sources import read_file
from race_jax.data.token_file import open_token_file, write_token_file
from race_jax.data.tokenizer import ByteTokenizer, Tokenizer, build_tokenizer

NAMES = ("bytes", "characters", "words", "bpe")


def ids_of(paths: list[Path], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    """Yields the ids of one text after the other, and of the separators between them."""
    for index, path in enumerate(paths):
        if index:
            yield tokenizer.encode(tokenizer.separator)
        data = read_file(path)
        is_bytes = isinstance(tokenizer, ByteTokenizer)
        yield tokenizer.encode(data if is_bytes else Document(str(path), data).text())


def chosen_tokenizer(options: argparse.Namespace) -> Tokenizer:
    """Returns the tokenizer of another token file, or the one that the options describe."""
    if options.like is not None:
        return open_token_file(options.like).tokenizer
    config = DataConfig(
        tokenizer=options.tokenizer,
        tokenizer_file=options.tokenizer_file,
        vocab_limit=options.vocab_limit,
    )

    def texts() -> Iterator[str]:
        for path in options.texts:
            yield Document(str(path), read_file(path)).text()
        if len(options.texts) > 1:
            yield Tokenizer.separator

    return build_tokenizer(config, texts())


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the file to write, NAME.npy")
    parser.add_argument("texts", type=Path, nargs="+", help="plain or packed text files")
    parser.add_argument("--tokenizer", choices=NAMES, default="bytes")
    parser.add_argument("--tokenizer_file", help="for bpe: the JSON file of a tokenizer")
    parser.add_argument("--vocab_limit", type=int, help="for words: the size of the vocabulary")
    parser.add_argument("--like", type=Path, help="a token file whose tokenizer is used")
    options = parser.parse_args(argv)
    try:
        tokenizer = chosen_tokenizer(options)
        count = write_token_file(options.output, ids_of(options.texts, tokenizer), tokenizer)
    except (ValueError, ImportError, OSError) as error:
        print(f"write_tokens: {error}", file=sys.stderr)
        return 2
    size = options.output.stat().st_size
    print(f"{options.output}: {count:,} tokens ({tokenizer.name}), {size / 1e6:,.1f} MB")
    return 0


if __name__ == "__main__":
    main_of(main)
