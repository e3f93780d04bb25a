"""Runs the tests of tests/devices in a Python of its own, which has eight CPU devices.

Tests are chosen by the same marks as here, so `-m "not once"` leaves out theirs as well.

JAX fixes the number of devices at first use, and the other tests use one. To run them directly:
`pytest tests/devices`.
"""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "devices"


@pytest.mark.first
def test_everything_on_eight_devices(request):
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    command += ["-m", request.config.getoption("markexpr")]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
