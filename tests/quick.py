"""XLA without its optimizer, where compilation would take most of a test's time.

Only the places that are named here are compiled quickly: the oracles, and what is built from the
operation and its layers, such as models, runs, and programs on several devices. So are other
attentions than RACE, benchmarks, and the kernels, whose programs for the CPU are those of Pallas's
interpreter. So are the parts that the operation is made of, masks, states cut anywhere, the forms
of the layer and its projections, `jax.export`, the examples of docstrings and pages, and the
commands of the pages.

Everything else is compiled as a user's programs are, so that the optimizer is part of what is
tested: the operation with every option against its definition, causality, the layer, transforms,
memory and extremes. Models and runs are too in tests/integration, in `make train`, and in
`examples`. So is all on a GPU.
"""

import contextlib
import functools
import os
import pathlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import pytest

from tests.newest import TESTS

# The files and folders of which all programs are compiled quickly.
PLACES = (
    *("../race_jax", "../pallas_kernels"),
    *("devices", "diagnostics", "kernels", "models", "sparse", "streaming", "tasks", "train"),
    *("test_attention_fn.py", "test_attentions.py", "test_baselines.py", "test_bench.py"),
    *("test_bench_decode.py", "test_bench_scaling.py", "test_bench_sharding.py", "test_docs.py"),
    *("test_hashing.py", "test_layer_transforms.py", "test_leak.py", "test_linen.py"),
    *("test_masking.py", "test_matrix_state.py", "test_nnx.py", "test_passes.py"),
    *("test_processes.py", "test_projections.py", "test_race_delta.py", "test_reference.py"),
    *("test_reproduce.py", "test_sliding_window.py", "test_state.py", "test_strictness.py"),
    "test_study_decoding.py",
)
# The options of such a program. jaxlib before 0.11 can also leave out what takes half of the time,
# and needs less of it where a program is not cut into parts.
OPTIONS: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    OPTIONS |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
# The same for all programs of a new process, as the variable XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


@contextlib.contextmanager
def everywhere() -> Iterator[None]:
    """Compiles every program quickly, here and in new processes."""
    with _options_by_default(), mock.patch.dict(os.environ, environment()):
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


def _options_by_default() -> contextlib.AbstractContextManager:
    """Adds OPTIONS to those of every program, where JAX's own setting is only a part of them."""
    if jax.__version_info__ >= (0, 11):
        return contextlib.nullcontext()
    from jax._src import compiler

    get_compile_options = compiler.get_compile_options

    def quickly(*args: Any, env_options_overrides: dict | None = None, **options: Any) -> Any:
        return get_compile_options(
            *args, env_options_overrides=OPTIONS | (env_options_overrides or {}), **options
        )

    return mock.patch.object(compiler, "get_compile_options", quickly)


def environment() -> dict[str, str]:
    """Returns XLA_FLAGS for a new process, with those of this one."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()}


def is_for(path: pathlib.Path) -> bool:
    """Returns whether the tests of a file are compiled quickly."""
    named = any(path.is_relative_to((TESTS / place).resolve()) for place in PLACES)
    return named and jax.default_backend() == "cpu"


@pytest.fixture(scope="module", autouse=True)
def compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compiles the programs of a file quickly, if it lies in one of PLACES."""
    with everywhere() if is_for(request.path) else contextlib.nullcontext():
        yield
