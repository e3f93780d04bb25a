"""Labeled texts are read from every form. What is wrong in a file is named with its line."""

import json
import lzma
import sys
import types

import pytest

from race_jax.data.config import DataConfig
from race_jax.data.documents import Document
from race_jax.data.labeled import Columns, labeled_texts, read_splits


def read(content, *, name="f.tsv", text=("text",), label="label", form="auto"):
    content = content if isinstance(content, bytes) else content.encode()
    texts = labeled_texts(Document(name, content), Columns(text, label, form))
    return [(*one.parts, one.label, one.place) for one in texts]


def test_a_table_with_tabs_has_no_quotation_marks_and_its_last_column_takes_the_rest():
    table = 'label\tid\ttext\r\n1\t7\t"so" he said\ta\x85b\r\n0\t8\tx\n'
    assert read(table) == [('"so" he said\ta\x85b', "1", "f.tsv:2"), ("x", "0", "f.tsv:3")]


def test_columns_without_a_header_are_numbered():
    got = read("good,x\t1\nbad\t0\n", text=("0",), label="1")
    assert got == [("good,x", "1", "f.tsv:1"), ("bad", "0", "f.tsv:2")]


def test_a_pair_of_texts_comes_from_two_columns():
    table = "index\tquestion\tsentence\tlabel\n0\twho?\tme\tyes\n"
    assert read(table, text=("question", "sentence")) == [("who?", "me", "yes", "f.tsv:2")]


def test_commas_and_quotation_marks_and_texts_of_several_lines():
    table = '"3","A ""b"", c","two\nlines"\n"4","d","e"\n'
    got = read(table, text=("2",), label="0")
    assert got == [("two\nlines", "3", "f.tsv:1"), ("e", "4", "f.tsv:3")]


def test_json_lines():
    lines = "".join(json.dumps({"s": text, "y": y}) + "\n" for text, y in (("é\t", 1), ("b", "no")))
    assert read(lines, text=("s",), label="y") == [("é\t", "1", "f.tsv:1"), ("b", "no", "f.tsv:2")]


def test_a_file_of_one_class_is_named_after_it():
    got = read("one\ntwo\n", name="some/folder/pos.part.txt", form="classes")
    assert got == [
        ("one", "pos", "some/folder/pos.part.txt:1"),
        ("two", "pos", "some/folder/pos.part.txt:2"),
    ]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (b"text\tlabel\nfine\t1\n\xff\t0\n", {}, r"f\.tsv:3: not UTF-8 text \(byte 0xff\)"),
        ("sentence\tlabel\na\t1\n", {}, r"f\.tsv:1: .* no column 'text' among sentence, label"),
        ("text\tlabel\na\t1\nb\n", {}, r"f\.tsv:3: has 1 columns, and column 2 is read"),
        ("text\tlabel\na\t1\n\nb\t0\n", {}, r"f\.tsv:3: has 1 columns"),
        ("text\tlabel\na\t1\nb\t\n", {}, r"f\.tsv:3: '' is no label"),
        ("text\tlabel\na\t1\nb\t0\t1\n", {}, r"f\.tsv:3: '0\\t1' is no label"),
        ("text\tlabel\n \t1\n", {}, r"f\.tsv:2: the text is empty"),
        ("text\tlabel\n", {}, r"f\.tsv: holds no labeled text"),
        ("just a text\n", {}, r"f\.tsv:1: neither a tab nor a comma"),
        ('a,b\n"c"d,1\n', {"text": ("a",), "label": "b"}, r"f\.tsv:2: not a row of comma-sep"),
        ('{"text": "a", "label": 1}\n{"text"\n', {}, r"f\.tsv:2: not JSON: "),
        ('{"text": "a"}\n', {}, r"f\.tsv:1: there is no key 'label' among text"),
        ('{"text": 3, "label": 1}\n', {}, r"f\.tsv:1: the text must be a string, got 3"),
        ('{"text": "a", "label": 0.5}\n', {}, r"f\.tsv:1: the label must be .*, got 0\.5"),
        ('{"text": "a\\ud83d", "label": 1}\n', {}, r"f\.tsv:1: 'a\\ud83d' has the lone surrogate"),
        ('{"text": "a", "label": "\\udc00"}\n', {}, r"f\.tsv:1: .* the lone surrogate '\\udc00'"),
        (
            '{"text": "a", "label": 1}\n{"text": "a", "label": 1, "x": ' + "[" * 9**6 + "\n",
            {},
            r"f\.tsv:2: the JSON object is nested too deeply",
        ),
        ("[1]\n", {"form": "jsonl"}, r"f\.tsv:1: must be a JSON object, got '\[1\]'"),
        ("a\t1\n", {"form": "xml"}, r"must be one of tsv, csv, jsonl, classes; got 'xml'"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_line(content, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read(content, **options)
    assert "\n" not in str(error.value)


def test_files_become_splits_and_equal_texts_stay_on_one_side(tmp_path):
    rows = [f"text {i % 200}\t{i % 2}" for i in range(600)]
    with lzma.open(tmp_path / "train.tsv.xz", "wt") as file:
        file.write("\n".join(["text\tlabel", *rows]))
    (tmp_path / "test.csv").write_text("1,last\n")
    config = DataConfig(
        source="files",
        root=str(tmp_path),
        train_files=("train.tsv.xz",),
        test_files=("test.csv",),
        valid_fraction=0.2,
    )
    splits = read_splits(config, Columns(), Columns(("1",), "0"))
    assert [text.parts for text in splits["test"]] == [("last",)]
    train, valid = ({text.parts for text in splits[name]} for name in ("train", "valid"))
    assert not train & valid
    assert len(train | valid) == 200
    assert len(splits["train"]) + len(splits["valid"]) == 600
    assert 60 < len(splits["valid"]) < 180
    config.valid_files, config.test_files = ("train.tsv.xz",), ()
    splits = read_splits(config, Columns(), Columns())
    assert {name: len(texts) for name, texts in splits.items()} == {"train": 600, "valid": 600}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "stdlib"}, r"config\.data\.source must be files or huggingface .*'stdlib'"),
        (
            {"source": "huggingface"},
            r"train_files=\('one\.tsv',\) is used with .*source=files only",
        ),
        ({"packing": "packed"}, r"config\.data\.packing is not used .* leave it at 'contiguous'"),
        ({"valid_tail": 5}, r"config\.data\.valid_tail is not used"),
        ({"train_files": ("no.tsv",)}, r"no\.tsv: no such file"),
        ({"valid_fraction": 1e-9}, r"one\.tsv:2: of 1 texts, none is left on one side"),
    ],
)
def test_fields_that_do_not_apply_are_refused(tmp_path, fields, message):
    (tmp_path / "one.tsv").write_text("text\tlabel\na\t1\n")
    config = {"source": "files", "root": str(tmp_path), "train_files": ("one.tsv",)} | fields
    with pytest.raises(ValueError, match=message):
        read_splits(DataConfig(**config), Columns(), Columns())


class Rows(dict):
    """The parts of a Hugging Face split that the library uses."""

    features: dict

    @property
    def column_names(self):
        return list(self)


class TestHuggingFace:
    @pytest.fixture
    def hub(self, monkeypatch):
        """A stand-in for the package `datasets`, and the splits that it returns."""
        splits, asked = {}, []

        def load_dataset(name, config):
            asked.append((name, config))
            return splits

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return splits, asked

    def read(self, source="hf:glue:sst2", **columns):
        config = DataConfig(source=source)
        config.validate()
        return read_splits(config, Columns(**columns), Columns(**columns))

    def rows(self, labels, names=None):
        rows = Rows(text=[f"text {i}" for i in range(len(labels))], label=labels)
        rows.features = {"label": types.SimpleNamespace(names=names)}
        return rows

    def test_a_data_set_is_asked_for_by_its_name(self, hub):
        splits, asked = hub
        splits["train"] = self.rows([1, 0], names=["no", "yes"])
        splits["validation"] = self.rows(["yes"])
        splits["test"] = self.rows([-1, -1], names=["no", "yes"])
        found = self.read()
        assert asked == [("glue", "sst2")]
        assert [(text.parts, text.label) for text in found["train"]] == [
            (("text 0",), "yes"),
            (("text 1",), "no"),
        ]
        assert found["valid"][0].place == "glue/validation[0]"
        assert "test" not in found  # GLUE hides these labels

    def test_what_is_wrong_is_named(self, hub):
        splits, _ = hub
        splits["train"] = self.rows([0.5])
        with pytest.raises(ValueError, match=r"glue/train\[0\]: the label must be .* got 0\.5"):
            self.read()
        with pytest.raises(ValueError, match=r"glue/train: there is no column 'body' among"):
            self.read(text=("body",))

    def test_a_missing_package_says_which_extra_brings_it(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match=r"pip install 'race-jax\[datasets\]'"):
            self.read()

    def test_two_names_of_a_data_set_are_refused(self):
        config = DataConfig(source="hf:glue", dataset="imdb")
        with pytest.raises(ValueError, match=r"source='hf:glue' .*\.dataset='imdb'; give one"):
            config.validate()
        with pytest.raises(ValueError, match=r"config\.data\.dataset must be given"):
            DataConfig(source="hf:").validate()
