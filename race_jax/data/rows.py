"""Rows of a batch: inputs and targets from token ids, at once or piece by piece.

targets[t] is the token after inputs[t], and weights[t] is 1 where there is such a token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Batch = dict[str, np.ndarray]


def row(ids: np.ndarray, length: int) -> Batch:
    """Returns a row of one segment from at most T + 1 tokens, filled up with zeros of weight 0.

    Args:
        ids: shape (n,), with n at most T + 1.
        length: T.

    Returns:
        Arrays of shape (T,): `inputs` and `targets` in the dtype of `ids`, and `weights` in uint8.

    Example:
        >>> row(np.array([5, 6, 7]), 3)["targets"].tolist()
        [6, 7, 0]
    """
    count = max(len(ids) - 1, 0)
    inputs, targets = np.zeros((2, length), ids.dtype)
    inputs[:count], targets[:count] = ids[:count], ids[1:]
    return {
        "inputs": inputs,
        "targets": targets,
        "weights": (np.arange(length) < count).astype(np.uint8),
    }


@dataclasses.dataclass(frozen=True)
class UnreadRows:
    """A batch of rows that stay where they are, on the disk or in memory, until a piece is read.

    Attributes:
        ids: for each row, its T + 1 ids or fewer. They may be mapped to a file.
        length: T.
        check: a function that raises an error if that file has changed.

    Example:
        >>> batch = UnreadRows([np.arange(9), np.arange(3)], length=8)
        >>> batch.piece(2, 5)["targets"].tolist()
        [[3, 4, 5], [0, 0, 0]]
    """

    ids: Sequence[np.ndarray] = dataclasses.field(repr=False)
    length: int
    check: Callable[[], Any] = lambda: None

    def __len__(self) -> int:
        return len(self.ids)

    def piece(self, first: int, stop: int, rows: Sequence[int] | None = None) -> Batch:
        """Reads the tokens from `first` to before `stop`.

        Args:
            first: index of the first token.
            stop: index after the last token. From T on there are zeros of weight 0.
            rows: the rows to read, in this order; None reads all.

        Returns:
            The arrays of `row`, of shape (rows, stop - first).

        Raises:
            ValueError: the file has changed since it was opened.
        """
        self.check()
        chosen = self.ids if rows is None else [self.ids[index] for index in rows]
        read = [row(ids[first : stop + 1], stop - first) for ids in chosen]
        return {name: np.stack([part[name] for part in read]) for name in read[0]}
