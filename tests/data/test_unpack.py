"""The content of a file says how it is read. Packed text is unpacked, other forms are refused."""

import bz2
import codecs
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from race_jax.data.config import DataConfig
from race_jax.data.sources import load_corpus
from race_jax.data.text import build_data
from race_jax.data.unpack import plain_text

TEXT = "Grüße,\nline two\n".encode()


def zipped(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("folder/", b"")
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        entry = tarfile.TarInfo("text")
        entry.size = len(TEXT)
        archive.addfile(entry, io.BytesIO(TEXT))
    return stream.getvalue()


PACKED = {
    "gz": gzip.compress(TEXT),
    "bz2": bz2.compress(TEXT),
    "xz": lzma.compress(TEXT),
    "zip": zipped(text=TEXT),
}


@pytest.mark.parametrize("form", PACKED)
@pytest.mark.parametrize("name", ["t.{}", "t.txt", "t", "T.{}", "zip"])
def test_packed_text_is_unpacked_whatever_its_name(form, name):
    assert plain_text(name.format(form.upper()), PACKED[form]) == TEXT


def test_text_packed_twice_or_in_parts_is_unpacked():
    assert plain_text("t", gzip.compress(bz2.compress(TEXT))) == TEXT
    assert plain_text("t.gz", gzip.compress(TEXT) + gzip.compress(TEXT)) == 2 * TEXT
    assert plain_text("t.bz2", bz2.compress(TEXT) + bz2.compress(TEXT)) == 2 * TEXT


@pytest.mark.parametrize("form", PACKED)
def test_damaged_data_names_file_and_form(form):
    packed, third = PACKED[form], len(PACKED[form]) // 3
    zeros_inside = packed[:third] + bytes(third) + packed[2 * third :]
    for data in (packed[:-12], zeros_inside, packed[1:], TEXT):
        with pytest.raises(ValueError, match=rf"t\.{form}: .* data.* (damaged|truncated)"):
            plain_text(f"t.{form}", data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped(a=TEXT, b=TEXT), "is a zip archive of 2 files"),
        (zipped(), "is a zip archive of 0 files"),
        (tarred(), "a tar archive"),
        (gzip.compress(tarred()), "a tar archive"),
        (b"7z\xbc\xaf\x27\x1c" + TEXT, "7-Zip"),
        (b"Rar!\x1a\x07\x00" + TEXT, "RAR"),
        (b"\x28\xb5\x2f\xfd" + TEXT, "Zstandard data, .*zstd -d"),
        (b"\x04\x22\x4d\x18" + TEXT, "LZ4"),
        (b"\x1f\x9d\x90" + TEXT, "compress"),
        (b"PAR1\x15" + TEXT, "Parquet"),
        (b"ARROW1\x00\x00" + TEXT, "Arrow"),
        (b"%PDF-1.7" + TEXT, "PDF"),
        (b"\x93NUMPY\x01" + TEXT, "NumPy"),
        (b"SQLite format 3\x00", "SQLite"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8a", "byte order mark of utf-16-le"),
    ],
)
def test_what_is_not_read_is_refused_by_its_form(data, words):
    with pytest.raises(ValueError, match=rf"^t\.txt: .*{words}"):
        plain_text("t.txt", data)


def test_an_encrypted_archive_is_refused():
    data = bytearray(PACKED["zip"])
    for place in (6, data.index(b"PK\x01\x02") + 8, data.rindex(b"PK\x01\x02") + 8):
        data[place] |= 1  # the flag of an encrypted entry
    with pytest.raises(ValueError, match=r"t\.zip: .*encrypted.*; extract the text"):
        plain_text("t.zip", bytes(data))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_part_of_the_text(encoding, pack):
    text = TEXT.decode()
    if encoding.endswith("-be"):
        text = "\ufeff" + text
    assert plain_text("t", pack(text.encode(encoding))) == TEXT


def test_text_that_only_looks_packed_is_text():
    for text in (b"BZh, said the bee", b"PK is a name", b"%PDF", b"PAR10", b"]", b"{}"):
        assert plain_text("t.txt", text) == text


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", "words"])
def test_packed_and_marked_files_train_as_their_text(tmp_path, tokenizer):
    text = b"the cat sees the dog\n" * 50
    (tmp_path / "plain").write_bytes(text)
    (tmp_path / "my packed text").write_bytes(zipped(text=codecs.BOM_UTF8 + text))
    digests = set()
    for name in ("plain", "my packed text"):
        config = DataConfig(source="files", root=str(tmp_path), train_files=(name,),
                            tokenizer=tokenizer, sequence_length=8)  # fmt: skip
        data = build_data(config, batch_size=2, seed=0)
        digests.add((data.digest, data.tokenizer_digest))
    assert len(digests) == 1


def test_a_home_folder_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RACE_JAX_DATA", "~")
    (tmp_path / "a.txt").write_bytes(TEXT)
    for root, name in (("~", "a.txt"), (None, "~/a.txt"), (None, "a.txt")):
        config = DataConfig(source="files", root=root, train_files=(name,), valid_files=(name,))
        assert load_corpus(config).train[0].data == TEXT
    config = DataConfig(source="files", train_files=("~no-such-user-here/a.txt",))
    with pytest.raises(ValueError, match=r"config\.data\.train_files: ~no-such-user-here/a\.txt"):
        load_corpus(config)
