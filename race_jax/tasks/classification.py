"""What all tasks have in common whose examples are sequences with a class.

Equations: loss = sum_i w_i (log sum_c exp(y_ic) - y_i,label(i)) / sum_i w_i, and accuracy is the
share of examples whose greatest logit is that of their label. Rows that only fill up the last batch
have weight 0, so every example of a split counts exactly once.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from race_jax.data.examples import (
    Augment,
    Examples,
    bucket_lengths,
    held_out_batches,
    train_batches,
)
from race_jax.models.classifier import POOLINGS, Classifier
from race_jax.records import at_least, one_of
from race_jax.tasks.task import Task, TaskConfig, shapes_of

MOST_NAMED = 12  # with more classes than this, a run does not name them when it starts


@dataclasses.dataclass
class ClassificationConfig(TaskConfig):
    """Classification of whole sequences.

    Attributes:
        pooling: what the head reads: "mean" is the mean over the tokens that are not padding, and
            "cls" is a learned token before the first one.
        num_buckets: the number of lengths that batches are padded to: config.data.sequence_length,
            half of it, a quarter, and so on. One program is compiled for each.
    """

    pooling: str = "mean"
    num_buckets: int = 4

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with its name.
        """
        one_of("pooling", self.pooling, POOLINGS)
        at_least("num_buckets", self.num_buckets, 1)


class Classification(Task):
    """The base class of tasks that classify sequences. It is not a task itself.

    The constructor of a subclass reads its data, and then calls this one. The subclass needs a line
    in the registry and, if it has settings of its own, a subclass of `ClassificationConfig`.

    Args:
        config: the checked `race_jax.train.config.Config`.
        splits: the examples by split. "train" and "valid" must be there, and "test" may be. No
            example is longer than config.data.sequence_length.
        classes: the names of the classes, in the order of the labels.
        vocab_size: the number of token ids, if the inputs are token ids.
        channels: the width of the vectors, if the inputs are vectors.
        record: further JSON values that are kept in checkpoints, such as a tokenizer.
        digests: as for `Task`. None takes the digest of every split.
        augment: changes the inputs of a training example each time that it is read.
        description: one line about where the examples come from. Their numbers are added to it.
        declared: whether the user has listed the classes. Then held-out examples may have a class
            that no training example has.
        way_out: what to change if the training examples lack a class. By default errors speak of
            the files of `config.data`.

    Raises:
        ValueError: there are no examples, or one is too long; or the training examples have one
            class only, or lack a class that held-out examples have, and the classes are not
            declared; or a label is no class.
    """

    config_class = ClassificationConfig
    loss_unit = "nats per example"
    weight_name = "examples"
    is_causal = False
    splits_sequences = False

    def __init__(
        self,
        config: Any,
        splits: dict[str, Examples],
        *,
        classes: Sequence[str],
        vocab_size: int | None = None,
        channels: int | None = None,
        record: dict[str, Any] | None = None,
        digests: dict[str, str] | None = None,
        augment: Augment | None = None,
        description: str = "",
        declared: bool = False,
        way_out: str = "",
    ):
        length, run = config.data.sequence_length, config.run
        _check_examples(splits, vocab_size)
        _check_labels(splits, classes, config.data)
        _check_training(splits["train"], classes, config.data, way_out)
        if not declared:
            _check_held_out(splits, classes, config.data, way_out)
        lengths = bucket_lengths(length, config.task_config().num_buckets)
        masked = any((split.lengths != length).any() for split in splits.values())
        self.train = train_batches(
            splits["train"],
            lengths,
            batch_size=run.batch_size,
            seed=run.seed,
            masked=masked,
            augment=augment,
            num_workers=config.data.num_workers,
        )
        self.held_out = {
            name: held_out_batches(split, lengths, batch_size=run.batch_size, masked=masked)
            for name, split in splits.items()
            if name != "train"
        }
        if digests is None:
            digests = {f"the {name} examples": split.digest() for name, split in splits.items()}
        self.digests = digests
        self.record = {
            "classes": list(classes),
            "vocab_size": vocab_size,
            "channels": channels,
            **(record or {}),
        }
        self.batch = _longest(shapes_of(next(iter(self.held_out["valid"]))), length)
        self.description = description + _numbers(splits, classes)

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a classifier for the inputs and the classes of the record."""
        return Classifier(
            config.model,
            num_classes=len(record["classes"]),
            vocab_size=record["vocab_size"],
            channels=record["channels"],
            pooling=config.task_config().pooling,
            keep_rngs=False,
            rngs=rngs,
        )

    @staticmethod
    def loss_sums(model, batch, rngs):
        """Computes the nats of the labels, and the number of examples."""
        return _nats(_logits(model, batch, rngs), batch), jnp.sum(batch["weights"])

    @classmethod
    def score_sums(cls, model, batch):
        """Computes the nats, and how many examples are classified correctly."""
        logits = _logits(model, batch, None)
        right = jnp.argmax(logits, -1) == batch["labels"]
        return {
            "loss": _nats(logits, batch),
            "weight": jnp.sum(batch["weights"]),
            "right": jnp.sum(right * batch["weights"]),
        }

    def metrics(self, split, sums):
        """Computes the loss and the accuracy, the share of examples that are classified right."""
        weight = sums["weight"]
        return {"loss": sums["loss"] / weight, "accuracy": sums["right"] / weight}


def _logits(model: Classifier, batch: dict, rngs) -> jax.Array:
    return model(
        batch["inputs"], key_value_mask=batch.get("mask"), deterministic=rngs is None, rngs=rngs
    )


def _nats(logits: jax.Array, batch: dict) -> jax.Array:
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
    return jnp.sum(nats * batch["weights"])


def _longest(shapes: dict[str, jax.ShapeDtypeStruct], length: int) -> dict:
    """Returns the shapes of a batch that is padded to the greatest length."""
    return {
        name: jax.ShapeDtypeStruct((x.shape[0], length, *x.shape[2:]), x.dtype)
        if len(x.shape) > 1
        else x
        for name, x in shapes.items()
    }


def _check_examples(splits: dict[str, Examples], vocab_size: int | None) -> None:
    """Raises ValueError if a split is missing, or holds what a classifier cannot read."""
    for name in ("train", "valid"):
        if name not in splits:
            raise ValueError(f"splits must have {name!r}, got {sorted(splits)}")
    for name, split in splits.items():
        if not np.issubdtype(split.labels.dtype, np.integer):
            raise ValueError(
                f"the labels of the {name} examples must be integers, got {split.labels.dtype}"
            )
        if vocab_size is None:
            continue
        for index in range(len(split)):
            ids = np.asarray(split.inputs[index])
            if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
                raise ValueError(
                    f"{name} example {index} has the token ids {ids.min()} to {ids.max()}, and "
                    f"vocab_size={vocab_size} allows 0 to {vocab_size - 1}"
                )


def _check_labels(splits: dict[str, Examples], classes: Sequence[str], data: Any) -> None:
    """Raises ValueError unless every label is the number of a class."""
    for name, split in splits.items():
        strange = split.labels[(split.labels < 0) | (split.labels >= len(classes))]
        if len(strange):
            raise ValueError(
                f"{_start(data, name)}the {name} examples have the label {strange[0]}, and there "
                f"are {len(classes)} classes, counted from 0; correct the label, or add its class"
            )


def _check_training(train: Examples, classes: Sequence[str], data: Any, way_out: str) -> None:
    """Raises ValueError unless the training examples have at least two classes."""
    counts = np.bincount(train.labels, minlength=len(classes))
    if np.count_nonzero(counts) < 2:
        raise ValueError(
            f"{_start(data, 'train')}all {len(train):,} training examples have the class "
            f"{classes[counts.argmax()]!r}; at least two classes are needed, so "
            f"{way_out or 'add examples of another class'}"
        )


def _check_held_out(
    splits: dict[str, Examples], classes: Sequence[str], data: Any, way_out: str
) -> None:
    """Raises ValueError if a class that is scored has no training examples."""
    trained = np.bincount(splits["train"].labels, minlength=len(classes))
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(classes)) * (trained == 0)
        if counts.any():
            raise ValueError(
                f"{_start(data, name)}{counts.max():,} of the {len(split):,} {name} examples have "
                f"the class {classes[counts.argmax()]!r}, and no training example has it; "
                f"{way_out or more_examples(data, name)}"
            )


def more_examples(data: Any, name: str) -> str:
    """Says what to change if only held-out examples have a class.

    Args:
        data: the `DataConfig`.
        name: the split of these examples.
    """
    if name == "valid" and data.source == "files" and not data.valid_files:
        return (
            "add some to the training files, lower "
            f"config.data.valid_fraction={data.valid_fraction}, which holds out a share of these "
            "files, or name config.data.valid_files"
        )
    return f"add some to the training data, or leave them out of the {name} data"


def _start(data: Any, name: str) -> str:
    """Returns where the examples of a split come from, for the beginning of an error."""
    files = getattr(data, f"{name}_files") or data.train_files
    origin = {"files": ", ".join(files), "huggingface": data.dataset}.get(data.source)
    return f"{origin}: " if origin else ""


def _numbers(splits: dict[str, Examples], classes: Sequence[str]) -> str:
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    unused = len(classes) - len(np.unique(splits["train"].labels))
    without = f" ({unused} of them without a training example)" if unused else ""
    mean = _mean(splits["train"])
    line = f"{counts} examples of {len(classes)} classes{without}, mean length {mean}"
    if len(classes) > MOST_NAMED:
        return line
    by_class = np.bincount(splits["train"].labels, minlength=len(classes)).tolist()
    named = (f"{name} ({count:,})" for name, count in zip(classes, by_class, strict=True))
    return f"{line}; training examples by class: {', '.join(named)}"


def _mean(examples: Examples) -> str:
    return f"{examples.lengths.mean():.0f}"
