"""Token files: how they are written, by the script too, and what is refused."""

import json
import tracemalloc

import numpy as np
import pytest

from race_jax.data.config import DataConfig
from race_jax.data.rows import UnreadRows, row
from race_jax.data.text import build_data
from race_jax.data.token_file import open_token_file, write_token_file
from race_jax.data.tokenizer import BytePairTokenizer, ByteTokenizer
from race_jax.tasks.language_model import LanguageModel
from scripts import write_tokens
from tests.train.small import small_config

TEXT = np.random.default_rng(0).integers(0, 256, 300).astype(np.uint8)


def test_pieces_of_rows_are_the_rows():
    ids = [TEXT[:25], TEXT[25:32], TEXT[:1], TEXT[:0]]
    batch = UnreadRows(ids, length=24)
    want = {name: np.stack([row(x, 24)[name] for x in ids]) for name in row(ids[0], 24)}
    for length in (1, 7, 24):
        pieces = [batch.piece(i, min(i + length, 24)) for i in range(0, 24, length)]
        for name, whole in want.items():
            np.testing.assert_array_equal(np.concatenate([p[name] for p in pieces], 1), whole)
    np.testing.assert_array_equal(
        batch.piece(2, 9, [2, 0])["targets"], want["targets"][[2, 0], 2:9]
    )


def test_the_script_writes_what_its_tokenizer_says(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abba")
    (tmp_path / "b.txt").write_text("cab")
    texts = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    letters, more = str(tmp_path / "letters.npy"), str(tmp_path / "more.npy")
    assert write_tokens.main([letters, *texts, "--tokenizer", "characters"]) == 0
    assert "8 tokens (characters)" in capsys.readouterr().out
    found = open_token_file(tmp_path / "letters.npy")
    assert found.tokenizer.decode(found.ids) == "abba\ncab"
    assert write_tokens.main([more, texts[1], "--like", letters]) == 0
    assert open_token_file(tmp_path / "more.npy").ids.tolist() == [3, 1, 2]
    assert write_tokens.main([letters, *texts]) == 2
    assert "letters.npy exists already" in capsys.readouterr().err
    assert write_tokens.main([str(tmp_path / "x.npy"), str(tmp_path / "none.txt")]) == 2
    assert "none.txt: no such file" in capsys.readouterr().err
    assert not list(tmp_path.glob("x.npy*"))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a whole file of NumPy"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"!"), "its ids are not those"),
        (lambda path: path.with_name("t.npy.json").unlink(), r"t\.npy\.json beside it is missing"),
        (lambda path: path.with_name("t.npy.json").write_text("{}"), "is missing or damaged"),
        (
            lambda path: path.with_name("t.npy.json").write_text(
                '{"tokenizer": {}, "tokens": 9, "sha256": 5}'
            ),
            "is missing or damaged",
        ),
        (lambda path: np.save(path, np.zeros((2, 2))), r"holds float64 of shape \(2, 2\)"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_token_file_is_refused(tmp_path, damage, words):
    path = tmp_path / "t.npy"
    write_token_file(path, [TEXT], ByteTokenizer())
    assert json.loads((tmp_path / "t.npy.json").read_text())["tokens"] == len(TEXT)
    np.testing.assert_array_equal(open_token_file(path).ids, TEXT)
    with pytest.raises(ValueError, match="exists already"):
        write_token_file(path, [TEXT], ByteTokenizer())
    damage(path)
    with pytest.raises(ValueError, match=words):
        open_token_file(path)


@pytest.mark.parametrize("dtypes", [("uint8", "uint16"), ("float32",)])
def test_parts_of_other_numbers_are_refused(tmp_path, dtypes):
    parts = [np.ones(3, dtype) for dtype in dtypes]
    with pytest.raises(ValueError, match=f"integers of one dtype; got {dtypes[-1]}"):
        write_token_file(tmp_path / "tokens.npy", parts, ByteTokenizer())
    assert not list(tmp_path.iterdir())


def test_a_negative_id_is_refused(tmp_path):
    path = tmp_path / "tokens.npy"
    write_token_file(path, [np.array([1, -5, 2], np.int32)], ByteTokenizer())
    with pytest.raises(ValueError, match="holds the id -5, and its tokenizer has 256 ids"):
        open_token_file(path)


def test_files_of_different_numbers_are_refused(tmp_path):
    for name, dtype in {"train": np.uint8, "valid": np.int32}.items():
        write_token_file(tmp_path / f"{name}.npy", [TEXT.astype(dtype)], ByteTokenizer())
    files = {"train_files": ("train.npy",), "valid_files": ("valid.npy",)}
    config = DataConfig(
        source="tokens", root=str(tmp_path), tokenizer="bytes", sequence_length=4, **files
    )
    with pytest.raises(ValueError, match=r"valid\.npy holds ids in int32, .* in uint8; write both"):
        build_data(config, batch_size=1, seed=0)


@pytest.mark.parametrize(
    ("tokenizer", "encodes"), [("bytes", True), ("characters", True), ("words", False)]
)
def test_only_tokens_that_keep_every_text_have_bits_per_byte(tmp_path, tokenizer, encodes):
    """Words of a token file do not say what white space was between them."""
    (tmp_path / "text.txt").write_text("ab  cd ab\n" * 30)
    path = str(tmp_path / "t.npy")
    assert write_tokens.main([path, str(tmp_path / "text.txt"), "--tokenizer", tokenizer]) == 0
    config = small_config()
    config.data.source, config.data.train_files = "tokens", (path,)
    config.data.tokenizer, config.data.sequence_length = tokenizer, 4
    config.language_model.compare_xz = True
    task = LanguageModel(config)
    assert task._data.valid.encodes_text == encodes
    figures = task.metrics("valid", {"loss": 3.0, "weight": 2.0})
    assert ("bits_per_byte" in figures) == encodes
    said = "bits per byte, same text" if encodes else "the token file does not have the text"
    assert said in task.end_facts()["xz -9e"]
    score = task.score_text("valid", {"loss": 1.5, "perplexity": 4.5, "bits_per_byte": 2.0})
    assert ("does not tell whether its tokens encode the whole text" in score) != encodes


def test_byte_pairs_that_begin_within_a_character_are_counted_in_bytes(tmp_path):
    pytest.importorskip("tokenizers")
    text = "öé" * 50
    byte_pairs = BytePairTokenizer.from_texts([text], vocab_size=256)
    write_token_file(tmp_path / "t.npy", [byte_pairs.encode(text)], byte_pairs)
    for fraction in (0.1, 0.105):  # 20 tokens of a byte each, and 21
        config = DataConfig(
            source="tokens",
            train_files=(str(tmp_path / "t.npy"),),
            tokenizer="bpe",
            sequence_length=4,
            valid_fraction=fraction,
        )
        held_out = build_data(config, batch_size=2, seed=0).valid
        assert held_out.num_bytes == held_out.num_tokens == 200 * fraction - 1


def test_held_out_bytes_stay_on_the_disk(tmp_path):
    """They are read when a batch needs them, as those to train on."""
    held_out = np.resize(TEXT, 1 << 20)
    for name, ids in {"train": held_out[: 1 << 13], "valid": held_out}.items():
        write_token_file(tmp_path / f"{name}.npy", [ids], ByteTokenizer())
    config = DataConfig(
        source="tokens",
        root=str(tmp_path),
        train_files=("train.npy",),
        valid_files=("valid.npy",),
        tokenizer="bytes",
        sequence_length=1 << 12,
    )
    build_data(config, batch_size=2, seed=0)  # modules are loaded
    tracemalloc.start()
    data = build_data(config, batch_size=2, seed=0)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < held_out.nbytes / 4
    assert (data.valid.num_tokens, data.valid.num_bytes) == (held_out.size - 1, held_out.size - 1)
    assert bytes(data.valid.text) == held_out.tobytes()
    first = next(iter(data.valid.batches))
    np.testing.assert_array_equal(first["inputs"][1], held_out[1 << 12 : 1 << 13])
