r"""Reads labeled texts: tables, JSON lines, one file per class, or a Hugging Face data set.

The inputs are the files or the data set that a `DataConfig` names, and `Columns`, which say where
texts and labels stand. The output is the texts of each split. Every error names the file and the
line.

    tsv      a table with tabs between its columns, without quotation marks. The last column takes
             the rest of its line, with any tabs.
    csv      a table with commas between its columns, in which '"' may enclose a column
    jsonl    one JSON object on each line
    classes  one file for each class, with one text on each line. The name of the file up to its
             first dot is the class.
"""

import csv
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from race_jax.data.config import DataConfig
from race_jax.data.documents import Document
from race_jax.data.sources import load_data_set, read_documents, refuse_other_sources
from race_jax.records import one_of

AUTO = "auto"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where texts and labels stand in a file.

    Attributes:
        text: the names of the columns, or keys, of the text. If there are two, the text is a pair.
        label: the name of the column, or key, of the label. None is for texts whose labels are not
            read, which may have none. They get the label "". Columns of a table without a header
            line are given by their numbers, from 0 on.
        form: "tsv", "csv", "jsonl", "classes", or "auto", which looks at the content.
    """

    text: tuple[str, ...] = ("text",)
    label: str | None = "label"
    form: str = AUTO

    def wanted(self) -> tuple[str, ...]:
        """Returns the columns that are read: those of the text, and then that of the label."""
        return self.text if self.label is None else (*self.text, self.label)


@dataclasses.dataclass(frozen=True)
class LabeledText:
    """A text, or a pair of texts, with its label. `place` is the file and the line, for errors."""

    parts: tuple[str, ...]
    label: str
    place: str


Splits = dict[str, list[LabeledText]]


def read_splits(config: DataConfig, columns: Columns, test_columns: Columns) -> Splits:
    """Reads all splits that `config` names.

    Args:
        config: `source` is "files" or "huggingface".
        columns: where texts and labels stand.
        test_columns: the same for the test split.

    Returns:
        The texts of "train" and "valid", and of "test" if there is such a split. If no validation
        split is given, a share `config.valid_fraction` of the training texts is held out. A hash of
        the text decides, so equal texts are on one side, and every seed has the same split.

    Raises:
        ValueError: a file or a line cannot be used. The error names it.
        ImportError: the source is "huggingface" and `datasets` is not installed.
    """
    read = {"files": _read_files, "huggingface": _read_data_set}
    if config.source not in read:
        raise ValueError(
            "config.data.source must be files or huggingface for labeled texts, got "
            f"{config.source!r}"
        )
    for field, unused in (("packing", "contiguous"), ("document_separator", ""), ("valid_tail", 0)):
        if (value := getattr(config, field)) != unused:
            raise ValueError(
                f"config.data.{field} is not used for labeled texts; leave it at {unused!r}, got "
                f"{value!r}"
            )
    refuse_other_sources(config)
    splits = read[config.source](config, columns, test_columns)
    if not splits["valid"]:
        splits["train"], splits["valid"] = _hold_out(splits["train"], config.valid_fraction)
    return {name: texts for name, texts in splits.items() if texts or name != "test"}


def _read_files(config: DataConfig, columns: Columns, test_columns: Columns) -> Splits:
    return {
        name: [
            text
            for document in documents
            for text in labeled_texts(document, test_columns if name == "test" else columns)
        ]
        for name, documents in read_documents(config).items()
    }


def _hold_out(
    texts: list[LabeledText], fraction: float
) -> tuple[list[LabeledText], list[LabeledText]]:
    kept, held_out = [], []
    for text in texts:
        digest = hashlib.sha256("\0".join(text.parts).encode("utf-8", "surrogatepass")).digest()
        share = int.from_bytes(digest[:6], "big") / 2**48
        (held_out if share < fraction else kept).append(text)
    if not kept or not held_out:
        raise ValueError(
            f"{texts[0].place}: of {len(texts)} texts, none is left on one side if a share "
            f"{fraction} (config.data.valid_fraction) is held out; give valid_files"
        )
    return kept, held_out


def labeled_texts(document: Document, columns: Columns) -> list[LabeledText]:
    r"""Returns the texts of a file.

    Args:
        document: the name and the content of the file.
        columns: where texts and labels stand.

    Returns:
        The texts in their order, at least one.

    Raises:
        ValueError: the form is unknown, or a line cannot be used. The error names file and line.

    Example:
        >>> table = Document("movies.tsv", b"text\tlabel\na joy\t1\nno fun\t0\n")
        >>> [(text.parts, text.label, text.place) for text in labeled_texts(table, Columns())]
        [(('a joy',), '1', 'movies.tsv:2'), (('no fun',), '0', 'movies.tsv:3')]
    """
    form = columns.form
    content = _decoded(document)
    if form == AUTO:
        form = _form(document.name, content)
    one_of("the form of labeled texts", form, tuple(_READERS))
    texts = list(_READERS[form](document.name, content, columns))
    if not texts:
        raise ValueError(f"{document.name}: holds no labeled text")
    for text in texts:
        if not all(part.strip() for part in text.parts):
            raise ValueError(f"{text.place}: the text is empty")
    return texts


def _decoded(document: Document) -> str:
    try:
        return document.data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = document.data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{document.name}:{line}: not UTF-8 text (byte {document.data[error.start]:#04x}); "
            "convert the file to UTF-8"
        ) from None


def _form(name: str, content: str) -> str:
    """Returns the form that the first line of a file has."""
    first = content[: content.find("\n")] if "\n" in content else content
    if first.startswith("{"):
        return "jsonl"
    for form, mark in (("tsv", "\t"), ("csv", ",")):
        if mark in first:
            return form
    raise ValueError(
        f"{name}:1: neither a tab nor a comma divides the line into columns, and it is no JSON "
        "object; for files of one class each set the form to classes"
    )


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Yields the numbers and the lines, which only line breaks divide."""
    lines = content.split("\n")
    for number, line in enumerate(lines, 1):
        if line or number < len(lines):
            yield number, line.removesuffix("\r")


def _read_tsv(name: str, content: str, columns: Columns) -> Iterator[LabeledText]:
    _, first = next(_lines(content))
    width = first.count("\t")
    rows = ((number, line.split("\t", width)) for number, line in _lines(content))
    return _table(name, rows, columns)


def _read_csv(name: str, content: str, columns: Columns) -> Iterator[LabeledText]:
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        start = 1
        try:
            for fields in reader:
                yield start, fields
                start = reader.line_num + 1
        except csv.Error as error:
            raise ValueError(
                f"{name}:{start}: not a row of comma-separated values: {error}"
            ) from None

    return _table(name, rows(), columns)


def _table(
    name: str, rows: Iterator[tuple[int, list[str]]], columns: Columns
) -> Iterator[LabeledText]:
    """Yields the texts of the rows of a table. Names of columns stand in its first row."""
    wanted = columns.wanted()
    if all(column.isdecimal() for column in wanted):
        places = [int(column) for column in wanted]
    else:
        _, header = next(rows)
        for column in wanted:
            if column not in header:
                raise ValueError(
                    f"{name}:1: there is no column {column!r} among {', '.join(header)}; give the "
                    "names of the columns, or their numbers from 0 on if there is no header line"
                )
        places = [header.index(column) for column in wanted]
    for number, fields in rows:
        if len(fields) <= max(places):
            raise ValueError(
                f"{name}:{number}: has {len(fields)} columns, and column {max(places) + 1} is read"
            )
        parts = [fields[place] for place in places]
        label = "" if columns.label is None else parts.pop()
        if columns.label is not None and (not label.strip() or "\t" in label):
            raise ValueError(f"{name}:{number}: {label!r} is no label; it is empty, or has a tab")
        yield LabeledText(tuple(parts), label.strip(), f"{name}:{number}")


def _read_jsonl(name: str, content: str, columns: Columns) -> Iterator[LabeledText]:
    for number, line in _lines(content):
        place = f"{name}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place}: not JSON: {error}") from None
        except RecursionError:
            raise ValueError(
                f"{place}: the JSON object is nested too deeply to be read; leave out what is "
                "neither text nor label"
            ) from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: must be a JSON object, got {line[:40]!r}")
        for key in columns.wanted():
            if key not in record:
                raise ValueError(f"{place}: there is no key {key!r} among {', '.join(record)}")
        label = "" if columns.label is None else record[columns.label]
        yield _checked(place, [record[key] for key in columns.text], label)


def _checked(place: str, parts: Sequence[Any], label: Any) -> LabeledText:
    """Returns a text from values that may be of a wrong kind."""
    strange = next((part for part in parts if not isinstance(part, str)), None)
    if strange is not None or None in parts:
        raise ValueError(f"{place}: the text must be a string, got {strange!r}")
    if isinstance(label, bool) or not isinstance(label, (str, int)):
        raise ValueError(f"{place}: the label must be a string or an integer, got {label!r}")
    for value in (*parts, str(label)):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can write half of a UTF-16 pair
            raise ValueError(
                f"{place}: {value[:40]!r} has the lone surrogate {value[error.start]!r}, which is "
                "no character; write the character, or leave it out"
            ) from None
    return LabeledText(tuple(parts), str(label), place)


def _read_classes(name: str, content: str, columns: Columns) -> Iterator[LabeledText]:
    del columns  # a line is a text
    label = name.replace("\\", "/").rsplit("/", 1)[-1].split(".")[0]
    for number, line in _lines(content):
        yield LabeledText((line,), label, f"{name}:{number}")


_READERS: dict[str, Callable[[str, str, Columns], Iterator[LabeledText]]] = {
    "tsv": _read_tsv,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
    "classes": _read_classes,
}
FORMS = (AUTO, *_READERS)


def _read_data_set(config: DataConfig, columns: Columns, test_columns: Columns) -> Splits:
    """Reads a Hugging Face data set. A test split without labels, which are all -1, is left out."""
    found = load_data_set(config)
    splits: Splits = {}
    for name, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        rows = found.get(theirs)
        split = test_columns if name == "test" else columns
        texts = [] if rows is None else _rows(f"{config.dataset}/{theirs}", rows, split)
        if name == "test" and all(text.label == "-1" for text in texts):
            texts = []
        splits[name] = texts
    return splits


def _rows(name: str, rows: Any, columns: Columns) -> list[LabeledText]:
    for column in (*columns.text, columns.label):
        if column not in rows.column_names:
            raise ValueError(f"{name}: there is no column {column!r} among {rows.column_names}")
    feature = (getattr(rows, "features", None) or {}).get(columns.label)
    names = getattr(feature, "names", None)
    texts = []
    parts = zip(*(rows[column] for column in columns.text), strict=True)
    for index, (part, label) in enumerate(zip(parts, rows[columns.label], strict=True)):
        if names and isinstance(label, int) and 0 <= label < len(names):
            label = names[label]
        texts.append(_checked(f"{name}[{index}]", part, label))
    if not texts:
        raise ValueError(f"{name}: holds no rows")
    return texts
