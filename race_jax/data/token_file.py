"""Files of token ids, which are read where they lie on the disk.

NAME.npy holds the ids, in the format of NumPy. NAME.npy.json has the tokenizer that made them,
their number and their SHA-256.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np

from race_jax.data.tokenizer import Tokenizer, from_dict

# Ids are copied, counted and compared in pieces of this number.
PIECE = 1 << 24


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """An open file of token ids.

    Attributes:
        path: the file.
        ids: shape (tokens,), mapped to the file, so that only what is used is read.
        tokenizer: the tokenizer that made the ids.
        digest: their SHA-256.
        stamp: the size of the file, and when it was last changed.
    """

    path: Path
    ids: np.ndarray
    tokenizer: Tokenizer
    digest: str
    stamp: tuple[int, int]

    def check(self) -> None:
        """Checks that nobody has written to the file since it was opened.

        To read a mapped file beyond its end would kill the process.

        Raises:
            ValueError: the file has changed, or it is no longer there.
        """
        now = _stamp(self.path)
        if now != self.stamp:
            raise ValueError(
                f"{self.path} had {self.stamp[0]} bytes when it was opened, and was changed since "
                f"then (it has {now[0]} bytes now). Leave it as it is while a run reads it, and "
                "start the run again"
            )


def write_token_file(path: Path, parts: Iterable[np.ndarray], tokenizer: Tokenizer) -> int:
    """Writes ids to a file, part after part, and the record beside it.

    Args:
        path: the file, with a name that ends in `.npy`. Neither it nor its record may exist.
        parts: arrays of ids of one dtype, in their order.
        tokenizer: the tokenizer that made them.

    Returns:
        The number of ids.

    Raises:
        ValueError: the name is not usable, or there are no ids.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from race_jax.data.tokenizer import ByteTokenizer
        >>> path = Path(tempfile.mkdtemp(), "tokens.npy")
        >>> write_token_file(path, [np.frombuffer(b"some text", np.uint8)], ByteTokenizer())
        9
        >>> open_token_file(path).ids[:4].tobytes()
        b'some'
    """
    if path.suffix != ".npy":
        raise ValueError(f"{path}: the name of a token file must end in .npy")
    for taken in (path, _record_path(path)):
        if taken.exists():
            raise ValueError(f"{taken} exists already; remove it, or give another name")
    draft = path.with_name(path.name + ".tmp")
    try:
        with open(draft, "wb") as stream:
            count, digest = _write_ids(stream, parts)
        if count == 0:
            raise ValueError(f"{path}: there are no tokens to write")
        record = {"tokenizer": tokenizer.to_dict(), "tokens": count, "sha256": digest}
        _record_path(path).write_text(json.dumps(record))
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return count


def open_token_file(path: Path) -> TokenFile:
    """Opens a file of token ids, and reads all of it once to compare it with its record.

    Args:
        path: the file.

    Returns:
        The file, whose ids stay on the disk.

    Raises:
        ValueError: the file or its record is missing, is damaged, or does not fit the other.
        ImportError: its tokenizer needs a package that is not installed.
    """
    stamp = _stamp(path)
    record = _read_record(path)
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: not a whole file of NumPy ({error}); write it again") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or len(ids) != record["tokens"]:
        raise ValueError(
            f"{path}: holds {ids.dtype} of shape {ids.shape}, and {_record_path(path).name} beside "
            f"it says {record['tokens']} ids; write both again"
        )
    tokenizer, digest, last = from_dict(record["tokenizer"]), hashlib.sha256(), 0
    least = 0
    for first in range(0, len(ids), PIECE):
        piece = ids[first : first + PIECE]
        digest.update(np.ascontiguousarray(piece).data)
        least, last = min(least, int(piece.min())), max(last, int(piece.max()))
    if least < 0 or last >= tokenizer.vocab_size:
        raise ValueError(
            f"{path}: holds the id {least if least < 0 else last}, and its tokenizer has "
            f"{tokenizer.vocab_size} ids, counted from 0; write the file again"
        )
    if digest.hexdigest() != record["sha256"]:
        raise ValueError(
            f"{path}: its ids are not those that {_record_path(path).name} beside it describes "
            f"(sha256 {digest.hexdigest()[:16]} and {record['sha256'][:16]}); write both again"
        )
    return TokenFile(path, ids, tokenizer, record["sha256"], stamp)


def _write_ids(stream: IO[bytes], parts: Iterable[np.ndarray]) -> tuple[int, str]:
    """Writes a NumPy file of all parts, and returns the number of ids and their SHA-256."""
    digest, count, dtype = hashlib.sha256(), 0, None
    for part in parts:
        if dtype is None:
            dtype = part.dtype
            _write_header(stream, dtype, 0)
        if part.dtype != dtype or dtype.kind not in "iu":
            raise ValueError(
                f"token ids must be integers of one dtype; got {part.dtype} after {dtype}"
            )
        data = np.ascontiguousarray(part, dtype).data
        digest.update(data)
        stream.write(data)
        count += len(part)
    if count:
        stream.seek(0)
        _write_header(stream, dtype, count)
        stream.flush()
        os.fsync(stream.fileno())
    return count, digest.hexdigest()


def _write_header(stream: IO[bytes], dtype: np.dtype, count: int) -> None:
    """Writes the start of a NumPy file, which has the same size for every count."""
    described = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": described, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(stream, header)


def _record_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_record(path: Path) -> dict[str, Any]:
    """Returns the record beside a token file."""
    beside = _record_path(path)
    try:
        record = json.loads(beside.read_bytes())
        kinds = {"tokenizer": dict, "tokens": int, "sha256": str}
        known = all(isinstance(record.get(name), kind) for name, kind in kinds.items())
    except (OSError, ValueError, AttributeError):
        known = False
    if not known:
        raise ValueError(
            f"{path}: {beside.name} beside it is missing or damaged; scripts/write_tokens.py makes "
            "both from text"
        )
    return record


def _stamp(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    return found.st_size, found.st_mtime_ns
