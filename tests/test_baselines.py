"""The baselines equal their definitions, such as softmax attention written out in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.layers import softmax
from race_jax.layers.softmax import SoftmaxConfig, softmax_attention

MASK = np.array([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0, 0], [0] * 7], bool)
SEGMENTS = np.array([[0, 0, 4, 4, 4, 7, 7], [2] * 7, [0, 0, 0, 0, 1, 1, 1]], np.int32)


def draw(rng, batch=3, length=7, heads=4, kv_heads=2, head_dim=8, value_dim=5):
    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return (
        normal(batch, length, heads, head_dim),
        normal(batch, length, kv_heads, head_dim),
        normal(batch, length, kv_heads, value_dim),
    )


def oracle(query, key, value, bias=None, *, is_causal=False, mask=None, segments=None):
    """Computes softmax for each head and query, over the keys that the query sees, in float64."""
    batch, length, heads, head_dim = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, length, heads, value.shape[-1]))
    for b, t, n in np.ndindex(batch, length, heads):
        sees = np.ones(key.shape[1], bool)
        if is_causal:
            sees[t + 1 :] = False
        if mask is not None:
            sees &= mask[b] & (mask[b, t] or not is_causal)
        if segments is not None:
            sees &= segments[b] == segments[b, t]
        if not sees.any():
            continue
        logits = key[b, sees, n // group].astype(np.float64) @ query[b, t, n] / np.sqrt(head_dim)
        if bias is not None:
            logits += bias[0, n, t, sees]
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ value[b, sees, n // group] / weights.sum()
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"mask": MASK},
        {"is_causal": True, "mask": MASK, "segments": SEGMENTS},
    ],
    ids=["bidirectional", "causal", "padded", "causal padded packed"],
)
def test_softmax_is_its_definition(rng, assert_close, options):
    query, key, value = draw(rng)
    bias = rng.normal(size=(1, 4, 7, 7)).astype(np.float32)
    names = {"mask": "key_value_mask", "segments": "segment_ids"}
    masks = {names[name]: jnp.asarray(options[name]) for name in names if name in options}
    got = softmax_attention(
        *map(jnp.asarray, (query, key, value, bias)),
        is_causal=options.get("is_causal", False),
        **masks,
    )
    assert_close("out", got, oracle(query, key, value, bias, **options), kind="outputs")


@pytest.mark.parametrize("value_dim", [5, 8, 11])
def test_values_may_be_wider_or_narrower_than_keys(rng, assert_close, value_dim):
    query, key, value = draw(rng, value_dim=value_dim)
    got = softmax_attention(*map(jnp.asarray, (query, key, value)), is_causal=True)
    assert_close("out", got, oracle(query, key, value, is_causal=True), kind="outputs")


def test_junk_in_padded_slots_changes_neither_outputs_nor_gradients(rng, assert_close):
    arrays = draw(rng)
    padded = ~MASK[:, :, None, None]

    def outputs_and_gradients(fill):
        filled = [jnp.where(padded, fill, x) for x in arrays]

        def loss(*filled):
            out = softmax_attention(*filled, is_causal=True, key_value_mask=jnp.asarray(MASK))
            return (out**2).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*filled)

    compiled = jax.jit(outputs_and_gradients)
    clean = compiled(0.0)
    for junk in (jnp.nan, jnp.inf, 1e30):
        assert_close(f"junk {junk}", compiled(junk), clean, kind="rerun")
    assert np.abs(clean[0][1]).max() > 0


@pytest.mark.parametrize("mask", [None, MASK], ids=["odd", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
def test_padding_by_lengths_is_padding_by_a_mask(rng, assert_close, monkeypatch, is_causal, mask):
    """cuDNN gets the tokens at the front of each row and their number; here XLA takes its part."""
    arrays = [*map(jnp.asarray, draw(rng, value_dim=8))]
    mask = None if mask is None else jnp.asarray(mask)

    def outputs_and_gradients(*arrays):
        def loss(*arrays):
            out = softmax_attention(*arrays, is_causal=is_causal, key_value_mask=mask)
            return (out**2).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    want = jax.jit(outputs_and_gradients)(*arrays)
    monkeypatch.setattr(softmax, "_choose", lambda *_: "cudnn")
    attend, given = jax.nn.dot_product_attention, []

    def by_xla(*arrays, implementation, **options):
        lengths = options["key_value_seq_lengths"].shape
        given.append((implementation, options.get("mask"), lengths, arrays[0].shape[1]))
        return attend(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    got = jax.jit(lambda *arrays: outputs_and_gradients(*arrays))(*arrays)
    assert given == [("cudnn", None, (3,), 8)]
    assert_close("out", got[1], want[1], kind="outputs")
    for name, one, other in zip(("query", "key", "value"), got[0], want[0], strict=True):
        assert_close(name, one, other, kind="gradients")
    mapped = jax.jit(jax.vmap(outputs_and_gradients, in_axes=(0, None, None)))
    for one in jax.tree.leaves(mapped(jnp.stack([arrays[0]] * 2), *arrays[1:])):
        assert one.shape[0] == 2
        assert_close("mapped", one[1], one[0], kind="rerun")


def test_the_dtype_of_the_values_comes_out(rng, assert_close):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in draw(rng)]
    got = softmax_attention(*rounded, is_causal=True)
    want = oracle(*(np.asarray(x, np.float32) for x in rounded), is_causal=True)
    assert got.dtype == jnp.bfloat16
    assert_close("out", got, want, kind="outputs", dtype="bfloat16")


@pytest.mark.parametrize(("queries", "keys"), [(0, 0), (3, 0), (0, 3)])
def test_no_keys_give_zeros(queries, keys):
    query, key = jnp.ones((2, queries, 4, 8)), jnp.ones((2, keys, 2, 8))
    out = softmax_attention(query, key, jnp.ones((2, keys, 2, 5)))
    assert out.shape == (2, queries, 4, 5)
    assert not out.any()


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"log_decay": jnp.zeros((3, 7, 2))}, NotImplementedError, "has no log_decay"),
        ({"return_state": True}, NotImplementedError, "no state of fixed size"),
        ({"implementation": "cudnn"}, NotImplementedError, "cuDNN attention needs"),
        ({"implementation": "pallas"}, ValueError, "implementation='pallas' is unknown"),
        ({"query": jnp.ones((3, 7, 8))}, ValueError, "query must have 4 axes"),
        ({"query": jnp.ones((3, 7, 3, 8))}, ValueError, "multiple of key/value heads"),
        ({"query": jnp.ones((3, 7, 4, 6))}, ValueError, "share head_dim"),
        ({"query": jnp.ones((3, 6, 4, 8)), "is_causal": True}, ValueError, "as many queries"),
        ({"key": jnp.ones((3, 6, 2, 8))}, ValueError, "share batch, tokens and heads"),
        ({"value": jnp.ones((3, 7, 2, 5), int)}, TypeError, "value must be floating"),
        ({"key_value_mask": jnp.ones((3, 1, 7, 7), bool)}, ValueError, "dense mask"),
        ({"key_value_mask": jnp.ones((3, 7))}, TypeError, "must be bool"),
        ({"segment_ids": jnp.ones((3, 6), int)}, ValueError, "segment_ids must be"),
    ],
)
def test_what_it_cannot_do_is_refused_in_words(rng, changes, kind, words):
    arrays = dict(zip(("query", "key", "value"), map(jnp.asarray, draw(rng)), strict=True))
    with pytest.raises(kind, match=words):
        softmax_attention(**(arrays | changes))


def test_the_implementation_that_will_run_is_named(monkeypatch):
    sizes = {"in_features": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}

    def named(is_packed=False, length=64, **options):
        return SoftmaxConfig(**sizes, **options).describe(2, length, is_packed)[1]

    assert "xla, because cuDNN needs an NVIDIA GPU" in named(dtype=jnp.bfloat16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert named(dtype=jnp.bfloat16) == "implementation cudnn"
    assert named(dtype=jnp.bfloat16, implementation="xla") == "implementation xla"
    assert "needs bfloat16 or float16, got float32" in named()
    assert "even lengths" in named(is_packed=True, length=63, dtype=jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("padding", ["none", "behind", "anywhere"])
@pytest.mark.parametrize("length", [64, 65])
def test_cudnn_agrees_with_xla(rng, assert_close, padding, is_causal, length):
    query, key, value = draw(rng, length=length, head_dim=64, value_dim=64)
    # A longer query weighs few keys, so that outputs do not shrink to a mean near zero.
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in (2 * query, key, value)]
    mask = {
        "none": None,
        "behind": jnp.arange(length) < jnp.array([[length], [40], [0]]),
        "anywhere": jnp.asarray(rng.random((3, length)) < np.array([[0.5], [0.9], [0.02]])),
    }[padding]

    def outputs_and_gradients(implementation):
        def loss(*arrays):
            out = softmax_attention(
                *arrays, is_causal=is_causal, key_value_mask=mask, implementation=implementation
            )
            return (out.astype(jnp.float32) ** 2).sum(), out

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*rounded)

    gradients, out = outputs_and_gradients("cudnn")
    want_gradients, want = outputs_and_gradients("xla")
    assert_close("out", out, want, kind="outputs", dtype="bfloat16")
    assert_close("gradients", gradients, want_gradients, kind="gradients", dtype="bfloat16")
    assert_close("chosen", outputs_and_gradients(None)[1], out, kind="rerun")
