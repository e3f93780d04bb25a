"""What every test shares: the one tolerance table, the comparison by name, markers, fresh Pythons.

Tests ask for `assert_close`, `tolerance`, `rng`, `run_python`, `on_h200`, `data_root` as fixtures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


class Tolerance(NamedTuple):
    """|got - want| <= atol + rtol |want| in every element, and RMS(got - want) <= rms RMS(want).

    With `scaled`, atol is in units of RMS(want) where this is above 1: gradients that sum over
    tokens, as those of planes and sharpness do, grow with the problem and round accordingly.
    """

    atol: float = np.inf
    rtol: float = 0.0
    rms: float = np.inf
    scaled: bool = False


# By kind of comparison and dtype. A looser entry needs a reason of its own, written beside it.
TOLERANCES = {
    # A path against the oracle, which is given the rounded inputs upcast; kernels against XLA.
    "outputs": {
        "float64": Tolerance(rms=1e-12),
        "float32": Tolerance(atol=1e-5, rtol=1e-5),
        "bfloat16": Tolerance(rms=1e-2),
    },
    "gradients": {
        "float64": Tolerance(rms=1e-11),
        "float32": Tolerance(atol=5e-5, scaled=True),
        "bfloat16": Tolerance(rms=2e-2),
    },
    # dg and dzk where values and cotangents have a mean: 2.1e-3 and 3.7e-3 where measured.
    "means": {"bfloat16": Tolerance(rms=6e-3)},
    # Folded against unfolded planes, outputs and gradients of the projection kernels.
    "folded": {
        "float32": Tolerance(atol=1e-5, rtol=1e-5),
        "bfloat16": Tolerance(rms=1e-2),
    },
    # Chunked, resumed or sharded against the whole.
    "resumed": {"float32": Tolerance(rms=2e-6), "bfloat16": Tolerance(rms=1e-2)},
    # Streamed training against the whole, loss and gradients.
    "streamed": {"float32": Tolerance(rms=1e-5), "bfloat16": Tolerance(rms=2e-2)},
    # NNX against Linen with shared parameters.
    "modules": {
        "float32": Tolerance(atol=1e-5, rtol=1e-5),
        "bfloat16": Tolerance(rms=1e-2),
    },
    # log_decay of zeros against no gate.
    "gate": {"float32": Tolerance(rms=2e-6), "bfloat16": Tolerance(rms=1e-2)},
    # An identity of the mathematics, both sides by one path.
    "identity": {
        "float64": Tolerance(rms=1e-12),
        "float32": Tolerance(atol=1e-5, rtol=1e-5),
        "bfloat16": Tolerance(rms=1e-2),
    },
}


def lookup_tolerance(kind: str, dtype: Any = "float32") -> Tolerance:
    """The table's entry for a kind of comparison and a dtype."""
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
        problem = _difference(np.asarray(g), np.asarray(w), limits)
        if problem:
            problems.append(f"{name}{jax.tree_util.keystr(path)} ({kind}): {problem}")
    assert not problems, "\n".join(problems)


def _difference(got: np.ndarray, want: np.ndarray, limits: Tolerance | None) -> str | None:
    """What is wrong with `got`, in words; None if nothing is."""
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
    error = np.abs(got - want)
    rms, scale = (np.sqrt(np.mean(np.square(x))) if x.size else 0.0 for x in (error, want))
    atol = limits.atol * max(scale, 1.0) if limits.scaled else limits.atol
    excess = error - (atol + limits.rtol * np.abs(want))
    if not (excess > 0).any() and (limits.rms == np.inf or rms <= limits.rms * scale):
        return None
    worst = np.unravel_index(np.argmax(excess if limits.atol < np.inf else error), error.shape)
    return (
        f"{(excess > 0).sum()} of {error.size} elements out of {limits}; relative RMS "
        f"{rms / max(scale, 1e-300):.2e}; worst at {tuple(map(int, worst))}: "
        f"got {got[worst]:.9g}, want {want[worst]:.9g}"
    )


def run_fresh_python(script: str, *, devices: int = 1, timeout: float = 900) -> str:
    """Runs a script in its own Python with that many CPU devices; returns what it printed."""
    settings = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
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
    """`tolerance(kind, dtype)`: the entry of the table, with fields atol, rtol, rms."""
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
    """Random numbers, the same ones for every test."""
    return np.random.default_rng(20251004)


@pytest.fixture(scope="session")
def data_root() -> pathlib.Path:
    """The folder of real data sets; tests that ask for it are marked `data`."""
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips marked tests where what they need is missing, with the reason."""
    for marker, why_not in (("gpu", _why_no_gpu), ("data", _why_no_data)):
        if item.get_closest_marker(marker) and (reason := why_not()):
            pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    """One warning is expected, by name: JAX says it of every kernel in Pallas's Triton form."""
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
