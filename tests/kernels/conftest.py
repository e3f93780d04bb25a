"""Skips the tests of kernels where JAX is too old for kernels."""

import pathlib

import pytest

from pallas_kernels import backend

FOLDER = pathlib.Path(__file__).parent
# Arithmetic, and what is said where kernels cannot run.
ON_EVERY_VERSION = ("test_blocks.py", "test_supports.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder."""
    if backend.has_warpgroups():
        return
    for item in items:
        if item.path.parent == FOLDER and item.path.name not in ON_EVERY_VERSION:
            item.add_marker(pytest.mark.skip(reason="the kernels need jax >= 0.11"))
