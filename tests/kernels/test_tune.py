"""The table of block sizes, and the command that makes it, as far as they go without a card."""

import dataclasses
import itertools
import json
import re

import jax
import pytest

from pallas_kernels import blocks, tune
from pallas_kernels.blocks import Block, Pipeline, ProblemClass
from pallas_kernels.tune import Found, Timing

WIDE = ProblemClass(64, 128, 2)
FED = dataclasses.replace(WIDE, warpgroups=True)
SMALLER, DEEPER = Block(64, 4, 2), Pipeline(3, 3, (24, 160, 160))
SIZES = tune.FEATURES, tune.VALUE_DIMS, blocks.DTYPES, tune.FORMS.values(), (False, True)
EVERY_CLASS = {
    problem.name: problem
    for features, value_dim, itemsize, form, warpgroups in itertools.product(*SIZES)
    if (problem := ProblemClass(features, value_dim, itemsize, *form, warpgroups))
    and (
        not warpgroups
        or (problem.is_causal and blocks.fits_warpgroups(features, 16, value_dim, itemsize))
    )
}
TUNED_CLASSES = [
    tune.problem_class(form, features, value_dim, dtype)
    for form in tune.FORMS
    for features, value_dim in itertools.product(tune.FEATURES, tune.VALUE_DIMS)
    for dtype in blocks.DTYPES.values()
]


def table_complaints(table: dict) -> list[str]:
    """What in a table no problem could use."""
    found = []
    for device, classes in table.items():
        for name, fields in classes.items():
            if name not in EVERY_CLASS:
                found.append(f"{device}: there is no class {name!r}")
                continue
            problem, where = EVERY_CLASS[name], f"{device}, {name}"
            steps = tune.steps(problem)
            found += [f"{where}: no kernel {field!r}" for field in fields if field not in steps]
            found += [
                f"{where}: {field} cannot take {item}"
                for field, item in fields.items()
                if field in steps
                and blocks.read_record(item) not in blocks.candidates(problem, field)
            ]
    return found


@pytest.fixture
def use_table(monkeypatch):
    """`use_table(table)`: choose_blocks reads it in place of the file."""

    def use(table):
        monkeypatch.setattr(blocks, "tuned_blocks", lambda: blocks.read_table(table))

    return use


def entry(problem: ProblemClass, device: str = "NVIDIA H200", **records) -> dict:
    return {device: {problem.name: {f: blocks.record_item(x) for f, x in records.items()}}}


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (entry(WIDE, query=DEEPER), "query cannot take .*Pipeline"),
        (entry(FED, query=SMALLER), "query cannot take .*Block"),
        (entry(FED, value=SMALLER), "no kernel 'value'"),
        (entry(WIDE, sums=Block(64, 4, 2, packed=True)), "sums cannot take"),
        ({"NVIDIA H200": {"causal F=65": {}}}, "no class 'causal F=65'"),
    ],
)
def test_an_entry_that_does_not_fit_is_found(table, complaint):
    (found,) = table_complaints(table)
    assert re.search(complaint, found), found


def test_the_table_kept_here_fits():
    table = json.loads(blocks.TABLE.read_text("utf-8"))
    assert not (found := table_complaints(table)), "\n".join(found)
    assert blocks.TABLE.read_text("utf-8") == json.dumps(table, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("problem", EVERY_CLASS.values(), ids=EVERY_CLASS)
def test_every_kernel_has_valid_candidates(problem):
    chosen = blocks.heuristic_blocks(problem)
    for field in tune.steps(problem):
        found = blocks.candidates(problem, field)
        assert found[0] == getattr(chosen, field)
        assert len(set(found)) == len(found)
        assert len({type(block) for block in found}) == 1
        for block in found[1:]:
            if isinstance(block, Block):
                assert block in blocks.TRITON_SPACE
                assert block.value <= problem.value_dim
            else:
                assert block in blocks.PIPELINES[field]


def test_pipelines_share_out_no_more_registers_than_there_are():
    for kernel, pipelines in blocks.PIPELINES.items():
        shares = 4 if kernel == "key" else 3
        for pipeline in pipelines:
            registers = pipeline.registers
            assert len(registers) == shares
            assert all(x % 8 == 0 and 24 <= x <= 240 for x in registers)
            # The last of three is the share of two warpgroups.
            assert sum(registers) + registers[-1] * (shares == 3) <= 512


@pytest.mark.parametrize("record", [SMALLER, Block(32, 4, 1, packed=True), DEEPER])
def test_a_record_survives_json(record):
    assert blocks.read_record(json.loads(json.dumps(blocks.record_item(record)))) == record


def test_classes_that_are_timed_have_names_of_their_own():
    assert len({problem.name for problem in TUNED_CLASSES}) == len(TUNED_CLASSES)
    assert {problem.name for problem in TUNED_CLASSES} <= set(EVERY_CLASS)
    gate = tune.problem_class("gate", 64, 128, "bfloat16")
    assert gate.name == "causal F=64 V=128 bfloat16 gate warpgroups"
    assert tune.problem_class("bidirectional", 256, 64, "float32").name == (
        "bidirectional F=256 V=64 float32"
    )


@pytest.mark.parametrize("form", tune.FORMS)
def test_every_step_runs_on_what_is_drawn(form):
    """By shapes alone, with kernels that every jax traces."""
    problem = tune.problem_class(form, 128, 64, "bfloat16")
    arguments = jax.eval_shape(lambda: tune.draw(problem, 100, 2))
    for step in tune.steps(problem).values():
        run = tune.program(problem, step, blocks.heuristic_blocks(problem))
        found = jax.eval_shape(run, *arguments[step.is_backward])
        assert len(found) == len(step.results)
        assert sum(step.kernel in other for other in tune.KERNELS) == 1


def test_the_table_comes_before_the_heuristic(use_table):
    kind = jax.devices()[0].device_kind
    use_table(entry(WIDE, kind, sums=SMALLER))
    plain = blocks.heuristic_blocks(WIDE)
    assert blocks.choose_blocks(64, 128, 2) == dataclasses.replace(plain, sums=SMALLER)
    gated = blocks.heuristic_blocks(dataclasses.replace(WIDE, gate=True))
    assert blocks.choose_blocks(64, 128, 2, gate=True) == gated
    assert blocks.choose_blocks(64, 128, 2, is_causal=False) == plain
    assert blocks.choose_blocks(64, 128, 2, warpgroups=True) == blocks.heuristic_blocks(FED)


def test_the_device_of_the_mesh_counts_and_unknown_ones_have_no_entry(use_table):
    use_table(entry(FED, query=DEEPER))
    choose = lambda: blocks.choose_blocks(64, 128, 2, warpgroups=True).query  # noqa: E731
    heuristic = blocks.heuristic_blocks(FED).query
    for kind, query in (("NVIDIA H200", DEEPER), ("NVIDIA H100", heuristic)):
        device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
        axes = (jax.sharding.AxisType.Auto,)
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device, axis_types=axes)
        with jax.sharding.use_abstract_mesh(mesh):
            assert choose() == query


def test_only_clear_winners_are_kept():
    found = {
        "sums": Found(1.0, 0.96, SMALLER),
        "outputs": Found(1.0, 0.975, SMALLER),
        "query": Found(1.0, 1.0, Block(128, 4, 2)),
    }
    other = entry(WIDE, "another card", sums=SMALLER)
    old = entry(WIDE, query=SMALLER, reverse=SMALLER) | other
    merged = tune.merge(old, "NVIDIA H200", WIDE, found)
    assert merged == entry(WIDE, sums=SMALLER, reverse=SMALLER) | other
    assert old == entry(WIDE, query=SMALLER, reverse=SMALLER) | other
    assert tune.merge({}, "NVIDIA H200", WIDE, {"query": found["query"]}) == {}


def test_what_a_block_leaves_to_xla_counts_against_it():
    heuristic, leaner = Block(128, 4, 2), Block(64, 4, 1)
    times = {heuristic: Timing(1.0, 0.5), SMALLER: Timing(0.5, 1.5), leaner: Timing(0.75, 0.5)}
    assert tune.best(times, heuristic) == Found(1.0, 0.75, leaner)


def test_a_profile_is_read_by_the_kernels_name():
    run = [("causal_sums_7", 2.0), ("fusion", 0.5), ("causal_outputs", 4.0), ("fusion_1", 0.25)]
    slow = [(name, 3 * ms) for name, ms in run]
    assert tune.read_runs([run, run, slow], "causal_outputs") == Timing(4.0, 0.75)
    with pytest.raises(RuntimeError, match="no kernel called causal_reverse_sums ran; these did"):
        tune.read_runs([run], "causal_reverse_sums")


def test_a_candidate_that_fails_is_passed_over(monkeypatch, capsys):
    def program(problem, step, config):
        def run(x):
            if config.sums.num_stages == 1:
                raise ValueError("exceeds available shared memory")
            return x

        return run

    def clock(run, arguments, kernel):
        if kernel == "causal_outputs":
            raise RuntimeError("out of resources")
        return Timing(float(run(*arguments)))

    monkeypatch.setattr(tune, "draw", lambda *_: ((2.0,), (3.0,)))
    monkeypatch.setattr(tune, "program", program)
    found = tune.tune(WIDE, 64, 1, clock)
    assert set(found) == {"sums", "query", "reverse", "key", "value"}
    assert found["sums"] == Found(2.0, 2.0, blocks.heuristic_blocks(WIDE).sums)
    assert found["key"].best_ms == 3.0
    said = capsys.readouterr().err
    assert f"sums failed with {Block(64, 4, 1)}: exceeds available shared memory" in said
    assert said.count("outputs failed") == len(blocks.candidates(WIDE, "outputs"))


def test_the_file_is_replaced_whole_and_reads_back(tmp_path):
    path, table = tmp_path / "tuned.json", entry(FED, query=DEEPER)
    tune.write(table, path)
    assert blocks.read_table(json.loads(path.read_text())) == {
        "NVIDIA H200": {FED.name: {"query": DEEPER}}
    }
    assert [file.name for file in tmp_path.iterdir()] == ["tuned.json"]


def test_the_command_prints_a_table_and_writes_winners(monkeypatch, tmp_path, capsys):
    path = tmp_path / "tuned.json"
    path.write_text("{}\n")
    found = {"sums": Found(0.4, 0.3, SMALLER), "outputs": Found(0.9, 0.9, Block(128, 4, 3))}
    for name, value in {
        "TABLE": path,
        "device_kind": lambda: "NVIDIA H200",
        "find_clock": lambda: None,
        "limit": lambda problem: "too long" if problem.gate else None,
        "tune": lambda problem, length, heads, clock: found if length == 2**20 else {},
    }.items():
        monkeypatch.setattr(tune, name, value)
    monkeypatch.setattr(tune.backend, "missing", lambda: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    tune.main("--features 256 --value_dims 64 --forms gate,bidirectional --write".split())
    said = capsys.readouterr()
    problem = ProblemClass(256, 64, 2, is_causal=False)
    assert said.out.splitlines()[0] == f"| {' | '.join(tune.COLUMNS)} |"
    assert said.out.splitlines()[2] == f"| {problem.name} | sums | 0.400 | 0.300 | {SMALLER} |"
    assert said.err == "causal F=256 V=64 bfloat16 gate: left out, too long\n"
    assert json.loads(path.read_text()) == entry(problem, sums=SMALLER)


def test_the_command_asks_for_a_card(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(SystemExit, match="Tuning needs an NVIDIA GPU; JAX found cpu only"):
        tune.main([])


@pytest.mark.parametrize(
    "words", ["--features 48", "--forms sideways", "--length many", "--length 100"]
)
def test_a_word_that_the_command_does_not_know_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        tune.main(words.split())
    assert words.split()[0] in capsys.readouterr().err
