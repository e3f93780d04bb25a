"""`attention_fn` works inside Flax's own attention modules, and refuses what RACE cannot do."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from race_jax import attention_fn, init_planes
from race_jax.core import reference

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 6, 16, 4, 4
PLANES = init_planes(jax.random.key(0), num_tables=2, num_planes=2, head_dim=HEAD_DIM)
X = jax.random.normal(jax.random.key(1), (BATCH, LENGTH, WIDTH))
MASK = jnp.arange(LENGTH) < jnp.array([[LENGTH], [4]])
attend = attention_fn(PLANES, sharpness=2.0)


def oracle(query, key, value, **options):
    return reference.all_pairs(query, key, value, PLANES, sharpness=2.0, **options)


def heads(*shape, seed=2):
    return jax.random.normal(jax.random.key(seed), shape)


def nnx_layer(function, **options):
    return nnx.MultiHeadAttention(
        HEADS, WIDTH, attention_fn=function, decode=False, rngs=nnx.Rngs(0), **options
    )


@nnx.jit(static_argnames="is_causal")
def call(layer, x, mask=None, is_causal=False):
    return layer(x, mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("always_causal", [False, True])
def test_inside_nnx_attention(assert_close, num_kv_heads, always_causal):
    """There are grouped heads and padding. Causality is set by `attention_fn` or by the call."""
    function = attention_fn(PLANES, sharpness=2.0, is_causal=always_causal)
    layer = nnx_layer(function, num_kv_heads=num_kv_heads)

    @nnx.jit
    def want(layer):
        qkv = layer.query(X), layer.key(X), layer.value(X)
        return layer.out(oracle(*qkv, is_causal=True, key_value_mask=MASK))

    got = call(layer, X, MASK[:, None, None], is_causal=not always_causal)
    assert_close("output", got, want(layer), kind="outputs")


def test_decoding_with_the_cache_of_nnx_attention(assert_close):
    """The mask of the cache decides, whether or not the version of Flax also passes is_causal."""
    layer = nnx_layer(attention_fn(PLANES, is_causal=True), num_kv_heads=2)
    whole = call(layer, X, is_causal=True)
    layer.init_cache(X.shape)

    @nnx.jit
    def decode(layer, x):
        return layer(x, decode=True, is_causal=True)

    parts = [decode(layer, X[:, t : t + 1]) for t in range(LENGTH)]
    assert_close("output", jnp.concatenate(parts, axis=1), whole, kind="resumed")


@pytest.mark.parametrize("by_partial", [False, True])
def test_inside_linen_attention(assert_close, by_partial):
    causal = functools.partial(attend, is_causal=True)
    function = causal if by_partial else attention_fn(PLANES, sharpness=2.0, is_causal=True)
    layer = nn.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=function)
    variables = layer.init(jax.random.key(0), X)
    params = variables["params"]

    @jax.jit
    def both(params):
        weights = [params[name] for name in ("query", "key", "value")]
        qkv = [jnp.einsum("btd,dnh->btnh", X, w["kernel"]) + w["bias"] for w in weights]
        out = oracle(*qkv, is_causal=True, key_value_mask=MASK)
        want = jnp.einsum("btnh,nhd->btd", out, params["out"]["kernel"]) + params["out"]["bias"]
        return layer.apply({"params": params}, X, mask=MASK[:, None, None]), want

    got, want = both(params)
    assert_close("output", got, want, kind="outputs")


def test_decoding_with_the_cache_of_linen_attention(assert_close):
    make = functools.partial(
        nn.MultiHeadDotProductAttention, HEADS, attention_fn=attention_fn(PLANES, is_causal=True)
    )
    variables = jax.jit(make(decode=True).init)(jax.random.key(0), X)
    params, cache = variables["params"], variables["cache"]
    whole = jax.jit(make().apply)({"params": params}, X)
    step = jax.jit(functools.partial(make(decode=True).apply, mutable=["cache"]))
    parts = []
    for t in range(LENGTH):
        part, updated = step({"params": params, "cache": cache}, X[:, t : t + 1])
        cache = updated["cache"]
        parts.append(part)
    assert_close("output", jnp.concatenate(parts, axis=1), whole, kind="resumed")


def test_every_name_that_flax_and_jax_pass_is_accepted():
    """Flax's NNX module passes all of its names. Linen passes those in the signature only."""
    ours = set(inspect.signature(attend).parameters)
    passed_by_nnx = {
        *("mask", "dropout_rng", "dropout_rate", "broadcast_dropout", "deterministic", "dtype"),
        *("precision", "module", "is_causal", "input_positions"),
    }
    passed_to_jax = set(inspect.signature(jax.nn.dot_product_attention).parameters)
    assert passed_by_nnx <= ours
    assert passed_to_jax - ours == {"implementation"}  # chosen where the function is made
    assert list(inspect.signature(attend).parameters)[:5] == [
        *("query", "key", "value", "bias", "mask")
    ]


def test_arguments_of_jax_attention(assert_close):
    """One call has lengths, packed segments, and several leading axes."""
    query, key, value = (heads(BATCH, 1, LENGTH, 2, HEAD_DIM, seed=seed) for seed in range(3))
    lengths = jnp.array([LENGTH, 4])
    segment_ids = jnp.array([[0, 0, 0, 1, 1, 1], [2, 3, 3, 3, 3, 3]])

    @jax.jit
    def both(query, key, value):
        got = attend(
            query, key, value, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
            segment_ids=segment_ids[:, None], input_positions=jnp.arange(LENGTH), dtype=jnp.float32,
        )  # fmt: skip
        flat = (x[:, 0] for x in (query, key, value))
        want = oracle(*flat, key_value_mask=MASK, segment_ids=segment_ids)
        return got, jnp.where(MASK[..., None, None], want, 0)[:, None]

    got, want = both(query, key, value)
    assert_close("output", got, want, kind="outputs")


def test_dtype_and_float_masks_follow_flax():
    query = jax.ShapeDtypeStruct((BATCH, LENGTH, 2, HEAD_DIM), jnp.float32)
    mask = jax.ShapeDtypeStruct((1, 1, 1, LENGTH), jnp.float32)
    half = functools.partial(attend, dtype=jnp.bfloat16)
    out = jax.eval_shape(lambda q, m: half(q, q, q, mask=m), query, mask)
    assert out.dtype == jnp.bfloat16
    assert out.shape == query.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": jnp.zeros(())}, "bias is not supported"),
        ({"scale": 0.5}, "scale is not supported.*sharpness"),
        ({"local_window_size": 3}, "local_window_size is not supported.*forget_gate"),
        ({"dropout_rate": 0.1}, "dropout_rate is not supported.*deterministic=True"),
        ({"module": object()}, "module is not supported.*sow_weights=False"),
        ({"return_residual": True}, "return_residual is not supported"),
    ],
)
def test_what_needs_the_weight_matrix_is_refused_in_words(options, message):
    x = jnp.zeros((1, 2, 1, HEAD_DIM))
    with pytest.raises(NotImplementedError, match=message):
        attend(x, x, x, **options)


@pytest.mark.parametrize("shape", [(BATCH, 1, 5, 5), (BATCH, HEADS, 1, 5), (BATCH, 5), (5, 5)])
def test_masks_that_are_not_key_padding_are_refused_with_the_way_out(shape):
    x = jnp.zeros((BATCH, 5, HEADS, HEAD_DIM))
    sentence = "key-padding masks only, such as .*; for causal use is_causal=True, for packing use"
    with pytest.raises(ValueError, match=sentence):
        attend(x, x, x, mask=jnp.ones(shape, bool))


def test_masks_that_are_added_to_logits_are_refused():
    x = jnp.zeros((BATCH, 5, HEADS, HEAD_DIM))
    added = jnp.where(jnp.arange(5) < 3, 0.0, -1e9)[None, None, None]
    with pytest.raises(ValueError, match=r"negative numbers.*pass mask == 0"):
        attend(x, x, x, mask=added)
    kept = attend(x, x, x, mask=(added == 0).astype(jnp.float32))
    assert (kept == attend(x, x, x, mask=added == 0)).all()


def test_sowing_and_attention_dropout_are_refused_inside_flax():
    layer = nnx_layer(attend, dropout_rate=0.5)
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer(X, deterministic=False)
    with pytest.raises(NotImplementedError, match="sow"):
        layer(X, deterministic=True, sow_weights=True)
    assert jax.eval_shape(lambda x: layer(x, deterministic=True), X).shape == X.shape


def test_wrong_shapes_are_refused_in_words():
    x = jnp.zeros((BATCH, 5, HEADS, HEAD_DIM))
    with pytest.raises(ValueError, match=r"planes must be \(L, P, H\)"):
        attention_fn(jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="the same leading axes"):
        attend(x, x[:1], x)
    with pytest.raises(ValueError, match="the same leading axes"):
        attend(x[0, 0], x[0, 0], x[0, 0])


def test_no_tokens():
    x = jnp.zeros((BATCH, 0, HEADS, HEAD_DIM))
    assert np.shape(attend(x, x, x, mask=jnp.ones((BATCH, 1, 1, 0), bool))) == x.shape
