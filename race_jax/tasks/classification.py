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

    Raises:
        ValueError: there are no examples, or one is too long; or the training examples have one
            class only, or lack a class that held-out examples have; or a label is no class.
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
    ):
        length, run = config.data.sequence_length, config.run
        _check_classes(splits, classes, _origin(config.data))
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


def _check_classes(splits: dict[str, Examples], classes: Sequence[str], origin: str) -> None:
    """Raises ValueError unless at least two classes, and all that are scored, can be learned."""
    for name, split in splits.items():
        strange = split.labels[(split.labels < 0) | (split.labels >= len(classes))]
        if len(strange):
            raise ValueError(
                f"{origin}the {name} examples have the label {strange[0]}, and there are "
                f"{len(classes)} classes, counted from 0"
            )
    trained = np.bincount(splits["train"].labels, minlength=len(classes))
    if np.count_nonzero(trained) < 2:
        raise ValueError(
            f"{origin}all {trained.sum():,} training examples have the class "
            f"{classes[trained.argmax()]!r}; at least two classes are needed"
        )
    for name, split in splits.items():
        counts = np.bincount(split.labels, minlength=len(classes)) * (trained == 0)
        if counts.any():
            raise ValueError(
                f"{origin}no training example has the class {classes[counts.argmax()]!r}, and "
                f"{counts.max():,} of the {len(split):,} {name} examples have it; add some to the "
                f"training data, or leave them out of the {name} data"
            )


def _origin(data: Any) -> str:
    """Returns where the training examples come from, for the beginning of an error."""
    names = {"files": ", ".join(data.train_files), "huggingface": data.dataset}.get(data.source)
    return f"{names}: " if names else ""


def _numbers(splits: dict[str, Examples], classes: Sequence[str]) -> str:
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    unused = len(classes) - len(np.unique(splits["train"].labels))
    without = f" ({unused} of them without an example)" if unused else ""
    mean = _mean(splits["train"])
    return f"{counts} examples of {len(classes)} classes{without}, mean length {mean}"


def _mean(examples: Examples) -> str:
    return f"{examples.lengths.mean():.0f}"
