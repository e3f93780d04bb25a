"""Long documents: which book, or which author, is a window of 16K to 64K bytes from?

The books are local files. Windows that are trained on and windows that are scored never overlap.
For the book, they come from different regions of each book. For the author, from other books.
"""

import dataclasses
import hashlib
from pathlib import PurePath

import numpy as np

from race_jax.data.documents import Corpus, Document
from race_jax.data.examples import Examples
from race_jax.data.regions import SPLITS, Windows, author_of, letters_only, regions, without_header
from race_jax.data.sources import read_documents
from race_jax.records import at_least, one_of
from race_jax.tasks.classification import Classification, ClassificationConfig

TARGETS = ("book", "author")


@dataclasses.dataclass
class LongDocumentsConfig(ClassificationConfig):
    """Long documents, read as bytes. The window is config.data.sequence_length.

    Attributes:
        pooling: what the head reads: "mean" is the mean over the bytes, and "cls" is a learned
            token before the first one.
        num_buckets: has no effect, because all windows have one length.
        target: "book": each of `config.data.train_files` is a class, and the end of every book is
            held out. "author": the authors of `train_files` are the classes, and `valid_files` and
            `test_files` are other books of them. A line "Author: NAME" at the start of a book says
            who wrote it.
        letters_only: whether all but letters becomes a space, and capitals become small. Otherwise
            the typography of a file gives its book away: with the frequencies of bytes alone, 91 %
            of windows of 16,384 bytes are told apart, and with those of letters 71 %.
        held_out_share: the part of each book that is held out for validation, and the part that is
            held out for the test, if the target is the book.
        train_stride: the bytes from one training window to the next, which may overlap. None is an
            eighth of a window. Held-out windows of one book do not overlap.
    """

    num_buckets: int = 1
    target: str = "book"
    letters_only: bool = True
    held_out_share: float = 0.15
    train_stride: int | None = None

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        super().validate()
        one_of("target", self.target, TARGETS)
        if not 0 < self.held_out_share < 0.5:
            raise ValueError(f"held_out_share must lie in (0, 0.5), got {self.held_out_share}")
        if self.train_stride is not None:
            at_least("train_stride", self.train_stride, 1)


class LongDocuments(Classification):
    """The book or the author of a window of bytes.

    Source: beyond the paper, in place of its Arxiv task, which joins short documents of one class.
    """

    config_class = LongDocumentsConfig

    def __init__(self, config):
        options, data = config.task_config(), config.data
        if data.source != "files":
            raise ValueError(
                'config.data.source must be files for config.task="long_documents", got '
                f"{data.source!r}"
            )
        documents = read_documents(data)
        length = data.sequence_length
        stride = options.train_stride or max(1, length // 8)
        make = _by_book if options.target == "book" else _by_author
        splits, classes = make(documents, options, length, stride)
        super().__init__(
            config,
            splits,
            classes=classes,
            vocab_size=256,
            digests={"data": Corpus(*map(tuple, documents.values())).digest()},
            description=f"windows of {length:,} bytes, by {options.target}; ",
        )


def _check_different(documents: dict[str, list[Document]], options: LongDocumentsConfig) -> None:
    """Raises ValueError if two files have the same text, which no model can tell apart."""
    seen: dict[bytes, str] = {}
    for name, books in documents.items():
        for book in books:
            place = f"{book.name} of config.data.{name}_files"
            digest = hashlib.sha256(_text(book, options)).digest()
            if digest in seen:
                raise ValueError(
                    f"{place} has the same text as {seen[digest]}; name every book once"
                )
            seen[digest] = place


def _by_book(
    documents: dict[str, list[Document]], options: LongDocumentsConfig, length: int, stride: int
) -> tuple[dict[str, Examples], list[str]]:
    """Returns the windows of each region of each book, and the names of the books."""
    books = documents["train"]
    for name in ("valid", "test"):
        if documents[name]:
            raise ValueError(
                f'config.data.{name}_files must be empty with config.long_documents.target="book", '
                f"which holds out the end of every training file; got {len(documents[name])} files"
            )
    _check_different({"train": books}, options)
    texts = [_text(book, options) for book in books]
    spans = []
    for book, text in zip(books, texts, strict=True):
        try:
            spans.append(regions(len(text), length=length, share=options.held_out_share))
        except ValueError as error:
            raise ValueError(
                f"{book.name}: {error}; lower config.data.sequence_length or change "
                "config.long_documents.held_out_share"
            ) from None
    splits = {
        name: _examples(
            texts,
            [span[name] for span in spans],
            np.arange(len(texts)),
            length,
            stride if name == "train" else length,
        )
        for name in SPLITS
    }
    return splits, [PurePath(book.name).name.split(".")[0] for book in books]


def _by_author(
    documents: dict[str, list[Document]], options: LongDocumentsConfig, length: int, stride: int
) -> tuple[dict[str, Examples], list[str]]:
    """Returns the windows of each book by the number of its author, and the authors."""
    if not documents["valid"]:
        raise ValueError(
            "config.data.valid_files must name other books of the authors with "
            'config.long_documents.target="author", got ()'
        )
    _check_different(documents, options)
    authors = sorted({author_of(book) for book in documents["train"]})
    splits = {}
    for name in SPLITS:
        labels, texts = [], []
        for book in documents[name]:
            author, text = author_of(book), _text(book, options)
            if author not in authors:
                raise ValueError(
                    f"{book.name}: its author {author!r} wrote none of the training files, whose "
                    f"authors are {', '.join(authors)}"
                )
            if len(text) < length:
                raise ValueError(
                    f"{book.name}: {len(text):,} bytes are fewer than one window of {length:,}"
                )
            labels.append(authors.index(author))
            texts.append(text)
        if texts:
            spans = [(0, len(text)) for text in texts]
            step = stride if name == "train" else length
            splits[name] = _examples(texts, spans, np.array(labels), length, step)
    return splits, authors


def _text(book: Document, options: LongDocumentsConfig) -> np.ndarray:
    text = without_header(book)
    return letters_only(text) if options.letters_only else text


def _examples(texts, spans, labels: np.ndarray, length: int, stride: int) -> Examples:
    """Returns windows with the label of the text that they were cut from."""
    windows = Windows(texts, spans, length=length, stride=stride)
    return Examples(windows, labels[windows.owner].astype(np.int32), np.full(len(windows), length))
