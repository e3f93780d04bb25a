"""The benchmark of decoding: what it counts, how good selections are, and its tables."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench_decode
import race_jax
from benchmarks import decode_cells, decode_prefill, decode_programs, decode_report
from benchmarks.decode_cells import METHODS, RATIOS, WINDOW_ONLY, Cell, Setting, Shape
from benchmarks.decode_quality import draw_runs, kept_mask, recall_and_mass
from benchmarks.decode_runs import Bench, Limits, Pool, runs_quality
from benchmarks.timing import Clock
from race_jax.sparse import Report, SparseCache, SparseConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.once

SMALL = Setting(heads=4, head_dim=16, sink=2, window=8, layers=2, quality_length=256)
SHAPE = Shape(rows=1, kv_heads=2, capacity=256)
MB = 1e6


@pytest.mark.parametrize(
    ("method", "selection", "megabytes"),
    [
        # The table of the design: codes 33.6 and factors 2.1 at 256 bits, kept rows 65.1 and 16.3.
        ("sign_linear, 256 bits", "head", 33.6 + 2.1 + 65.1),
        ("sign_linear, 256 bits", "group", 33.6 + 2.1 + 16.3),
        ("quantized, 4 bits", "head", 67.1 + 2.1 + 65.1),
        ("oracle", "head", 268.4 + 65.1),
        ("quest", "head", 33.6 + 65.1),
        (WINDOW_ONLY, "head", 65.1),
    ],
)
def test_bytes_are_those_of_the_model(method, selection, megabytes):
    cell = Cell(Shape(1, 8, 131072), method, 33, selection)
    assert decode_cells.bytes_read(cell, Setting()) / MB == pytest.approx(megabytes, rel=2e-3)
    assert decode_cells.dense_bytes(cell.shape, Setting()) / MB == pytest.approx(537, rel=1e-3)


def test_the_grid_is_whole_and_the_main_part_is_in_it():
    lengths = [2**power for power in range(14, 19)]
    whole = decode_cells.every(Setting(), lengths, list(METHODS))
    cells = [cell for part in whole for cell in part]
    assert len(cells) == len(set(cells)) == len(METHODS) * len(RATIOS) * 5 * 2 * 3
    main = decode_cells.main_part(Setting(), lengths, list(METHODS))
    some = [cell for part in main for cell in part]
    assert set(some) < set(cells)
    assert len(some) == len(set(some))
    assert {cell.method for cell in some} == set(METHODS)
    assert {cell.ratio for cell in some} == set(RATIOS)


def test_caches_that_do_not_fit_are_fewer_or_none():
    cell = Cell(Shape(8, 8, 2**18), "quantized, 4 bits", 33, "head")
    each = cell.shape.cache_bytes(Setting())
    assert each == 8 * 2**18 * 8 * 128 * 2 * 2
    assert decode_cells.layers_that_fit(cell, Setting(), 100 * each) == 8
    assert decode_cells.layers_that_fit(cell, Setting(), 4 * each) == 2
    assert decode_cells.layers_that_fit(cell, Setting(), each) == 0


def test_recall_and_mass_by_hand():
    """One head, four tokens with logits log 1, log 2, log 4, log 8; the first and last are kept."""
    logits = np.log([1.0, 2.0, 4.0, 8.0])
    keys = np.zeros((1, 4, 1, 4), np.float32)
    keys[0, :, 0, 0] = 2 * logits  # divided by sqrt(4)
    cache = race_jax.KVCache.init(1, 4, 1, 4, dtype=jnp.float32)
    cache = cache.append(jnp.asarray(keys), jnp.asarray(keys))
    query = jnp.array([1.0, 0, 0, 0])[None, None, None]
    report = Report(jnp.array([[[[0, 1, 3, 0]]]]), jnp.array([[[3]]]), jnp.bool_(False))
    mask = kept_mask(report, 1, 4)
    assert mask[0, 0, 0].tolist() == [True, True, False, True]
    wanted = SparseConfig(budget=3, sink=1, window=1, dense_below=0)
    recall, mass = recall_and_mass(query, cache, mask, wanted)
    assert float(recall[0, 0, 0]) == 0  # of the candidates 1 and 2 the better one is 2
    assert float(mass[0, 0, 0]) == pytest.approx(11 / 15)


def test_rows_hold_times_bytes_and_quality():
    cells = [Cell(SHAPE, "quantized, 4 bits", 5, lists) for lists in ("head", "group")]
    cells.append(Cell(SHAPE, WINDOW_ONLY, 5, "head"))
    bench = Bench(SMALL, Limits(repeats=1, seconds=1e9), Clock(missing="a test"), rate=1e9)
    rows = list(bench.measure([cells]))
    assert [row["method"] for row in rows] == [cell.method for cell in cells]
    for row, cell in zip(rows, cells, strict=True):
        assert not row["stopped"]
        assert row["bytes"] == decode_cells.bytes_read(cell, SMALL)
        assert row["floor_us"] == pytest.approx(row["bytes"] / 1e9 * 1e6)
        assert row["gain"] == pytest.approx(row["dense_us"] / row["us"])
        assert 0 <= row["recall"] <= 1
        assert 0 < row["mass"] <= 1
    head, group, window = rows
    assert head["recall"] > 0.8
    assert head["recall"] > group["recall"] > window["recall"]
    fastest = min(row["us"] for row in bench.dense if not row["stopped"])
    assert {row["dense_us"] for row in rows} == {fastest}
    late = Bench(SMALL, Limits(seconds=0.0), Clock(missing="a test"), rate=1e9)
    assert not list(late.measure([cells]))
    assert late.left_out == 3


def test_the_stages_give_what_the_whole_gives():
    config = Cell(SHAPE, "quantized, 4 bits", 5, "group").config(SMALL)
    query, kv = draw_runs(jax.random.key(0), 1, 256, 4, 2, 16)
    kv = kv.truncate(jnp.array([253]))
    cache = SparseCache.of(jax.random.key(1), kv, config)
    layers = decode_programs.stage_layers(config)
    scores = layers["scores"](query, cache) * race_jax.sparse.scores.unit(query, cache, config)
    _, report = race_jax.sparse_decode_attention(query, cache, return_report=True)
    np.testing.assert_array_equal(layers["select"](scores, kv), report.indices)


def test_kernels_are_counted_by_stage():
    """Two layers, with the kernel of the scores and with kernels of XLA in its place."""
    layer = [("round", 1.0), ("sparse_scores", 2.0), ("sort", 3.0), ("sparse_attend", 4.0)]
    found = decode_programs.stage_of([*layer, ("merge", 0.5), *layer, ("merge", 0.5)])
    assert found == {"scores": 4.0, "select": 6.0, "attend": 8.0, "other": 3.0}
    layer = [("gemm", 2.0), ("sparse_threshold", 1.0), ("cumsum", 1.0), ("sparse_attend", 4.0)]
    found = decode_programs.stage_of([*layer, *layer])
    assert found == {"scores": 4.0, "select": 4.0, "attend": 8.0, "other": 0.0}


def test_constant_scores_are_an_error(monkeypatch):
    monkeypatch.setitem(
        race_jax.sparse.scores.FUNCTIONS,
        "oracle",
        lambda query, cache, config, positions: jnp.zeros((*query.shape[:3], cache.capacity)),
    )
    bench = Bench(SMALL, Limits(repeats=1, seconds=1e9), Clock(missing="a test"), rate=1e9)
    plan = dataclasses.make_dataclass("Plan", ["quality", "cell"])
    cell = Cell(SHAPE, "oracle", 5, "head")
    future = Pool().compile(runs_quality(cell, SMALL, "xla"), jax.random.key(0))
    with pytest.raises(RuntimeError, match="'oracle' are the same for all tokens"):
        bench._quality(plan(future, cell))


def row(length: int, gain: float, method: str = "quest", ratio: int = 33) -> dict:
    shape = {"rows": 1, "kv_heads": 8, "capacity": length}
    return {
        "shape": shape,
        "method": method,
        "ratio": ratio,
        "selection": "head",
        "implementation": "xla",
        "why": "",
        "stopped": "",
        "us": 2.0 / gain,
        "wall_us": 3.0,
        "stages": {"scores": 1.0},
        "bytes": 10**6,
        "floor_us": 1.0,
        "dense_us": 2.0,
        "gain": gain,
        "recall": 0.5,
        "mass": 0.5 + gain / 100,
        "error": 0.1,
    }


def test_break_even_lengths_are_found_and_said():
    rows = [row(2**10, 0.5), row(2**12, 2.0), row(2**10, 0.1, "oracle"), row(2**12, 0.9, "oracle")]
    rows += [row(2**10, 1.5, "hamming"), row(2**12, 3.0, "hamming")]
    said = "\n".join(decode_report.break_even_lines(decode_report.break_even(rows)))
    assert "quest, 33x, per head: pays from 2,048 tokens on" in said
    assert "oracle, 33x, per head: does not pay up to 4,096 tokens" in said
    assert "hamming, 33x, per head: pays from 1,024 tokens on or earlier" in said


def test_tables_and_figure_hold_every_row(tmp_path):
    rows = [row(2**17, 1.0 + ratio / 10, "oracle", ratio) for ratio in RATIOS]
    rows.append(row(2**17, 1.0) | {"stopped": "out of memory", "us": None})
    lines = decode_report.table(rows)
    assert len(lines) == 2 + len(rows)
    assert "128k" in lines[2]
    assert "out of memory" in lines[-1]
    decode_report.draw(rows, tmp_path / "figure.svg", "a card")
    text = (tmp_path / "figure.svg").read_text()
    assert "oracle" in text
    assert "dense" in text


def test_codes_of_a_prompt_are_compared_with_its_attention():
    setting = dataclasses.replace(SMALL, heads=8, window=16)
    methods = ["oracle", "quantized, 4 bits", "quest"]
    cells = decode_prefill.prompts(setting, [1024, 100, 768], methods)  # 100 is too short
    rows = [*decode_prefill.measure(setting, cells, Clock(missing="none"), 1)]
    assert [(row["length"], row["method"]) for row in rows] == [
        (length, method) for length in (768, 1024) for method in methods[1:]
    ]
    for row in rows:
        assert row["share"] == row["coding_us"] / row["attention_us"] > 0
    stopped = decode_prefill.row(256, "quest", "out of memory", 1.0)
    lines = decode_report.prefill_table([*rows, stopped])
    assert len(lines) == 2 + 5
    assert "1k" in lines[4]
    assert "out of memory" in lines[-1]
    assert decode_report.prefill_table([]) == []


def test_a_dry_run_measures_nothing(capsys, tmp_path):
    bench_decode.main(["--tiny", "--dry", "--out", str(tmp_path / "x.json")])
    out = capsys.readouterr().out
    assert "B = 1, K = 8, S = 1,024" in out
    assert out.rstrip().endswith("cells")
    assert not list(tmp_path.iterdir())


def test_the_figure_of_the_pages_is_drawn_again(tmp_path, capsys):
    """The figure in docs/ is what `--draw` makes of the rows beside it."""
    rows = ROOT / "docs" / "figures" / "decode_h100.json"
    bench_decode.main(["--draw", str(rows), "--out", str(tmp_path / "drawn.json")])
    drawn = (tmp_path / "drawn.svg").read_text()
    assert "131,072 tokens" in drawn
    assert "quantized, 4 bits" in drawn
    assert "131,072 tokens" in rows.with_suffix(".svg").read_text()
    assert "drawn.svg has the figure" in capsys.readouterr().out
