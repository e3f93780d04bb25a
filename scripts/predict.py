r"""Tells the classes of texts with a trained text classifier.

    .venv/bin/python scripts/predict.py --checkpoint runs/cls_sst2 --text "a joy to watch"

`--text` may be repeated. `--lines FILE` reads one text a line, and `--file FILE` a table or JSON
lines in the form that the run was trained on, in which labels may be missing. Where the run reads
pairs, a tab divides the two texts of `--text` and of a line, as in --text $'Who came?\tNobody.' in
bash. The answer is a table with tabs between its columns: the likeliest class of each text, the
probability of every class, and the text.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from command_line import main_of, why_not_written
from race_jax.data.documents import Document
from race_jax.data.labeled import Columns, LabeledText, labeled_texts
from race_jax.data.sources import read_file
from race_jax.tasks.registry import task_named
from race_jax.tasks.text_classification import TextClassification, class_probabilities
from race_jax.train.checkpoint import SavedModel, open_for_inference
from race_jax.train.files import write_text


def texts_of(options: argparse.Namespace, columns: Columns) -> list[LabeledText]:
    """Returns the texts that the command line names.

    Args:
        options: what `parse` returns.
        columns: the columns of the training files.
    """
    is_pair = len(columns.text) == 2
    if options.text:
        parts = [tuple(text.split("\t", 1)) if is_pair else (text,) for text in options.text]
        return [LabeledText(part, "", f"--text={part[0]!r}") for part in parts]
    if options.lines:
        columns = Columns(("0", "1"), None, "tsv") if is_pair else Columns((), None, "classes")
        return labeled_texts(Document(str(options.lines), read_file(options.lines)), columns)
    columns = Columns(options.columns or columns.text, None, columns.form)
    document = Document(str(options.file), read_file(options.file))
    try:
        return labeled_texts(document, columns)
    except ValueError as error:
        raise ValueError(
            f"{error}; --columns names other columns of the text, and --lines reads one text a line"
        ) from None


def predict(options: argparse.Namespace) -> tuple[list[str], list[LabeledText], np.ndarray]:
    """Returns the names of the classes, the texts, and the probabilities (texts, classes)."""
    with open_for_inference(options.checkpoint) as saved:
        _check_task(options.checkpoint, saved)
        texts = texts_of(options, saved.config.task_config().columns("train"))
        model = saved.load()
    found = class_probabilities(
        model,
        saved.companion,
        saved.config,
        [text.parts for text in texts],
        [text.place for text in texts],
    )
    return saved.record["classes"], texts, found


def _check_task(checkpoint: str, saved: SavedModel) -> None:
    if not issubclass(task_named(saved.config.task), TextClassification):
        raise ValueError(
            f"{checkpoint} is a run of the task {saved.config.task!r}, which does not classify "
            "texts; give the directory of a run of the task text_classification"
        )


def table_lines(classes: list[str], texts: list[LabeledText], found: np.ndarray) -> Iterator[str]:
    r"""Yields the lines of a table: for each text its class, the probabilities, and the text.

    Example:
        >>> texts = [LabeledText(("a joy",), "", "movies.tsv:1")]
        >>> [line.split("\t") for line in table_lines(["no", "yes"], texts, np.eye(2)[1:])]
        [['class', 'no', 'yes', 'text'], ['yes', '0.0000', '1.0000', 'a joy']]
    """
    yield "\t".join(["class", *classes, "text"])
    for text, row in zip(texts, found, strict=True):
        shown = (" ".join(part.splitlines()) for part in text.parts)
        yield "\t".join([classes[row.argmax()], *(f"{p:.4f}" for p in row), *shown])


def json_lines(classes: list[str], texts: list[LabeledText], found: np.ndarray) -> Iterator[str]:
    """Yields a JSON object for each text: the text or the pair, the class, the probabilities."""
    for text, row in zip(texts, found, strict=True):
        answer = {
            "text": text.parts[0] if len(text.parts) == 1 else text.parts,
            "class": classes[row.argmax()],
            "probabilities": dict(zip(classes, row.tolist(), strict=True)),
        }
        yield json.dumps(answer, ensure_ascii=False)


def parse(argv: list[str]) -> argparse.Namespace:
    """Returns the options of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="the directory of a training run")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--text", action="append", help="a text; may be repeated")
    given.add_argument("--lines", type=Path, help="a file of one text a line, plain or packed")
    given.add_argument("--file", type=Path, help="a table or JSON lines, as the run reads them")
    names = lambda text: tuple(text.split(","))  # noqa: E731
    parser.add_argument("--columns", type=names, help="--file: the columns of the text")
    parser.add_argument("--output", type=Path, help="a file of JSON lines, in place of the table")
    options = parser.parse_args(argv)
    if options.columns and not options.file:
        parser.error("--columns is used with --file only; leave it out")
    if options.output is not None and (reason := why_not_written(options.output)):
        parser.error(f"--output: {reason}")
    return options


def main(argv: list[str]) -> int:
    """Runs the command line and returns the exit status."""
    options = parse(argv)
    with contextlib.suppress(AttributeError):  # a stream that is not a file, as in a test
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters its encoding lacks
    try:
        answer = predict(options)
        if options.output is not None:
            write_text(options.output, "".join(f"{line}\n" for line in json_lines(*answer)))
            return 0
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        print(f"predict.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(table_lines(*answer)))
    return 0


if __name__ == "__main__":
    main_of(main)
