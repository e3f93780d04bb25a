"""`scripts/score_positions.py`: the loss by position, against the logits of the whole text."""

import itertools
import json
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from flax import nnx

from race_jax.data.tokenizer import ByteTokenizer
from race_jax.models import ModelConfig, TransformerLM
from race_jax.train.checkpoint import SavedModel
from scripts import score_positions

pytestmark = pytest.mark.once

TEXT = np.random.default_rng(0).integers(0, 256, 2500).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    config = ModelConfig(num_layers=1, width=16, num_heads=2)
    model = TransformerLM(config, 256, keep_rngs=False, rngs=nnx.Rngs(0))
    # Random tables of a fresh model are small, and every token would have nearly the same loss.
    model.embedding[...] *= 30
    return model


@nnx.jit
def read(model, ids):
    return model(ids, deterministic=True)


def wanted(model, ids):
    """The nats of all tokens but the first, from the logits of the whole."""
    logits = read(model, ids[None, :-1].astype(np.int32))[0]
    return -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[1:, None], 1)[:, 0]


def nats(model, context):
    pieces = score_positions.text_nats(model, TEXT, segment_length=700, context=context)
    return np.concatenate(list(pieces))


def test_nats_of_every_token_are_those_of_the_whole(model, assert_close):
    assert_close("whole text", nats(model, 0), wanted(model, TEXT), kind="resumed")
    windows = [wanted(model, TEXT[first : first + 201]) for first in range(0, 2499, 200)]
    assert_close("windows", nats(model, 200), np.concatenate(windows), kind="resumed")


def test_the_table_has_the_mean_of_every_bucket(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "book.txt").write_bytes(TEXT.tobytes())
    saved = SavedModel(model, ByteTokenizer(), None, lambda: model)
    monkeypatch.setattr(score_positions, "open_for_inference", lambda _: nullcontext(saved))
    words = [str(tmp_path / "book.txt"), "--checkpoint", "run", "--context", "0,200"]
    words += ["--json", str(tmp_path / "sums.json"), "--segment_length", "700"]
    words += ["--per_token", str(tmp_path / "nats.npz")]
    assert score_positions.main(words) == 0
    per_token = np.load(tmp_path / "nats.npz")
    for context in (0, 200):
        np.testing.assert_array_equal(
            per_token[f"{context} {tmp_path / 'book.txt'}"], nats(model, context)
        )
    rows = json.loads((tmp_path / "sums.json").read_text())
    # Token i of the book is scored at position i, and token 0 is not scored.
    borders = [0, 1023, 2047, 2499]
    for context in (0, 200):
        found = nats(model, context)
        for bucket, (first, stop) in enumerate(itertools.pairwise(borders)):
            row = next(r for r in rows if (r["context"], r["bucket"]) == (context, bucket))
            assert row["tokens"] == stop - first
            assert row["nats"] == pytest.approx(found[first:stop].sum(), rel=1e-6)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("The mean loss in bits a token")
    assert lines[2] == "| position | tokens | whole text | 200 |"
    assert lines[4].startswith("| 0 to 1,023 | 1,023 | ")
    assert lines[6].startswith("| 2,048 to 4,095 | 452 | ")


def test_what_cannot_be_scored_is_said(tmp_path, capsys):
    assert score_positions.main([str(tmp_path / "a"), "--checkpoint", str(tmp_path)]) == 2
    assert "no checkpoints in" in capsys.readouterr().err


def test_a_state_that_grows_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    config = ModelConfig(num_layers=1, width=16, num_heads=2, attention="softmax")
    model = TransformerLM(config, 256, keep_rngs=False, rngs=nnx.Rngs(0))
    saved = SavedModel(model, ByteTokenizer(), None, lambda: pytest.fail("the model is loaded"))
    monkeypatch.setattr(score_positions, "open_for_inference", lambda _: nullcontext(saved))
    words = [str(tmp_path / "a"), "--checkpoint", "run", "--context", "0,200"]
    assert score_positions.main(words) == 2
    assert "no state of fixed size; give --context without 0" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    words = [str(tmp_path / "a"), "--checkpoint", str(tmp_path), "--json", "nowhere/sums.json"]
    with pytest.raises(SystemExit):
        score_positions.main(words)
    assert "--json: there is no folder nowhere" in capsys.readouterr().err


def test_words_that_are_no_contexts_are_refused(tmp_path, capsys):
    words = [str(tmp_path / "a"), "--checkpoint", str(tmp_path), "--context", "128,x"]
    with pytest.raises(SystemExit):
        score_positions.main(words)
    assert "--context: '128,x' is not 0 or lengths such as 0,2048" in capsys.readouterr().err
