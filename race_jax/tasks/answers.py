"""The common part of tasks that ask for tokens at some positions of rows drawn from the seed.

A row has inputs, targets and weights of shape (T,). The weight is 1 where a token is asked for, and
0 elsewhere. Loss and accuracy count the positions of weight 1 only. Of `config.data` such a task
uses `sequence_length`, and other fields only where its file says so.
"""

from collections.abc import Callable

import grain
import jax
import jax.numpy as jnp
import numpy as np

from race_jax.data.windows import SYNCHRONOUS
from race_jax.tasks.losses import chunked_cross_entropy
from race_jax.tasks.task import Batch, Task, shapes_of

_ENDLESS = 1 << 62
TRAIN, VALID, TEST = 0, 1, 2


def drawn_batches(
    draw: Callable[[np.random.Generator], Batch], *, seed: int, split: int, count: int | None = None
) -> grain.IterDataset[Batch]:
    """Returns batches, each of which is a function of the seed, the split and its own index.

    Args:
        draw: makes a batch from a source of random numbers.
        seed: the seed of the run. The held-out batches do not depend on it, so that runs of several
            seeds are scored on the same rows.
        split: TRAIN, VALID or TEST.
        count: the number of batches, or None for endless ones.
    """

    def batch(index: int) -> Batch:
        return draw(np.random.default_rng((seed if split == TRAIN else 0, split, index)))

    numbers = grain.MapDataset.range(_ENDLESS if count is None else count)
    return numbers.map(batch).to_iter_dataset(SYNCHRONOUS)


class AnswerTask(Task):
    """A causal model is asked for tokens. Subclasses draw the rows and make the model."""

    loss_unit = "nats per answer"
    weight_name = "answers"

    def __init__(self, config, draw: Callable[[int], Callable], splits: dict[str, int], held: int):
        """Makes the batches.

        Args:
            config: the configuration of the run.
            draw: gives for a split the function that draws a batch.
            splits: the numbers of the held-out splits, by name.
            held: the least number of rows of a held-out split.
        """
        seed, count = config.run.seed, -(-held // config.run.batch_size)
        self.train = drawn_batches(draw(TRAIN), seed=seed, split=TRAIN)
        self.held_out = {
            name: drawn_batches(draw(split), seed=seed, split=split, count=count)
            for name, split in splits.items()
        }
        self.digests, self.record = {}, {}
        self.batch = shapes_of(draw(VALID)(np.random.default_rng(0)))

    @staticmethod
    def loss_sums(model, batch, rngs):
        """Computes the nats of the tokens that are asked for, and their number."""
        hidden = model.hidden(batch["inputs"], deterministic=rngs is None, rngs=rngs)
        return _nats(model, hidden, batch)

    @staticmethod
    def init_state(model, batch):
        """Returns the state of the model before any token."""
        return model.init_state(len(batch["inputs"]))

    @staticmethod
    def segment_sums(model, segment, state, rngs):
        """Computes the nats of the tokens that one segment asks for, and their number."""
        hidden, state = model.hidden(
            segment["inputs"], state=state, deterministic=rngs is None, rngs=rngs
        )
        return state, _nats(model, hidden, segment)

    @classmethod
    def score_sums(cls, model, batch):
        """Computes the nats, and what `right_sums` counts."""
        hidden = model.hidden(batch["inputs"], deterministic=True)
        loss, weight = _nats(model, hidden, batch)
        best = jax.lax.map(lambda row: jnp.argmax(model.logits(row), -1), hidden)
        return {"loss": loss, "weight": weight, **cls.right_sums(best == batch["targets"], batch)}

    @classmethod
    def right_sums(cls, hit: jax.Array, batch: Batch) -> dict[str, jax.Array]:
        """Counts right answers.

        Args:
            hit: shape (B, T) bool, True where the likeliest token is the target.
            batch: the batch.

        Returns:
            The number of right answers as "right" and of all answers as "asked", and further sums
            that `metrics` of the subclass uses.
        """
        return {"right": jnp.sum(hit * batch["weights"]), "asked": jnp.sum(batch["weights"])}

    def metrics(self, split, sums):
        """Computes the loss and, unless rows were read segment by segment, the accuracy."""
        figures = {"loss": sums["loss"] / sums["weight"]}
        if "right" in sums:
            figures["accuracy"] = sums["right"] / sums["asked"]
        return figures


def _nats(model, hidden: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    table = model.embedding[...]
    return chunked_cross_entropy(hidden, table, batch["targets"], batch["weights"], sparse=True)
