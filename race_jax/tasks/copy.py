"""A task that needs no files: to repeat the symbols that stand before a separator.

A row consists of n random symbols, the separator, and the same n symbols again, where
n = (T + 1) // 2. Only the second half is scored. The task tests recall, and it is the smallest
example of a task.
"""

import dataclasses

import grain
import jax.numpy as jnp
import numpy as np

from race_jax.models import TransformerLM
from race_jax.records import at_least
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Task, TaskConfig, shapes_of

HELD_OUT_BATCHES = 4


@dataclasses.dataclass
class CopyConfig(TaskConfig):
    """Copying.

    Attributes:
        symbols: number of different symbols. The separator is one more.
    """

    symbols: int = 8

    def validate(self) -> None:
        """Checks the fields.

        Raises:
            ValueError: a field is out of range. The message starts with its name.
        """
        at_least("symbols", self.symbols, 2)


class Copy(Task):
    """Copying. Of `config.data` it uses `sequence_length` only."""

    config_class = CopyConfig
    loss_unit = "nats per symbol"
    weight_name = "symbols"

    def __init__(self, config):
        run, length, symbols = config.run, config.data.sequence_length, _symbols(config)
        if length < 2:
            raise ValueError(
                f'config.data.sequence_length must be >= 2 for config.task="copy", got {length}'
            )

        def batches(split: int) -> grain.MapDataset:
            def rows(index: int) -> dict[str, np.ndarray]:
                rng = np.random.default_rng((run.seed, split, index))
                return _rows(rng, run.batch_size, length, symbols)

            return grain.MapDataset.range(1 << 62 if split == 0 else HELD_OUT_BATCHES).map(rows)

        self.train = batches(0).to_iter_dataset()
        self.held_out = {"valid": batches(1).to_iter_dataset()}
        self.digests, self.record = {}, {}
        self.batch = shapes_of(batches(0)[0])
        self.description = (
            f"copy: {(length + 1) // 2} symbols of {symbols} kinds, drawn from the seed"
        )

    @staticmethod
    def make_model(config, record, rngs):
        """Makes a causal transformer over the symbols and the separator."""
        return TransformerLM(config.model, _symbols(config) + 1, keep_rngs=False, rngs=rngs)

    @staticmethod
    def loss_sums(model, batch, rngs):
        """Computes the nats of the symbols of the second half, and their number."""
        hidden = model.hidden(batch["inputs"], deterministic=rngs is None, rngs=rngs)
        table = model.embedding[...]
        return chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"])

    @classmethod
    def score_sums(cls, model, batch):
        """Computes the nats, and how many symbols are repeated correctly."""
        loss, weight = cls.loss_sums(model, batch, None)
        right = jnp.argmax(model(batch["inputs"], deterministic=True), -1) == batch["targets"]
        return {"loss": loss, "weight": weight, "right": jnp.sum(right * batch["weights"])}

    def metrics(self, split, sums):
        """Computes the loss and the share of symbols that are repeated correctly."""
        weight = sums["weight"]
        return {"loss": sums["loss"] / weight, "accuracy": sums["right"] / weight}


def _symbols(config) -> int:
    return config.task_config().symbols


def _rows(rng: np.random.Generator, count: int, length: int, symbols: int) -> dict[str, np.ndarray]:
    """Draws `count` rows of `length` inputs, with their targets.

    The weight is 1 where a symbol is repeated, and 0 elsewhere.
    """
    half = (length + 1) // 2
    drawn = rng.integers(0, symbols, (count, half), np.int32)
    separator = np.full((count, 1), symbols, np.int32)
    rows = np.concatenate([drawn, separator, drawn], axis=1)[:, : length + 1]
    scored = np.arange(length) >= half
    weights = np.tile(scored.astype(np.float32), (count, 1))
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}
