"""Turns the bytes of a file into text: unpacked, and without a byte order mark.

The first bytes of a file say what it holds. The name of the file must agree with them.
"""

import bz2
import codecs
import gzip
import io
import lzma
import zipfile
import zlib
from collections.abc import Callable
from pathlib import PurePath

# The first bytes of packed files, and the forms that they stand for.
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b\x08", "gzip"),
    *((b"BZh%d1AY&SY" % level, "bzip2") for level in range(1, 10)),
    *((b"BZh%d\x17\x72\x45\x38\x50\x90" % level, "bzip2") for level in range(1, 10)),  # empty
    (b"\xfd7zXZ\x00", "xz"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),  # an empty archive
)
# Forms of files that are refused: their first bytes, their names, and what to do instead.
_EXTRACT, _CONVERT = "extract the text files", "convert it to plain text"
_CONVERT_TABLE = "load it as a data set (--config.data.source=huggingface), or " + _CONVERT
_REFUSED: tuple[tuple[bytes, str, str], ...] = (
    (b"\x28\xb5\x2f\xfd", "Zstandard data", "unpack it with zstd -d"),
    (b"\x04\x22\x4d\x18", "LZ4 data", "unpack it with lz4 -d"),
    (b"\x1f\x9d", "compress (.Z) data", "unpack it with uncompress"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _EXTRACT),
    (b"Rar!\x1a\x07", "a RAR archive", _EXTRACT),
    (b"PAR1\x15", "a Parquet file", _CONVERT_TABLE),
    (b"ARROW1\x00\x00", "an Arrow file", _CONVERT_TABLE),
    (b"%PDF-", "a PDF document", _CONVERT),
    (b"{\\rtf", "an RTF document", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a Microsoft Office document", _CONVERT),
    (b"SQLite format 3\x00", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
)
_TAR, _TAR_OFFSET = b"ustar", 257
_SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zip": "zip"}
# UTF-32 comes first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def plain_text(name: str, data: bytes) -> bytes:
    """Returns the text that the bytes of a file stand for.

    Args:
        name: the name of the file, for errors. If it ends in .gz, .bz2, .xz or .zip, the data must
            be of that form.
        data: the whole file.

    Returns:
        The unpacked bytes. A byte order mark of UTF-8 is removed. Text that begins with the byte
        order mark of UTF-16 or UTF-32 becomes UTF-8.

    Raises:
        ValueError: the data is damaged, or its form is not read. The error says which.

    Example:
        >>> plain_text("poem.txt", gzip.compress(b"one line"))
        b'one line'
        >>> plain_text("poem.txt", "one line".encode("utf-16"))
        b'one line'
    """
    data = unpacked(name, data)
    for begins, what, way_out in _REFUSED:
        if data.startswith(begins):
            raise ValueError(f"{name}: holds {what}, which is not read as text; {way_out}")
    if data[_TAR_OFFSET:].startswith(_TAR):
        raise ValueError(f"{name}: holds a tar archive, which is not read as text; {_EXTRACT}")
    return _without_mark(name, data)


def unpacked(name: str, data: bytes) -> bytes:
    """Returns the content of a file that may be packed, once or more often.

    Args:
        name: the name of the file, for errors. If it ends in .gz, .bz2, .xz or .zip, the data must
            be of that form.
        data: the whole file.

    Raises:
        ValueError: the data is damaged. The error names the file.

    Example:
        >>> list(unpacked("numbers.gz", gzip.compress(bytes([1, 2, 3]))))
        [1, 2, 3]
    """
    promised = _SUFFIXES.get(PurePath(name).suffix.lower())
    form = _form(data)
    if data and promised is not None and form != promised:
        raise ValueError(
            f"{name}: its name promises {promised} data, but its first bytes are not of that form; "
            "it is damaged (fetch it again) or not packed (rename it)"
        )
    while form is not None:
        data = _unpack(name, form, data)
        form = _form(data)
    return data


def _form(data: bytes) -> str | None:
    """Returns the packed form that `data` has, or None."""
    return next((form for begins, form in _MAGIC if data.startswith(begins)), None)


def _unpack(name: str, form: str, data: bytes) -> bytes:
    try:
        return _UNPACKERS[form](data)
    except EOFError as error:
        raise ValueError(
            f"{name}: its {form} data breaks off: the file is truncated; fetch it again"
        ) from error
    except (OSError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{name}: its {form} data is damaged; fetch it again") from error
    except (_NotOneFile, NotImplementedError, RuntimeError) as error:  # zip files only
        raise ValueError(f"{name}: {error}; {_EXTRACT}") from error


class _NotOneFile(Exception):
    """The archive holds no file, or several."""


def _unzip(data: bytes) -> bytes:
    """Returns the only file of a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
        if len(names) != 1:
            raise _NotOneFile(f"is a zip archive of {len(names)} files, and only one is read")
        return archive.read(names[0])


_UNPACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.decompress,
    "bzip2": lambda data: bz2.BZ2File(io.BytesIO(data)).read(),
    "xz": lambda data: lzma.LZMAFile(io.BytesIO(data)).read(),  # noqa: SIM115 (in memory)
    "zip": _unzip,
}


def _without_mark(name: str, data: bytes) -> bytes:
    """Returns the bytes without a byte order mark. If there was one, they become UTF-8."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            if encoding == "utf-8":
                return data[len(mark) :]
            try:
                return data[len(mark) :].decode(encoding).encode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{name}: begins with the byte order mark of {encoding}, but is not such text "
                    f"(offset {error.start + len(mark)}); convert the file to UTF-8"
                ) from error
    return data
