"""`ModelConfig` refuses bad values by an error that names the field."""

import dataclasses

import pytest

from race_jax.layers import registry
from race_jax.models import ModelConfig


def test_the_defaults_are_valid():
    config = ModelConfig()
    assert config.validate() is config
    assert (config.kv_heads, config.head_size) == (4, 64)
    race = config.attention_config()
    assert (race.num_tables, race.num_planes, race.forget_gate, race.head_dim) == (
        16,
        2,
        "data",
        64,
    )


def test_a_hybrid_has_its_second_attention_in_every_so_many_blocks():
    config = ModelConfig(
        num_layers=6, hybrid="softmax", hybrid_every=3, positions="alibi"
    ).validate()
    names = [config.attention_of(block) for block in range(6)]
    assert names == ["race", "race", "softmax"] * 2
    assert config.attentions == ("race", "softmax")
    assert config.attention_config("softmax").positions == "alibi"
    assert ModelConfig().attentions == ("race",)
    few = ModelConfig(num_layers=3, hybrid="linear", hybrid_every=8).validate()
    assert [few.attention_of(block) for block in range(3)] == ["race", "race", "linear"]


def test_the_word_none_turns_the_gate_off():
    assert ModelConfig(race={"forget_gate": "none"}).attention_config().forget_gate is None


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
        {"attention": "quadratic"},
        {"positions": "sinusoidal"},
        {"positions": "rope"},
        {"positions": "alibi"},
        {"max_length": 0},
        {"dtype": "float16"},
    ],
    ids=str,
)
def test_a_bad_field_is_named_with_its_value(changes):
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        ModelConfig(**changes).validate()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"race": {"num_tables": 0}}, "num_tables must be an integer and at least 1, got 0"),
        ({"race": {"num_planes": 11}}, "num_planes must be at most 10, got 11"),
        ({"race": {"sharpness": float("inf")}}, "sharpness must be > 0 and finite, got inf"),
        ({"race": {"forget_gate": "sometimes"}}, "forget_gate must be one of .* got 'sometimes'"),
        ({"race": {"half_life": 64.0, "forget_gate": None}}, "half_life=64.0 has no effect"),
        ({"race": {"forget_gate": "fixed"}}, "needs half_life, .* half_life=1024"),
        ({"implementation": "cudnn"}, "implementation must be one of None, 'xla', 'pallas'"),
        ({"positions": "rope"}, "positions='rope' does not go with attention='race', which takes"),
        ({"hybrid": "window"}, "hybrid='window' is unknown; choose one of"),
        ({"hybrid": "race"}, "hybrid='race' is the attention of all other blocks as well"),
        ({"hybrid": "softmax", "hybrid_every": 1}, "at least 2, so .* got hybrid_every=1"),
        ({"hybrid": "softmax", "num_layers": 1}, "at least 2, so .* num_layers=1"),
        ({"hybrid": "linear", "positions": "rope"}, "with attention='race' and 'linear', which"),
        ({"attention": "linear", "positions": "alibi"}, "go with attention='linear'"),
        ({"attention": "linear", "linear": {"forget_gate": "fixed"}}, "needs half_life"),
        ({"attention": "linear", "implementation": "pallas"}, "linear attention takes one of"),
        ({"attention": "softmax", "implementation": "pallas"}, "implementation='pallas'"),
        ({"attention": "softmax", "positions": "rope", "head_dim": 3}, "even head_dim; got 3"),
        (
            {"attention": "softmax", "positions": "rope", "rope_base": 1.0},
            "rope_base=1.0 must be a n",
        ),
        ({"rope_base": 1e6}, "rope_base=1000000.0 has no effect with positions='none'; leave it"),
    ],
    ids=str,
)
def test_an_attention_checks_its_own_options(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**changes).validate()


def test_the_options_of_other_attentions_do_not_count():
    other = {"race": {"num_planes": 11}}
    ModelConfig(attention="softmax", implementation="cudnn", **other).validate()
    ModelConfig(race={"forget_gate": "fixed", "half_life": 64.0}).validate()


@pytest.mark.parametrize("name", registry.ATTENTIONS)
def test_every_option_is_documented(name):
    for field in dataclasses.fields(registry.options_class(name)):
        assert f"    {field.name}: " in registry.options_class(name).__doc__


def test_every_field_is_documented():
    for field in dataclasses.fields(ModelConfig):
        if field.name not in registry.ATTENTIONS:
            assert f"        {field.name}: " in ModelConfig.__doc__


def test_an_attention_that_is_added_too_late_is_named(monkeypatch):
    monkeypatch.setitem(registry.ATTENTIONS, "mine", "mine.Attention")
    with pytest.raises(
        ValueError, match=r"'mine' has been added .* too late: .* before that import"
    ):
        ModelConfig()
