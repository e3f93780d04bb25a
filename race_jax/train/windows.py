"""Token ids to batches: windows of one stream, or packed documents, by Grain pipelines.

In: token ids and the borders of their documents. Out: Grain datasets of batches, rows of T tokens
with targets[t] = the token after inputs[t]. Equation: none.
"""

import dataclasses

import grain
import numpy as np

from race_jax.train.workers import WorkerDataset

Batch = dict[str, np.ndarray]

# Read in the caller's thread: cutting a window out of an array costs less than handing it over.
_SYNCHRONOUS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Indices of this many windows: more than any run reads, few enough to be counted in 64 bits.
_ENDLESS = 1 << 62
# First-fit fills this many rows side by side at least; with fewer, more of each row stays empty.
_MIN_PACKING_BINS = 16


@dataclasses.dataclass(frozen=True)
class HostRows:
    """The rows of a global batch that one process reads; they stand together, in process order."""

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.process_count < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} must be a positive multiple of "
                f"process_count={self.process_count}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index} must lie in [0, {self.process_count})"
            )

    @property
    def local_size(self) -> int:
        """Rows of this process."""
        return self.batch_size // self.process_count

    def select(self, batch: Batch) -> Batch:
        """This process's rows of a global batch, which is first filled up with rows of zeros."""
        missing = self.batch_size - len(batch["inputs"])
        first = self.process_index * self.local_size
        return {
            name: np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)])[
                first : first + self.local_size
            ]
            for name, rows in batch.items()
        }


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
    ids: np.ndarray, length: int, *, rows: HostRows, seed: int, num_workers: int = 0
) -> grain.IterDataset[Batch]:
    """Endless batches of windows over one stream, shuffled anew in each epoch."""
    windows = ShiftedWindows(ids, length, seed)
    # Not `repeat()`: its length is the largest that Python allows, too long for batches of one row.
    endless = windows.shuffle(seed=_mixed(seed)).repeat(_ENDLESS // len(windows))
    batches = endless.map(lambda ids: _row(ids, length)).batch(rows.local_size)
    # Batch b of process p is batch b * process_count + p of all that are read.
    mine = batches[rows.process_index :: rows.process_count]
    if num_workers:
        return WorkerDataset(mine, num_workers)
    return mine.to_iter_dataset(_SYNCHRONOUS)


def held_out_windows(
    stream: TokenStream, length: int, *, rows: HostRows
) -> grain.IterDataset[Batch]:
    """One pass over a stream in windows that do not overlap; the last is padded, weight 0."""
    windows = grain.MapDataset.source(Pieces(stream, length))
    batches = windows.map(lambda ids: _row(ids, length)).batch(rows.batch_size)
    return batches.map(rows.select).to_iter_dataset(_SYNCHRONOUS)


def train_packed(
    stream: TokenStream, length: int, *, rows: HostRows, seed: int
) -> grain.IterDataset[Batch]:
    """Endless batches of packed documents, shuffled anew in each epoch.

    Every process packs all documents and keeps its rows: the order of packing is then the same
    for any number of processes, and a run may go on with another number.
    """
    pieces = grain.MapDataset.source(Pieces(stream, length)).shuffle(seed=_mixed(seed)).repeat()
    return _pack(pieces, length, rows, shuffle_seed=_mixed(seed))


def held_out_packed(
    stream: TokenStream, length: int, *, rows: HostRows
) -> grain.IterDataset[Batch]:
    """One pass over all documents, packed in order of first fit; what stays empty has weight 0."""
    return _pack(grain.MapDataset.source(Pieces(stream, length)), length, rows)


def _pack(
    pieces: grain.MapDataset, length: int, rows: HostRows, shuffle_seed: int | None = None
) -> grain.IterDataset[Batch]:
    """Batches of pieces packed by first fit: whole pieces, as many in a row as it holds."""
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces.map(lambda ids: {"pairs": _pairs(ids)}).to_iter_dataset(_SYNCHRONOUS),
        length_struct={"pairs": length},
        num_packing_bins=max(rows.batch_size, _MIN_PACKING_BINS),
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    return packed.map(_packed_row).batch(rows.batch_size).map(rows.select)


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
        "positions": packed["pairs_positions"],
    }


def _row(ids: np.ndarray, length: int) -> Batch:
    """A row of one segment from n + 1 <= T + 1 tokens, filled up with zeros of weight 0."""
    pairs = np.zeros((length, 2), np.int32)
    pairs[: len(ids) - 1] = _pairs(ids)
    return {
        "inputs": pairs[:, 0],
        "targets": pairs[:, 1],
        "weights": (np.arange(length) < len(ids) - 1).astype(np.float32),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.arange(length, dtype=np.int32),
    }
