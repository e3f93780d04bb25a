"""The shell commands of README and docs run as printed, in order, in a copy of the project.

In the copy, each configuration is replaced by one of the same name that trains a tiny model for a
few steps on a small text. A command whose words are all in another one does not run beside it.
Scripts that measure have tests of their own, so only the words of their commands are tried here.
The environment is the one that runs the tests.
"""

import importlib
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests import quick
from tests.test_docs import ROOT, tracked_files

pytestmark = pytest.mark.once

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:[A-Z][A-Z_]*=\S+ )*(?:make|python3?|\.venv/bin/python|pip) ")
CONFIG = '''"""A tiny stand-in, written by a test."""

import pathlib

from race_jax.train.config import Config


def get_config():
    config = Config()
    config.model.num_layers, config.model.width, config.model.num_heads = 1, 16, 2
    config.model.race.num_tables, config.model.race.num_planes = 2, 2
    config.data.source, config.data.sequence_length = "files", 32
    config.data.train_files = (str(pathlib.Path(__file__).parents[1] / "text.txt"),)
    config.optimizer.warmup_steps = 1
    config.mesh.data = 1
    config.run.steps, config.run.batch_size, config.run.checkpoint_every = 3, 2, 2
    options = config.language_model
    options.sample_length, options.sample_prompt = 3, "def "
    return config
'''

# What the stand-ins of other tasks add, by the beginning of their names.
LINES = {
    "lm": "",
    "mlm": """    config.task, config.model.race.forget_gate = "masked_lm", None
""",
    "cls": """    config.task, config.model.race.forget_gate = "text_classification", None
    config.data.train_files = (str(pathlib.Path(__file__).parents[1] / "table.tsv"),)
""",
}


def shell_commands(page: str) -> list[str]:
    """The commands of a page's indented and fenced shell blocks, in order, without comments."""
    text = re.sub(r"```python\n.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\\\n\s*", "", text)
    lines = [line.strip() for line in text.splitlines() if line[:1] == " "]
    fences = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines += [line.strip() for fence in fences for line in fence.splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if COMMAND.match(line)]


def measuring(command: str) -> tuple[str, list[str]] | None:
    """Returns the module and the words of a script that measures, or None for other commands.

    These scripts have a function `parse`, and tests that run them.
    """
    found = re.search(r"scripts/((?:bench|study)_\w+|reproduce)\.py *(.*)", command)
    return (found[1], shlex.split(found[2])) if found else None


def in_small(command: str) -> str | None:
    """Returns a form of the command that runs in seconds, or None if another test runs it."""
    elsewhere = "configs/recall.py", "configs/needle.py", "launch_local.py"
    if command.startswith(("make test", "pip ")) or any(name in command for name in elsewhere):
        return None
    if measuring(command):
        return None
    if "hybrid_every=4" in command:
        command += " --config.model.hybrid_every=2 --config.model.num_layers=2"
    if "--config.run.steps" in command and not command.startswith("make"):
        command += " --config.run.steps=4 --config.optimizer.warmup_steps=1"
    if "--config.data.sequence_length" in command:
        command += " --config.data.sequence_length=64"
    if "--config.optimizer.segment_length" in command:
        command += " --config.optimizer.segment_length=16"
    return command.replace("FOLDER", "data")


def what_it_runs(command: str) -> str:
    """The command, with the kind of its configuration in place of the name.

    All configurations of a kind have the same stand-in, which does not read the folder of data.
    tests/test_docs.py checks that a page names configurations that exist, and
    tests/test_structure.py reads them all.
    """
    kinds = "|".join(LINES)
    return re.sub(rf"^RACE_JAX_DATA=\S+ |(?<=configs/)({kinds})_\w+\.py", r"\1", command)


def without_covered(commands: list[str]) -> list[str]:
    """The commands, in order, without those whose words are all words of another one.

    The other one runs the same script with the same options and more, perhaps in another folder.
    Commands that are equal run once, in the place of the first. Those of `make` always run.
    """
    programs: dict[str, str] = {}
    for command in commands:
        programs.setdefault(what_it_runs(command), command)
    words = {what: set(shlex.split(what)) for what in programs}
    options = {
        what: {word for word in of if "run.directory" not in word} for what, of in words.items()
    }
    return [
        command
        for what, command in programs.items()
        if what.startswith("make") or not any(options[what] < other for other in options.values())
    ]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A fresh copy of the project, whose `.venv` is the environment of this process."""
    copy = tmp_path_factory.mktemp("clone")
    for file in tracked_files():
        target = copy / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for kind, lines in LINES.items():
        for file in (copy / "configs").glob(f"{kind}_*.py"):
            file.write_text(CONFIG.replace("    return", f"{lines}    return"))
    (copy / "text.txt").write_text("def main(argument):\n    return argument + 1\n" * 1_000)
    rows = [f"{i} {word}\t{word}" for i in range(99) for word in ("yes", "no")]
    (copy / "table.tsv").write_text("\n".join(["text\tlabel", *rows]))
    python = copy / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp_environment(copy)
    return copy


def stamp_environment(copy: pathlib.Path) -> None:
    """Marks `.venv` as made by `make`, so that `make` installs nothing."""
    makefile = (copy / "Makefile").read_text()
    base = re.search(r"^BASE := (.*)$", makefile, re.MULTILINE)[1]
    script = (
        f"version=$(python3 --version 2>&1); base=$(python3 -c '{base}'); "
        'echo "$version, $base, in $(pwd), $(cksum < pyproject.toml)" > .venv/made-from'
    )
    subprocess.run(["sh", "-c", script], cwd=copy, check=True)


def test_shell_commands_are_found():
    page = (
        "    make train ARGS=x   # a comment\n    python a.py \\\n        --b\n\ntext `make`\n"
        "```python\n    make = 1\n```\n```sh\n.venv/bin/python c.py \\\n    --d\n```\n    z = W x\n"
    )
    assert shell_commands(page) == [
        "make train ARGS=x",
        "python a.py --b",
        ".venv/bin/python c.py --d",
    ]


def test_a_command_that_another_one_covers_is_left_out():
    plain, more = "python a.py configs/lm_x.py --b=1", "python a.py configs/lm_x.py --b=1 --c"
    same = "RACE_JAX_DATA=data python a.py configs/lm_y.py --b=1"
    other, makes = "python a.py configs/mlm_x.py", ["make a", 'make a B="c"']
    assert without_covered([plain, *makes, other, same]) == [plain, *makes, other]
    assert without_covered([plain, more, *makes, other, same]) == [more, *makes, other]


def test_scripts_that_measure_know_the_words_of_the_pages(monkeypatch):
    monkeypatch.setenv("RACE_JAX_DATA", str(ROOT))  # any folder
    commands = [command for page in PAGES for command in shell_commands(page.read_text("utf-8"))]
    found = list(filter(None, map(measuring, commands)))
    assert len({name for name, _ in found}) >= 6
    for name, words in found:
        words = ["causal_lm" if word == "TABLE" else word for word in words]
        assert importlib.import_module(name).parse(words)


@pytest.mark.first
def test_every_command_of_the_pages_runs_in_order(copy):
    # The variables that `make test ARGS=...` was given must not reach the commands of the pages.
    make = ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in make} | {
        "PYTHONPATH": str(copy),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(copy / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    found = [command for page in PAGES for command in shell_commands(page.read_text("utf-8"))]
    # Stands in the README's prose. Both compile one program.
    found.insert(1, 'make train ARGS="--config.run.directory=runs/arguments"')
    programs = without_covered(list(filter(None, map(in_small, found))))
    assert len(programs) > 12
    for small in programs:
        done = subprocess.run(
            ["sh", "-c", small],
            cwd=copy,
            env=environment | ({} if "make train" in small else quick.environment()),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{small}\n{done.stdout}\n{done.stderr}"
        hint = re.search(r"^next +(.*scripts/generate\.py .*)$", done.stdout, re.MULTILINE)
        assert ("train_lm.py" in small or "make train" in small) == (hint is not None)
    assert (copy / "runs" / "arguments" / "summary.json").exists()  # ARGS has reached the run
