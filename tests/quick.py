"""XLA without its optimizer, where compilation would take most of a test's time.

The operation, its layer, the examples of the documentation and the runs of tests/integration are
compiled as a user's programs are, so that the optimizer is part of what is tested. Their oracles
are not, nor what is built from them: models, other runs, and programs on several devices.
"""

import functools
import os
import pathlib

import jax

# The files and folders of `tests` that are compiled as a user's programs are. In the others,
# `jax_disable_most_optimizations` is on.
AS_USERS = (
    *("integration", "kernels", "test_docs.py", "test_examples.py"),
    *("test_attention.py", "test_causality.py", "test_compiled.py", "test_extremes.py"),
    *("test_hashing.py", "test_layer.py", "test_leak.py", "test_properties.py", "test_state.py"),
    *("test_baselines.py", "test_bench.py", "test_short_conv.py"),
)
# The same for one program. jaxlib before 0.11 can also leave out what takes half of the time then.
OPTIONS: dict[str, bool | int] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    OPTIONS["xla_cpu_use_fusion_emitters"] = False
# The same for all programs of a new process, as the variable XLA_FLAGS.
FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())

jit = functools.partial(jax.jit, compiler_options=OPTIONS)


def environment() -> dict[str, str]:
    """Returns XLA_FLAGS for a new process, with those of this one."""
    return {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()}


def is_for(path: pathlib.Path) -> bool:
    """Returns whether the tests of a file are compiled quickly."""
    tests = pathlib.Path(__file__).parent
    return path.is_relative_to(tests) and path.relative_to(tests).parts[0] not in AS_USERS
