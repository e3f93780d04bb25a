"""Every example runs with the command in its first lines, and is short."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
MOST_LINES = 80
EXPECTED = {
    "decode_with_state.py": r"differs from reading everything again by [0-9.]+e-0[5-9]",
    "decode_softmax.py": r"the same text without the cache: True\nsparse: 150 of 1520",
    "drop_in.py": r"RACE +loss after \d+ steps: 0\.[0-2]",
    "long_documents.py": r"accuracy on new documents: (0\.9|1\.0)",
}


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_runs_and_does_what_it_promises(name):
    path = ROOT / "examples" / name
    source = path.read_text("utf-8")
    assert source.count("\n") <= MOST_LINES
    assert f"python examples/{name}" in source
    run = subprocess.run(
        [sys.executable, path], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert re.search(EXPECTED[name], run.stdout), run.stdout


def test_every_example_is_tried():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXPECTED)
