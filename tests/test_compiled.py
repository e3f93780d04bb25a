"""Compiled programs do not grow with the length, and their memory grows no faster than the inputs.

Programs are only lowered or compiled from shapes. Nothing is run at the lengths named here. What is
called outside ``jax.jit`` is compiled once.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import race_jax
from race_jax.layers import registry
from race_jax.models import ModelConfig

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64


def shapes(length):
    """Returns arguments of this length, and the bytes of the arrays that have a token axis."""
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    tokens = (
        float32((1, length, HEADS, HEAD_DIM)),
        float32((1, length, KV_HEADS, HEAD_DIM)),
        float32((1, length, KV_HEADS, HEAD_DIM)),
    )
    masks = {
        "key_value_mask": jax.ShapeDtypeStruct((1, length), jnp.bool_),
        "segment_ids": jax.ShapeDtypeStruct((1, length), jnp.int32),
    }
    return (*tokens, float32((3, 3, HEAD_DIM))), masks, sum(4 * x.size for x in tokens)


def forward(is_causal):
    return functools.partial(race_jax.race_attention, is_causal=is_causal, implementation="xla")


def forward_and_backward(is_causal):
    def total(arrays, masks):
        return jnp.sum(forward(is_causal)(*arrays, **masks) ** 2)

    return lambda *arrays, **masks: jax.grad(total)(arrays, masks)


PASSES = pytest.mark.parametrize(
    "passes", [pytest.param(forward, marks=pytest.mark.once), forward_and_backward]
)
CAUSALITY = pytest.mark.parametrize("is_causal", [True, False])


@pytest.mark.once
@CAUSALITY
def test_program_text_grows_with_the_log_of_the_length_only(is_causal):
    def lines(length):
        arrays, masks, _ = shapes(length)
        lowered = jax.jit(forward_and_backward(is_causal)).lower(*arrays, **masks)
        return len(lowered.as_text().splitlines())

    short, middle, long = lines(2**12), lines(2**16), lines(2**20)
    # Sixteen times the length is at most four more levels of a scan over blocks' sums, each of
    # them a few dozen operations, whatever the length was.
    assert middle - short <= 4 * 100
    assert long - middle <= 4 * 100


@PASSES
@CAUSALITY
def test_memory_grows_no_faster_than_the_inputs(passes, is_causal):
    def temporary_bytes(length):
        arrays, masks, _ = shapes(length)
        compiled = jax.jit(passes(is_causal)).lower(*arrays, **masks).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = 2**14, 2**16
    of_short, of_long = temporary_bytes(short), temporary_bytes(long)
    inputs, all_pairs = shapes(long)[2], 4 * long**2
    assert of_long <= 1.05 * (long / short) * of_short
    assert of_long < all_pairs / 50
    # Bidirectional calls with packed segments take a second pass, backward in time.
    assert of_long < (2 if is_causal else 5) * inputs


@CAUSALITY
def test_gradients_of_a_batch_do_not_end_the_process(is_causal, run_python):
    """jaxlib 0.10.2 crashed in a fusion of an earlier form of this gradient."""
    printed = run_python(
        f"""
        import jax, jax.numpy as jnp, race_jax
        x = jax.random.normal(jax.random.key(0), (4, 64, 2, 16))
        planes = jax.random.normal(jax.random.key(1), (4, 4, 16)) / 4
        total = lambda q, k, v, w, b: race_jax.race_attention(
            q, k, v, w, sharpness=b, is_causal={is_causal}).sum()
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3, 4)))(x, x, x, planes, jnp.ones(2))
        print(all(bool(jnp.isfinite(g).all()) for g in gradients))
        """
    )
    assert printed.strip() == "True"


def test_gradients_of_the_delta_rule_do_not_end_the_process(run_python):
    """jaxlib 0.10.2 crashed in the gradient of an earlier form of soft_hash."""
    printed = run_python(
        """
        import jax, jax.numpy as jnp
        from flax import nnx
        from race_jax.layers.race_delta import RACEDeltaAttention, RACEDeltaConfig
        sizes = dict(num_heads=2, num_kv_heads=2, head_dim=64, in_features=128)
        layer = RACEDeltaAttention(RACEDeltaConfig(**sizes), rngs=nnx.Rngs(0))
        graph, variables = nnx.split(layer)
        total = lambda v, x: (nnx.merge(graph, v)(x, is_causal=True) ** 2).sum()
        x = jax.random.normal(jax.random.key(0), (2, 64, 128))
        gradients = jax.jit(jax.grad(total, argnums=(0, 1)))(variables, x)
        print(all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients)))
        """
    )
    assert printed.strip() == "True"


def compilations(run, caplog):
    """The programs that a second call compiles."""
    jax.block_until_ready(run())
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        caplog.clear()
        jax.block_until_ready(run())
        return [text for text in caplog.messages if text.startswith("Compiling")]


@pytest.mark.parametrize("name", registry.ATTENTIONS)
def test_a_second_call_outside_jit_compiles_nothing(name, caplog):
    is_causal = name != "linformer"
    config = ModelConfig(num_layers=1, width=8, num_heads=2, attention=name)
    layer = registry.find(name).from_config(
        config.attention_config(), is_causal=is_causal, rngs=nnx.Rngs(0)
    )
    x, positions = jnp.ones((1, 5, 8)), jnp.arange(5)[None]

    def forward(layer=layer):
        return layer(x, positions=positions, is_causal=is_causal)

    def total(layer):
        return jnp.sum(forward(layer))

    for run in (forward, lambda: nnx.grad(total)(layer)):
        assert not compilations(run, caplog)
    assert len(compilations(lambda: jax.jit(lambda x: x + 1)(x), caplog)) == 1  # the log is read
