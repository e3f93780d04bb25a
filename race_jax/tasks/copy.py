"""A task that needs no files: repeat the symbols that stand before a separator.

A row is n random symbols, the separator, and the same n symbols again, n = (T + 1) // 2. Only the
second half is scored. It is a probe of recall, and the smallest example of a task.
"""

import grain
import jax.numpy as jnp
import numpy as np

from race_jax.models import TransformerLM
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Task, shapes_of

SYMBOLS = 8  # the separator is one more
HELD_OUT_BATCHES = 4


class Copy(Task):
    """Copying; of `config.data` only `sequence_length` is used."""

    def __init__(self, config):
        run, length = config.run, config.data.sequence_length
        if length < 2:
            raise ValueError(
                f'config.data.sequence_length must be >= 2 for config.task="copy", got {length}'
            )

        def batches(split: int) -> grain.MapDataset:
            def rows(index: int) -> dict[str, np.ndarray]:
                rng = np.random.default_rng((run.seed, split, index))
                return _rows(rng, run.batch_size, length)

            return grain.MapDataset.range(1 << 62 if split == 0 else HELD_OUT_BATCHES).map(rows)

        self.train = batches(0).to_iter_dataset()
        self.held_out = {"valid": batches(1).to_iter_dataset()}
        self.digests, self.record = {}, {}
        self.batch = shapes_of(batches(0)[0])
        self.description = f"copy: {(length + 1) // 2} of {SYMBOLS} symbols, drawn from the seed"

    @staticmethod
    def make_model(config, record, rngs):
        """A causal transformer over the symbols and the separator."""
        return TransformerLM(config.model, SYMBOLS + 1, keep_rngs=False, rngs=rngs)

    @staticmethod
    def loss_sums(model, batch, rngs):
        """The nats of the symbols of the second half."""
        hidden = model.hidden(batch["inputs"], deterministic=rngs is None, rngs=rngs)
        table = model.embedding[...]
        return chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"])

    @classmethod
    def score_sums(cls, model, batch):
        """The nats, and how many symbols are repeated rightly."""
        nats, weight = cls.loss_sums(model, batch, None)
        right = jnp.argmax(model(batch["inputs"], deterministic=True), -1) == batch["targets"]
        return {"nats": nats, "weight": weight, "right": jnp.sum(right * batch["weights"])}

    def metrics(self, split, sums):
        """The loss and the share of symbols that are repeated rightly."""
        weight = sums["weight"]
        return {"loss": sums["nats"] / weight, "accuracy": sums["right"] / weight}


def _rows(rng: np.random.Generator, count: int, length: int) -> dict[str, np.ndarray]:
    """`count` rows of `length` inputs, their targets, and weight 1 where a symbol is repeated."""
    half = (length + 1) // 2
    symbols = rng.integers(0, SYMBOLS, (count, half), np.int32)
    separator = np.full((count, 1), SYMBOLS, np.int32)
    rows = np.concatenate([symbols, separator, symbols], axis=1)[:, : length + 1]
    scored = np.arange(length) >= half
    weights = np.tile(scored.astype(np.float32), (count, 1))
    return {"inputs": rows[:, :-1], "targets": rows[:, 1:], "weights": weights}
