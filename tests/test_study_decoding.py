"""The study of sparse decoding on a small model: what is read, and that a full budget is dense."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

import study_decoding
from benchmarks.decode_cells import METHODS
from benchmarks.decode_model import PROBES, Runner
from race_jax.core.rotary import rotate
from race_jax.core.state import EMPTY
from race_jax.data.tokenizer import ByteTokenizer
from race_jax.layers.parts import Span, init_taps
from race_jax.models import ModelConfig, TransformerLM
from race_jax.tasks.lookup import LookupConfig
from race_jax.train.config import Config
from study_decoding import SOME, book_rows, cases, lookup_rows

pytestmark = pytest.mark.once

TEXT = "It rained for a whole day, and nobody came to the old house by the sea. " * 20
OPTIONS = LookupConfig(least_lines=1, most_lines=4)
SIZES = "--rows 2 --questions 2 --scored 64 --draws 1 --sink 2 --window 8 --context 192".split()


def convolve_anyhow(model: TransformerLM) -> None:
    """Gives the convolutions, which are the identity at first, random kernels."""
    for block in model.trunk.blocks:
        for name, kernel in vars(block.attention).items():
            if name.endswith("conv_kernel"):
                kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape) / 2


@pytest.fixture
def checkpoint(monkeypatch, tmp_path):
    """Stands for a checkpoint of a model with random parameters and one layer."""
    (tmp_path / "book.txt").write_text(TEXT)
    config = Config()
    config.task, config.lookup.least_lines, config.lookup.most_lines = "lookup", 1, 3
    config.data.source, config.data.valid_files = "files", (str(tmp_path / "book.txt"),)
    sizes = {"num_layers": 1, "width": 32, "num_heads": 4, "num_kv_heads": 2}
    config.model = ModelConfig(attention="softmax", positions="rope", **sizes)

    def load(directory):
        model = TransformerLM(config.model, 256, keep_rngs=False, rngs=nnx.Rngs(0))
        convolve_anyhow(model)
        return model, ByteTokenizer(), config

    monkeypatch.setattr(study_decoding, "load_for_inference", load)
    return config


@pytest.mark.parametrize("short_conv", [None, "before", "qkv"])
def test_a_full_budget_is_dense_and_a_small_one_is_measured(
    short_conv, checkpoint, monkeypatch, tmp_path, capsys
):
    checkpoint.model.softmax.short_conv = short_conv
    monkeypatch.setattr(study_decoding, "RATIOS", (8, 1))
    out = tmp_path / "study.json"
    words = ["--checkpoint", "x", "--methods", "oracle,window only", "--out", str(out), *SIZES]
    assert study_decoding.main(words) == 0
    content = json.loads(out.read_text())
    rows = {(r["method"], r["ratio"], r["selection"]): r for r in content["rows"]}
    dense = rows.pop(("dense", 1, "head"))
    ratios = [("oracle", r, s) for r in (1, 8) for s in ("head", "group")]
    assert set(rows) == {*ratios, ("window only", 1, "head"), ("window only", 8, "head")}
    for (_, ratio, _), row in rows.items():
        exact = abs(row["bits_per_byte"] - dense["bits_per_byte"]) < 1e-5
        assert exact == (ratio == 1)
        if ratio == 1:
            assert row["mass"] == pytest.approx([1.0], abs=1e-5)
            assert row["found_by_depth"] == dense["found_by_depth"]
    assert rows["oracle", 8, "head"]["recall"] == [1.0]
    assert rows["oracle", 8, "group"]["recall"] > rows["window only", 8, "head"]["recall"]
    assert rows["oracle", 8, "head"]["mass"] > rows["oracle", 8, "group"]["mass"]
    (layer,) = content["statistics"]
    assert {name: len(values) for name, values in layer.items()} == dict.fromkeys(layer, 2)
    assert all(0 < share < 1 for share in layer["mean_key_share"] + layer["overlap"])
    printed = capsys.readouterr().out
    assert "| oracle | 8x | group | 1 |" in printed
    assert out.with_suffix(".md").read_text().strip() in printed


@pytest.mark.parametrize("short_conv", [None, "before", "qkv"])
def test_the_probed_queries_are_those_of_one_pass(short_conv, assert_close):
    sizes = {"num_layers": 1, "width": 32, "num_heads": 4}
    config = ModelConfig(attention="softmax", positions="rope", **sizes)
    config.softmax.short_conv = short_conv
    model = TransformerLM(config, 256, keep_rngs=False, rngs=nnx.Rngs(0))
    convolve_anyhow(model)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 64))
    runner = Runner(model, 2, 64)
    (probed,), read = runner.probe(tokens[:, 32:], runner.prefill(tokens[:, :32]))
    (block,) = model.trunk.blocks
    places = np.broadcast_to(np.arange(64), (2, 64))
    x = block.attention_norm(model.trunk.embedding(tokens, places))
    span = Span(jax.numpy.full(2, EMPTY), None, None)
    _, (query, _, _), taps = block.attention.project(x, init_taps(block.attention.config, 2), span)
    assert_close("query", probed, rotate(query, places)[:, -PROBES:], kind="outputs")
    if short_conv:
        assert_close("taps", read.layers[0].taps, taps, kind="outputs")


def test_rows_end_with_a_line_of_the_text():
    ids = np.frombuffer(TEXT.encode(), np.uint8)
    rows, asked, depths = lookup_rows(book_rows(ids, 20, 200), OPTIONS)
    for row, mask, depth in zip(rows, asked, depths, strict=True):
        text = bytes(row).decode()
        line = re.search(r"\n(#[a-z]{3}=\d{4})$", text)[1]
        place = text.index(f"\n{line}\n")
        assert depth == place * 5 // 200
        assert bytes(row[mask]).decode() == line[-4:]
    assert len(set(depths)) > 2
    with pytest.raises(ValueError, match="has 1440 bytes; a row needs 2000"):
        book_rows(ids, 2, 2000)


def test_every_case_is_there_once_and_the_first_draw_comes_first():
    found = cases(list(METHODS), 3)
    assert len(found) == len(set(found))
    assert [case.draw for case in found] == sorted(case.draw for case in found)
    assert {case.method for case in found if case.draw == 0} == set(METHODS)
    assert {c.method for c in found if c.draw} == set(METHODS) - {"oracle", "quest", "window only"}
    assert set(SOME) < set(METHODS)


def test_what_cannot_be_studied_is_refused(checkpoint, tmp_path, capsys):
    words = ["--checkpoint", "x", "--out", str(tmp_path / "x.json")]
    assert study_decoding.main([*words, *SIZES, "--context", "80"]) == 2
    assert "a context of 80 tokens is too short; it needs 90" in capsys.readouterr().err
    checkpoint.model.positions = "alibi"
    assert study_decoding.main([*words, *SIZES]) == 2
    assert "does not go with ALiBi" in capsys.readouterr().err
    checkpoint.model = ModelConfig(num_layers=1, width=32)
    assert study_decoding.main([*words, *SIZES]) == 2
    assert "needs a softmax model" in capsys.readouterr().err
