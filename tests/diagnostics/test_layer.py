"""What a layer computes attention from, and the report, for layers and for a whole model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import race_jax
from race_jax import diagnostics
from race_jax.models import ModelConfig, TransformerLM

pytestmark = pytest.mark.once

SIZES = {"num_heads": 4, "in_features": 16, "num_kv_heads": 2, "is_causal": True}
OPTIONS = [
    {"forget_gate": "data", "short_conv": "before", "fold_planes": True},
    {"short_conv": "qkv", "qkv_activation": "silu", "use_tanh": False},
    {"normalize_qk": True, "shared_sharpness": True, "learn_sharpness": False},
]


def shaken(layer):
    """The layer with every parameter moved, so that no part of it is the identity."""
    params = nnx.state(layer, nnx.Param)
    keys = jax.random.split(jax.random.key(5), len(jax.tree.leaves(params)))
    keys = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    moved = jax.tree.map(lambda x, key: x + 0.3 * jax.random.normal(key, x.shape), params, keys)
    nnx.update(layer, moved)
    return layer


@pytest.mark.parametrize("options", OPTIONS, ids=["before", "qkv", "norm"])
def test_the_heads_give_the_output_of_the_layer(options, assert_close):
    layer = shaken(race_jax.RACEAttention(**SIZES, **options, num_tables=3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 9, 16))
    heads = diagnostics.heads_of(layer, x)
    attend = functools.partial(
        race_jax.race_attention, use_tanh=layer.config.use_tanh, is_causal=True
    )
    attended = jax.jit(attend)(
        heads.query,
        heads.key,
        heads.value,
        heads.planes,
        sharpness=heads.sharpness,
        log_decay=heads.log_decay,
    )
    want = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert_close("output", layer.out(attended), want, kind="outputs")
    assert (heads.log_decay is None) == (options.get("forget_gate") is None)


def test_the_layers_of_a_model_get_the_inputs_of_a_forward_pass(assert_close):
    config = ModelConfig(num_layers=2, width=16, num_heads=2, positions="learned", max_length=8)
    model = TransformerLM(config, 11, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 11)
    seen = list(diagnostics.layers_of(model, tokens))
    assert [layer for layer, _ in seen] == [block.attention for block in model.trunk.blocks]
    last = model.trunk.blocks[1]
    positions = jnp.broadcast_to(jnp.arange(7), (2, 7))
    x = model.trunk.embedding(tokens, positions)
    x, _ = model.trunk.blocks[0](x, positions, None, None, None, None)
    assert_close("input", seen[1][1], last.attention_norm(x), kind="outputs")
    x += last.attention(seen[1][1], is_causal=True)
    x = model.trunk.norm(x + last.mlp(last.mlp_norm(x)))
    assert_close("hidden", x, model.hidden(tokens), kind="outputs")


def test_the_report_of_a_layer():
    layer = race_jax.RACEAttention(
        **SIZES, forget_gate="data", num_tables=4, num_planes=2, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (1, 12, 16))
    found = diagnostics.report(layer, x, jax.random.key(2))
    assert (found.num_tables, found.num_planes) == (4, 2)
    assert found.errors.tables.tolist() == [1, 2, 4, 8]
    # The layer's own planes are one more draw of L tables.
    at_four = dict(zip(found.errors.tables, found.errors.mean, strict=True))[4]
    assert 0.3 * at_four < found.error < 3 * at_four
    heads = diagnostics.heads_of(layer, x)
    kernels = (
        diagnostics.hash_kernel(heads.query, heads.key, heads.planes, heads.sharpness),
        diagnostics.soft_kernel(
            heads.query, heads.key, num_planes=2, sharpness=heads.sharpness, scale=0.5
        ),
    )
    weights = [diagnostics.attention_weights(kernel, is_causal=True) for kernel in kernels]
    assert found.error == pytest.approx(float(diagnostics.distance(*weights)))
    assert found.key_buckets.share.shape == found.query_buckets.share.shape == (4, 4)
    assert found.context.shape == (1, 12, 2)
    text = found.text()
    for words in (
        "L = 4, P = 2",
        "of the attention on wrong keys",
        "of 2 bits",
        "gate       keeps",
    ):
        assert words in text
    plain = race_jax.RACEAttention(**SIZES, num_tables=4, num_planes=2, rngs=nnx.Rngs(0))
    assert "gate" not in diagnostics.report(plain, x, jax.random.key(2)).text()


def test_a_layer_with_a_gate_is_compared_with_earlier_tokens():
    layer = race_jax.RACEAttention(
        **SIZES | {"is_causal": False},
        forget_gate="data",
        num_tables=4,
        num_planes=2,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(1), (1, 12, 16))
    assert diagnostics.report(layer, x, jax.random.key(2)).is_causal


def test_what_cannot_be_reported_is_refused_in_words():
    layer = race_jax.RACEAttention(**SIZES, num_tables=4, num_planes=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"of at most 1,024, and x has 1,025; pass a part"):
        diagnostics.report(layer, jnp.zeros((1, 1025, 16)), jax.random.key(2))
    with pytest.raises(TypeError, match=r"got a RACEAttention; for a layer of your own"):
        next(diagnostics.layers_of(layer, jnp.zeros((1, 3), int)))


def test_the_report_of_a_call_in_the_other_direction():
    x = jax.random.normal(jax.random.key(1), (1, 12, 16))
    own, other = (
        race_jax.RACEAttention(
            **SIZES | {"is_causal": is_causal}, num_tables=4, num_planes=2, rngs=nnx.Rngs(0)
        )
        for is_causal in (True, False)
    )
    want = diagnostics.report(own, x, jax.random.key(2))
    got = diagnostics.report(other, x, jax.random.key(2), is_causal=True)
    assert got.error == want.error
    assert "the earlier ones" in got.text()
    assert got.error != diagnostics.report(other, x, jax.random.key(2)).error


def test_another_layer_is_refused():
    with pytest.raises(TypeError, match=r"must be a race_jax\.RACEAttention, got a Linear"):
        diagnostics.heads_of(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 3, 2)))


def test_the_exact_kernel_without_tanh_is_its_mean_over_many_planes():
    query, key = (jax.random.normal(k, (1, 4, 1, 8)) for k in jax.random.split(jax.random.key(0)))
    planes = race_jax.init_planes(
        jax.random.key(1), num_tables=20_000, num_planes=1, head_dim=8, scale=8**-0.5
    )
    got = diagnostics.soft_kernel(
        query, key, num_planes=1, sharpness=2.0, scale=8**-0.5, use_tanh=False
    )
    mean = diagnostics.hash_kernel(query, key, planes, 2.0, use_tanh=False)
    # A table's value lies between 0 and 1, so that the mean of 20,000 is known to 1/283 at most.
    assert np.abs(np.asarray(got - mean)).max() < 4 * 0.5 / 20_000**0.5
