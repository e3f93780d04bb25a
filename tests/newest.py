"""What is run with the newest JAX too: all that depends on its version, by one example each.

.ci/run has the newest JAX run the kernels, which need jax 0.11, the operation and its transforms,
devices, and examples of the layer, of models, and of a training run. All other tests are marked
`once`: messages, settings, files, data, reports, pages and commands, other attentions, and masks
and states, which the tests of the operation have too. A test that some version skips runs with
both, wherever it lies.
"""

import pathlib
from collections.abc import Collection, Iterable

import pytest

TESTS = pathlib.Path(__file__).parent
PLACES = (
    *("kernels", "test_devices.py", "test_attention.py", "test_transforms.py"),
    "devices/test_sequence.py::test_outputs_and_gradients_match_the_oracle",
    "devices/test_decoding.py::test_an_explicit_mesh_and_shard_map_give_what_one_device_gives",
    "devices/test_models.py::test_loss_and_gradients_are_those_of_one_device",
    "test_causality.py::test_derivative_with_respect_to_the_future_is_exactly_zero",
    "test_layer.py::test_layer_is_its_definition",
    "test_layer_transforms.py::test_export_for_any_batch_and_length",
    "test_layer_transforms.py::test_vmap_over_layers_and_inputs_equals_a_loop",
    "test_attention_fn.py::test_decoding_with_the_cache_of_linen_attention",
    "test_linen.py::test_parameters_go_both_ways_with_equal_outputs_and_gradients",
    "test_nnx.py::test_prefill_and_decoding_are_one_call",
    "models/test_transformer.py::test_a_sequence_may_be_split_anywhere",
    "tasks/test_copy.py::test_copying_learns_and_resumes_to_the_bit",
)


def is_for(item: pytest.Item) -> bool:
    """Returns whether a test is run with the newest JAX."""
    name = item.name.split("[")[0]
    places = ((TESTS / path, test) for path, _, test in (place.partition("::") for place in PLACES))
    return any(item.path.is_relative_to(path) and test in ("", name) for path, test in places)


def examples(names: Iterable[str], chosen: Collection[str]) -> list:
    """The names as parameters of a test, of which the newest JAX runs the chosen ones."""
    return [
        name if name in chosen else pytest.param(name, marks=pytest.mark.once) for name in names
    ]
