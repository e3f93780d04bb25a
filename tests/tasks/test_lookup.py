"""Lines to be looked up: where they are, which bytes count, and what is refused."""

import itertools
import re

import numpy as np
import pytest

from race_jax.tasks.lookup import Lookup, LookupConfig, with_lookups
from tests.tasks.few_steps import few_steps
from tests.train.small import small_config

pytestmark = pytest.mark.once

TEXT = "It rained for a whole day, and nobody came to the old house by the sea. " * 400


def lookup_config(tmp_path, **options):
    (tmp_path / "text.txt").write_text(TEXT)
    config = small_config()
    config.task, config.model.attention = "lookup", "softmax"
    config.data.source, config.data.train_files = "files", (str(tmp_path / "text.txt"),)
    config.data.sequence_length, config.run.batch_size = 64, 8
    options = {"least_lines": 2, "most_lines": 3, "name_length": 1, "value_length": 2} | options
    for name, value in options.items():
        setattr(config.lookup, name, value)
    return config


def as_text(ids) -> str:
    return bytes(np.asarray(ids, np.uint8)).decode()


def test_the_repeated_lines_are_found_in_the_text():
    options = LookupConfig(least_lines=3, most_lines=5)
    text = np.frombuffer(TEXT[:400].encode(), np.uint8)
    counts = set()
    for seed in range(40):
        ids, asked, places = with_lookups(np.random.default_rng(seed), text, options, 2)
        assert len(ids) == len(asked) == len(text)
        hidden, repeated = as_text(ids[: -2 * 10]), as_text(ids[-2 * 10 :])
        lines = re.findall(r"\n(#[a-z]{3}=\d{4})\n", hidden)
        counts.add(len(lines))
        assert len({line[:4] for line in lines}) == len(lines)
        first, second = repeated[1:10], repeated[11:]
        assert {first, second} <= set(lines)
        assert first != second
        assert as_text(ids[asked]) == first[-4:] + second[-4:]
        for place, line in zip(places, (first, second), strict=True):
            assert hidden[place:].startswith(f"\n{line}\n")
        assert re.sub(r"\n#[a-z]{3}=\d{4}\n", "", hidden) == TEXT[: len(hidden) - 11 * len(lines)]
    assert counts == {3, 4, 5}


def test_more_questions_than_lines_ask_for_every_line_before_one_comes_again():
    options = LookupConfig(least_lines=3, most_lines=3)
    text = np.frombuffer(TEXT[:400].encode(), np.uint8)
    ids, asked, places = with_lookups(np.random.default_rng(0), text, options, 8)
    repeated = re.findall(r"#[a-z]{3}=\d{4}", as_text(ids[-8 * 10 :]))
    assert len(repeated) == len(places) == 8
    assert set(repeated[:3]) == set(repeated[3:6]) == set(re.findall(r"#\S+", as_text(ids[:-80])))
    assert as_text(ids[asked]) == "".join(line[-4:] for line in repeated)


def test_a_larger_share_leaves_the_held_out_windows_as_they_are(tmp_path):
    few, many = (
        list(Lookup(lookup_config(tmp_path, share=share).validate()).held_out["valid"])
        for share in (0.1, 1.0)
    )
    for one, other in zip(few, many, strict=True):
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])
    assert any(batch["asked"].any() for batch in few)


def test_a_text_without_room_is_refused():
    text = np.zeros(20, np.uint8)
    with pytest.raises(ValueError, match="20 bytes have no room for 8 lines and 1 questions of 11"):
        with_lookups(np.random.default_rng(0), text, LookupConfig(most_lines=8), 1)


def test_training_weighs_answers_and_held_out_rows_are_scored_apart(tmp_path):
    options = {"share": 0.5, "least_questions": 2, "most_questions": 5, "answer_weight": 9}
    task = Lookup(lookup_config(tmp_path, **options).validate())
    first, again = (list(itertools.islice(task.train, 4)) for _ in range(2))
    for name in first[0]:
        np.testing.assert_array_equal(*([b[name] for b in batches] for batches in (first, again)))
    batch = {name: np.concatenate([b[name] for b in first]) for name in first[0]}
    chosen = batch["asked"].any(axis=1)
    assert 0 < chosen.sum() < len(chosen)
    questions = set(batch["asked"].sum(axis=1)[chosen] // 2)
    assert questions <= {2, 3, 4, 5}
    assert len(questions) > 1
    np.testing.assert_array_equal(batch["weights"], 1 + 8 * batch["asked"])
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])
    batches = list(task.held_out["valid"])
    held = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    full = held["weights"].all(axis=1) | held["asked"].any(axis=1)
    held = {name: rows[full] for name, rows in held.items()}
    chosen = held["asked"].any(axis=1)
    assert 0 < chosen.sum() < len(chosen)
    assert set(held["asked"].sum(axis=1)[chosen]) == {2}
    assert not held["weights"][chosen].any()
    assert held["weights"][~chosen].all()
    assert "#" not in as_text(held["inputs"][~chosen].ravel())


def test_a_model_learns_and_is_scored(tmp_path):
    losses, scores = few_steps(lookup_config(tmp_path, share=0.5), 10)
    assert losses[-1] < losses[0]
    assert set(scores) == {"loss", "perplexity", "bits_per_byte", "accuracy"}
    assert 0 <= scores["accuracy"] <= 1


def test_without_lines_it_is_language_modeling(tmp_path):
    _, scores = few_steps(lookup_config(tmp_path, share=0.0), 1)
    assert set(scores) == {"loss", "perplexity", "bits_per_byte"}


def test_a_held_out_text_of_one_window_is_scored_as_text(tmp_path, monkeypatch):
    monkeypatch.setattr("race_jax.tasks.lookup.HELD_OUT_SHARE", 1.0)
    config = lookup_config(tmp_path, share=1.0)
    (tmp_path / "held_out.txt").write_text(TEXT[:65])
    config.data.valid_files = (str(tmp_path / "held_out.txt"),)
    _, scores = few_steps(config, 1)
    assert set(scores) == {"loss", "perplexity", "bits_per_byte"}
    (tmp_path / "held_out.txt").write_text(TEXT[: 3 * 64 + 1])
    task = Lookup(config.validate())
    (batch,) = task.held_out["valid"]
    np.testing.assert_array_equal(batch["asked"].any(axis=1), [False, True, True] + 5 * [False])
    np.testing.assert_array_equal(batch["weights"].any(axis=1), [True] + 7 * [False])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 1.5}, r"share must lie in \[0, 1\], got 1\.5"),
        ({"least_lines": 4}, "most_lines must be >= 4, got 3"),
        ({"least_questions": 0}, "least_questions must be >= 1, got 0"),
        ({"least_questions": 3, "most_questions": 2}, "most_questions must be >= 3, got 2"),
        ({"most_lines": 27}, "most_lines must be <= 26, .* got 27; raise name_length"),
        ({"answer_weight": 256}, r"answer_weight must lie in \[1, 255\], got 256"),
        ({"value_length": 30}, "sequence_length must be >= 140, .* got 64"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, options, message):
    config = lookup_config(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        Lookup(config.validate())


def test_packed_documents_and_several_processes_are_refused(tmp_path):
    config = lookup_config(tmp_path)
    config.data.packing = "packed"
    with pytest.raises(ValueError, match=r'needs config\.data\.tokenizer="bytes"'):
        Lookup(config.validate())
    config = lookup_config(tmp_path)
    config.mesh.coordinator = "auto"
    with pytest.raises(ValueError, match="runs in one process"):
        Lookup(config)
