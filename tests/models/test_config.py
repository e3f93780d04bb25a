"""ModelConfig: what it refuses, and that it names the field."""

import dataclasses

import pytest

from race_jax.models import ModelConfig


def test_the_defaults_are_valid():
    config = ModelConfig()
    assert config.validate() is config
    assert (config.kv_heads, config.head_size, config.gate) == (4, 64, "data")


def test_the_word_none_turns_the_gate_off():
    assert ModelConfig(forget_gate="none").validate().gate is None


@pytest.mark.parametrize(
    "changes",
    [
        {"num_layers": 0},
        {"width": 2.5},
        {"num_heads": True},
        {"num_heads": 3},
        {"num_kv_heads": 3},
        {"head_dim": -1},
        {"mlp_ratio": 0},
        {"dropout_rate": 1.0},
        {"dropout_rate": float("nan")},
        {"attention": "linear"},
        {"positions": "sinusoidal"},
        {"positions": "rope"},
        {"positions": "alibi"},
        {"max_length": 0},
        {"num_tables": 0},
        {"num_planes": 11},
        {"planes_scale": 0.0},
        {"sharpness": -1.0},
        {"sharpness": float("inf")},
        {"forget_gate": "sometimes"},
        {"half_life": 1.0},
        {"half_life": 64.0, "forget_gate": None},
        {"normalization": "layer"},
        {"dtype": "float16"},
        {"implementation": "cudnn"},
    ],
    ids=str,
)
def test_a_bad_field_is_named_with_its_value(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ModelConfig(**changes).validate()


def test_softmax_does_not_look_at_the_fields_of_race():
    ModelConfig(attention="softmax", implementation="cudnn", num_planes=11).validate()
    with pytest.raises(ValueError, match="implementation='pallas'"):
        ModelConfig(attention="softmax", implementation="pallas").validate()


def test_a_fixed_gate_asks_for_its_half_life():
    with pytest.raises(ValueError, match=r"half_life=None: .* such as 1024"):
        ModelConfig(forget_gate="fixed").validate()
    ModelConfig(forget_gate="fixed", half_life=64.0).validate()


def test_rotary_positions_need_an_even_head():
    with pytest.raises(ValueError, match="even head_dim; got 3"):
        ModelConfig(attention="softmax", positions="rope", head_dim=3).validate()


def test_every_field_is_documented():
    for field in dataclasses.fields(ModelConfig):
        assert f"        {field.name}: " in ModelConfig.__doc__
