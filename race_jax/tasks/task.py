"""The interface between the trainer and a task.

A task is one file of this folder and one line of `registry.TASKS`. The file holds a subclass of
`Task` and, if the task has settings, a subclass of `TaskConfig`. The trainer, the command line, the
checkpoints and the reports take all that they need from these two classes.
"""

import abc
import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import grain
import jax
import numpy as np
from flax import nnx

from race_jax.data.rows import UnreadRows

Batch = dict[str, Any]


@dataclasses.dataclass
class TaskConfig:
    """The settings of a task, `config.NAME.*` on the command line; NAME is the task's name.

    A subclass is a mutable dataclass with a default for every field. Its docstring describes each
    field in a section "Attributes:", from which `--help` is made.
    """

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field cannot be used. The message starts with the name of the field.
        """


class Task(abc.ABC):
    """The data, the model, the loss and the scores of a run.

    Args:
        config: the checked `race_jax.train.config.Config`. `config.task_config()` is the task's own
            record.

    Raises:
        ValueError: the data or a field cannot be used. This is found here, before any training.

    Attributes:
        config_class: the class of the task's own record.
        free_fields: names of the fields of that record that may change between two starts of a
            run, because they do not affect what is learned.
        loss_unit: the unit of the loss, such as "nats per token".
        is_causal: whether a token of the model sees only itself and earlier tokens. If it is False,
            attentions that work in one direction only are refused.
        splits_sequences: whether every array of a batch is (B, T, ...) and the loss is a sum over
            tokens, so that several devices can share a sequence. If they do not divide T, zeros
            are added at the end, and the batch has a `mask` (B, T) that is False there. It hides
            them if `is_causal` is False.
        reads_token_files: whether batches are `UnreadRows` if `config.reads_from_disk()`.
        weight_name: what the weights of a batch count, such as "tokens". The speed of a run is
            given in these per second, and the metrics hold their number by this name.
        train: endless batches, which are dicts of arrays (B, T, ...) or (B,). T may differ from
            batch to batch, if there are only a few lengths. They must be `UnreadRows` if
            `config.reads_from_disk()`, and may be otherwise. The state of the iterator is a JSON
            value.
        held_out: for each split, by its name, one pass over its batches. The split "valid" is
            always there.
        digests: for all content that affects what is learned, by its name, its digest. A run is
            not continued with other digests.
        record: JSON values that are kept in checkpoints. Together with the configuration they are
            all that `make_model` needs.
        batch: the shape and dtype of every array of the largest batch.
        description: one line about the data.
    """

    config_class: ClassVar[type[TaskConfig]] = TaskConfig
    free_fields: ClassVar[tuple[str, ...]] = ()
    is_causal: ClassVar[bool] = True
    splits_sequences: ClassVar[bool] = True
    reads_token_files: ClassVar[bool] = False
    loss_unit: ClassVar[str]
    weight_name: ClassVar[str]
    train: grain.IterDataset[Batch]
    held_out: dict[str, grain.IterDataset[Batch]]
    digests: dict[str, str]
    record: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]
    description: str

    @staticmethod
    @abc.abstractmethod
    def make_model(config: Any, record: dict[str, Any], rngs: nnx.Rngs) -> nnx.Module:
        """Makes a fresh model with its head. `record` may come from a checkpoint."""

    @staticmethod
    def companion(record: dict[str, Any]) -> Any:
        """Returns what the trained model needs beside it to be used, such as a tokenizer."""
        return None

    @staticmethod
    @abc.abstractmethod
    def loss_sums(
        model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, jax.Array]:
        """Computes what a batch adds to the loss.

        Args:
            model: the model of `make_model`.
            batch: a batch, or the share of one device.
            rngs: the random streams of dropout. Without them there is no dropout.

        Returns:
            The weighted sum of the losses and the sum of the weights, float32 scalars.
        """

    @staticmethod
    def init_state(model: nnx.Module, batch: Batch) -> Any:
        """Returns the state before the first token of a batch, which `segment_sums` carries on.

        Raises:
            NotImplementedError: the task, or its model, reads whole sequences only.
        """
        raise NotImplementedError("this task reads whole sequences only")

    @staticmethod
    def segment_sums(
        model: nnx.Module, segment: Batch, state: Any, rngs: nnx.Rngs | None
    ) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        """Computes what one segment of the sequences of a batch adds to the loss.

        Args:
            model: the model of `make_model`.
            segment: the next tokens of every sequence of a batch.
            state: the state after the tokens before them.
            rngs: as for `loss_sums`.

        Returns:
            The state after the segment, and what `loss_sums` returns.
        """
        raise NotImplementedError("this task reads whole sequences only")

    @classmethod
    def score_sums(cls, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """Computes the sums that a batch adds to an evaluation, by name."""
        loss, weight = cls.loss_sums(model, batch, None)
        return {"loss": loss, "weight": weight}

    @classmethod
    def loss_text(cls, loss: float) -> str:
        """Describes a training loss in words."""
        return f"loss {loss:.4f} {cls.loss_unit}"

    def metrics(self, split: str, sums: dict[str, float]) -> dict[str, float]:
        """Computes the numbers of an evaluation from its sums. One of them is "loss"."""
        return {"loss": sums["loss"] / sums["weight"]}

    def score_text(self, split: str, metrics: dict[str, float]) -> str:
        """Describes an evaluation in words."""
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in self.metric_names(metrics))

    @staticmethod
    def metric_names(metrics: dict[str, Any]) -> list[str]:
        """Returns the names of the numbers in a record of the metrics."""
        return [name for name in metrics if name not in ("kind", "step")]

    def end_facts(self) -> dict[str, str]:
        """Returns further facts to print beside the last scores, by name."""
        return {}

    def sample_lines(self, model: nnx.Module, directory: Path) -> list[str]:
        """Returns lines that show what the trained model does; by default there are none."""
        return []


def shapes_of(batch: dict[str, np.ndarray] | UnreadRows) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shape and dtype of every array of a batch, which may be on the disk."""
    if isinstance(batch, UnreadRows):
        one = batch.piece(0, 1)
        shape = len(batch), batch.length
        return {name: jax.ShapeDtypeStruct(shape, x.dtype) for name, x in one.items()}
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
