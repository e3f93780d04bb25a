"""What is run with the newest JAX too: all that depends on its version, by one example each.

.ci/run has the newest JAX run the operation and its transforms, layers, models, kernels, devices,
and a training run. The tests of other places are marked `once`: messages, settings, files, data,
reports, pages and commands. So are the tests in PLACES that another one resembles.
"""

import pathlib

TESTS = pathlib.Path(__file__).parent
PLACES = (
    *("devices", "kernels", "models", "test_devices.py"),
    *("test_attention.py", "test_attention_fn.py", "test_attentions.py", "test_causality.py"),
    *("test_compiled.py", "test_extremes.py", "test_hashing.py", "test_layer.py"),
    *("test_layer_transforms.py", "test_linear_attention.py", "test_linen.py", "test_masking.py"),
    *("test_matrix_state.py", "test_nnx.py", "test_passes.py", "test_projections.py"),
    *("test_properties.py", "test_scan.py", "test_short_conv.py", "test_sliding_window.py"),
    *("test_state.py", "test_transforms.py"),
    *("sparse/test_sparse.py", "streaming/test_exact.py", "tasks/test_copy.py"),
)


def is_for(path: pathlib.Path) -> bool:
    """Returns whether the tests of a file are run with the newest JAX."""
    return any(path.is_relative_to(TESTS / place) for place in PLACES)
