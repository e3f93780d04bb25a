"""Text is read from every source, a part is held out, and every bad file is a clear error."""

import ast
import gzip
import lzma
import sys
import types

import pytest

from race_jax.data.config import DataConfig
from race_jax.data.documents import Document, hold_out
from race_jax.data.sources import load_corpus, read_file

TEXT = "Grüße,\nline two\n".encode()


def files(tmp_path, **fields):
    return DataConfig(source="files", root=str(tmp_path), **fields)


@pytest.fixture
def text_files(tmp_path):
    """Files with the same text, plain and in two packed forms."""
    (tmp_path / "a.txt").write_bytes(TEXT)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(TEXT))
    (tmp_path / "c.txt.XZ").write_bytes(lzma.compress(TEXT))
    return tmp_path


class TestFiles:
    def test_plain_and_compressed_files_read_the_same(self, text_files):
        config = files(text_files, train_files=("a.txt", "b.txt.gz"), valid_files=("c.txt.XZ",))
        corpus = load_corpus(config)
        assert [document.data for document in corpus.train + corpus.valid] == [TEXT] * 3
        assert corpus.test == ()
        assert corpus.train[0].name == str(text_files / "a.txt")

    def test_names_may_be_one_comma_separated_string(self, text_files):
        config = files(text_files, valid_files=("a.txt",))
        config.train_files = "a.txt, b.txt.gz"  # as the command line sets it
        assert len(load_corpus(config).train) == 2

    def test_a_folder_and_a_pattern_stand_for_their_files_in_sorted_order(self, tmp_path):
        for name in ("b.txt", "a.txt", ".c.txt", "inner/d.txt", "e[1].md", "f*.md"):
            (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "texts" / name).write_bytes(TEXT)
        for name, want in (
            ("texts", ["a.txt", "b.txt", "e[1].md", "f*.md"]),
            ("texts/*.txt", ["a.txt", "b.txt"]),
            ("texts/?.txt,texts/a.txt", ["a.txt", "b.txt", "a.txt"]),
            ("texts/e[1]*", ["e[1].md"]),
            ("texts/f*.md", ["f*.md"]),
            ("*/*/d.txt", ["inner/d.txt"]),
        ):
            config = files(tmp_path, train_files=name, valid_files=("texts/a.txt",))
            names = [document.name for document in load_corpus(config).train]
            assert names == [str(tmp_path / "texts" / file) for file in want]

    def test_the_root_may_come_from_the_environment(self, text_files, monkeypatch):
        monkeypatch.setenv("RACE_JAX_DATA", str(text_files))
        config = DataConfig(source="files", train_files=("a.txt",), valid_files=("a.txt",))
        assert load_corpus(config).train[0].data == TEXT

    def test_an_absolute_name_needs_no_root(self, text_files, monkeypatch):
        monkeypatch.delenv("RACE_JAX_DATA", raising=False)
        name = str(text_files / "a.txt")
        config = DataConfig(source="files", train_files=(name,), valid_files=(name,))
        assert load_corpus(config).valid[0].data == TEXT

    def test_the_digest_tells_texts_and_splits_apart(self, text_files):
        (text_files / "d.txt").write_bytes(TEXT + b"!")
        digests = {
            load_corpus(files(text_files, train_files=train, valid_files=valid)).digest()
            for train, valid in [
                (("a.txt",), ("b.txt.gz",)),
                (("b.txt.gz",), ("a.txt",)),
                (("a.txt",), ("d.txt",)),
                (("a.txt", "a.txt"), ("a.txt",)),
            ]
        }
        assert len(digests) == 3  # the first two hold the same text


class TestBadFiles:
    def corpus_error(self, config):
        with pytest.raises(ValueError) as error:  # noqa: PT011 the callers check the words
            load_corpus(config)
        return str(error.value)

    @pytest.mark.parametrize(
        ("name", "data", "words"),
        [
            ("empty.txt", b"", "is empty"),
            ("empty.txt.gz", gzip.compress(b""), "is empty"),
            ("cut.txt.xz", lzma.compress(TEXT * 99)[:-20], "truncated"),
            ("cut.txt.gz", gzip.compress(TEXT * 99)[:-9], "truncated"),
            ("not.txt.xz", TEXT, "damaged"),
            ("not.txt.gz", TEXT, "damaged"),
            ("sum.txt.gz", gzip.compress(TEXT)[:-8] + bytes(8), "damaged"),
            ("block.txt.gz", gzip.compress(TEXT)[:10] + b"\xff" * 40, "damaged"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_unusable_contents_name_the_file(self, tmp_path, name, data, words):
        (tmp_path / name).write_bytes(data)
        message = self.corpus_error(files(tmp_path, train_files=(name,)))
        assert name in message
        assert words in message

    def test_a_missing_file_and_what_stands_for_no_file_are_named(self, tmp_path):
        (tmp_path / "folder" / "inner").mkdir(parents=True)
        (tmp_path / "folder" / ".hidden").write_bytes(TEXT)
        for name, words in (
            ("absent.txt", "no such file"),
            ("folder", "config.data.train_files: the folder FILE holds no file; hidden files and"),
            ("*", "config.data.train_files: no file matches the pattern FILE; correct it"),
        ):
            message = self.corpus_error(files(tmp_path, train_files=(name,)))
            assert str(tmp_path / name) in message
            assert words.replace("FILE", str(tmp_path / name)) in message

    def test_all_files_that_cannot_be_read_are_named_at_once(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(TEXT)
        (tmp_path / "empty.txt").write_bytes(b"")
        fields = {"train_files": ("no.txt", "a.txt", "empty.txt"), "test_files": ("gone.txt",)}
        assert self.corpus_error(files(tmp_path, **fields)) == (
            f"{tmp_path}/no.txt: no such file; {tmp_path}/empty.txt: the file is empty; "
            f"{tmp_path}/gone.txt: no such file"
        )
        names = tuple(f"{i}.txt" for i in range(12))
        message = self.corpus_error(files(tmp_path, train_files=names))
        assert message.endswith("9.txt: no such file; and 2 other files cannot be read")

    @pytest.mark.parametrize("name", ["a, b.txt", "a,b,c.txt"])
    def test_a_name_that_was_cut_at_its_comma_is_written_out(self, tmp_path, name):
        for file in (name, "c d.txt"):
            (tmp_path / file).write_bytes(TEXT)
        message = self.corpus_error(files(tmp_path, train_files=f"c d.txt,{name},c d.txt"))
        start, _, written = message.partition("--config.data.train_files=")
        assert f"the name of the file {name!r} was cut at its comma; write " in start
        assert written == f"\"('c d.txt', {name!r}, 'c d.txt')\""
        again = files(tmp_path, train_files=ast.literal_eval(written[1:-1]), valid_files=(name,))
        assert len(load_corpus(again).train) == 3

    def test_many_missing_files_and_a_folder_that_may_not_be_read_are_named(
        self, tmp_path, monkeypatch
    ):
        names = ",".join(f"{'n' * 60}{i}" for i in range(200))  # joined, too long for any name
        message = self.corpus_error(files(tmp_path, train_files=names))
        assert message.endswith("and 190 other files cannot be read")

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        (tmp_path / "folder").mkdir()
        monkeypatch.setattr("os.listdir", refuse)
        message = self.corpus_error(files(tmp_path, train_files="folder"))
        assert message == f"{tmp_path}/folder: may not be read by this user"

    def test_a_file_without_permission_is_named(self, tmp_path, monkeypatch):
        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
        with pytest.raises(ValueError, match=r"secret\.txt: may not be read"):
            read_file(tmp_path / "secret.txt")

    def test_a_missing_root_names_the_field_and_the_variable(self, tmp_path, monkeypatch):
        monkeypatch.delenv("RACE_JAX_DATA", raising=False)
        config = DataConfig(source="files", train_files=("ptb/train.txt",))
        message = self.corpus_error(config)
        for part in ("ptb/train.txt", "--config.data.root", "RACE_JAX_DATA"):
            assert part in message
        monkeypatch.setenv("RACE_JAX_DATA", str(tmp_path / "nowhere"))
        assert "RACE_JAX_DATA: " in self.corpus_error(config)
        config.root = str(tmp_path / "elsewhere")
        assert "--config.data.root: " in self.corpus_error(config)

    def test_no_file_at_all_is_refused(self, tmp_path):
        assert "config.data.train_files" in self.corpus_error(files(tmp_path))

    def test_an_unknown_source_lists_the_choices(self):
        message = self.corpus_error(DataConfig(source="internet"))
        assert "stdlib, files, huggingface" in message

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"train_files": ("a.txt",)}, r"train_files=\('a.txt',\) is used with .*=files only"),
            ({"dataset": "some/set"}, r"dataset='some/set' is used with .*=huggingface only"),
            ({"valid_tail": 9}, r"valid_tail=9 is used with .*=files or huggingface only"),
        ],
    )
    def test_a_field_that_the_source_would_ignore_is_refused(self, fields, words):
        with pytest.raises(ValueError, match=words):
            load_corpus(DataConfig(**fields))

    def test_text_that_is_not_utf8_is_named_with_the_place(self):
        with pytest.raises(ValueError, match=r"old\.txt: not UTF-8 .*0xfc at offset 2"):
            Document("old.txt", "Grün".encode("latin-1")).text()


class TestHoldOut:
    def test_a_tail_is_counted_in_characters(self):
        text = "aé€😀" * 50
        for count in (1, 2, 3, 4, 5, 199):
            kept, held_out = hold_out(
                [Document("t", text.encode())], characters=count, fraction=0.5
            )
            assert held_out[0].text() == text[-count:]
            assert kept[0].text() + held_out[0].text() == text

    def test_a_tail_as_long_as_the_text_is_refused(self):
        for text in ("abc", "é€😀"):
            with pytest.raises(ValueError, match=r"poem: .*valid_tail"):
                hold_out([Document("poem", text.encode())], characters=3, fraction=0.5)

    @pytest.mark.parametrize("fraction", [0.01, 0.1, 0.3, 0.77])
    @pytest.mark.parametrize("border", ["\n", " ", ""])
    def test_a_fraction_is_cut_between_lines_words_or_characters(self, rng, fraction, border):
        words = ["é" * n for n in rng.integers(1, 9, size=300)]
        text = border.join(words).encode()
        cuts = sorted(rng.integers(1, len(words), size=3))
        parts = [words[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        documents = [Document(str(i), border.join(part).encode()) for i, part in enumerate(parts)]
        documents = [document for document in documents if document.data]
        kept, held_out = hold_out(documents, characters=0, fraction=fraction)
        assert all(document.data for document in kept + held_out)
        assert all(document.text() is not None for document in kept + held_out)
        joined = b"".join(document.data for document in kept + held_out)
        assert joined == b"".join(document.data for document in documents)
        size = sum(len(document.data) for document in held_out)
        assert fraction * len(joined) - 2 <= size <= 2 * fraction * len(joined) + 20
        if border and kept[-1].name + " (held-out end)" == held_out[0].name:
            assert kept[-1].data.endswith(border.encode())
        assert len(text) >= len(joined)

    def test_text_too_short_for_a_fraction_is_refused(self):
        with pytest.raises(ValueError, match=r"x.*valid_fraction"):
            hold_out([Document("x", b"y")], characters=0, fraction=0.5)

    def test_files_without_validation_files_lose_their_end(self, tmp_path):
        (tmp_path / "t.txt").write_text("".join(f"line {i}\n" for i in range(1000)))
        by_tail = load_corpus(files(tmp_path, train_files=("t.txt",), valid_tail=9))
        assert by_tail.valid[0].data == b"line 999\n"
        by_share = load_corpus(files(tmp_path, train_files=("t.txt",), valid_fraction=0.1))
        assert by_share.valid[0].data.startswith(b"line ")
        assert len(by_share.valid[0].data) == pytest.approx(889, abs=9)


class TestStdlib:
    def test_whole_files_are_held_out_by_a_hash_of_their_name(self):
        corpus = load_corpus(DataConfig())
        again = load_corpus(DataConfig())
        names = [document.name for document in corpus.train + corpus.valid]
        assert corpus.digest() == again.digest()
        assert len(set(names)) == len(names)
        assert [d.name for d in corpus.train] == sorted(d.name for d in corpus.train)
        assert 0.02 < len(corpus.valid) / len(names) < 0.1
        assert sum(len(d.data) for d in corpus.train) > 3_000_000
        assert all(document.data and document.text() for document in corpus.train + corpus.valid)
        for part in (
            "/test/",
            "/tests/",
            "site-packages",
            "/idlelib/",
            "/encodings/",
            "_sysconfig",
        ):
            assert not [name for name in names if part in name]

    def test_another_fraction_moves_files_but_loses_none(self):
        few, many = (load_corpus(DataConfig(valid_fraction=f)) for f in (0.05, 0.3))
        assert {d.name for d in few.valid} < {d.name for d in many.valid}
        assert len(few.train + few.valid) == len(many.train + many.valid)

    def test_a_python_without_sources_says_so(self, tmp_path, monkeypatch):
        monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
        (tmp_path / "latin.py").write_bytes("# Grün".encode("latin-1"))
        with pytest.raises(ValueError, match=r"0 training and 0 held-out .*source=files"):
            load_corpus(DataConfig())


class Rows(dict):
    """The parts of a Hugging Face split that the library uses."""

    @property
    def column_names(self):
        return list(self)


class TestHuggingFace:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A stand-in for the package `datasets`, and the splits that it returns."""
        splits = {}

        def load_dataset(name, config):
            if name != "some/set":
                raise FileNotFoundError(f"no data set {name}")
            assert config is None
            return splits

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return splits

    def config(self, **fields):
        return DataConfig(source="huggingface", **{"dataset": "some/set"} | fields)

    def test_rows_are_lines_of_one_document(self, hub):
        hub["train"] = Rows(text=[" = A = \n", "", "b"])
        hub["validation"] = Rows(text=["c"])
        hub["test"] = Rows(text=["d"])
        corpus = load_corpus(self.config())
        assert corpus.train == (Document("some/set/train", b" = A = \n\nb\n"),)
        assert (corpus.valid[0].data, corpus.test[0].data) == (b"c\n", b"d\n")

    def test_rows_are_documents_when_packed(self, hub):
        hub["train"] = hub["validation"] = Rows(story=["one\nday", "", "end"])
        corpus = load_corpus(self.config(packing="packed", text_field="story"))
        assert [document.data for document in corpus.train] == [b"one\nday", b"end"]

    def test_the_end_is_held_out_where_there_is_no_validation_split(self, hub):
        hub["train"] = Rows(text=[f"row {i}" for i in range(100)])
        corpus = load_corpus(self.config())
        assert corpus.valid[0].data.endswith(b"row 99\n")
        assert not corpus.train[0].data.endswith(b"row 99\n")

    @pytest.mark.parametrize(("rows", "shown"), [([], "''"), (["", ""], "''"), (["a", 7], "7")])
    @pytest.mark.parametrize("packing", ["packed", "contiguous"])
    def test_rows_without_text_are_refused(self, hub, rows, shown, packing):
        hub["train"] = Rows(text=rows)
        with pytest.raises(ValueError, match=rf"'text' of some/set/train .*got {shown} among"):
            load_corpus(self.config(packing=packing))

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"dataset": ""}, "config.data.dataset: no name"),
            ({"dataset": "other"}, "config.data.dataset: 'other' .*no data set other"),
            ({"text_field": "body"}, r"config.data.text_field: .*'body'; it has \['text'\]"),
        ],
    )
    def test_wrong_names_are_shown(self, hub, fields, words):
        hub["train"] = Rows(text=["a"])
        with pytest.raises(ValueError, match=words):
            load_corpus(self.config(**fields))

    def test_no_training_split_is_refused(self, hub):
        hub["validation"] = Rows(text=["a"])
        with pytest.raises(ValueError, match=r"no split 'train'; it has \['validation'\]"):
            load_corpus(self.config())

    def test_a_missing_package_says_which_extra_brings_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'race-jax\[datasets\]'"):
            load_corpus(self.config())
