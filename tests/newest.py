"""What is run with the newest JAX too: all that depends on its version, by one example each.

.ci/run has the newest JAX run the operation and its transforms, layers, models, kernels, devices,
and a training run. The tests of other places are marked `once`: messages, settings, files, data,
reports, pages and commands, and masks and states, which the tests of the operation have too. So are
the tests in PLACES that another one resembles. A test that some version skips runs with both,
wherever it lies.
"""

import pathlib
from collections.abc import Collection, Iterable

import pytest

TESTS = pathlib.Path(__file__).parent
PLACES = (
    *("devices", "kernels", "models", "test_devices.py"),
    *("test_attention.py", "test_attention_fn.py", "test_attentions.py", "test_causality.py"),
    *("test_compiled.py", "test_layer.py", "test_layer_transforms.py", "test_linen.py"),
    *("test_nnx.py", "test_projections.py", "test_transforms.py", "tasks/test_copy.py"),
)


def is_for(path: pathlib.Path) -> bool:
    """Returns whether the tests of a file are run with the newest JAX."""
    return any(path.is_relative_to(TESTS / place) for place in PLACES)


def examples(names: Iterable[str], chosen: Collection[str]) -> list:
    """The names as parameters of a test, of which the newest JAX runs the chosen ones."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.once) for name in names
    ]
