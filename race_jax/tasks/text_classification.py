"""Text classification: the class of a text, or of a pair of texts.

A pair is read as one sequence, the two texts with a separator between them.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from race_jax.data.examples import Examples, bucket_lengths, held_out_batches
from race_jax.data.labeled import FORMS, Columns, LabeledText, read_splits
from race_jax.data.tokenizer import Tokenizer, build_tokenizer, from_dict
from race_jax.models.classifier import Classifier
from race_jax.records import one_of
from race_jax.tasks.classification import Classification, ClassificationConfig, more_examples


@dataclasses.dataclass
class TextClassificationConfig(ClassificationConfig):
    """Text classification: where texts and labels stand in the files of config.data.

    Attributes:
        form: the form of the files: "tsv", "csv", "jsonl", "classes" (one file for each class, and
            one text on each line), or "auto", which looks at the first line.
        text_columns: the name of the column, or key, of the text, or the two names of a pair. A
            number counts the columns from 0 on, for tables without a header line.
        label_column: the name or the number of the column, or key, of the label.
        test_text_columns: the columns of the text in the test files, if they have other names.
        test_label_column: the column of the label in the test files, if it has another name.
        classes: the labels in their order, as in `negative|0,positive|1`, where "|" divides other
            spellings of the same label. If it is empty, the labels of the training examples count.
            A class that is listed may occur in held-out examples only.
        pooling: as for every classification: "mean" or "cls".
        num_buckets: the number of lengths that batches are padded to.
    """

    form: str = "auto"
    text_columns: tuple[str, ...] = ("text",)
    label_column: str = "label"
    test_text_columns: tuple[str, ...] = ()
    test_label_column: str = ""
    classes: tuple[str, ...] = ()

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        super().validate()
        one_of("form", self.form, FORMS)
        if not self.label_column:
            raise ValueError('label_column must name a column, got ""')
        for name in ("text_columns", "test_text_columns"):
            count = len(getattr(self, name))
            if count > 2 or (name == "text_columns" and not count):
                raise ValueError(f"{name} must be one column, or the two of a pair, got {count}")
        if self.test_text_columns and len(self.test_text_columns) != len(self.text_columns):
            raise ValueError(
                f"test_text_columns must be as many as text_columns, {len(self.text_columns)}, got "
                f"{len(self.test_text_columns)}"
            )
        if len(self.classes) == 1:
            raise ValueError(f"classes must be at least two, got {self.classes[0]!r} only")

    def columns(self, split: str) -> Columns:
        """Returns where texts and labels stand in the files of a split."""
        if split == "test":
            text = self.test_text_columns or self.text_columns
            return Columns(text, self.test_label_column or self.label_column, self.form)
        return Columns(self.text_columns, self.label_column, self.form)


class TextClassification(Classification):
    """The class of a text, or of a pair of texts, from the files of `config.data`."""

    config_class = TextClassificationConfig

    def __init__(self, config):
        options, data = config.task_config(), config.data
        texts = read_splits(data, options.columns("train"), options.columns("test"))
        names, numbers = _classes(options.classes, texts["train"])
        _check_labels(texts, numbers, config)
        words = (part for text in texts["train"] for part in text.parts)
        tokenizer = build_tokenizer(data, words)
        is_pair = len(options.text_columns) == 2
        cut: dict[str, int] = {}
        splits = {}
        for name, split in texts.items():
            labels = np.array([numbers[text.label] for text in split], np.int32)
            inputs, cut[name] = _encode(split, tokenizer, data.sequence_length)
            splits[name] = Examples(inputs, labels)
        super().__init__(
            config,
            splits,
            classes=names,
            vocab_size=tokenizer.vocab_size + is_pair,  # the separator is one more
            record={"tokenizer": tokenizer.to_dict()},
            description=f"{data.dataset or data.source}: {tokenizer.name}, vocabulary "
            f"{tokenizer.vocab_size:,}, {_shares(cut, splits)} of the texts cut to "
            f"{data.sequence_length} tokens; ",
            declared=bool(options.classes),
        )

    @staticmethod
    def companion(record):
        """Returns the tokenizer."""
        return from_dict(record["tokenizer"])


def class_probabilities(
    model: Classifier,
    tokenizer: Tokenizer,
    config: Any,
    texts: Sequence[str | Sequence[str]],
    names: Sequence[str] = (),
) -> np.ndarray:
    """Computes the probabilities of the classes of texts, as the evaluation of a run does.

    Args:
        model: the trained model.
        tokenizer: the tokenizer of the run, its companion.
        config: the configuration of the run.
        texts: the texts, or the pairs of texts if the run was trained on pairs.
        names: what errors call the texts. By default they are counted from 0.

    Returns:
        Shape (texts, classes) float32. The record of the run names the "classes" in their order.

    Raises:
        ValueError: there is no text, or one is empty, is not a pair where the run reads pairs, or
            cannot be encoded. The error names it.
    """
    if not texts:
        raise ValueError("there is no text to classify; give at least one")
    options, data = config.task_config(), config.data
    names = names or [f"text {i}" for i in range(len(texts))]
    count = len(options.text_columns)
    read = [_unlabeled(text, count, name) for text, name in zip(texts, names, strict=True)]
    inputs, _ = _encode(read, tokenizer, data.sequence_length)
    rows = np.arange(len(texts))  # in place of labels, because batches are in a mixed order
    batches = held_out_batches(
        Examples(inputs, rows),
        bucket_lengths(data.sequence_length, options.num_buckets),
        batch_size=min(config.run.batch_size, len(texts)),
    )
    found = np.zeros((len(texts), model.head.out_features), np.float32)
    for batch in batches:
        real = batch["weights"] > 0
        found[batch["labels"][real]] = _softmax(model, batch["inputs"], batch["mask"])[real]
    return found


@nnx.jit
def _softmax(model: Classifier, inputs: jax.Array, mask: jax.Array) -> jax.Array:
    return jax.nn.softmax(model(inputs, key_value_mask=mask, deterministic=True))


def _unlabeled(text: str | Sequence[str], count: int, name: str) -> LabeledText:
    """Returns a text, or a pair, without a label."""
    parts = (text,) if isinstance(text, str) else tuple(text)
    if len(parts) != count:
        needed = "one text" if count == 1 else "a pair of texts"
        raise ValueError(f"{name}: the run reads {needed} at a time, got {len(parts)}: {text!r}")
    if not all(part.strip() for part in parts):
        raise ValueError(f"{name}: the text is empty; leave it out")
    return LabeledText(parts, "", name)


def _classes(given: tuple[str, ...], texts: list[LabeledText]) -> tuple[list[str], dict[str, int]]:
    """Returns the names of the classes, and the number of the class of each spelling."""
    if given:
        spellings = [[part.strip() for part in label.split("|")] for label in given]
    else:
        labels = {text.label for text in texts}
        in_order = all(label.isdecimal() for label in labels)
        spellings = [[label] for label in sorted(labels, key=int if in_order else None)]
    numbers = {label: index for index, group in enumerate(spellings) for label in group}
    return [group[0] for group in spellings], numbers


def _check_labels(
    texts: dict[str, list[LabeledText]], numbers: dict[str, int], config: Any
) -> None:
    """Raises ValueError naming the first text whose label is no class."""
    field, classes = "config.text_classification.classes", config.task_config().classes
    for name, split in texts.items():
        text = next((text for text in split if text.label not in numbers), None)
        if text is None:
            continue
        if classes:
            raise ValueError(
                f"{text.place}: the label {text.label!r} is none of {field}={','.join(classes)}; "
                f"add it there, as a class of its own or as another spelling of one "
                f"({classes[0]}|{text.label}), or leave the text out"
            )
        raise ValueError(
            f"{text.place}: no training example has the label {text.label!r} of this {name} "
            f"example; list all classes in {field} to score such examples all the same, or "
            f"{more_examples(config.data, name)}"
        )


def _encode(
    texts: list[LabeledText], tokenizer: Tokenizer, length: int
) -> tuple[list[np.ndarray], int]:
    """Returns the token ids of each text, and how many texts were longer than `length`."""
    places = [text.place for text in texts]
    columns = [
        tokenizer.encode_all(column, places)
        for column in zip(*(text.parts for text in texts), strict=True)
    ]
    whole = list(zip(*columns, strict=True))
    cut = sum(sum(map(len, parts)) + len(parts) - 1 > length for parts in whole)
    return [join(parts, tokenizer.vocab_size, length) for parts in whole], cut


def join(parts: Sequence[np.ndarray], separator: int, length: int) -> np.ndarray:
    """Returns one text, or two with the separator between them, in at most `length` tokens.

    A text keeps its first tokens. Of a pair, the longer one is cut first.

    Example:
        >>> join([np.arange(5), np.arange(2)], separator=9, length=6).tolist()
        [0, 1, 2, 9, 0, 1]
    """
    if len(parts) == 1:
        return parts[0][:length]
    first, second = parts
    room = length - 1
    first = first[: max(room - len(second), room - room // 2)]
    second = second[: room - len(first)]
    return np.concatenate([first, [separator], second]).astype(np.int32)


def _shares(cut: dict[str, int], splits: dict[str, Examples]) -> str:
    return f"{sum(cut.values()) / sum(map(len, splits.values())):.1%}"
