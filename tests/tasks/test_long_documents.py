"""Long documents: which windows a split has, a few steps of training, and what is refused."""

import itertools

import numpy as np
import pytest

from race_jax.tasks.long_documents import LongDocuments
from tests.tasks.few_steps import few_steps
from tests.train.small import small_config

pytestmark = pytest.mark.once


@pytest.fixture
def folder(tmp_path):
    """Four books of two authors. Every byte of a book is one of three letters of its own."""
    rng = np.random.default_rng(0)
    for number, (title, author) in enumerate(
        (("one", "Anna"), ("two", "Ben"), ("three", "Anna"), ("four", "Ben"))
    ):
        letters = np.frombuffer(b"abcdefghijkl", np.uint8)[3 * number : 3 * number + 3]
        header = f"# Title: {title}\n\n## Author: {author}\n\n## Year: 1900\n\n".encode()
        (tmp_path / f"{title}.md").write_bytes(header + bytes(rng.choice(letters, 1000)))
    return tmp_path


def documents_config(folder, **options):
    config = small_config()
    config.task, config.data.sequence_length, config.run.batch_size = "long_documents", 32, 8
    config.model.attention = "softmax"
    config.data.source, config.data.root = "files", str(folder)
    config.data.train_files = ("one.md", "two.md", "three.md")
    for name, value in options.items():
        setattr(config.long_documents, name, value)
    return config


def windows(dataset, count=None):
    """The windows of some batches, as text, with their labels."""
    return [
        (bytes(row.astype(np.uint8)).decode(), int(label))
        for batch in itertools.islice(dataset, count)
        for row, label, weight in zip(
            batch["inputs"], batch["labels"], batch["weights"], strict=True
        )
        if weight
    ]


def test_books_are_told_apart_by_windows_from_separate_regions(folder):
    task = LongDocuments(documents_config(folder, held_out_share=0.2, train_stride=5).validate())
    texts = [(folder / f"{name}.md").read_text() for name in ("one", "two", "three")]
    places = {"train": windows(task.train, 38)} | {
        name: windows(split) for name, split in task.held_out.items()
    }
    assert task.record["classes"] == ["one", "two", "three"]
    seen = {}
    for name, found in places.items():
        for text, label in found:
            start = texts[label].index(text)
            assert "Author" not in text
            seen.setdefault((label, name), set()).update(range(start, start + 32))
    assert [len(places[name]) for name in ("valid", "test")] == [18, 18]
    for label in range(3):
        train, valid, test = (seen[label, name] for name in ("train", "valid", "test"))
        assert min(valid) - max(train) > 32
        assert min(test) - max(valid) > 32


def test_authors_are_told_apart_by_other_books(folder):
    config = documents_config(folder, target="author")
    config.data.train_files, config.data.valid_files = ("one.md", "two.md"), ("three.md", "four.md")
    task = LongDocuments(config.validate())
    assert task.record["classes"] == ["Anna", "Ben"]
    assert {
        (set(text) <= set("ghi"), label) for text, label in windows(task.held_out["valid"])
    } == {
        (True, 0),
        (False, 1),
    }
    config.data.valid_files = ("three.md", "two.md")
    with pytest.raises(
        ValueError, match=r"two\.md of config\.data\.valid_files has the .*train_files"
    ):
        LongDocuments(config.validate())
    config.data.train_files, config.data.valid_files = ("one.md",), ("two.md",)
    with pytest.raises(ValueError, match=r"two\.md: its author 'Ben' wrote none .* are Anna"):
        LongDocuments(config.validate())
    config.data.valid_files = ()
    with pytest.raises(ValueError, match=r"valid_files must name other books"):
        LongDocuments(config.validate())


@pytest.mark.parametrize("target", ["book", "author"])
def test_the_same_book_under_two_names_is_refused(folder, target):
    text = (folder / "two.md").read_text().replace("Ben", "Carla").replace("Title: two", "Title: 2")
    (folder / "again.md").write_text("\n" + text)
    config = documents_config(folder, target=target)
    config.data.train_files = ("one.md", "two.md", "again.md")
    config.data.valid_files = ("three.md",) if target == "author" else ()
    message = r"again\.md of config\.data\.train_files has the same text as .*two\.md of"
    with pytest.raises(ValueError, match=message):
        LongDocuments(config.validate())
    config.data.train_files = ("one.md", "one.md")
    with pytest.raises(ValueError, match=r"one\.md of .* as .*one\.md of .*; name every book once"):
        LongDocuments(config.validate())


def test_a_single_book_or_author_is_refused(folder):
    config = documents_config(folder)
    config.data.train_files = ("one.md",)
    with pytest.raises(
        ValueError, match=r"one\.md: all \d+ training examples .* class 'one'; at le"
    ):
        LongDocuments(config.validate())
    config = documents_config(folder, target="author")
    config.data.train_files, config.data.valid_files = ("one.md",), ("three.md",)
    with pytest.raises(
        ValueError, match=r"one\.md: all \d+ training .* class 'Anna'; at least two"
    ):
        LongDocuments(config.validate())


def test_it_learns(folder):
    config = documents_config(folder)
    config.optimizer.learning_rate = 1e-2
    losses, scores = few_steps(config, 12)
    assert losses[-1] < losses[0] - 0.2
    assert scores["accuracy"] > 0.5  # the letters differ


def test_what_cannot_be_divided_is_refused(folder):
    config = documents_config(folder)
    config.data.sequence_length = 200
    with pytest.raises(ValueError, match=r"one\.md: 1,000 bytes give no three regions .*lower"):
        LongDocuments(config.validate())
    config.data.valid_files = ("two.md",)
    with pytest.raises(ValueError, match=r"valid_files must be empty .* got 1 files"):
        LongDocuments(config.validate())
    for name, value, words in (
        ("target", "year", "must be one of book, author; got 'year'"),
        ("held_out_share", 0.5, r"must lie in \(0, 0\.5\), got 0\.5"),
        ("train_stride", 0, "must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=rf"config\.long_documents\.{name} {words}"):
            documents_config(folder, **{name: value}).validate()
