"""Segments that are read from the host: how a sequence is cut, and reading ahead of use.

A segment that is read a second time is compared with the first reading by its CRC-32.
"""

from __future__ import annotations

import concurrent.futures
import os
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.streaming.step import check_at_least_one, common_length


class Segments:
    """Arrays on the host, cut into segments: what `host_fold` and `host_value_and_grad` read.

    Nothing is read before it is asked for, so the arrays may be memory-mapped files of any length.

    Args:
      sequence: a pytree of NumPy arrays of equal length along ``axis``.
      segment_length: the tokens of a segment; the last one is shorter if it does not divide.
      axis: the axis of time in every array.

    Raises:
      ValueError: ``segment_length`` is below 1, or the arrays have no axis of time or differ in
        length; when a segment is read: its file has become shorter.

    Example:
      >>> import numpy as np
      >>> from race_jax import streaming
      >>> tokens = np.arange(8)[None]  # or np.memmap("tokens.bin", np.uint16, mode="r")[None]
      >>> sequence = {"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}
      >>> segments = streaming.Segments(sequence, segment_length=3)
      >>> [segment["targets"].tolist() for segment in segments]
      [[[1, 2, 3]], [[4, 5, 6]], [[7]]]
    """

    def __init__(self, sequence: Any, segment_length: int, *, axis: int = 1):
        check_at_least_one("segment_length", segment_length)
        self._sequence, self._segment_length, self._axis = sequence, segment_length, axis
        self._length = common_length(sequence, axis)
        files = {_file_of(x) for x in jax.tree.leaves(sequence)} - {None}
        self._sizes = {file: os.stat(file).st_size for file in files}

    def __len__(self) -> int:
        return -(-self._length // self._segment_length)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} segments, and no segment {index}")
        for file, size in self._sizes.items():
            now = os.stat(file).st_size
            if now < size:  # reading a mapped page beyond the end would kill the process
                raise ValueError(
                    f"{file} had {size} bytes when it was opened and has {now} now; leave a file "
                    "as it is while it is read, and start again with the new one"
                )
        first = index * self._segment_length
        time = (slice(None),) * self._axis + (slice(first, first + self._segment_length),)
        return jax.tree.map(lambda x: x[time], self._sequence)


def read_ahead(segments: Any, order: list[int]) -> Iterator[Any]:
    """Yields segments in an order, while a thread reads the next one.

    Args:
      segments: something with a length that is indexed from 0.
      order: the index of every segment to read, at least one; an index may come again.

    Yields:
      A copy of ``segments[index]`` for every index.

    Raises:
      ValueError: a segment that comes again differs from what it was.
    """
    digests: dict[int, int] = {}

    def read(index: int) -> Any:
        # A copy: a mapped file must not be read any more when the computation uses the segment.
        segment = jax.tree.map(_copy, segments[index])
        digest = _digest(segment)
        if digests.setdefault(index, digest) != digest:
            raise ValueError(
                f"segment {index} of {len(segments)} differs from what was read before; leave the "
                "data as it is until the gradient is there, and start again"
            )
        return segment

    with concurrent.futures.ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = thread.submit(read, order[0])
        for following in [*order[1:], None]:
            segment = coming.result()
            if following is not None:
                coming = thread.submit(read, following)
            yield segment


def _copy(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"a sequence that is read from the host holds numbers; got keys of dtype {x.dtype}. "
            "Pass their jax.random.key_data, and make keys of it inside f"
        )
    return np.array(x)


def _digest(segment: Any) -> int:
    """Returns a checksum of the names, shapes, dtypes and bytes of a segment's arrays."""
    digest = 0
    for path, x in jax.tree_util.tree_leaves_with_path(segment):
        kind = f"{jax.tree_util.keystr(path)} {x.dtype} {x.shape}"
        digest = zlib.crc32(x.tobytes(), zlib.crc32(kind.encode(), digest))
    return digest


def _file_of(x: Any) -> str | None:
    """Returns the name of the file that an array is mapped to."""
    while x is not None:
        if isinstance(x, np.memmap) and x.filename is not None:
            return os.fspath(x.filename)
        x = getattr(x, "base", None)
    return None
