"""The benchmark over length: what it measures, where it stops, and how it goes on."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import pytest

import bench_scaling
from benchmarks import scaling, scaling_figure, streamed, timing
from benchmarks.model_scaling import PRESETS, ModelSetting
from benchmarks.scaling import Limits, Record, Series, Setting
from race_jax.core import reference
from tests.gradients import with_biases_as_rows

pytestmark = pytest.mark.once

SIZES = {"heads": 2, "tables": 2, "planes": 2, "segment_length": 64, "dtype": "float32"}
SETTING = Setting(head_dim=8, value_dim=8, **SIZES)
MODEL = ModelSetting(layers=1, width=16, **SIZES)
MACHINE = {"platform": "cpu", "device": "cpu", "devices": 1, "jax": jax.__version__}
STREAMED = Series("race_streamed", causal=True)


def memory(series: Series, length: int, setting: Setting = SETTING) -> timing.Figures:
    """What the compiler says, without a run."""
    made = series.program(length, setting)
    figures = timing.Figures.of(made)
    figures.note_memory(made.compile())
    return figures


def test_one_command_measures_draws_and_goes_on(run_python, tmp_path):
    out = tmp_path / "scaling.json"
    words = ["--tiny", "--methods", "race,race_streamed", "--forms", "causal", "--out", str(out)]
    # One length: every point has a process of its own. A model is measured at two lengths below.
    printed = run_python(f"""
        import sys; sys.path.insert(0, "scripts"); import bench_scaling
        bench_scaling.TINY = bench_scaling.TINY.replace("--to 128", "--to 64")
        for more in [], [], ["--dtype", "bfloat16"]:
            try: bench_scaling.main({words} + more)
            except SystemExit as stop: print(stop)
            print("ran")
    """)
    first, again, other = printed.split("ran\n")[:3]
    content = json.loads(out.read_text())
    points = content["points"]
    names = ("race causal", "race_streamed causal")
    assert [(p["series"], p["length"]) for p in points] == [(name, 64) for name in names]
    for point in points:
        assert set(point) == {"series", "length", "date", "commit", *scaling.POINT}
        assert point["seconds"] > 0 < point["estimated_bytes"] < point["peak_bytes"]
    assert first.count("peak memory") == len(points)
    assert set(content["machine"]) >= {"device", "jax"}
    assert content["setting"]["tables"] == 2
    assert b"RACE, streamed" in out.with_suffix(".svg").read_bytes()
    assert "peak memory" not in again  # all is there
    assert again.splitlines()[-4:] == first.splitlines()[-4:]  # the table and the files
    assert "points with dtype = float32, and this run has dtype = bfloat16; give" in other


def test_the_streamed_program_has_the_loss_and_gradients_of_its_definition(assert_close):
    length = 150  # two segments of 64 and a shorter one
    made = STREAMED.program(length, SETTING)
    inputs = made.draw({})
    tables = {name: inputs[name] for name in streamed.TABLES}
    tokens = inputs["tokens"]
    assert tokens.shape == (1, length)
    assert len(set(tokens[0].tolist())) > length / 3

    def loss(tables):
        query, key, value = (tables[name][tokens] for name in streamed.TABLES)
        output = reference.all_pairs(query, key, value, inputs["planes"], is_causal=True)
        return jnp.square(output).sum()

    value, gradients = jax.jit(jax.value_and_grad(loss))(tables)
    got = made.compile()(inputs)
    assert_close("loss", got["loss"][0], value, kind="streamed")
    for name, gradient in gradients.items():
        assert_close(name, got["gradients"][name], gradient, kind="streamed")


def test_a_model_has_the_same_loss_and_gradients_in_segments(assert_close):
    length = 150
    found = {}
    for method in "race", "race_streamed":
        made = MODEL.program(method, length)
        found[method] = made.compile()(made.draw({}))
    whole, streamed = found["race"], found["race_streamed"]
    assert 5 < whole["loss"] / length < 6  # nats a byte, untrained: log(256) is 5.55
    assert_close("loss", streamed["loss"], whole["loss"], kind="streamed")
    got, want = (with_biases_as_rows(x["gradients"]) for x in (streamed, whole))
    assert_close("gradients", got, want, kind="streamed")


def test_the_operations_of_a_model_are_those_of_its_matrix_products():
    preset, length = PRESETS["small"], 1024
    width, weights = preset.width, 4 * 12 * preset.width**2 + 256 * preset.width
    pairs = 2 * length * width * preset.layers
    assert preset.operations("softmax", length) == 3 * length * (2 * weights + pairs)
    # docs/streaming.md has the products of this model as the compiler counted them, forward.
    assert preset.operations("race", length) / 3 / length == pytest.approx(6.1e6, rel=0.05)


@pytest.mark.parametrize(("name", "millions"), [("small", 3.2), ("30m", 31.7), ("wide", 101.1)])
def test_the_presets_have_their_sizes(name, millions):
    preset = PRESETS[name].completed("gpu")
    assert preset.dtype == "bfloat16"
    assert preset.facts()["parameters"] / 1e6 == pytest.approx(millions, abs=0.1)
    assert preset.segment_length == {"small": 2**18}.get(name, 2**15)


def test_a_model_is_measured_and_drawn(run_python, tmp_path):
    out = tmp_path / "model.json"
    words = f"--tiny --model small --methods race_streamed --out {out}".split()
    printed = run_python(f"""
        import sys; sys.path.insert(0, "scripts"); import bench_scaling
        bench_scaling.TINY = bench_scaling.TINY.replace("--to 128", "--to 96")
        bench_scaling.main({words})
    """)
    content = json.loads(out.read_text())
    assert [point["length"] for point in content["points"]] == [64, 96]
    for point in content["points"]:
        assert point["operations"] > 3 * 20 * 16**2 * point["length"]
        assert point["compile_seconds"] > 0
    assert content["facts"]["parameters"] == 7444
    assert content["facts"]["matmul_rate"] > 1e9
    assert "MFLOP/token" in printed
    assert "% of peak |" in printed
    title = out.with_suffix(".svg").read_text()
    assert "A language model of bytes, value and gradient: 1 layers of width 16" in title


def test_lengths_end_with_the_longest():
    assert scaling.ladder(64, 1024, 4) == [64, 256, 1024]
    assert scaling.ladder(64, 1000, 4) == [64, 256, 1000]
    assert scaling.ladder(64, 64, 2) == [64]


def test_the_streamed_program_is_of_one_size_whatever_the_length():
    short, long = 64 * 64, 64 * 1024
    state = 2 * 8 * (8 + 1) + 2 + 1  # numbers of 4 bytes: numerator, mass, log_decay, segment
    grown = memory(STREAMED, long).temporary_bytes - memory(STREAMED, short).temporary_bytes
    kept = 4 * state * (long - short) // 64
    assert grown <= 1.2 * kept  # the states before the segments, and nothing else
    assert grown < 4 * 3 * 8 * 2 * (long - short) / 4  # a quarter of what q, k and v would take

    def text(length):
        made = STREAMED.program(length, SETTING)
        structs = {name: random.struct() for name, random in made.inputs.items()}
        return jax.jit(made.call).lower(structs).as_text()

    assert len(text(long)) < 1.05 * len(text(short))


@pytest.mark.parametrize("causal", [True, False])
def test_the_estimate_of_memory_is_linear_for_race_and_quadratic_for_softmax(causal):
    for method, power in (("race", 1), ("softmax", 2)):
        series = Series(method, causal)
        small, large = (memory(series, length).held_bytes for length in (4096, 16384))
        assert 0.7 * 4**power < large / small < 1.3 * 4**power, method


def test_what_needs_too_much_memory_is_refused_before_it_runs():
    limits = Limits(memory=1e-5)
    arguments = scaling.measure, Series("softmax", causal=True), 64, SETTING, limits
    figures = scaling.in_own_process(*arguments)
    assert set(figures) == {"compile_seconds", "estimated_bytes", "operations", "stopped"}
    need = figures["estimated_bytes"] / 2**30
    assert figures["stopped"] == f"would need {need:.3g} GiB of 1e-05 GiB"


def test_a_process_that_dies_is_a_word():
    assert scaling.in_own_process(os._exit, 3) == {"stopped": "its process ended with exit code 3"}


def test_a_measuring_process_ends_when_its_parent_is_killed():
    script = f"""
        import sys; sys.path.insert(0, {str(pathlib.Path(scaling.__file__).parents[1])!r})
        from benchmarks.scaling import in_own_process
        in_own_process(exec, "import time; print('here', flush=True); time.sleep(600)")
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "here\n"
        parent.kill()
        assert parent.communicate(timeout=60)[0] == ""  # both have closed their output


def test_a_method_stops_at_its_limits_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    calls = []

    def measured(call, series, length, setting, limits, tick):
        tick()
        calls.append((series.name, length))
        if series.name == "race bidirectional" and length == 128:
            return {"stopped": "would need 12.3 GiB of 8 GiB", "estimated_bytes": 13 * 2**30}
        seconds = length**2 / 64**2 if series.method == "softmax" else length / 64
        return {"seconds": seconds, "peak_bytes": 2**30, "estimated_bytes": length}

    monkeypatch.setattr(scaling, "in_own_process", measured)
    series = scaling.series_of(["race", "softmax"], ["causal", "bidirectional"])
    path = tmp_path / "scaling.json"
    record = Record(path, MACHINE, SETTING)
    lengths = scaling.ladder(64, 1024, 2)
    scaling.fill(record, series, lengths, SETTING, Limits(seconds=5))
    names = [s.name for s in series]
    expected = [(name, 64) for name in names] + [(name, 128) for name in names]
    # Softmax would take 16 s at 256, where RACE takes 4, and 8 at 512.
    assert calls == [*expected, ("race causal", 256)]
    stops = {(p["series"], p["length"]): p["stopped"] for p in record.content["points"]}
    assert stops["softmax causal", 256] == "would take about 16 s of 5 s"
    assert stops["race causal", 512] == "would take about 8 s of 5 s"
    assert "stops: would need 12.3 GiB of 8 GiB" in capsys.readouterr().out
    assert json.loads(path.read_text()) == record.content
    # With a higher limit only what was stopped is tried again.
    calls.clear()
    again = Record(path, MACHINE, SETTING)
    scaling.fill(again, series[:1], lengths, SETTING, Limits(seconds=9))
    assert calls == [("race causal", 512)]
    assert [point["length"] for point in again.measured(series[0])] == [64, 128, 256, 512]
    places = [(point["series"], point["length"]) for point in again.content["points"]]
    assert len(places) == len(set(places))  # the new point took the place of the old one
    assert {("softmax causal", 256), ("race bidirectional", 128)} < set(places)


def test_points_of_another_device_or_setting_are_not_mixed(tmp_path):
    path = tmp_path / "scaling.json"
    Record(path, MACHINE, SETTING).add(STREAMED, 64, {"seconds": 1.0})
    other = MACHINE | {"device": "NVIDIA H200"}
    with pytest.raises(
        ValueError, match="device = cpu, and this run has device = NVIDIA H200; give"
    ):
        Record(path, other, SETTING)
    with pytest.raises(ValueError, match="tables = 2, and this run has tables = 3"):
        Record(path, MACHINE, dataclasses.replace(SETTING, tables=3))
    assert len(Record(path, MACHINE, SETTING).content["points"]) == 1
    assert Record(path, other, SETTING, fresh=True).content["points"] == []


def test_the_time_left_counts_what_is_not_known_yet(tmp_path):
    record, series = Record(tmp_path / "scaling.json", MACHINE, SETTING), Series("softmax", True)

    def left(longest):
        lengths = scaling.ladder(64, longest, 2)
        return scaling.seconds_left([series], record, lengths, Limits(10, 8, 3))

    start = scaling.START_SECONDS
    assert left(1024) == start  # at 64, and nothing is known of the rest
    record.add(series, 64, {"seconds": 0.5, "estimated_bytes": 2**20})
    assert left(64) == 0
    # 128 tokens take 2 s: once, and three samples. 256 take 8 s, sampled for 20. 512 would take 32.
    assert left(1024) == (start + 2 + 6) + (start + 8 + 20)


@pytest.mark.parametrize("content", ['{"a": 1}', "xx", "[1]", b"\xff\xfe"])
def test_a_file_of_something_else_is_refused_and_kept(content, tmp_path):
    path = tmp_path / "scaling.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="does not hold points of this command; give another"):
        Record(path, MACHINE, SETTING)
    with pytest.raises(SystemExit, match="does not hold points of this command"):
        bench_scaling.main(["--draw", "--out", str(path)])
    assert path.stat().st_size == len(content)
    assert Record(path, MACHINE, SETTING, fresh=True).content["points"] == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--methods fast", "no method 'fast'; there are race, softmax, race_streamed"),
        ("--forms sideways", "no form 'sideways'; there are causal, bidirectional"),
        ("--from 1k,2k", "'1k,2k' is not one length"),
        ("--from 4k --to 1k", "--to 1024 is below --from 4096"),
        ("--step 1", "--step 1 does not make lengths grow"),
        ("--layers 2", "--layers is a size of a model; add --model"),
        ("--model wide --head_dim 8", "--head_dim is a size of one operation; leave out --model"),
        ("--model wide --forms bidirectional", "a language model has no bidirectional form"),
        ("--model small --heads 3", "--heads 3 does not divide --width 256"),
        ("--seconds 0", "0 is not above zero"),
        ("--out nowhere/scaling.json", "not a .json file in an existing folder"),
        ("--out missing.json --draw", "there is no missing.json"),
    ],
)
def test_a_bad_flag_stops_at_once(words, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        bench_scaling.parse(words.split())
    assert sentence in capsys.readouterr().err


def test_streaming_is_causal():
    assert scaling.series_of(["race_streamed"], ["bidirectional"]) == []
    assert bench_scaling.parse(["--to", "4M", "--tiny"]).longest == 128


def test_the_figure_names_lines_apart_and_the_table_has_every_cell(tmp_path):
    record = Record(tmp_path / "scaling.json", MACHINE, SETTING)
    for name, factor in (("race", 1.0), ("softmax", 1.01)):
        for causal in (True, False):
            series = Series(name, causal)
            for length in (1024, 16384):
                known = {"seconds": factor * length, "peak_bytes": 2**30}
                record.add(series, length, known)
    record.add(series, 32768, {"stopped": "over | 8"})
    path = tmp_path / "scaling.svg"
    scaling_figure.draw(record.content, path)
    once = path.read_bytes()
    for words in ("RACE, causal", "softmax, bidirectional", "peak memory, GiB", "16k"):
        assert words.encode() in once
    scaling_figure.draw(record.content, path)
    assert path.read_bytes() == once
    lines = [line.split("|")[1:-1] for line in scaling_figure.table(record.content).splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0][:2] == ["T", "race causal"]
    assert cells[2][:2] == ["1k", "1.02e+03 s, 1.00 GiB"]
    assert cells[4] == ["32k", "", "", "", "over / 8"]


@pytest.mark.parametrize(("base", "values"), [(2, (0.40, 0.48)), (10, (0.02, 0.03))])
def test_an_axis_has_two_numbers_however_narrow_the_range(base, values):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=base)
    axes.plot([1024, 2048], values)
    scaling_figure.style_axes(axes, [1024, 2048], base)
    low, high = axes.get_ylim()
    assert low <= min(values)
    assert max(values) <= high
    inside = [tick for tick in axes.yaxis.get_majorticklocs() if low <= tick <= high]
    assert len(inside) >= 2


def test_a_record_without_a_time_is_drawn_as_well(tmp_path):
    record = Record(tmp_path / "scaling.json", MACHINE, SETTING)
    record.add(STREAMED, 64, {"stopped": "would need 12.3 GiB of 8 GiB"})
    scaling_figure.draw(record.content, tmp_path / "scaling.svg")
    assert (tmp_path / "scaling.svg").stat().st_size > 1000
