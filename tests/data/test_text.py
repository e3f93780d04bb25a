"""Batches hold the text, a run resumes with the very next one, and bad input is refused."""

import collections
import json

import numpy as np
import pytest

from race_jax.data.config import DataConfig
from race_jax.data.text import build_data
from race_jax.data.workers import read_ahead

T = 8
DTYPES = {
    "inputs": np.uint8,
    "targets": np.uint8,
    "weights": np.uint8,
}


@pytest.fixture
def make_data(tmp_path):
    """`make_data(train, valid, ...)` writes each text to a file and builds data from the files."""

    def make(train, valid=b"held out text", *, batch_size=4, seed=0, **fields):
        names = {}
        for split, texts in (("train", train), ("valid", valid)):
            texts = [texts] if isinstance(texts, bytes) else texts
            names[split] = tuple(f"{split}{i}.txt" for i in range(len(texts)))
            for name, text in zip(names[split], texts, strict=True):
                (tmp_path / name).write_bytes(text)
        config = DataConfig(
            source="files",
            root=str(tmp_path),
            train_files=names["train"],
            valid_files=names["valid"],
            **{"sequence_length": T} | fields,
        )
        return build_data(config, batch_size=batch_size, seed=seed)

    return make


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def reading(data, state: str | None = None):
    """Returns an iterator that reads ahead, as the trainer's, from the batch that `state` names."""
    iterator = read_ahead(data.train)
    if state is not None:
        iterator.set_state(json.loads(state))
    return iterator


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def some_text(rng, length):
    """Returns random letters, so that most places of the text differ from each other."""
    return bytes(rng.integers(97, 123, size=length, dtype=np.uint8))


def some_documents(rng, count, longest):
    return [some_text(rng, int(n)) for n in rng.integers(1, longest + 1, size=count)]


def segments(batch, name="inputs"):
    """Returns the tokens of every segment of a packed batch, without places of weight 0."""
    found = []
    for row, ids, weights in zip(batch[name], batch["segment_ids"], batch["weights"], strict=True):
        found += [bytes(row[ids == i].astype(np.uint8)) for i in np.unique(ids[weights > 0])]
    return found


@pytest.mark.parametrize("packing", ["contiguous", "packed"])
class TestEveryPacking:
    def text(self, rng, packing):
        return some_documents(rng, 30, 3 * T) if packing == "packed" else some_text(rng, 500)

    def test_a_batch_has_the_agreed_arrays(self, make_data, rng, packing):
        data = make_data(self.text(rng, packing), packing=packing)
        dtypes = DTYPES | ({"segment_ids": np.int32} if packing == "packed" else {})
        for batch in [next(reading(data)), *data.valid.batches]:
            assert {name: array.dtype for name, array in batch.items()} == dtypes
            assert {array.shape for array in batch.values()} == {(4, T)}

    def test_a_seed_decides_the_order(self, make_data, rng, packing):
        text = self.text(rng, packing)
        first, again, other = (
            take(reading(make_data(text, packing=packing, seed=seed)), 9) for seed in (0, 0, 1)
        )
        assert_same(first, again)
        assert any((a["inputs"] != b["inputs"]).any() for a, b in zip(first, other, strict=True))

    def test_killed_anywhere_a_run_resumes_to_the_next_batch(self, make_data, rng, packing):
        """States go through JSON into newly built data, at every batch of three epochs."""
        text = self.text(rng, packing)
        data, fresh = (make_data(text, packing=packing) for _ in range(2))
        iterator, states, batches = reading(data), [], []
        for _ in range(50):
            states.append(json.dumps(iterator.get_state()))
            batches.append(next(iterator))
        for step, state in enumerate(states[:47]):
            resumed = reading(fresh, state)
            assert json.dumps(resumed.get_state()) == state
            assert_same(take(resumed, 3), batches[step : step + 3])
        moved = reading(data)
        take(moved, 5)
        moved.set_state(json.loads(states[20]))
        assert_same(take(moved, 3), batches[20:23])

    def test_held_out_weights_sum_to_the_scored_tokens(self, make_data, rng, packing):
        texts = some_documents(rng, 40, 3 * T)
        data = make_data(texts, texts, packing=packing)
        batches = list(data.valid.batches)
        assert sum(batch["weights"].sum() for batch in batches) == data.valid.num_tokens
        separators = 39 if packing == "contiguous" else 0
        assert data.valid.num_bytes == data.valid.num_tokens - separators  # bytes: one a token
        assert data.valid.text == b"\0".join(texts)
        assert_same(list(data.valid.batches), batches)
        for batch in batches:
            assert set(np.unique(batch["weights"])) <= {0, 1}
            assert not batch["inputs"][batch["weights"] == 0].any()


class TestContiguous:
    def test_targets_are_the_next_tokens_of_the_text(self, make_data, rng):
        text = some_text(rng, 400)
        for batch in take(reading(make_data(text)), 40):
            for inputs, targets in zip(batch["inputs"], batch["targets"], strict=True):
                window = bytes(inputs.astype(np.uint8)) + bytes(targets[-1:].astype(np.uint8))
                assert window in text
                np.testing.assert_array_equal(inputs[1:], targets[:-1])
            assert (batch["weights"] == 1).all()

    @pytest.mark.parametrize("length", [2, T, T + 1, T + 2, 5 * T, 5 * T + 1, 5 * T + 2, 100])
    def test_held_out_windows_predict_each_token_but_the_first_once(self, make_data, rng, length):
        text = some_text(rng, length)
        data = make_data(some_text(rng, 100), text, batch_size=3)
        batches = list(data.valid.batches)
        scored = [batch["targets"][batch["weights"] > 0] for batch in batches]
        context = [batch["inputs"][batch["weights"] > 0] for batch in batches]
        assert bytes(np.concatenate(scored).astype(np.uint8)) == text[1:]
        assert bytes(np.concatenate(context).astype(np.uint8)) == text[:-1]
        assert len(batches) == -(-(length - 1) // (3 * T))

    def test_documents_are_joined_by_a_separator(self, make_data):
        data = make_data([b"one", b"two"], [b"three", b"four"], sequence_length=6)
        batch = next(iter(data.valid.batches))
        assert data.tokenizer.decode(batch["inputs"][0]) == "three\0"
        assert data.valid.text == b"three\0four"
        words = make_data([b"a", b"b"], tokenizer="words", end_of_line=True, sequence_length=2,
                          valid=[b"b", b"a"])  # fmt: skip
        assert words.num_train_tokens == 3
        assert words.valid.text == b"b\na"

    def test_two_files_may_be_held_out_where_one_trains(self, make_data):
        data = make_data(b"abcabcabc", [b"ab", b"ca"], tokenizer="characters")
        assert data.valid.num_tokens == 4


class TestPacked:
    def test_rows_hold_what_the_documents_say(self, make_data, rng):
        documents = some_documents(rng, 50, T + 1)
        data = make_data(documents, documents, packing="packed")
        found = collections.Counter(
            pair
            for batch in data.valid.batches
            for pair in zip(segments(batch), segments(batch, "targets"), strict=True)
        )
        assert found == collections.Counter((d[:-1], d[1:]) for d in documents if len(d) > 1)
        for batch in take(reading(data), 20):
            assert {
                a + b[-1:] for a, b in zip(segments(batch), segments(batch, "targets"), strict=True)
            } <= set(documents)

    def test_each_segment_id_is_one_run_of_its_row(self, make_data, rng):
        texts = some_documents(rng, 40, 3 * T)
        data = make_data(texts, texts, packing="packed")
        for batch in take(reading(data), 30) + list(data.valid.batches):
            for ids, weights in zip(batch["segment_ids"], batch["weights"], strict=True):
                runs = 1 + np.count_nonzero(np.diff(ids))
                assert runs == len(np.unique(ids))
                assert (np.diff(weights.astype(int)) <= 0).all()  # padding only at the tail

    def test_empty_places_have_the_segment_0(self, make_data, rng):
        data = make_data(some_documents(rng, 50, 5), packing="packed")
        for batch in take(reading(data), 10):
            assert (batch["segment_ids"][:, 0] == 1).all()
            np.testing.assert_array_equal(batch["segment_ids"] == 0, batch["weights"] == 0)

    def test_a_long_document_is_cut_into_pieces_that_share_one_token(self, make_data, rng):
        text = some_text(rng, 5 * T + 3)
        data = make_data(b"ab", text, packing="packed", batch_size=2)
        pieces = [piece for batch in data.valid.batches for piece in segments(batch)]
        assert b"".join(pieces) == text[:-1]
        assert [len(piece) for piece in pieces] == [T] * 5 + [2]

    def test_a_separator_divides_a_file_into_documents(self, make_data):
        text = b"one\n\ntwo words\n\n\n\nthree"
        data = make_data(text, text, packing="packed", document_separator="\n\n", batch_size=1,
                         sequence_length=16)  # fmt: skip
        found = [piece for batch in data.valid.batches for piece in segments(batch)]
        assert sorted(found) == [b"on", b"thre", b"two word"]
        assert data.valid.num_bytes == 2 + 4 + 8

    def test_little_room_is_wasted(self, make_data, rng):
        data = make_data(some_documents(rng, 200, T), packing="packed")
        weights = np.mean([batch["weights"] for batch in take(reading(data), 50)])
        assert weights > 0.85


class TestOtherTokenizers:
    def test_bytes_of_text_are_counted_whatever_the_tokens(self, make_data):
        text = "größe ab\nab größe\n".encode()
        characters = make_data(text, text, tokenizer="characters")
        assert (characters.valid.num_tokens, characters.valid.num_bytes) == (17, len(text) - 1)
        words = make_data(text, text, tokenizer="words", end_of_line=True, sequence_length=2)
        assert (words.valid.num_tokens, words.valid.num_bytes) == (
            5,
            len(text) - len("größe".encode()),
        )
        assert words.vocab_size == 3
        packed = make_data(text, text, tokenizer="words", packing="packed",
                           document_separator="\n", sequence_length=2)  # fmt: skip
        assert (packed.valid.num_tokens, packed.valid.num_bytes) == (2, 3 + 8)  # " ab", " größe"

    @pytest.mark.parametrize(
        ("text", "fields", "encodes", "unknown"),
        [
            ("a b\nb a\n", {"end_of_line": True}, True, 0),
            (" a b \n b a \n", {"end_of_line": True}, True, 0),
            ("a b\n\nb a\n", {"end_of_line": True}, True, 0),
            (" \n a b \n \n b a \n", {"end_of_line": True}, True, 0),
            ("  a b b a  ", {}, True, 0),
            ("a b b a", {}, True, 0),
            ("a <unk>\nb a\n", {"end_of_line": True}, True, 1),  # so it stands in the text
            ("a b\nb a\n", {}, False, 0),  # the line break is lost
            ("a  b\nb a\n", {"end_of_line": True}, False, 0),
            ("a b  \n  b a\n", {"end_of_line": True}, False, 0),
            ("a b \n b a\na b\n", {"end_of_line": True}, False, 0),  # two kinds of lines
            ("a\tb\nb a\n", {"end_of_line": True}, False, 0),
            ("a c\nc a\n", {"end_of_line": True, "vocab_limit": 4}, False, 2),
        ],
    )
    def test_words_encode_a_text_or_they_do_not(self, make_data, text, fields, encodes, unknown):
        data = make_data(b"a b a b <unk> <unk>\n" * 9, text.encode(), tokenizer="words",
                         sequence_length=2, **{"end_of_line": False} | fields)  # fmt: skip
        assert (data.valid.encodes_text, data.valid.num_unknown) == (encodes, unknown)

    @pytest.mark.parametrize(
        ("text", "num_bytes"),
        [("ab cd ab\n", 7), ("   ab cd ab   ", 6), (" ab \n cd \n ab \n", 12)],
    )
    def test_bytes_that_words_stand_for_are_counted(self, make_data, text, num_bytes):
        data = make_data(b"ab cd ab\n" * 9, text.encode(), tokenizer="words", sequence_length=2,
                         end_of_line="\n" in text)  # fmt: skip
        assert data.valid.encodes_text
        assert data.valid.num_bytes == num_bytes  # after the first word

    @pytest.mark.parametrize("packing", ["contiguous", "packed"])
    @pytest.mark.parametrize(
        ("texts", "num_bytes"),
        [
            ([" ab \n cd \n", " ab cd \n"], {"contiguous": 14, "packed": 12}),
            (["ab cd\nab\n", " ab cd \n"], {"contiguous": 14, "packed": 12}),
            (["ab cd  ab\n", " ab cd \n"], None),
        ],
    )
    def test_separators_between_files_of_words_are_no_bytes_of_theirs(
        self, make_data, texts, num_bytes, packing
    ):
        data = make_data(b"ab cd ab\n" * 9, [text.encode() for text in texts], tokenizer="words",
                         sequence_length=2, end_of_line=True, packing=packing)  # fmt: skip
        assert data.valid.encodes_text == (num_bytes is not None)
        if num_bytes:
            assert data.valid.num_bytes == num_bytes[packing]  # after the first words

    def test_a_first_token_of_half_a_character_has_its_own_bytes(self, make_data, tmp_path):
        pytest.importorskip("tokenizers")
        text = "öé öé\n".encode()
        data = make_data(text * 9, text, tokenizer="bpe", vocab_limit=256, sequence_length=2,
                         tokenizer_file=str(tmp_path / "bytes.json"))  # fmt: skip
        assert data.valid.encodes_text
        assert data.valid.num_bytes == data.valid.num_tokens == len(text) - 1

    def test_other_tokenizers_encode_every_text(self, make_data):
        text = "größe  ab\n\tab größe\n".encode()
        for tokenizer in ("bytes", "characters"):
            data = make_data(text, text, tokenizer=tokenizer)
            assert (data.valid.encodes_text, data.valid.num_unknown) == (True, 0)

    def test_another_tokenizer_has_another_digest(self, make_data):
        text = b"ab ba ab ba\n" * 9
        kinds = [
            {"tokenizer": "bytes"},
            {"tokenizer": "characters"},
            {"tokenizer": "words", "end_of_line": True},
            {"tokenizer": "words", "vocab_limit": 3},
            {"tokenizer": "words", "vocab_limit": 2},
        ]
        digests = [make_data(text, text, sequence_length=2, **kind).digests for kind in kinds]
        assert len({each["the tokenizer"] for each in digests}) == len(kinds)
        assert len({each["the training text"] for each in digests}) == 1

    def test_a_test_split_is_read_too(self, make_data, tmp_path):
        data = make_data(b"some text to train on")
        assert data.test is None
        (tmp_path / "test.txt").write_bytes(b"test")
        data = make_data(b"some text to train on", test_files=("test.txt",))
        (batch,) = data.test.batches
        assert data.test.num_tokens == batch["weights"].sum() == 3

    def test_the_description_tells_source_sizes_and_digest(self, make_data):
        data = make_data(b"x" * 1234)
        assert "1,234 bytes" in data.description
        assert data.digest[:16] in data.description
        assert data.digest != make_data(b"y" * 1234).digest


class TestRefused:
    @pytest.mark.parametrize(
        ("train", "fields", "words"),
        [
            (b"x" * T, {}, rf"train0\.txt: {T} tokens are fewer than the {T + 1} of one window"),
            ([b"x", b"y"], {"packing": "packed"}, r"train0\.txt and 1 more: no document has two"),
            (b"a \xff b", {"tokenizer": "words"}, r"train0\.txt: not UTF-8"),
            (b"a b c" * 9, {"tokenizer": "words"}, r"valid0\.txt: the word 'held' does not occur"),
            (b"a b c" * 9, {"tokenizer": "characters"}, r"valid0\.txt: the character 'h' does not"),
            (b"text", {"packing": "loose"}, "contiguous, packed; got 'loose'"),
            (b"text", {"tokenizer": "letters"}, "got 'letters'"),
            (b"text", {"sequence_length": 0}, "config.data.sequence_length must be >= 1, got 0"),
            (b"text", {"batch_size": 0}, "batch_size must be >= 1, got 0"),
            (b"text", {"seed": -1}, r"seed must lie in \[0, 2\*\*32\), got -1"),
            (b"text", {"valid": b"v", "sequence_length": 1}, r"valid0\.txt: .*nothing to score"),
            (b"text", {"document_separator": " "}, "is used with config.data.packing=packed only"),
            (b"--", {"packing": "packed", "document_separator": "-"}, r"0\.txt: holds nothing but"),
            (b"", {}, r"train0\.txt: the file is empty"),
        ],
    )  # fmt: skip
    def test_bad_input_is_named_before_any_training(self, make_data, train, fields, words):
        with pytest.raises(ValueError, match=words):
            make_data(train, **fields)

    def test_bytes_take_what_is_not_text(self, make_data, rng):
        noise = bytes(rng.integers(0, 256, size=300, dtype=np.uint8))
        data = make_data(noise, noise)
        assert data.valid.num_bytes == 299


def test_a_worker_process_reads_the_same_batches_and_resumes(make_data, rng):
    text = some_text(rng, 500)
    with_worker = make_data(text, num_workers=1)
    want = take(reading(make_data(text)), 6)
    iterator = reading(with_worker)
    assert_same(take(iterator, 3), want[:3])
    state = json.dumps(iterator.get_state())
    assert_same(take(reading(with_worker, state), 3), want[3:])


def test_the_default_source_is_split_and_read():
    data = build_data(DataConfig(), batch_size=2, seed=0)
    batch = next(reading(data))
    assert batch["inputs"].shape == (2, 256)
    assert data.vocab_size == 256
    assert data.num_train_tokens > 3_000_000
    assert data.valid.num_tokens == len(data.valid.text) - 1
    again = build_data(DataConfig(), batch_size=2, seed=0)
    assert again.digest == data.digest
