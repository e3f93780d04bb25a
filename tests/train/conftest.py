"""Compilation takes most of the time of these tests, so it is made quick, and its results are kept.

The programs of `tests/integration` are compiled as a user's are.
"""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory):
    """A folder for JAX's compilation cache, which is used in this run of the tests only."""
    folder = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes. All runs that are compared are compiled alike."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
