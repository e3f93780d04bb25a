"""Programs are compiled with XLA's options for their devices, and together."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.train import programs
from race_jax.train.mesh import make_mesh
from tests.train.small import small_config


@pytest.mark.parametrize(("platform", "version", "has"), [
    ("cpu", "", False), ("gpu", "PJRT C API\ncuda 13000", True), ("gpu", "rocm 60300", False),
    ("tpu", "libtpu", False),
])  # fmt: skip
def test_only_cuda_has_options(platform, version, has):
    device = SimpleNamespace(platform=platform, client=SimpleNamespace(platform_version=version))
    found = programs.compiler_options(SimpleNamespace(devices=np.array([device])))
    assert found == (programs.GPU_OPTIONS if has else None)


def test_xla_knows_the_options():
    """An option that XLA does not know is an error on every platform."""
    lowered = jax.jit(jnp.sin).lower(1.0)
    assert lowered.compile(compiler_options=programs.GPU_OPTIONS)(0.0) == 0
    with pytest.raises(Exception, match="xla_gpu_enable_nothing"):
        lowered.compile(compiler_options={"xla_gpu_enable_nothing": True})


def test_programs_come_in_the_order_of_their_sources():
    mesh = make_mesh(small_config())
    lowered = [jax.jit(lambda x, i=i: x + i).lower(1.0) for i in range(4)]
    compiled = programs.compile_together(lowered, mesh)
    assert [float(run(1.0)) for run in compiled] == [1, 2, 3, 4]


def test_each_length_is_compiled_once(monkeypatch):
    mesh = make_mesh(small_config())
    made = []
    together = programs.compile_together
    monkeypatch.setattr(
        programs, "compile_together", lambda *given: made.append(1) or together(*given)
    )
    program = programs.PerLength(mesh, lambda a, b, c, d, segment: segment.sum())
    lengths = 3, 5, 3
    sums = [int(program(0, 0, 0, 0, jnp.ones((2, length), int))) for length in lengths]
    assert sums == [6, 10, 6]
    assert len(made) == 2


def test_nothing_is_moved_while_a_program_runs_for_the_first_time():
    first, events = programs.FirstRuns(), []
    started = threading.Event()

    def move():
        started.set()
        first.move(lambda: events.append("moved"))

    def call():
        thread.start()
        assert started.wait(10)
        thread.join(0.2)
        events.append("ran")
        return 1

    thread = threading.Thread(target=move)
    assert first.run("program", call) == 1
    thread.join(10)
    assert events == ["ran", "moved"]
    assert first.run("program", lambda: first.move(lambda: 2)) == 2  # a later run holds nothing
    with pytest.raises(FloatingPointError):
        first.run("other", lambda: (_ for _ in ()).throw(FloatingPointError))
    assert first.run("third", lambda: 3) == 3  # a failure frees the devices
