"""Token ids to batches: windows of one stream, or packed documents, by Grain pipelines.

In: token ids and the borders of their documents. Out: Grain datasets of batches, rows of T tokens
with targets[t] = the token after inputs[t]. Equation: none.
"""

import dataclasses

import grain
import numpy as np

from race_jax.data.workers import WorkerDataset

Batch = dict[str, np.ndarray]

# Read in the caller's thread: cutting a window out of an array costs less than handing it over.
_SYNCHRONOUS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Indices of this many windows: more than any run reads, few enough to be counted in 64 bits.
_ENDLESS = 1 << 62
# First-fit fills this many rows side by side at least; with fewer, more of each row stays empty.
_MIN_PACKING_BINS = 16


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """Documents one after the other: document d is ids[borders[d] : borders[d + 1]]."""

    ids: np.ndarray
    borders: np.ndarray

    @classmethod
    def of(cls, documents: list[np.ndarray]) -> "TokenStream":
        """The stream of the given documents, at least one."""
        return cls(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))


class Pieces:
    """Documents cut into pieces of at most T + 1 tokens; a piece starts with the last one's end.

    So every token of a document but its first is the target of exactly one piece.

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
    """Neighbouring windows of T + 1 tokens over a stream, the first one elsewhere in each epoch.

    An epoch starts at an offset in [0, T) drawn from the seed and its number, so the borders of
    windows fall differently each time. Grain counts the epochs by indices beyond the length.

    Args:
        ids: (tokens,), at least T + 1.
        length: T.
        seed: of the offsets.
    """

    def __init__(self, ids: np.ndarray, length: int, seed: int):
        super().__init__()
        self._ids, self._length, self._seed = ids, length, seed
        # Whatever the offset, this many windows fit.
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
    ids: np.ndarray, length: int, *, batch_size: int, seed: int, num_workers: int = 0
) -> grain.IterDataset[Batch]:
    """Endless batches of windows over one stream, shuffled anew in each epoch."""
    windows = ShiftedWindows(ids, length, seed)
    # Not `repeat()`: its length is the largest that Python allows, too long for batches of one row.
    endless = windows.shuffle(seed=_mixed(seed)).repeat(_ENDLESS // len(windows))
    batches = endless.map(lambda ids: _row(ids, length)).batch(batch_size)
    if num_workers:
        return WorkerDataset(batches, num_workers)
    return batches.to_iter_dataset(_SYNCHRONOUS)


def held_out_windows(
    stream: TokenStream, length: int, *, batch_size: int
) -> grain.IterDataset[Batch]:
    """One pass over a stream in windows that do not overlap; the last is padded, weight 0."""
    windows = grain.MapDataset.source(Pieces(stream, length))
    batches = windows.map(lambda ids: _row(ids, length)).batch(batch_size)
    return batches.map(lambda rows: filled(rows, batch_size)).to_iter_dataset(_SYNCHRONOUS)


def train_packed(
    stream: TokenStream, length: int, *, batch_size: int, seed: int
) -> grain.IterDataset[Batch]:
    """Endless batches of packed documents, shuffled anew in each epoch."""
    pieces = grain.MapDataset.source(Pieces(stream, length)).shuffle(seed=_mixed(seed)).repeat()
    return _pack(pieces, length, batch_size, shuffle_seed=_mixed(seed))


def held_out_packed(
    stream: TokenStream, length: int, *, batch_size: int
) -> grain.IterDataset[Batch]:
    """One pass over all documents, packed in order of first fit; what stays empty has weight 0."""
    return _pack(grain.MapDataset.source(Pieces(stream, length)), length, batch_size)


def _pack(
    pieces: grain.MapDataset, length: int, batch_size: int, shuffle_seed: int | None = None
) -> grain.IterDataset[Batch]:
    """Batches of pieces packed by first fit: whole pieces, as many in a row as it holds."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces.map(lambda ids: {"pairs": _pairs(ids)}).to_iter_dataset(_SYNCHRONOUS),
        length_struct={"pairs": length},
        num_packing_bins=max(batch_size, _MIN_PACKING_BINS),
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    batches = packed.map(_packed_row).batch(batch_size)
    return batches.map(lambda rows: filled(rows, batch_size))


def filled(batch: Batch, batch_size: int) -> Batch:
    """The batch, filled up with rows of zeros.

    Args:
        batch: arrays (B, ...), with B at most `batch_size`.
        batch_size: rows of the batch that is returned.

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


def _mixed(seed: int) -> int:
    """A 32-bit seed far from a neighbour's: Grain adds the epoch's number to it."""
    return int(np.random.SeedSequence(seed).generate_state(1)[0])


def _pairs(ids: np.ndarray) -> np.ndarray:
    """Each token with the one after it, (n, 2)."""
    return np.stack([ids[:-1], ids[1:]], axis=-1).astype(np.int32)


def _packed_row(packed: dict[str, np.ndarray]) -> Batch:
    """A row of a batch from Grain's: ids 1, 2, … for the documents and 0 for the empty tail.

    0 occurs nowhere else in the row, so each id is one run, the tail's too.
    """
    segment_ids = packed["pairs_segment_ids"]
    return {
        "inputs": packed["pairs"][:, 0],
        "targets": packed["pairs"][:, 1],
        "weights": (segment_ids > 0).astype(np.float32),
        "segment_ids": segment_ids,
    }


def _row(ids: np.ndarray, length: int) -> Batch:
    """A row of one segment from n + 1 <= T + 1 tokens, filled up with zeros of weight 0."""
    pairs = np.zeros((length, 2), np.int32)
    pairs[: len(ids) - 1] = _pairs(ids)
    return {
        "inputs": pairs[:, 0],
        "targets": pairs[:, 1],
        "weights": (np.arange(length) < len(ids) - 1).astype(np.float32),
    }
