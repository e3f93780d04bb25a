"""The benchmark of one sequence over several devices, on CPU devices."""

import os
import subprocess
import sys

import pytest

import bench_sharding

pytestmark = pytest.mark.once


def test_one_command_times_every_number_of_devices():
    """The collectives have the same size at any length."""
    sizes = "--heads 2 --width 8 --tables 2 --planes 2 --dtype float32 --repeats 1".split()
    printed = {}
    for length in ("256", "512"):
        run = subprocess.run(
            [sys.executable, bench_sharding.__file__, "--length", length, *sizes],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        lines = [line.split("|")[1:-1] for line in run.stdout.splitlines() if "|" in line][2:]
        printed[length] = [[cell.strip() for cell in line] for line in lines]
    assert [line[:3] for line in printed["256"]] == [
        ["one", "1", "256"],
        ["strong", "2", "256"],
        ["weak", "2", "512"],
    ]
    gathered = {length: [line[-1] for line in lines] for length, lines in printed.items()}
    assert gathered["256"] == gathered["512"]
    assert float(gathered["256"][1]) > 0


def test_bytes_of_collectives_are_counted():
    program = """
      %a = (f32[4,2]{1,0}, bf16[3]{0}) all-gather-start(f32[2,2]{1,0} %x, bf16[3]{0} %y)
      %b = f32[] all-reduce(f32[] %z), to_apply=%add
      %c = f32[100]{0} add(f32[100]{0} %p, f32[100]{0} %q)
    """
    assert bench_sharding.bytes_gathered(program) == 4 * 8 + 2 * 3 + 4
