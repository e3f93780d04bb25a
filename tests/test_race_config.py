"""The settings of the layer have the right defaults and initial values. Bad ones are refused."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import linen
from race_jax.layers.race import RACEAttention
from race_jax.layers.race_config import RACEConfig

WIDTH = 8


def test_sizes_are_filled_in_as_flax_fills_them():
    s = RACEConfig(num_heads=2, in_features=WIDTH)
    assert (s.num_kv_heads, s.in_kv_features, s.out_features) == (2, WIDTH, WIDTH)
    assert (s.qkv_features, s.head_dim, s.value_dim, s.planes_scale) == (WIDTH, 4, 4, 0.5)
    s = RACEConfig(num_heads=3, in_features=WIDTH, head_dim=16, num_planes=3)
    assert (s.qkv_features, s.value_dim, s.planes_scale, s.features) == (48, 16, 0.25, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide in_features=8.*or give head_dim"),
        ({"num_heads": 3, "qkv_features": 16}, "num_heads=3 does not divide qkv_features=16"),
        ({"qkv_features": 8, "head_dim": 3}, "leave one of the two out"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4 must be divisible by num_kv_heads=3"),
        ({"num_tables": 0}, "num_tables must be an integer and at least 1, got 0"),
        ({"num_planes": 11}, "num_planes must be at most 10, got 11"),
        ({"forget_gate": "dta"}, "forget_gate must be one of None, 'fixed', 'learned', 'data'"),
        ({"forget_gate": "fixed"}, "needs half_life"),
        ({"half_life": 64.0}, "no effect without a forget_gate"),
        ({"forget_gate": "data", "half_life": 1.0}, "at least 2.0 tokens, got 1.0"),
        ({"short_conv": "after"}, "short_conv must be one of None, 'before', 'qkv'; got 'after'"),
        ({"short_conv": True}, "got True; write 'before'"),
        ({"output_gate": True}, "one of None, 'silu', 'sigmoid'; got True; write 'silu'"),
        ({"output_norm": "layer"}, "output_norm must be one of None, 'rms'; got 'layer'"),
        ({"qkv_activation": "relu"}, "qkv_activation must be one of None, 'silu'"),
        ({"implementation": "cuda"}, "implementation must be one of None, 'xla', 'pallas'"),
        ({"normalization": "none"}, 'normalization must be "global" or "bucket"'),
        ({"sharpness": 0.0}, "sharpness must be > 0 and finite, got 0.0"),
        ({"planes_scale": -1.0}, "planes_scale must be > 0 and finite, got -1.0"),
        ({"dropout_rate": 1.0}, r"dropout_rate must lie in \[0, 1\), got 1.0"),
        ({"fold_planes": True, "normalize_qk": True}, "turn one of the two off"),
    ],
)
def test_bad_settings_are_refused_in_words(options, message):
    with pytest.raises(ValueError, match=message):
        RACEConfig(**{"num_heads": 2, "in_features": WIDTH, **options})


def test_sharpness_starts_where_it_is_said_to():
    for shared, shape in ((False, (2,)), (True, ())):
        s = RACEConfig(num_heads=2, in_features=WIDTH, sharpness=3.0, shared_sharpness=shared)
        start = s.own_parameters()["log_sharpness"](jax.random.key(0))
        np.testing.assert_allclose(np.exp(start), np.full(shape, 3.0), rtol=1e-6)


def test_flax_decode_is_refused_with_the_way_out():
    with pytest.raises(NotImplementedError, match=r"pass state=module\.init_state"):
        RACEConfig(num_heads=2, in_features=WIDTH, decode=True)


@pytest.mark.parametrize("layer", [RACEAttention, linen.RACEAttention])
def test_the_arguments_of_both_layers_are_the_fields_of_the_record(layer):
    record = inspect.signature(RACEConfig).parameters
    arguments = inspect.signature(layer.__init__).parameters
    taken_from_inputs = {"in_features", "in_kv_features"} - set(arguments)
    assert set(record) - set(arguments) == taken_from_inputs
    assert not taken_from_inputs or layer is linen.RACEAttention
    for name in set(record) & set(arguments):
        assert arguments[name].default == record[name].default, name


def test_the_record_is_json_and_back():
    config = RACEConfig(num_heads=2, in_features=WIDTH, dtype=jnp.bfloat16)
    values = json.loads(json.dumps(config.to_dict()))
    assert values["dtype"] == "bfloat16"
    assert RACEConfig(**values).to_dict() == config.to_dict()
