"""A cache holds the tokens of every row side by side, and attention reads these and no others."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import race_jax
from race_jax import KVCache, SparseCache, SparseConfig, dense_decode_attention
from race_jax.sparse import exact
from tests import quick
from tests.sparse.problems import attend_over, draw_tokens

pytestmark = pytest.mark.once

B, C, K, N, H, V = 3, 600, 2, 4, 8, 5
T = 540  # tokens, more than a block of 512


def empty(capacity=C, dtype=jnp.float32):
    return KVCache.init(B, capacity, K, H, V, dtype=dtype)


@functools.cache
def jitted(**static):
    return quick.jit(functools.partial(dense_decode_attention, **static))


append = quick.jit(KVCache.append)


def tokens(rng, length, dtype=np.float32):
    return draw_tokens(rng, B, length, N, K, H, V, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ragged_rows_with_padding_anywhere_equal_a_loop(rng, assert_close, dtype):
    """Lengths on both sides of 512, several queries, grouped heads, slopes."""
    query, key, value = tokens(rng, T, dtype)
    mask = rng.random((B, T)) < np.array([[0.98], [0.6], [0.1]])
    mask[:, -1] = True
    cache = append(empty(dtype=dtype), key, value, key_value_mask=mask)
    assert cache.length.tolist() == mask.sum(axis=1).tolist()
    slopes = jnp.array([0.5, 0.25, 0.0, 1.0])
    for options in ({}, {"slopes": slopes}):
        want = attend_over(query, key, value, mask, last=20, **options)
        got = jitted()(query[:, -20:], cache, query_mask=mask[:, -20:], **options)
        assert_close("out", got, want, kind="outputs", dtype=dtype)
        assert not np.asarray(got)[~mask[:, -20:]].any()
        one = jitted()(query[:, -1:], cache, **options)
        assert_close("one query", one, want[:, -1:], kind="outputs", dtype=dtype)


def sigmoid(logits):
    return 1 / (1 + np.exp(-logits)) / logits.size


RULES = {
    "softmax": (exact.SOFTMAX, None),
    "sigmoid": (
        exact.Rule(lambda x, n: jax.nn.log_sigmoid(x) - jnp.log(n), normalized=False),
        sigmoid,
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_forget_gate_and_other_weights_equal_a_loop(rng, assert_close, name):
    """The prompt comes in two pieces. Each is added, cut off, and added again.

    The gates sum to about -20, of which float32 has 2e-6.
    """
    query, key, value = tokens(rng, T)
    mask = rng.random((B, T)) < np.array([[0.98], [0.6], [0.1]])
    mask[:, -1] = True
    log_decay = -rng.exponential(0.02, (B, T, K)).astype(np.float32)
    log_decay[:, [3, T - 5]] = -4
    cache = KVCache.init(B, C, K, H, V, dtype=jnp.float32, has_decay=True)
    for piece in (slice(0, 7), slice(7, T)):
        new = {"key_value_mask": mask[:, piece], "log_decay": log_decay[:, piece]}
        junk = append(cache, -key[:, piece], value[:, piece], **new)
        cache = append(junk.truncate(cache.length), key[:, piece], value[:, piece], **new)
    rule, weigh = RULES[name]
    slopes = jnp.array([0.5, 0.25, 0.0, 1.0])
    want = attend_over(
        query, key, value, mask, slopes=slopes, last=20, log_decay=log_decay, weigh=weigh
    )
    options = {"query_mask": mask[:, -20:], "slopes": slopes}
    got = jitted(rule=rule)(query[:, -20:], cache, **options)
    assert_close("out", got, want, kind="outputs")
    grown = cache.grow(C + 5)
    again = jitted(rule=rule)(query[:, -20:], grown, **options)
    assert_close("grown", again, got, kind="resumed")


def test_long_prompts_are_read_in_groups(rng, assert_close, monkeypatch):
    query, key, value = tokens(rng, T)
    query *= 0.5  # the errors of logits grow with them
    mask = jnp.asarray(rng.random((B, T)) < 0.9)
    cache = append(empty(), key, value, key_value_mask=mask)
    want = jitted()(query, cache, query_mask=mask)
    monkeypatch.setattr(exact, "MOST_QUERIES", 16)
    grouped = quick.jit(lambda *arguments: dense_decode_attention(*arguments, query_mask=mask))
    got = grouped(query, cache)
    assert_close("groups", got, want, kind="resumed")


def test_a_step_copies_no_cache():
    cache = jax.eval_shape(lambda: KVCache.init(2, 4096, 2, 64, dtype=jnp.float32))
    query = jax.ShapeDtypeStruct((2, 1, 4, 64), jnp.float32)
    key = jax.ShapeDtypeStruct((2, 1, 2, 64), jnp.float32)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, query, key):
        cache = cache.append(key, key)
        return cache, dense_decode_attention(query, cache)

    memory = step.lower(cache, query, key).compile().memory_analysis()
    held = sum(leaf.size * 4 for leaf in jax.tree.leaves(cache))
    assert memory.alias_size_in_bytes == held
    assert memory.temp_size_in_bytes < held / 4


def test_pieces_are_the_whole_and_a_cut_takes_them_back(rng, assert_close):
    _, key, value = tokens(rng, 13)
    mask = rng.random((B, 13)) < 0.7
    whole = append(empty(), key, value, key_value_mask=mask)
    cache = empty()
    for piece in (slice(0, 1), slice(1, 7), slice(7, 13)):
        cache = append(cache, key[:, piece], value[:, piece], key_value_mask=mask[:, piece])
    assert_close("in pieces", cache, whole, kind="rerun")
    kept = mask[:, :7].sum(axis=1)
    cut = append(cache.truncate(kept), key[:, 7:], value[:, 7:], key_value_mask=mask[:, 7:])
    assert_close("cut and added again", cut, whole, kind="rerun")
    assert cache.reset([True, False, False]).length.tolist() == [0, *cache.length.tolist()[1:]]
    grown = cache.grow(610)
    assert (grown.capacity, grown.length.tolist()) == (610, cache.length.tolist())
    assert_close("grown", grown.key[:, :C], cache.key, kind="rerun")


@pytest.mark.parametrize("junk", [np.nan, np.inf, 1e30])
def test_what_lies_beyond_a_row_is_never_read(rng, assert_close, junk):
    query, key, value = tokens(rng, 5)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    hidden = ~mask[..., None, None]
    clean = append(empty(), key, value, key_value_mask=mask)
    beyond = np.arange(C) >= np.asarray(clean.length)[:, None]
    spoilt = append(
        dataclasses.replace(
            clean,
            key=jnp.where(beyond[..., None, None], junk, clean.key),
            value=jnp.where(beyond[..., None, None], junk, clean.value),
        ).truncate(jnp.zeros(B, int)),
        np.where(hidden, junk, key),
        np.where(hidden, junk, value),
        key_value_mask=mask,
    )
    for count in (1, 5):
        options = {"query_mask": mask[:, -count:]}
        want = jitted()(query[:, -count:], clean, **options)
        got = jitted()(np.where(hidden, junk, query)[:, -count:], spoilt, **options)
        assert_close(f"{count} queries", got, want, kind="rerun")


def test_a_row_beyond_its_room_gives_nan_until_it_is_cut(rng, assert_close):
    query, key, value = tokens(rng, 6)
    mask = np.array([[True] * 6, [True] * 5 + [False], [False] * 3 + [True] * 3])
    cache = append(empty(5), key, value, key_value_mask=mask)
    assert cache.length.tolist() == [6, 5, 3]
    last = jitted()(query[:, -1:], cache)
    assert np.isnan(last).all(axis=(1, 2, 3)).tolist() == [True, False, False]
    cut = jitted()(query[:, -1:], cache.truncate(jnp.array([4, 5, 3])))
    assert np.isfinite(cut).all()
    assert_close("other rows", cut[1:], last[1:], kind="rerun")
    four = jitted()(query[:, -4:], cache)  # more queries than the third row holds
    assert np.isnan(four).any(axis=(1, 2, 3)).tolist() == [True, False, True]


def test_it_works_under_vmap_scan_and_shard_map(rng, assert_close):
    query, key, value = tokens(rng, 9)
    cache = append(empty(), key, value)
    want = jitted()(query, cache)

    def step(cache, token):
        query, key, value = (x[:, None] for x in token)
        cache = cache.append(key, value)
        return cache, dense_decode_attention(query, cache)[:, 0]

    by_time = [jnp.moveaxis(x, 1, 0) for x in (query, key, value)]
    scanned = quick.jit(lambda c, t: jax.lax.scan(step, c, t))(empty(), by_time)
    assert_close("scan", scanned[1].swapaxes(0, 1), want, kind="resumed")

    def row(query, cache):
        return dense_decode_attention(query[None], jax.tree.map(lambda x: x[None], cache))[0]

    assert_close("vmap", quick.jit(jax.vmap(row))(query, cache), want, kind="resumed")
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(AxisType.Auto,))
    heads = P(None, None, "heads")
    specs = KVCache(heads, heads, P())
    split = jax.shard_map(
        dense_decode_attention, mesh=mesh, in_specs=(heads, specs), out_specs=heads
    )
    assert_close("shard_map", quick.jit(split)(query, cache), want, kind="resumed")
    with pytest.raises(NotImplementedError, match="decode attention has no gradient; train with"):
        jax.grad(lambda q: dense_decode_attention(q, cache).sum())(query)


def test_a_row_that_has_lost_tokens_gives_nan_in_a_larger_cache(rng):
    query, key, value = tokens(rng, 6)
    mask = np.array([[True] * 6, [True] * 5 + [False], [False] * 3 + [True] * 3])
    larger = quick.jit(lambda cache: cache.grow(9))(
        append(empty(5), key, value, key_value_mask=mask)
    )
    lost = np.isnan(jitted()(query[:, -1:], larger)).all(axis=(1, 2, 3))
    assert lost.tolist() == [True, False, False]
    again = append(larger, key, value)
    assert np.isnan(jitted()(query[:, -1:], again)).all(axis=(1, 2, 3))[0]


def test_a_cut_below_zero_empties_a_row_in_traced_code(rng, assert_close):
    query, key, value = tokens(rng, 4)
    cut = quick.jit(KVCache.truncate)(append(empty(8), key, value), jnp.array([-1, 0, 99]))
    assert cut.length.tolist() == [0, 0, 4]
    got = jitted()(query, append(cut, key, value))
    want = jitted()(query, append(empty(8), key, value))
    assert_close("emptied rows", got[:2], want[:2], kind="rerun")


@pytest.mark.parametrize("sparse", [None, "quantized", "socket"])
def test_nothing_is_compiled_again_outside_of_jit(rng, sparse):
    query, key, value = (jnp.asarray(x) for x in tokens(rng, 5))
    cache, attend = empty(8), dense_decode_attention
    if sparse is not None:
        config = SparseConfig(budget=3, sink=1, window=1, scorer=sparse, dense_below=3)
        cache = SparseCache.init(jax.random.key(0), B, 8, K, H, V, jnp.float32, config=config)
        attend = race_jax.sparse_decode_attention
    programs = []

    def note(name, *_, **__):
        programs.extend([name] * ("backend_compile" in name))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        for i in range(5):
            token = slice(i, i + 1)
            cache = cache.append(key[:, token], value[:, token])
            attend(query[:, token], cache)
            programs.clear() if i == 1 else None
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert not programs


def cases():
    cache = empty(8)
    x, v = jnp.ones((B, 3, K, H)), jnp.ones((B, 3, K, V))
    q = jnp.ones((B, 1, N, H))
    held = append(cache, x, v)
    gated = KVCache.init(B, 8, K, H, V, dtype=jnp.float32, has_decay=True)
    mask = jnp.ones((B, 3), bool).at[1:].set(False)
    dense = dense_decode_attention
    return {
        "room": (lambda: held.append(x.repeat(2, 1), v.repeat(2, 1)), ValueError,
                 "row 0 holds 3 of 8 tokens; 6 more do not fit: cache.grow(16)"),
        "cut": (lambda: held.truncate(jnp.array([3, 4, 0])), ValueError,
                "length=4 is not from 0 to the 3 tokens of row 1"),
        "capacity": (lambda: KVCache.init(1, 2**31, 1, 1), ValueError, "below 2**31"),
        "smaller": (lambda: cache.grow(8), ValueError, "capacity=8 must be above the present 8"),
        "dtype": (lambda: cache.append(x.astype(int), v), TypeError,
                  "key is int32; the cache holds float32"),
        "heads": (lambda: cache.append(x[:, :, :1], v), ValueError, "must be (3, T, 2, 8)"),
        "lengths": (lambda: cache.append(x, v[:, :2]), ValueError, "must share tokens"),
        "mask": (lambda: cache.append(x, v, key_value_mask=mask[:2]), ValueError,
                 "key_value_mask must be (B, S) = (3, 3)"),
        "no gate": (lambda: gated.append(x, v), ValueError,
                    "the cache holds a decay of its tokens: pass log_decay, or make"),
        "a gate": (lambda: cache.append(x, v, log_decay=-x[..., 0]), ValueError,
                   "holds no decay of its tokens: leave out log_decay, or make a cache with "
                   "has_decay=True"),
        "gate of a head": (lambda: gated.append(x, v, log_decay=-x[..., 0, 0]), ValueError,
                           "log_decay must be (B, S, K) = (3, 3, 2)"),
        "sparse gate": (lambda: SparseCache.of(jax.random.key(0), gated, SparseConfig()),
                        NotImplementedError, "sparse scores know nothing of a forget gate"),
        "query heads": (lambda: dense(q[:, :, :3], held), ValueError,
                        "does not meet a cache of 3 rows and 2 key/value heads of 8; N must be"),
        "query rank": (lambda: dense(q[0], held), ValueError, "query (B, T, N, H) = (1, 4, 8)"),
        "query dtype": (lambda: dense(q.astype(int), held), TypeError, "query must be floating"),
        "no query": (lambda: dense(q[:, :0], held), ValueError, "query has no token"),
        "too many": (lambda: dense(q.repeat(4, 1), held), ValueError,
                     "query has 4 tokens, but row 0 of the cache holds 3; append their keys"),
        "too many in a row": (
            lambda: dense(q.repeat(3, 1), append(cache, x, v, key_value_mask=mask),
                          query_mask=jnp.ones((B, 3), bool)), ValueError,
            "query has 3 tokens, but row 1 of the cache holds 0"),
        "slopes": (lambda: dense(q, held, slopes=jnp.ones(2)), ValueError, "must be (N,) = (4,)"),
        "implementation": (lambda: dense(q, held, implementation="cudnn"), ValueError,
                           "implementation must be one of"),
        "gate and kernels": (
            lambda: dense(q, append(gated, x, v, log_decay=-x[..., 0]), implementation="pallas"),
            NotImplementedError, "have the weights of softmax without a forget gate only"),
        "kernels": (lambda: dense(q, held, implementation="pallas"), NotImplementedError,
                    "the sparse kernels run on CUDA devices, and this host has none; pass"),
    }  # fmt: skip


def wrong_kinds():
    """Arguments of another kind, and rows that have lost tokens."""
    cache = empty(8)
    x, v, q = jnp.ones((B, 3, K, H)), jnp.ones((B, 3, K, V)), jnp.ones((B, 1, N, H))
    held, dense = append(cache, x, v), dense_decode_attention
    return {
        "cut by numbers": (lambda: held.truncate(jnp.array([1.5, 0, 0])), TypeError,
                           "length must hold integers; got float32"),
        "reset by index": (lambda: held.reset(jnp.array([1])), ValueError,
                           "rows must have shape (3,), True where a row is emptied; got (1,)"),
        "reset by numbers": (lambda: held.reset(jnp.array([0, 1, 0])), TypeError,
                             "rows must be bool, True where a row is emptied; got int32"),
        "lost": (lambda: append(held, x.repeat(2, 1), v.repeat(2, 1)).append(x, v), ValueError,
                 "row 0 was given 9 tokens and has room for 8, so the last ones are lost; go on"),
        "lost and grown": (lambda: append(held, x.repeat(2, 1), v.repeat(2, 1)).grow(16),
                           ValueError, "row 0 was given 9 tokens and has room for 8"),
        "no heads": (lambda: KVCache.init(1, 8, 0, 4), ValueError, "kv_heads=0 and head_dim=4"),
        "cache of 8 bits": (lambda: KVCache.init(1, 8, 1, 4, dtype=jnp.float8_e4m3fn), TypeError,
                            "dtype must have at least 16 bits"),
        "dtype of a cache": (lambda: KVCache.init(1, 8, 1, 4, dtype=int), TypeError,
                             "dtype must be floating"),
        "capacity of a fraction": (lambda: KVCache.init(1, 8.0, 1, 4), TypeError,
                                   "capacity=8.0 must be an integer"),
        "growth of a fraction": (lambda: cache.grow(16.0), TypeError, "capacity=16.0 must be an"),
        "no cache": (lambda: dense(q, (x, v)), TypeError, "cache must be a KVCache; got a tuple."),
        "codes": (lambda: dense(q, SparseCache.of(jax.random.key(0), held, SparseConfig())),
                  TypeError, "must be a KVCache; got a SparseCache with codes; pass cache.kv"),
        "codes again": (
            lambda: SparseCache.of(
                jax.random.key(0), SparseCache.of(jax.random.key(0), held, SparseConfig()),
                SparseConfig()), TypeError, "this cache has codes already; pass cache.kv"),
        "no config": (lambda: SparseCache.of(jax.random.key(0), held, None), TypeError,
                      "config must be a SparseConfig; got NoneType"),
        "query mask": (lambda: dense(q, held, query_mask=jnp.ones((B, 1), int)), TypeError,
                       "query_mask must be bool"),
        "list of slopes": (lambda: dense(q, held, slopes=[1.0, 2.0]), ValueError,
                           "slopes must be (N,) = (4,); got (2,)"),
    }  # fmt: skip


def test_bad_calls_are_refused_in_words():
    for name, (call, kind, words) in (cases() | wrong_kinds()).items():
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value), name


def test_the_names_are_public():
    assert race_jax.KVCache is KVCache
