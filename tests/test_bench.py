"""The benchmark measures what it says: the form of the table, percentages, limits, errors."""

import json

import pytest

import attention_variants
import bench_kernels
from attention_variants import Sizes
from bench_kernels import Limits, Row

SMALL = Sizes(heads=2, head_dim=4, value_dim=4, tables=1, planes=1)


def test_one_command_prints_the_table_and_writes_its_files(run_python, tmp_path):
    words = "--lengths 256 --heads 2 --head_dim 8 --value_dim 8 --repeats 2 --decay".split()
    words += ["--rows", "race causal,softmax causal"]
    files = {kind: str(tmp_path / f"bench.{kind}") for kind in ("json", "plot")}
    words += ["--json", files["json"], "--plot", files["plot"].replace(".plot", ".png")]
    printed = run_python(
        f"import sys; sys.path.insert(0, 'scripts'); import bench_kernels as b; b.main({words})"
    )
    table = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in table]
    assert cells[0] == list(bench_kernels.COLUMNS)
    assert set("".join(cells[1])) == {"-"}
    assert [line[:2] for line in cells[2:]] == [["256", "race causal"], ["256", "softmax causal"]]
    assert all(float(cell) > 0 for line in cells[2:] for cell in line[2:5])
    assert cells[3][4] == "1.00"  # softmax against itself
    figures = json.loads((tmp_path / "bench.json").read_text())
    assert figures["sizes"]["decay"] is True
    assert len(figures["rows"]) == 4
    assert (tmp_path / "bench.png").stat().st_size > 1000


def test_percent_of_peak_counts_by_hand():
    # F = 2: (4 * 2 * 5 + 4 * 1 * 1 * 4) * 100 tokens * 2 heads = 11200 operations forward.
    for backward, percent in ((False, 10.0), (True, 30.0)):
        row = Row("race causal", backward, length=100, seconds=1.0)
        assert bench_kernels.percent_of_peak(row, SMALL, peak=112_000.0) == pytest.approx(percent)
    # 2 * 100 * (4 + 4) * 100 tokens * 2 heads, half of it where causal.
    for name, operations in (("softmax bidirectional", 320_000), ("softmax causal", 160_000)):
        row = Row(name, backward=False, length=100, seconds=1.0)
        assert bench_kernels.percent_of_peak(row, SMALL, peak=operations) == pytest.approx(100)


def test_a_run_expected_to_be_too_long_is_left_out_from_there_on():
    limits = Limits(seconds=10)
    rows = [Row(f"{name} causal", True, length=1024, seconds=1.0) for name in ("race", "softmax")]
    assert [bench_kernels.expected_stop(row, 4096, limits) for row in rows] == ["", "over 10 s"]
    stopped = Row("race causal", True, length=4096, stopped="over 8 GiB")
    assert bench_kernels.expected_stop(stopped, 8192, limits) == "over 8 GiB"


def test_a_run_that_needs_too_much_memory_is_not_started():
    row = Row("softmax causal", backward=False)
    mesh = attention_variants.head_mesh(SMALL.heads)
    inputs = attention_variants.draw(SMALL, 64, mesh)
    assert bench_kernels.prepare(row, inputs, mesh, Limits(memory=1e-5)) is None
    assert row.stopped == "over 1e-05 GiB"
    rows = [row, Row("softmax causal", backward=True)]
    assert "over 1e-05 GiB" in bench_kernels.table_lines(rows, SMALL, peak=1.0)[0]


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
        ("--json nowhere/bench.json", "not a .json file in an existing folder"),
        ("--plot bench.jpg", "not a .png file"),
    ],
)
def test_a_bad_flag_stops_at_once(words, sentence, capsys):
    with pytest.raises(SystemExit):
        bench_kernels.parse(words.split())
    assert sentence in capsys.readouterr().err


def test_lengths_are_read_and_written_alike():
    assert bench_kernels.lengths("4k, 256,1M") == [256, 4096, 2**20]
    assert [bench_kernels.length_name(length) for length in (250, 4096, 2**20)] == [
        "250",
        "4k",
        "1M",
    ]
