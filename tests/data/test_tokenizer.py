"""Tokenizers: text to ids and back, their records, and what they refuse."""

import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from race_jax.data import vocabulary
from race_jax.data.byte_pairs import read_or_train
from race_jax.data.config import DataConfig
from race_jax.data.tokenizer import (
    BytePairTokenizer,
    ByteTokenizer,
    CharacterTokenizer,
    WordTokenizer,
    build_tokenizer,
    from_dict,
)

TEXT = "the cat sat on the mat\nthe dog, ünder it, did not\n\nend"


@pytest.fixture(scope="module")
def byte_pairs():
    return BytePairTokenizer.from_texts([TEXT * 5], vocab_size=300)


def every_tokenizer(byte_pairs):
    return [
        ByteTokenizer(),
        CharacterTokenizer.from_texts([TEXT]),
        WordTokenizer.from_texts([TEXT], end_of_line=True),
        byte_pairs,
    ]


def test_every_tokenizer_gives_the_text_back(byte_pairs):
    for tokenizer in every_tokenizer(byte_pairs):
        ids = tokenizer.encode(TEXT)
        text = tokenizer.decode(ids)
        if tokenizer.name == "words":  # keeps words and lines, not the number of spaces
            assert [line.split() for line in text.split("\n")] == [
                line.split() for line in TEXT.split("\n")
            ]
        else:
            assert text == TEXT
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab_size
        assert tokenizer.num_bytes(ids[:1]) == len(tokenizer.decode(ids[:1]).encode())


def test_a_record_survives_json_and_makes_an_equal_tokenizer(byte_pairs):
    for tokenizer in every_tokenizer(byte_pairs):
        again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert type(again) is type(tokenizer)
        assert again.to_dict() == tokenizer.to_dict()
        assert again.vocab_size == tokenizer.vocab_size
        np.testing.assert_array_equal(again.encode(TEXT), tokenizer.encode(TEXT))


def test_an_empty_text_has_no_tokens(byte_pairs):
    for tokenizer in every_tokenizer(byte_pairs):
        assert tokenizer.encode("").size == 0
        assert tokenizer.decode([]) == ""


def test_ids_outside_the_vocabulary_are_refused(byte_pairs):
    for tokenizer in every_tokenizer(byte_pairs):
        for ids in ([tokenizer.vocab_size], [-1]):
            with pytest.raises(ValueError, match="must lie in"):
                tokenizer.decode(ids)


def test_ids_take_the_smallest_dtype():
    for size, dtype in ((2, np.uint8), (256, np.uint8), (257, np.uint16), (70_000, np.int32)):
        tokenizer = WordTokenizer([f"w{i}" for i in range(size)])
        ids = tokenizer.encode(f"w{size - 1} w0")
        assert ids.dtype == dtype
        assert ids.tolist() == [size - 1, 0]


def test_long_text_is_encoded_as_its_parts_are(byte_pairs):
    """A long text is cut into pieces, and the cut may be between any two words."""
    part = f" {TEXT}"
    count = int(1.1 * vocabulary.PIECE / len(part))
    for tokenizer in every_tokenizer(byte_pairs):
        ids = tokenizer.encode(part * count)
        np.testing.assert_array_equal(ids, np.tile(tokenizer.encode(part), count))


@given(st.text(alphabet="ab \n\x85é", max_size=100), st.integers(1, 20))
def test_pieces_lose_nothing(text, size):
    assert "".join(vocabulary.pieces(text, size)) == text
    assert all(len(piece) <= 2 * size for piece in vocabulary.pieces(text, size))


@given(st.binary())
def test_bytes_take_anything(data):
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(data)) == data
    assert tokenizer.decode(tokenizer.encode(data)) == data.decode("utf-8", errors="replace")
    assert tokenizer.num_bytes(tokenizer.encode(data)) == len(data)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_characters_give_any_text_back(text):
    tokenizer = CharacterTokenizer.from_texts([text])
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == len(set(text))


class TestWords:
    def test_the_vocabulary_runs_by_frequency_then_alphabet(self):
        words = WordTokenizer.from_texts(["b a a\nc b", "a"], end_of_line=True)
        assert words.vocabulary == ("a", "b", "<eos>", "c")

    def test_only_line_feeds_end_lines(self):
        words = WordTokenizer.from_texts(["a\x85b\u2028c\r\nd\n"], end_of_line=True)
        assert (
            words.encode("a\x85b\u2028c\r\nd\n").tolist().count(words.vocabulary.index("<eos>"))
            == 2
        )

    def test_without_end_of_line_a_line_feed_is_a_space(self):
        words = WordTokenizer.from_texts(["b\na"])
        assert words.vocabulary == ("a", "b")
        assert words.decode(words.encode("a\nb\n")) == "a b"

    def test_a_limit_leaves_the_frequent_words_and_unknown(self):
        words = WordTokenizer.from_texts(["a a a b b c <unk> <unk> <unk> <unk>"], limit=3)
        assert words.vocabulary == ("<unk>", "a", "b")
        assert words.encode("c b new").tolist() == [0, 2, 0]

    def test_unknown_in_the_text_takes_new_words(self):
        words = WordTokenizer.from_texts(["a <unk> b"])
        assert words.decode(words.encode("a new b")) == "a <unk> b"

    def test_a_new_word_without_unknown_is_shown(self):
        with pytest.raises(ValueError, match=r"the word 'new' .*vocab_limit"):
            WordTokenizer.from_texts(["a b"]).encode("a new b")


def test_a_new_character_is_shown():
    tokenizer = CharacterTokenizer.from_texts(["abc"])
    for character in ("é", "B", "z"):
        with pytest.raises(ValueError, match=f"the character '{character}'"):
            tokenizer.encode("ab" + character)


class TestBytePairs:
    def config(self, path, **fields):
        return DataConfig(tokenizer="bpe", tokenizer_file=str(path), **fields)

    def test_training_writes_the_file_and_the_next_run_reads_it(self, tmp_path):
        path = tmp_path / "new" / "pairs.json"
        config = self.config(path, vocab_limit=280)
        trained = build_tokenizer(config, [TEXT * 9])
        assert trained.vocab_size == 280
        assert [file.name for file in path.parent.iterdir()] == ["pairs.json"]
        read = build_tokenizer(config, iter(()))
        assert read.to_dict() == trained.to_dict()
        assert len(read.encode(TEXT)) < len(TEXT.encode())
        assert read.decode(read.encode("日本 any text 😀")) == "日本 any text 😀"

    def test_training_twice_gives_the_same(self, byte_pairs):
        again = BytePairTokenizer.from_texts([TEXT * 5], vocab_size=300)
        assert again.json_text == byte_pairs.json_text

    def test_truncation_and_padding_in_a_file_do_not_apply(self, byte_pairs):
        record = json.loads(byte_pairs.json_text)
        record["truncation"] = {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        }  # fmt: skip
        assert BytePairTokenizer(json.dumps(record)).decode(byte_pairs.encode(TEXT)) == TEXT
        np.testing.assert_array_equal(
            BytePairTokenizer(json.dumps(record)).encode(TEXT), byte_pairs.encode(TEXT)
        )

    def test_a_missing_file_says_how_to_train_it(self, tmp_path):
        with pytest.raises(ValueError, match=r"none\.json does not exist.*vocab_limit"):
            build_tokenizer(self.config(tmp_path / "none.json"), [TEXT])

    @pytest.mark.parametrize(
        ("content", "words"), [(b"{}", "not a `tokenizers`"), (b"\xff", "utf-8"), (b"", "is empty")]
    )
    def test_a_damaged_file_is_named(self, tmp_path, content, words):
        path = tmp_path / "bad.json"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"bad\.json.*{words}"):
            build_tokenizer(self.config(path), [TEXT])

    def test_sizes_that_cannot_be_are_refused(self, tmp_path, byte_pairs):
        with pytest.raises(ValueError, match="vocab_limit must be >= 256"):
            build_tokenizer(self.config(tmp_path / "t.json", vocab_limit=255), [TEXT])
        path = tmp_path / "big.json"
        path.write_text(byte_pairs.json_text)
        with pytest.raises(ValueError, match=f"holds {byte_pairs.vocab_size} tokens, more than"):
            build_tokenizer(self.config(path, vocab_limit=260), [TEXT])

    def test_a_tokenizer_that_drops_what_it_does_not_know_is_refused(self):
        tokenizers = pytest.importorskip("tokenizers")
        model = tokenizers.models.BPE(vocab={"a": 0, "b": 1}, merges=[])
        with pytest.raises(ValueError, match="silently drops characters"):
            BytePairTokenizer(tokenizers.Tokenizer(model).to_str())

    def test_byte_pairs_encode_every_text_and_an_unknown_token_does_not(self, byte_pairs):
        tokenizers = pytest.importorskip("tokenizers")
        text = "größe  the\n\tcat \U0001f600\n"
        ids = byte_pairs.encode(text)
        assert byte_pairs.encodes(text.encode(), ids)
        assert byte_pairs.num_unknown(ids) == 0
        model = tokenizers.models.BPE(vocab={"?": 0, "a": 1, "b": 2}, merges=[], unk_token="?")
        small = BytePairTokenizer(tokenizers.Tokenizer(model).to_str())
        ids = small.encode("abxa")
        assert not small.encodes(b"abxa", ids)
        assert small.num_unknown(ids) == 1

    def test_parts_of_characters_are_counted_in_bytes(self, byte_pairs):
        tokenizers = pytest.importorskip("tokenizers")
        inner = tokenizers.Tokenizer.from_str(byte_pairs.json_text)
        inner.add_special_tokens(["<é>"])
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"<unk>": 256, "a": 257}
        fallback = tokenizers.Tokenizer(
            tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
        )
        decoders = tokenizers.decoders
        fallback.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        for tokenizer in map(BytePairTokenizer, (inner.to_str(), fallback.to_str())):
            for text in ("a\u20ac\ufffda\u00eb", "\U0001f600", "\ufffd"):
                ids = tokenizer.encode(text)
                assert len(ids) == len(text.encode())  # one byte each
                for start in range(len(ids)):
                    for stop in range(start + 1, len(ids) + 1):
                        assert tokenizer.num_bytes(ids[start:stop]) == stop - start
        special = BytePairTokenizer(inner.to_str())
        assert special.num_bytes(special.encode("\u20ac<é>")[1:]) == 2 + len("<é>".encode())

    def test_a_normalizer_or_a_form_of_words_does_not_keep_the_text(self, byte_pairs):
        tokenizers = pytest.importorskip("tokenizers")
        assert byte_pairs.keeps_text
        normalizers = tokenizers.normalizers
        for normalizer in (normalizers.Lowercase(), normalizers.NFC(), normalizers.NFKC()):
            inner = tokenizers.Tokenizer.from_str(byte_pairs.json_text)
            inner.normalizer = normalizer
            assert not BytePairTokenizer(inner.to_str()).keeps_text
        inner = tokenizers.Tokenizer.from_str(byte_pairs.json_text)
        inner.decoder = tokenizers.decoders.Metaspace()
        assert not BytePairTokenizer(inner.to_str()).keeps_text
        inner = tokenizers.Tokenizer.from_str(byte_pairs.json_text)
        inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
        assert not BytePairTokenizer(inner.to_str()).keeps_text

    def test_a_file_that_cannot_be_written_is_named(self, tmp_path):
        pytest.importorskip("tokenizers")
        (tmp_path / "file").write_text("")
        path = tmp_path / "file" / "tok.json"
        with pytest.raises(ValueError, match=r"tokenizer_file: .*tok\.json cannot be written"):
            read_or_train(path, ["a b"], vocab_limit=256)
        with pytest.raises(ValueError, match="is a folder"):
            read_or_train(tmp_path, ["a b"], vocab_limit=256)

    def test_a_missing_package_says_which_extra_brings_it(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "tokenizers", None)
        with pytest.raises(ImportError, match=r"pip install 'race-jax\[bpe\]'"):
            build_tokenizer(self.config(tmp_path / "t.json", vocab_limit=300), [TEXT])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer": "letters"}, "bytes, characters, words, bpe; got 'letters'"),
        ({"tokenizer": "bpe"}, "config.data.tokenizer_file"),
        ({"end_of_line": True}, "end_of_line=True is used with .*=words only"),
        ({"tokenizer": "characters", "vocab_limit": 9}, "=words or bpe only, got 'characters'"),
        ({"tokenizer": "words", "tokenizer_file": "t.json"}, "=bpe only, got 'words'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        build_tokenizer(DataConfig(**fields), [TEXT])


def test_an_unknown_record_lists_the_choices():
    with pytest.raises(ValueError, match="must be one of bytes, characters, words, bpe"):
        from_dict({"name": "letters"})


def test_bytes_never_look_at_the_training_text():
    def texts():
        raise AssertionError("the text was read")
        yield

    assert build_tokenizer(DataConfig(), texts()).vocab_size == 256
