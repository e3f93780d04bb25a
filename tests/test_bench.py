"""The benchmarks report what they measure: tables, percentages, limits and errors."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bench_kernels
from benchmarks import attention, floor_table, peak_table, text, timing
from benchmarks.arrays import Random, maker
from benchmarks.attention import METHODS, Problem, Sizes
from benchmarks.floor_table import IMPLEMENTATIONS, Line, case
from benchmarks.peak_table import Limits, Row
from benchmarks.plot import Point, plot
from benchmarks.programs import Program
from benchmarks.timing import Clock, Figures

pytestmark = pytest.mark.once

SMALL = Sizes(heads=2, head_dim=4, value_dim=4, tables=1, planes=1)


def test_one_command_prints_the_table_and_writes_its_files(run_python, tmp_path):
    words = "--lengths 256 --heads 2 --head_dim 8 --value_dim 8 --repeats 2 --decay".split()
    words += ["--table", "peak", "--rows", "race causal,softmax causal"]
    files = {kind: str(tmp_path / f"bench.{kind}") for kind in ("json", "plot")}
    words += ["--json", files["json"], "--plot", files["plot"].replace(".plot", ".png")]
    printed = run_python(
        f"import sys; sys.path.insert(0, 'scripts'); import bench_kernels as b; b.main({words})"
    )
    table = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    assert cells[0] == list(peak_table.COLUMNS)
    assert set("".join(cells[1])) == {"-"}
    assert [line[:2] for line in cells[2:]] == [["256", "race causal"], ["256", "softmax causal"]]
    assert all(float(cell) > 0 for line in cells[2:] for cell in line[2:5])
    assert cells[3][4] == "1.00"  # softmax against itself
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["sizes"]["decay"] is True
    assert len(figures["rows"]) == 4
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_percent_of_peak_counts_by_hand():
    small = Problem(100, **dataclasses.asdict(SMALL))
    # F = 2: (4 * 2 * 5 + 4 * 1 * 1 * 4) * 100 tokens * 2 heads = 11200 operations forward.
    for backward, percent in ((False, 10.0), (True, 30.0)):
        figures = Figures.of(attention.program(small, "race", backward=backward))
        figures.ms = 1000.0
        assert figures.peak_percent(peak=112_000.0) == pytest.approx(percent)
    # 2 * 100 * (4 + 4) * 100 tokens * 2 heads, half of it where causal.
    for causal, operations in ((False, 320_000), (True, 160_000)):
        problem = dataclasses.replace(small, causal=causal)
        assert attention.program(problem, "softmax", backward=False).floor_operations == operations


def test_a_run_expected_to_be_too_long_is_left_out_from_there_on():
    limits = Limits(seconds=10)
    figures = Figures(ms=1000.0)
    rows = [Row(f"{name} causal", True, 1024, figures) for name in ("race", "softmax")]
    assert [peak_table.expected_stop(row, 4096, limits) for row in rows] == ["", "over 10 s"]
    stopped = Row("race causal", True, 4096, Figures(stopped="over 8 GiB"))
    assert peak_table.expected_stop(stopped, 8192, limits) == "over 8 GiB"


def test_a_run_that_needs_too_much_memory_is_not_started():
    mesh, inputs = peak_table.head_mesh(SMALL.heads), {}
    old = Row("softmax causal", backward=False)
    row, run = peak_table.prepare(old, SMALL, 64, inputs, mesh, Limits(memory=1e-5))
    assert run is None
    assert not inputs
    assert row.figures.stopped == "over 1e-05 GiB"
    rows = [row, Row("softmax causal", backward=True)]
    assert "over 1e-05 GiB" in peak_table.table_lines(rows, peak=1.0)[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--lengths 12,x", "'12,x' is not a list of lengths"),
        ("--lengths 0", "'0' is not a list of lengths"),
        ("--lengths 64M", "needs 1024.0 GiB for inputs and gradients alone"),
        ("--heads 0", "0 is not above zero"),
        ("--planes 11", "invalid choice"),
        ("--rows fast", "no row 'fast'; there are race causal"),
        ("--value_dim 64", "softmax rows need equal widths"),
        ("--table fast", "invalid choice: 'fast'"),
        ("--sweep lengths,fast", "no sweep 'fast'; there are lengths, features"),
        ("--implementations fast", "no implementation 'fast'; there are pallas from z"),
        ("--json nowhere/bench.json", "not a .json file in an existing folder"),
        ("--plot bench.jpg", "not a .png or .svg file"),
    ],
)
def test_a_bad_flag_stops_at_once(words, sentence, capsys):
    with pytest.raises(SystemExit):
        bench_kernels.parse(words.split())
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("table", "words"), [("floor", "--lengths 4k"), ("floor", "--decay"), ("peak", "--sweep gate")]
)
def test_an_option_of_the_other_table_is_refused(table, words):
    options = bench_kernels.parse(words.split())
    option, other = words.split()[0], {"floor": "peak", "peak": "floor"}[table]
    with pytest.raises(SystemExit, match=f"{option} is of the other table.*--table {other}"):
        bench_kernels.check_table(options, table)
    bench_kernels.check_table(options, other)


def test_lengths_are_read_and_written_alike():
    assert bench_kernels.lengths("4k, 256,1M") == [256, 4096, 2**20]
    assert [text.length_name(length) for length in (250, 4096, 2**20)] == ["250", "4k", "1M"]


TINY = {"heads": 2, "width": 8, "tables": 2, "planes": 3}


def test_floors_count_by_hand():
    tiny = case(100, **TINY)
    tensor, z = 100 * 2 * 8 * 2, 100 * 2 * 6 * 2  # bytes of q, k, v or o, and of z
    for name, forward, both in (
        ("pallas from qkv", 4 * tensor, 11 * tensor),
        ("xla from qkv", 4 * tensor, 11 * tensor),
        ("cudnn softmax", 4 * tensor, 11 * tensor),
        ("pallas from z", 2 * z + 2 * tensor, 6 * z + 5 * tensor),
    ):
        found = [attention.floor_bytes(tiny, METHODS[name], backward=b) for b in (False, True)]
        assert found == [forward, both], name
    gate = 100 * 2 * 4  # float32, read in both directions, and its gradient
    found = attention.floor_bytes(
        case(100, decay=True, **TINY), METHODS["pallas from z"], backward=True
    )
    assert found == 6 * z + 5 * tensor + 3 * gate
    resident = case(100, resident=True, **TINY)
    qkv = METHODS["pallas from qkv"]
    assert attention.floor_bytes(resident, qkv, backward=True) == 11 * tensor


def test_the_goals_are_lines_of_the_table():
    cases = [problem for sweep in floor_table.SWEEPS.values() for problem in sweep]
    assert len(cases) == len(set(cases))
    lines = {(jobs[0].case, jobs[0].attention) for jobs in floor_table.plan(cases, IMPLEMENTATIONS)}
    million, three = 2**20, {"tables": 3, "planes": 3}
    both = ("pallas from z", "pallas from qkv")
    assert {(case(million), name) for name in both} <= lines
    assert (case(million, decay=True, **three), both[0]) in lines
    assert {(case(4 * million, causal=False, **three), name) for name in both} <= lines
    assert {(case(n * million, resident=True, **three), both[1]) for n in (12, 16)} <= lines
    assert max(c.length for c, name in lines if name == "xla from qkv") == million
    assert max(c.length for c, name in lines if name == "cudnn softmax") == 2**16


def test_the_profiler_s_answers_are_read():
    one = [("sums", 0.5), ("outputs", 1.0)]
    assert timing.read_runs(one) == [one]
    assert timing.read_runs([one, one]) == [one, one]
    assert timing.total(one) == 1.5
    for nothing in (None, []):
        with pytest.raises(RuntimeError, match="saw no kernel"):
            timing.read_runs(nothing)


def test_a_program_s_time_is_the_median_sum_of_its_kernels(monkeypatch):
    asked, sums = [], iter((3.0, 1.0, 2.0, 5.0, 4.0))

    def record(program, inputs, iterations):
        asked.append(iterations)
        if iterations > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return [[("a", ms), ("b", 0.25), ("b", 0.25)] for ms in [next(sums)]]

    monkeypatch.setattr(timing, "record", record)
    found = timing.time_run(lambda x: x, jnp.ones(3), Clock(), repeats=5, together=3)
    assert asked == [3, 1, 1, 1, 1, 1]
    assert found.ms == 3.5
    assert found.kernels == {"a": 3.0, "b": 0.5}


def test_the_wall_clock_stands_in_and_says_so():
    clock = timing.find_clock()
    assert "WALL CLOCK" in clock.describe()
    assert timing.copy_rate(clock, elements=2**16) > 0


def test_a_tiny_run_fills_the_lines_and_names_what_cannot_run():
    if jax.default_backend() != "cpu":
        pytest.skip("on a card the kernels run")
    jobs = floor_table.plan([case(32, **TINY)], ["pallas from qkv", "xla from qkv"])
    with text.progress_bar(1) as progress:
        kernels, xla = floor_table.measured(jobs, Clock("no card"), 3, progress)
    for line in (kernels, xla):
        assert set(line.figures) == {False, True}
    assert all(f.ms > 0 and f.extra_percent > 0 for f in xla.figures.values())
    for figures in kernels.figures.values():
        assert figures.stopped.startswith("the RACE kernels run on CUDA devices")


def test_a_line_of_the_floor_table():
    figures = {
        False: Figures(2_000_000, 0, 10, 100, ms=4.0, wall_ms=4.0),
        True: Figures(6_000_000, 0, 2**29, 2**29, stopped="bad | word"),
    }
    line = Line(case(2**20, decay=True, tables=3, planes=2), "pallas from z", figures)
    cells = [cell.strip() for cell in floor_table.table_line(line, rate=1e9).split("|")[1:-1]]
    # 2 MB at 1 GB/s are 2 ms, half of the 4 taken; temporaries are 10 bytes beside 100.
    assert cells[:7] == ["1M", "causal, gate", "(2,3)", "4", "128", "pallas from z", "4.000"]
    assert cells[7:] == ["bad / word", "50.0", "", "10.0", "100.0", "1.00"]
    assert len(cells) == len(floor_table.COLUMNS)
    assert floor_table.uncounted([line]) == []
    figures[False].wall_ms = 6.0
    assert "kernels 4.00 ms, wall clock 6.00 ms" in floor_table.uncounted([line])[0]


def test_an_error_becomes_a_word():
    assert timing.words(RuntimeError("RESOURCE_EXHAUSTED: Out of memory")) == "out of memory"
    assert timing.words(ValueError("first\nsecond")) == "first"
    assert timing.words(ValueError()) == "ValueError"


def test_what_does_not_fit_is_not_drawn(monkeypatch):
    monkeypatch.setattr(timing, "memory_limit", lambda: 1)
    [[forward, _]] = floor_table.plan([case(16, **TINY)], ["xla from qkv"])
    inputs = {}
    figures = floor_table.measure(forward, forward.compile(), inputs, Clock("no card"), 1)
    assert figures.stopped == "out of memory"
    assert figures.held_bytes > 1
    assert not inputs


def test_any_program_is_timed_alike_and_its_failure_is_a_word():
    size = 32
    product = Program(
        "product",
        lambda inputs: inputs["x"] @ inputs["y"],
        {name: Random((size, size)) for name in ("x", "y")},
        floor_bytes=3 * 4 * size**2,
        floor_operations=2 * size**3,
    )
    shared = {}
    figures = timing.time_program(product, Clock("no card"), 3, shared=shared)
    assert set(shared) == {"x", "y"}
    assert (figures.array_bytes, figures.stopped) == (3 * 4 * size**2, "")
    assert figures.floor_percent(1e9) > 0 < figures.peak_percent(1e9)
    failing = dataclasses.replace(product, inputs={"x": Random((size,))})
    assert "'y'" in timing.time_program(failing, Clock("no card"), 3).stopped


def test_runs_in_turn_stop_at_their_limit_and_a_long_one_runs_once(monkeypatch):
    calls = []

    def wall_clock(run, inputs, calls=1):
        return run(inputs, calls)

    def run(name, calls_in_one):
        calls.append((name, calls_in_one))
        return {"short": 5.0, "middle": 1500.0, "long": 3000.0}[name]

    monkeypatch.setattr(timing, "wall_clock", wall_clock)
    runs = [(run, name) for name in ("short", "middle", "long")]
    assert timing.time_in_turn(runs, repeats=3, seconds=2) == [5.0, 1500.0, 3000.0]
    first, turn = [("short", 1), ("middle", 1), ("long", 1)], [("short", 4), ("middle", 1)]
    assert calls == [*first, *turn, *turn, ("short", 4)]


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_a_plot_leaves_out_what_is_not_known(suffix, tmp_path):
    points = [
        Point("race causal", length, backward, ms, 2**20 if backward else None)
        for length, ms in ((256, 1.0), (1024, 4.0), (4096, None))
        for backward in (False, True)
    ]
    path = tmp_path / f"bench{suffix}"
    plot(points, path)
    once = path.read_bytes()
    assert 1000 < len(once) < 100_000
    if suffix == ".svg":
        for word in (b">race causal<", b">4k<", b">milliseconds<"):
            assert word in once
        plot(points, path)
        assert path.read_bytes() == once


def test_a_loss_of_the_outputs_has_the_gradient_of_twice_the_outputs():
    made = attention.Method(lambda problem, x: x["query"] + 2 * x["key"] * x["value"])
    given, resident = case(16, **TINY), case(16, resident=True, **TINY)
    arrays = attention.input_arrays(resident, made, backward=True)
    assert "cotangent" not in arrays
    inputs = {name: array.draw(name) for name, array in arrays.items()}
    gradients = attention.function(resident, made, backward=True)(inputs)
    assert set(gradients) == {"query", "key", "value"}
    inputs["cotangent"] = 2 * attention.function(given, made, backward=False)(inputs)
    _, expected = attention.function(given, made, backward=True)(inputs)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(gradient, expected[name], err_msg=name)


def test_the_floor_table_is_printed_and_saved_line_by_line(monkeypatch, capsys, tmp_path):
    if jax.default_backend() != "cpu":
        pytest.skip("on a card the kernels run")
    monkeypatch.setattr(floor_table, "copy_rate", lambda clock: 2e12)
    words = ["--sweep", "gate,resident", "--implementations", "pallas from qkv"]
    words += ["--json", str(tmp_path / "floor.json")]
    floor_table.main(bench_kernels.parse(words))
    printed = capsys.readouterr().out.splitlines()
    assert "WALL CLOCK, not device time" in printed[0]
    assert "copy rate of the card 2.00 TB/s" in printed[1]
    table = [[cell.strip() for cell in line.split("|")] for line in printed if line[:1] == "|"]
    assert table[0][1:-1] == list(floor_table.COLUMNS)
    assert [line[1:4] for line in table[2:]] == [
        ["1M", "causal, gate", "(3,3)"],
        ["1M", "causal, gate", "(4,4)"],
        ["12M", "causal, resident", "(3,3)"],
        ["16M", "causal, resident", "(3,3)"],
    ]
    saved = json.loads((tmp_path / "floor.json").read_text())
    assert saved["machine"]["copy_rate"] == 2e12
    assert len(saved["rows"]) == 6


def test_random_arrays_are_normal_and_differ_by_place_and_seed():
    make = maker(Random((64, 32, 8)))
    x, y = (np.asarray(make(jnp.uint32(seed))) for seed in (0, 1))
    assert len(np.unique(x)) > 0.99 * x.size
    for value in (x.mean(), x.std() - 1, (x * y).mean(), (x[1:] * x[:-1]).mean()):
        assert abs(value) < 6 / math.sqrt(x.size)
    np.testing.assert_array_equal(x, make(jnp.uint32(0)))
