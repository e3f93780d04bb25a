"""Turns labeled sequences of different lengths into batches of a few lengths.

The inputs are `Examples`. The outputs are Grain datasets of batches of B rows. All sequences of a
batch are padded to one of a few lengths, so that few programs are compiled and little is padded.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence

import grain
import numpy as np

from race_jax.data.windows import SYNCHRONOUS, Batch, filled
from race_jax.data.workers import WorkerDataset

# Changes the inputs of an example while a model is trained, such as a random crop. It gets the
# inputs and a generator, and returns inputs of the same length.
Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]

_ENDLESS = 1 << 62  # no run reads so many batches, and 64 bits can count them


@dataclasses.dataclass(frozen=True)
class Examples:
    """Labeled sequences.

    Attributes:
        inputs: for each example, token ids (n,) or vectors (n, C). Any sequence will do, also one
            that makes an example when it is asked for it.
        labels: shape (examples,) int32, the class of each example.
        lengths: shape (examples,), the length n of each example. None measures them.

    Raises:
        ValueError: there is no example, or the numbers of examples differ.

    Example:
        >>> examples = Examples([np.array([3, 1]), np.array([2])], np.array([0, 1], np.int32))
        >>> examples.lengths.tolist()
        [2, 1]
    """

    inputs: Sequence[np.ndarray]
    labels: np.ndarray
    lengths: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", np.asarray(self.labels))
        if self.lengths is None:
            object.__setattr__(self, "lengths", np.array([len(x) for x in self.inputs], np.int64))
        counts = len(self.inputs), len(self.labels), len(self.lengths)
        if len(set(counts)) > 1 or not counts[0]:
            raise ValueError(
                "inputs, labels and lengths must be of the same examples, and of at least one; got "
                f"{counts[0]}, {counts[1]} and {counts[2]}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """Returns the SHA-256 of all inputs and labels."""
        total = hashlib.sha256(np.ascontiguousarray(self.labels, np.int32))
        for x in self.inputs:
            total.update(f"{x.dtype}{x.shape}".encode())
            total.update(np.ascontiguousarray(x))
        return total.hexdigest()

    def rows(self, indices: np.ndarray, length: int | None, inputs: list[np.ndarray]) -> Batch:
        """Returns the batch of some examples.

        Args:
            indices: the numbers of the examples.
            length: the length T that they are padded to. None says that they all have one length,
                and need no mask.
            inputs: the inputs of these examples.

        Returns:
            inputs (B, T) int32 or (B, T, C) float32, labels (B,) int32, weights (B,) float32, which
            are 1, and with a `length` also mask (B, T) bool, which is False at padding.
        """
        batch = {
            "labels": self.labels[indices].astype(np.int32),
            "weights": np.ones(len(indices), np.float32),
        }
        if length is None:
            return {"inputs": np.stack(inputs).astype(_dtype(inputs[0])), **batch}
        padded = np.zeros((len(inputs), length, *inputs[0].shape[1:]), _dtype(inputs[0]))
        mask = np.zeros((len(inputs), length), bool)
        for row, x in enumerate(inputs):
            padded[row, : len(x)], mask[row, : len(x)] = x, True
        return {"inputs": padded, "mask": mask, **batch}


def _dtype(inputs: np.ndarray) -> type:
    return np.int32 if np.issubdtype(inputs.dtype, np.integer) and inputs.ndim == 1 else np.float32


def bucket_lengths(length: int, count: int) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to: T, T / 2, T / 4 and so on, shortest first.

    Args:
        length: T, the greatest length.
        count: how many lengths there are at most.

    Example:
        >>> bucket_lengths(100, 3)
        (25, 50, 100)
    """
    return tuple(sorted({-(-length // 2**i) for i in range(count)}))


def batch_order(
    buckets: np.ndarray, batch_size: int, rng: np.random.Generator, *, drop_rest: bool
) -> list[np.ndarray]:
    """Divides examples into batches at random, so that most batches hold one bucket only.

    Args:
        buckets: shape (examples,), the bucket of each example.
        batch_size: the number of examples of a batch.
        rng: the generator of the order.
        drop_rest: whether examples that do not fill a batch are left out, if there is a full one.

    Returns:
        The indices of the examples of each batch. The batches are in random order, except that one
        that is not full is the last.

    Example:
        >>> order = batch_order(np.array([1, 0, 1, 0]), 2, np.random.default_rng(0), drop_rest=True)
        >>> sorted(sorted(batch.tolist()) for batch in order)
        [[0, 2], [1, 3]]
    """
    order = rng.permutation(len(buckets))
    full = len(order) // batch_size * batch_size
    chosen, rest = order[:full], order[full:]
    chosen = chosen[np.argsort(buckets[chosen], kind="stable")].reshape(-1, batch_size)
    batches = list(chosen[rng.permutation(len(chosen))])
    if len(rest) and not (drop_rest and batches):
        batches.append(rest)
    return batches


class _Reader:
    """Makes the batches of all epochs. Batch i is the same in every process."""

    def __init__(
        self,
        examples: Examples,
        lengths: tuple[int, ...],
        *,
        batch_size: int,
        seed: int,
        masked: bool,
        is_training: bool,
        augment: Augment | None = None,
    ):
        self.examples, self.lengths, self.masked = examples, lengths, masked
        self.batch_size, self.seed, self.is_training = batch_size, seed, is_training
        self.augment = augment
        self.buckets = np.searchsorted(lengths, examples.lengths)
        if self.buckets.max() >= len(lengths):
            longest = int(np.argmax(examples.lengths))
            raise ValueError(
                f"example {longest} has {examples.lengths[longest]} tokens, and "
                f"config.data.sequence_length allows {lengths[-1]}"
            )
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng((self.seed, epoch))
        return batch_order(self.buckets, self.batch_size, rng, drop_rest=self.is_training)

    def __len__(self) -> int:
        return len(self.epoch(0))

    def __getitem__(self, index: int) -> Batch:
        epoch, number = divmod(int(index), len(self))
        indices = self.epoch(epoch)[number]
        inputs = [self.examples.inputs[i] for i in indices]
        if self.augment is not None:
            inputs = [
                self.augment(x, np.random.default_rng((self.seed, epoch, int(i))))
                for i, x in zip(indices, inputs, strict=True)
            ]
        length = self.lengths[self.buckets[indices].max()] if self.masked else None
        return filled(self.examples.rows(indices, length, inputs), self.batch_size)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "epoch"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)


def train_batches(
    examples: Examples,
    lengths: tuple[int, ...],
    *,
    batch_size: int,
    seed: int,
    masked: bool = True,
    augment: Augment | None = None,
    num_workers: int = 0,
) -> grain.IterDataset[Batch]:
    """Returns endless batches, in a new order in each epoch.

    An epoch leaves out at random the few examples that do not fill a batch.

    Args:
        examples: the examples of the training split.
        lengths: the lengths that batches are padded to, as `bucket_lengths` returns them.
        batch_size: the rows of a batch. If there are fewer examples, the other rows have weight 0.
        seed: the seed of the order and of `augment`.
        masked: whether sequences are padded. If they all have one length, no mask is needed.
        augment: changes the inputs of an example anew each time that it is read.
        num_workers: the number of processes that read. The batches are the same for any number.

    Raises:
        ValueError: an example is longer than all `lengths`.
    """
    reader = _Reader(
        examples,
        lengths,
        batch_size=batch_size,
        seed=seed,
        masked=masked,
        is_training=True,
        augment=augment,
    )
    batches = grain.MapDataset.range(_ENDLESS).map(reader.__getitem__)
    if num_workers:
        return WorkerDataset(batches, num_workers)
    return batches.to_iter_dataset(SYNCHRONOUS)


def held_out_batches(
    examples: Examples, lengths: tuple[int, ...], *, batch_size: int, masked: bool = True
) -> grain.IterDataset[Batch]:
    """Returns one pass over all examples, in a mixed order that never changes.

    The last batch is filled up with rows of weight 0. The arguments are those of `train_batches`.
    """
    reader = _Reader(
        examples, lengths, batch_size=batch_size, seed=0, masked=masked, is_training=False
    )
    return grain.MapDataset.range(len(reader)).map(reader.__getitem__).to_iter_dataset(SYNCHRONOUS)
