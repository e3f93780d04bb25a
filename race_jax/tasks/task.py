"""What the trainer asks of a task."""

import abc
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx

Batch = dict[str, Any]


class Task(abc.ABC):
    """The data, the model, the loss and the scores of a run; the trainer knows nothing of them.

    Args:
        config: the checked `race_jax.train.config.Config`. Data and fields that cannot be used
            raise ValueError here, before any training.

    Attributes:
        train: endless batches, dicts of arrays (B, T, ...). The iterator's state is JSON.
        held_out: by the name of a split, one pass over its batches. "valid" is always there.
        digests: by its name, the digest of all content that decides what is learned. A run with
            another one is not continued.
        record: JSON values to keep in checkpoints, all that `make_model` needs beside the config.
        batch: the shape and dtype of every array of a batch.
        description: one line about the data.
    """

    train: grain.IterDataset[Batch]
    held_out: dict[str, grain.IterDataset[Batch]]
    digests: dict[str, str]
    record: dict[str, Any]
    batch: dict[str, jax.ShapeDtypeStruct]
    description: str

    @staticmethod
    @abc.abstractmethod
    def make_model(config: Any, record: dict[str, Any], rngs: nnx.Rngs) -> nnx.Module:
        """A fresh model with its head, also for a checkpoint with that `record`."""

    @staticmethod
    def companion(record: dict[str, Any]) -> Any:
        """What a user of the trained model needs beside it, such as a tokenizer, or None."""
        return None

    @staticmethod
    @abc.abstractmethod
    def loss_sums(
        model: nnx.Module, batch: Batch, rngs: nnx.Rngs | None
    ) -> tuple[jax.Array, jax.Array]:
        """What a batch adds to the loss: weighted nats and their weight, float32 scalars.

        Without `rngs` there is no dropout.
        """

    @classmethod
    def score_sums(cls, model: nnx.Module, batch: Batch) -> dict[str, jax.Array]:
        """The sums that a batch adds to an evaluation, by name."""
        nats, weight = cls.loss_sums(model, batch, None)
        return {"nats": nats, "weight": weight}

    def metrics(self, split: str, sums: dict[str, float]) -> dict[str, float]:
        """The numbers of an evaluation from its sums; "loss" is one of them."""
        return {"loss": sums["nats"] / sums["weight"]}

    def score_text(self, split: str, metrics: dict[str, float]) -> str:
        """An evaluation in words."""
        return ", ".join(f"{name} {metrics[name]:.4f}" for name in self.metric_names(metrics))

    @staticmethod
    def metric_names(metrics: dict[str, Any]) -> list[str]:
        """The names of the numbers in a record."""
        return [name for name in metrics if name not in ("kind", "step")]

    def end_facts(self) -> dict[str, str]:
        """Further facts to print beside the last scores, by name."""
        return {}

    def sample_lines(self, model: nnx.Module, directory: Path) -> list[str]:
        """Lines that show what the trained model does; none by default."""
        return []


def shapes_of(batch: dict[str, np.ndarray]) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape and dtype of every array of a batch."""
    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()}
