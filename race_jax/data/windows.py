"""Turns token ids into batches, which are windows of one stream or packed documents.

The inputs are token ids and the borders of their documents. The outputs are Grain datasets of
batches. A row has T tokens, and targets[t] is the token after inputs[t].
"""

import dataclasses
from collections.abc import Callable

import grain
import numpy as np

from race_jax.data.rows import Batch, UnreadRows, row
from race_jax.data.workers import WorkerDataset

# Windows are read in the caller's thread. To cut a window out of an array costs less than to hand
# it from one thread to another.
SYNCHRONOUS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# An endless dataset has this number of windows. No run reads so many, and 64 bits can count them.
_ENDLESS = 1 << 62
# The least number of rows that packing fills at the same time. With fewer, rows stay emptier.
_MIN_PACKING_BINS = 16


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """The ids of documents in one array. Document d is ids[borders[d] : borders[d + 1]]."""

    ids: np.ndarray
    borders: np.ndarray

    @classmethod
    def of(cls, documents: list[np.ndarray]) -> "TokenStream":
        """Returns the stream of the given documents, of which there is at least one."""
        return cls(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))


class Pieces:
    """Documents that are cut into pieces of at most T + 1 tokens.

    A piece begins with the last token of the piece before it. Every token of a document except its
    first is therefore a target in exactly one piece.

    Example:
        >>> pieces = Pieces(TokenStream.of([np.arange(6), np.arange(2)]), length=3)
        >>> [pieces[i].tolist() for i in range(len(pieces))]
        [[0, 1, 2, 3], [3, 4, 5], [0, 1]]
    """

    def __init__(self, stream: TokenStream, length: int):
        targets = np.maximum(np.diff(stream.borders) - 1, 0)
        counts = -(-targets // length)
        document = np.repeat(np.arange(len(counts)), counts)
        place = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._ids = stream.ids
        self._starts = stream.borders[document] + place * length
        self._stops = np.minimum(self._starts + length + 1, stream.borders[document + 1])
        self.num_targets = int(targets.sum())

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._ids[self._starts[index] : self._stops[index]]


class ShiftedWindows(grain.MapDataset):
    """Windows of T + 1 tokens that follow each other over a stream, with a new offset per epoch.

    An epoch starts at an offset in [0, T), which is drawn from the seed and the number of the
    epoch. The borders of windows are therefore different in each epoch. Grain counts epochs by
    indices beyond the length.

    Args:
        ids: token ids of shape (tokens,), at least T + 1 of them.
        length: T, the tokens of a row.
        seed: the seed of the offsets.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int):
        super().__init__()
        self._ids, self._length, self._seed = ids, length, seed
        # This number of windows fits at every offset.
        self._count = max(1, (len(ids) - length) // length)
        self._offsets = min(length, len(ids) - self._count * length)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, window = divmod(index, self._count)
        offset = int(np.random.default_rng((self._seed, epoch)).integers(self._offsets))
        start = offset + window * self._length
        return self._ids[start : start + self._length + 1]


def train_windows(
    ids: np.ndarray,
    length: int,
    *,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    check: Callable[[], None] | None = None,
) -> grain.IterDataset[Batch | UnreadRows]:
    """Returns endless batches of windows over one stream, in a new order in each epoch.

    Args:
        ids: the stream.
        length: T, the tokens of a row.
        batch_size: the rows of a batch.
        seed: the seed of the order.
        num_workers: the number of processes that read.
        check: if given, batches are `UnreadRows` with this check.
    """
    windows = ShiftedWindows(ids, length, seed)
    # `repeat()` has the greatest length that Python allows, and batches of one row would exceed it.
    endless = windows.shuffle(seed=_mixed(seed)).repeat(_ENDLESS // len(windows))
    if check is not None:
        return _unread(endless, length, batch_size, check)
    batches = endless.map(lambda ids: row(ids, length)).batch(batch_size)
    if num_workers:
        return WorkerDataset(batches, num_workers)
    return batches.to_iter_dataset(SYNCHRONOUS)


def held_out_windows(
    stream: TokenStream,
    length: int,
    *,
    batch_size: int,
    check: Callable[[], None] | None = None,
) -> grain.IterDataset[Batch | UnreadRows]:
    """Returns one pass over a stream, in windows whose targets do not overlap.

    The last window is padded, with weight 0. `check` is as for `train_windows`.
    """
    windows = grain.MapDataset.source(Pieces(stream, length))
    if check is not None:
        return _unread(windows, length, batch_size, check)
    batches = windows.map(lambda ids: row(ids, length)).batch(batch_size)
    return batches.map(lambda rows: filled(rows, batch_size)).to_iter_dataset(SYNCHRONOUS)


def train_packed(
    stream: TokenStream, length: int, *, batch_size: int, seed: int
) -> grain.IterDataset[Batch]:
    """Returns endless batches of packed documents, in a new order in each epoch."""
    pieces = grain.MapDataset.source(Pieces(stream, length)).shuffle(seed=_mixed(seed)).repeat()
    return _pack(pieces, length, batch_size, shuffle_seed=_mixed(seed))


def held_out_packed(
    stream: TokenStream, length: int, *, batch_size: int
) -> grain.IterDataset[Batch]:
    """Returns one pass over all documents. Each is packed into the first row that has room for it.

    The empty part of a row has weight 0.
    """
    return _pack(grain.MapDataset.source(Pieces(stream, length)), length, batch_size)


def _pack(
    pieces: grain.MapDataset, length: int, batch_size: int, shuffle_seed: int | None = None
) -> grain.IterDataset[Batch]:
    """Returns batches of pieces. Each piece goes whole into the first row that has room for it."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces.map(lambda ids: {"pairs": _pairs(ids)}).to_iter_dataset(SYNCHRONOUS),
        length_struct={"pairs": length},
        num_packing_bins=max(batch_size, _MIN_PACKING_BINS),
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    batches = packed.map(_packed_row).batch(batch_size)
    return batches.map(lambda rows: filled(rows, batch_size))


def filled(batch: Batch, batch_size: int) -> Batch:
    """Returns the batch, filled up with rows of zeros.

    Args:
        batch: arrays of shape (B, ...), with B at most `batch_size`.
        batch_size: the rows of the batch that is returned.

    Example:
        >>> filled({"weights": np.ones((1, 2))}, 2)["weights"].tolist()
        [[1.0, 1.0], [0.0, 0.0]]
    """
    return {
        name: np.concatenate(
            [rows, np.zeros((batch_size - len(rows), *rows.shape[1:]), rows.dtype)]
        )
        for name, rows in batch.items()
    }


def _unread(
    windows: grain.MapDataset[np.ndarray],
    length: int,
    batch_size: int,
    check: Callable[[], None],
) -> grain.IterDataset[UnreadRows]:
    """Returns batches of rows that are not read yet. Missing rows of the last one are empty."""

    def batch(rows: list[np.ndarray]) -> UnreadRows:
        empty = [rows[0][:0]] * (batch_size - len(rows))
        return UnreadRows([*rows, *empty], length, check)

    return windows.batch(batch_size, batch_fn=batch).to_iter_dataset(SYNCHRONOUS)


def _mixed(seed: int) -> int:
    """Returns a 32-bit seed that is far from those of neighboring seeds.

    Grain adds the number of the epoch to a seed.
    """
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _pairs(ids: np.ndarray) -> np.ndarray:
    """Returns pairs of each token and the next one, (n, 2)."""
    return np.stack([ids[:-1], ids[1:]], axis=-1)


def _packed_row(packed: dict[str, np.ndarray]) -> Batch:
    """Returns a row of a batch from one of Grain's.

    The segment ids are 1, 2, … for the documents, and 0 for the empty tail only, so that each id is
    one run.
    """
    segment_ids = packed["pairs_segment_ids"]
    return {
        "inputs": packed["pairs"][:, 0],
        "targets": packed["pairs"][:, 1],
        "weights": (segment_ids > 0).astype(np.uint8),
        "segment_ids": segment_ids,
    }
