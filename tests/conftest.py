"""Shared parts of all tests: the tolerance table, comparison by name, markers and new Pythons.

Tests use them through the fixtures `assert_close`, `tolerance`, `rng`, `run_python`, `on_h200` and
`data_root`.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest

from tests import newest, quick

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Names the file of `--margins`, also for the Pythons that tests start.
MARGINS = "RACE_JAX_TEST_MARGINS"


LEAST_SCALE = 1e-3


class Tolerance(NamedTuple):
    """RMS(error) <= rms scale and max |error| <= max scale, where scale is RMS(want).

    The scale is at least 1e-3. Arrays in these tests are of order one. If an array is much smaller,
    larger terms have canceled in it, and its rounding errors are those of the terms.
    """

    rms: float
    max: float


# By kind of comparison and dtype: relative RMS, and the maximum in units of RMS(want).
#
# Both are relative, because rounding errors are proportional to the numbers. The maximum is looser,
# because the largest of 1e3 to 1e5 errors is well above their RMS. Each bound is at least three
# times the worst error that was seen on Python 3.11 with jax 0.10.2, and in all tests on 3.12 with
# jax 0.12.0. These two round the same sums differently, and another machine would differ again.
# tests/margins.py shows the distances. A looser entry needs a reason of its own, written beside it,
# as CONTRIBUTING.md says.
TOLERANCES = {
    # A path against the oracle, which gets the rounded inputs in a wider dtype, and kernels against
    # XLA.
    # float32: 8e-7 and 9e-6 were seen, the first where the gate sums to -100, which is known to
    # 1e-5 only, the second where few of 1024 buckets hold nearly everything. In float64 the same
    # comparisons give 1e-13 or less, so it is rounding. A product in TF32 would add 5e-4.
    # bfloat16: 8e-3 of a whole model and 6e-3 of a layer, whose steps round to 2e-3 each; 2e-2.
    "outputs": {
        "float64": Tolerance(rms=1e-12, max=1e-11),
        "float32": Tolerance(rms=3e-6, max=3e-5),
        "bfloat16": Tolerance(rms=3e-2, max=1e-1),
    },
    # float32: 7e-6 and 2e-5 were seen, both of gradients that are small differences of large sums:
    # sharpness sums over all tokens, and unit planes at sharpness 8 saturate the hash.
    # bfloat16: 5e-3 and 7e-2, the second where few tokens carry most of d_query.
    "gradients": {
        "float64": Tolerance(rms=1e-11, max=1e-10),
        "float32": Tolerance(rms=3e-5, max=1e-4),
        "bfloat16": Tolerance(rms=2e-2, max=3e-1),
    },
    # dg of the interpreted kernels where values and cotangents have a mean. 2.1e-3 was seen; when
    # rows and columns were rounded apart it was 8.3e-3, which must stay out.
    "means": {"bfloat16": Tolerance(rms=7e-3, max=1e-1)},
    # Folded against unfolded planes, outputs and gradients of the projections.
    # float32: 1.7e-6 was seen of the gradient of the keys' bias, a sum over all tokens, on Python
    # 3.11 without XLA's optimizer, 5e-7 with it, and 4e-7 and 3e-7 on 3.12. float64 gives 1e-15.
    # TF32 would add 5e-4, and one token left out of a thousand 1e-3.
    "folded": {
        "float64": Tolerance(rms=1e-12, max=1e-11),
        "float32": Tolerance(rms=6e-6, max=3e-5),
        "bfloat16": Tolerance(rms=2e-2, max=1e-1),
    },
    # Chunked, resumed or sharded against the whole.
    "resumed": {
        "float32": Tolerance(rms=2e-6, max=1e-5),
        "bfloat16": Tolerance(rms=2e-2, max=1e-1),
    },
    # Streamed training against the whole, loss and gradients.
    "streamed": {
        "float32": Tolerance(rms=1e-5, max=1e-4),
        "bfloat16": Tolerance(rms=2e-2, max=3e-1),
    },
    # NNX against Linen with shared parameters.
    "modules": {
        "float32": Tolerance(rms=3e-6, max=3e-5),
        "bfloat16": Tolerance(rms=2e-2, max=1e-1),
    },
    # log_decay of zeros against no gate.
    "gate": {
        "float32": Tolerance(rms=2e-6, max=1e-5),
        "bfloat16": Tolerance(rms=2e-2, max=1e-1),
    },
    # The integral over planes against its closed form for hard signs, in equal steps of the angle.
    # 1.9e-3 and 5e-3 were seen. The step is 2e-3 of the circle.
    "quadrature": {"float32": Tolerance(rms=7e-3, max=3e-2)},
    # An identity of the mathematics, both sides by one path. float32: 2e-5 was seen of
    # features at sharpness 8, where one of 1024 corners has nearly all and RMS is 1/32 of it.
    "identity": {
        "float64": Tolerance(rms=1e-12, max=1e-11),
        "float32": Tolerance(rms=3e-6, max=6e-5),
        "bfloat16": Tolerance(rms=2e-2, max=1e-1),
    },
}


def lookup_tolerance(kind: str, dtype: Any = "float32") -> Tolerance:
    """Returns the table's entry for a kind of comparison and a dtype."""
    name = np.dtype(dtype).name
    if name not in TOLERANCES.get(kind, {}):
        known = {k: sorted(v) for k, v in TOLERANCES.items()}
        raise KeyError(f"no tolerance for {kind=}, dtype={name!r}; the table has {known}")
    return TOLERANCES[kind][name]


def compare(name: str, got: Any, want: Any, *, kind: str, dtype: Any = "float32") -> None:
    """Asserts that two trees of arrays agree, and names the array that does not.

    Args:
        name: what the tree is; leaves are reported as ``name`` and their path.
        got: what the code gave.
        want: what it should be, in any dtype.
        kind: a row of TOLERANCES, or "rerun": bit for bit.
        dtype: the dtype that was computed in, a column of the table.
    """
    limits = None if kind == "rerun" else lookup_tolerance(kind, dtype)
    got_leaves, got_tree = jax.tree_util.tree_flatten_with_path(got)
    want_leaves, want_tree = jax.tree_util.tree_flatten_with_path(want)
    assert got_tree == want_tree, f"{name}: got the tree {got_tree}, want {want_tree}"
    problems = []
    for (path, g), (_, w) in zip(got_leaves, want_leaves, strict=True):
        what = f"{name}{jax.tree_util.keystr(path)}"
        comparison = {"kind": kind, "dtype": np.dtype(dtype).name, "what": what}
        problem = _difference(np.asarray(g), np.asarray(w), limits, comparison)
        if problem:
            problems.append(f"{what} ({kind}): {problem}")
    assert not problems, "\n".join(problems)


def _difference(
    got: np.ndarray, want: np.ndarray, limits: Tolerance | None, comparison: dict[str, str]
) -> str | None:
    """Returns what is wrong with `got`, in words, or None."""
    if got.shape != want.shape:
        return f"shape {got.shape}, want {want.shape}"
    if limits is None or want.dtype.kind in "biu":
        if got.dtype == want.dtype and got.tobytes() == want.tobytes():
            return None
        unequal = np.argwhere(got != want)
        first = f", first at {tuple(map(int, unequal[0]))}" if len(unequal) else ""
        return f"not the same bits ({got.dtype}, want {want.dtype}): {len(unequal)} differ{first}"
    got, want = got.astype(np.float64), want.astype(np.float64)
    if not np.isfinite(got).all():
        return f"{(~np.isfinite(got)).sum()} of {got.size} elements are not finite"
    if not got.size:
        return None
    error = np.abs(got - want)
    scale = max(float(np.sqrt(np.mean(np.square(want)))), LEAST_SCALE)
    seen = Tolerance(float(np.sqrt(np.mean(np.square(error)))), float(error.max()))
    _record(comparison | {"seen": seen, "bound": [limit * scale for limit in limits]})
    if seen.rms <= limits.rms * scale and seen.max <= limits.max * scale:
        return None
    worst = np.unravel_index(np.argmax(error), error.shape)
    return (
        f"in units of RMS(want), {scale:.3g}, the error has an RMS of {seen.rms / scale:.2e}, "
        f"where {limits.rms:.0e} is allowed, and a maximum of {seen.max / scale:.2e}, where "
        f"{limits.max:.0e} is allowed, at {tuple(map(int, worst))} of {error.shape}: "
        f"got {got[worst]:.9g}, want {want[worst]:.9g}"
    )


def _record(comparison: dict[str, Any]) -> None:
    """Adds a line for tests/margins.py to the file of `--margins`, where that was given."""
    if file := os.environ.get(MARGINS):
        line = {"test": os.environ.get("PYTEST_CURRENT_TEST", "")} | comparison
        with open(file, "a", encoding="utf-8") as stream:  # one write: lines of workers never mix
            stream.write(json.dumps(line) + "\n")


def run_fresh_python(script: str, *, devices: int = 1, timeout: float = 900) -> str:
    """Runs a script in a new Python with that number of CPU devices, and returns its output."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if devices > 1:
        settings |= quick.environment()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"the script failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def tolerance():
    """`tolerance(kind, dtype)`: the entry of the table, with fields rms and max."""
    return lookup_tolerance


@pytest.fixture(scope="session")
def assert_close():
    """`assert_close(name, got, want, kind=, dtype=)` for arrays and trees of arrays."""
    return compare


@pytest.fixture(scope="session")
def run_python():
    """`run_python(script, devices=N)`: what the script prints in a Python of its own."""
    return run_fresh_python


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of random numbers with the same seed in every test."""
    return np.random.default_rng(20251004)


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
    """The folder of real data sets. Tests that ask for it are marked `data`."""
    if reason := _why_no_data():
        pytest.skip(reason)
    return pathlib.Path(os.environ["RACE_JAX_DATA"]).resolve()


@functools.cache
def _why_no_gpu() -> str | None:
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"needs an NVIDIA GPU: {error}"
    return None


def _why_no_data() -> str | None:
    root = os.environ.get("RACE_JAX_DATA", "")
    if pathlib.Path(root).is_dir() and root:
        return None
    return f"needs real data sets: RACE_JAX_DATA={root!r} names no folder"


@pytest.fixture
def on_h200() -> Callable[[], contextlib.AbstractContextManager]:
    """A context in which JAX lowers for one NVIDIA H200, which need not be there."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), abstract_device=device, axis_types=(jax.sharding.AxisType.Auto,)
    )
    return lambda: jax.sharding.use_abstract_mesh(mesh)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--margins FILE`, for tests/margins.py."""
    parser.addoption(
        "--margins",
        type=os.path.abspath,
        help="append the error of every comparison and its bound to this file (JSON lines)",
    )


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks `once` what tests/newest.py does not name, and puts long tests first."""
    for item in items:
        if not newest.is_for(item) and not item.get_closest_marker("skipif"):
            item.add_marker(pytest.mark.once)
    items.sort(key=lambda item: item.get_closest_marker("first") is None)  # others keep their order


def pytest_collection_finish() -> None:
    """Lets the garbage collector pass over what was imported, and run less often.

    Tracing makes many objects that live shortly. A twentieth of the time went to looking for cycles
    among all the others.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips marked tests where what they need is missing, with the reason."""
    for marker, why_not in (("gpu", _why_no_gpu), ("data", _why_no_data)):
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    """Registers tests/quick.py, and allows a warning that every kernel of Pallas's Triton gives.

    A shell starts a job in the background, and `nohup` its command, with Ctrl-C ignored. The
    commands that are tested respect that, so it is undone here for the tests of Ctrl-C.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A fixture of this file would not reach the examples of docstrings, which lie elsewhere.
    config.pluginmanager.register(quick)
    if file := config.getoption("margins"):
        os.environ[MARGINS] = file
    config.addinivalue_line(
        "filterwarnings", "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
    )
    hypothesis.settings.register_profile(
        "race_jax",
        derandomize=True,
        deadline=None,
        max_examples=10,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate, hypothesis.Phase.shrink],
    )
    hypothesis.settings.load_profile("race_jax")
