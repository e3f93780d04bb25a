"""Sparse decoding at the edges: junk, full rows, any number of forced tokens, dtypes and vmap."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import (
    KVCache,
    SparseCache,
    SparseConfig,
    dense_decode_attention,
    sparse_decode_attention,
)
from race_jax.sparse import SCORERS, budget_for, codes, explain, reference, score, socket_sharpness
from tests import quick
from tests.sparse.problems import attend_over, check_refusals, draw_tokens
from tests.sparse.test_sparse import (
    LENGTHS,
    B,
    C,
    H,
    K,
    N,
    T,
    V,
    append,
    attend,
    config_of,
    empty,
    problem,
)

pytestmark = pytest.mark.once

STORED = {
    "sign_linear": None,
    "quantized": None,
    "hamming": None,
    "quest": None,
    "socket": True,
}


def with_junk(rng, array, hidden):
    """The array with NaN, infinities and large numbers at the hidden slots (B, T)."""
    junk = rng.choice([np.nan, np.inf, -np.inf, 1e30], array.shape)
    return np.where(hidden[..., None, None], junk, array).astype(np.float32)


def real(cache):
    """What a cache stores of the tokens that it holds, and of pages that are full."""
    seen = np.arange(cache.capacity) < np.asarray(cache.length)[:, None]
    parts = {"key": cache.kv.key[seen], "value": cache.kv.value[seen]}
    for name in ("codes", "factor", "value_norm"):
        if (x := getattr(cache, name)) is not None:
            parts[name] = np.moveaxis(np.asarray(x), 2, 1)[seen]
    if cache.pages is not None:
        size = cache.config.coding().page_size
        full = (np.arange(cache.pages.shape[2]) + 1) * size <= np.asarray(cache.length)[:, None]
        parts["pages"] = np.moveaxis(np.asarray(cache.pages), 2, 1)[full]
    return parts


@pytest.mark.parametrize("scorer", STORED)
def test_padded_slots_and_tokens_that_were_cut_change_no_bit(rng, assert_close, scorer):
    """The second piece is added after other tokens, which are cut off again."""
    config = config_of(scorer, value_weighting=STORED[scorer])
    query, key, value = draw_tokens(rng, B, 30, N, K, H, V)
    mask = rng.random((B, 30)) < np.array([[0.9], [0.6], [0.3]])
    mask[:, -1] = True
    spoilt = [with_junk(rng, x, ~mask) for x in (query, key, value)]
    clean, other = empty(config), empty(config)
    for piece in (slice(0, 17), slice(17, 30)):
        masked = {"key_value_mask": mask[:, piece]}
        clean = append(clean, key[:, piece], value[:, piece], **masked)
        cut = append(other, -key[:, :13], 2 * value[:, :13]).truncate(other.length)
        other = append(cut, *(x[:, piece] for x in spoilt[1:]), **masked)
    assert_close("stored", real(other), real(clean), kind="rerun")
    run = functools.partial(attend, config=config, query_mask=mask[:, -T:])
    want = run(query[:, -T:], clean)
    assert_close("attended", run(spoilt[0][:, -T:], other), want, kind="rerun")
    again = append(other.reset(np.ones(B, bool)), key[:, :13], value[:, :13])
    fresh = append(empty(config), key[:, :13], value[:, :13])
    assert_close("reset", real(again), real(fresh), kind="rerun")


@pytest.mark.parametrize("scorer", ["quantized", "quest"])
@pytest.mark.parametrize("dense_below", [0, 100])
def test_rows_that_are_full_and_rows_of_one_token(assert_close, scorer, dense_below):
    """A row beyond its room, full rows, one slot less, and one token. The others stay the same."""
    config = config_of(scorer, dense_below=dense_below)
    rng, lengths = np.random.default_rng(3), np.array([17, 16, 15, 1])
    query, key, value = draw_tokens(rng, 4, 17, N, K, H, V)
    mask = np.arange(17) < lengths[:, None]
    tokens = key[:, :16], value[:, :16]
    most = append(empty(config, 16, 4), *tokens, key_value_mask=mask[:, :16])
    full = append(most, key[:, 16:], value[:, 16:], key_value_mask=mask[:, 16:])
    assert full.length.tolist() == lengths.tolist()
    want, before = attend(query[:, -1:], most, config)
    got, report = attend(query[:, -1:], full, config)
    assert np.isnan(got[0]).all()
    assert not np.asarray(report.count[0]).any()
    assert_close("other rows", got[1:], want[1:], kind="rerun")
    np.testing.assert_array_equal(report.indices[1:], before.indices[1:])
    assert_close("one token", got[3, 0], np.repeat(value[3, 0], N // K, axis=0), kind="outputs")
    three, report = attend(query[:, -3:], most, config)  # more queries than the last row holds
    assert np.isnan(three).any(axis=(1, 2, 3)).tolist() == [False, False, False, True]
    limit = 16 if dense_below else 12
    assert report.count[:, -1, 0].tolist() == [limit, limit, min(15, limit), 0]


@pytest.mark.parametrize(
    ("sink", "window", "budget"), [(0, 1, 1), (0, 1, 12), (8, 4, 12), (2, 60, 62), (30, 1, 40)]
)
def test_any_number_of_tokens_may_be_forced(assert_close, sink, window, budget):
    """None but the own token, all of the budget, and more than a row holds."""
    config, cache, query, key, value = problem("quantized")
    config = dataclasses.replace(config, sink=sink, window=window, budget=budget)
    out, report = attend(query, cache, config)
    scores = np.asarray(score(jnp.asarray(query), cache))
    wanted = np.zeros((B, T, N, V))
    for b, t, n in np.ndindex(B, T, N):
        length = LENGTHS[b] - T + t + 1
        tokens = (x[b, :length, n // (N // K)] for x in (key, value))
        found = query[b, t, n], *tokens, scores[b, t, n, :length]
        wanted[b, t, n], positions = reference.attend(*found, config)
        assert report.indices[b, t, n, : len(positions)].tolist() == positions
        assert report.count[b, t, n] == len(positions) == min(budget, length)
    assert_close("out", out, wanted, kind="outputs")


@pytest.mark.parametrize("scorer", ["quantized", "socket"])
@pytest.mark.parametrize("tile", [16, 24])
def test_a_cache_is_coded_tile_by_tile(assert_close, monkeypatch, scorer, tile):
    """Whole tiles and a rest, against all slots at once."""
    config, cache, query, *_ = problem(scorer, True if scorer == "socket" else None)

    def coded():
        return quick.jit(lambda kv: SparseCache.of(jax.random.key(3), kv, config))(cache.kv)

    whole = coded()
    monkeypatch.setattr(codes, "TILE", tile)
    tiled = coded()
    assert (np.asarray(tiled.codes) != np.asarray(whole.codes)).sum() <= 1  # a border
    assert_close("norms", tiled.value_norm, whole.value_norm, kind="resumed")
    assert_close("out", attend(query, tiled, config), attend(query, whole, config), kind="resumed")


@pytest.mark.parametrize(
    ("asks", "holds"),
    [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")],
)
def test_queries_may_have_another_dtype_than_the_cache(rng, assert_close, asks, holds):
    """Attention to all tokens in each dtype. What is computed does not depend on the query's."""
    query, *tokens = draw_tokens(rng, B, 50, N, K, H, V)
    key, value = (x.astype(jnp.dtype(holds)) for x in tokens)
    query, mask = query[:, -T:].astype(jnp.dtype(asks)), np.ones((B, 50), bool)
    config = config_of("quantized", budget=60)
    cache = append(empty(config, dtype=holds), key, value)
    dense = quick.jit(dense_decode_attention)
    everything = dense(query, cache.kv)
    assert everything.dtype == holds
    padded = np.zeros((B, 50, N, H))
    padded[:, -T:] = query
    want = attend_over(padded, key, value, mask, last=T)
    assert_close("dense", everything, want, kind="outputs", dtype=holds)
    out, _ = attend(query, cache, config)
    assert out.dtype == holds
    assert_close("budget", out, everything, kind="outputs", dtype=holds)
    below = dataclasses.replace(config, budget=12, dense_below=51)
    assert_close("dense_below", attend(query, cache, below)[0], everything, kind="rerun")
    wide = query.astype(np.float32)
    assert_close("wide query", dense(wide, cache.kv), everything, kind="rerun")
    few = dataclasses.replace(config, budget=12)
    listed = attend(query, cache, few)
    assert_close("few", attend(wide, cache, few), listed, kind="rerun")
    if asks != "bfloat16":  # the query is not rounded to the dtype of the cache
        rounded = query.astype(holds).astype(asks)
        assert (dense(rounded, cache.kv) != everything).any()
        assert (attend(rounded, cache, few)[0] != listed[0]).any()


@pytest.mark.parametrize("group", [1, 8])
def test_dense_decoding_of_grouped_heads_is_that_of_repeated_ones(rng, assert_close, group):
    query, *tokens = draw_tokens(rng, B, 9, K * group, K, H, V)
    run = quick.jit(dense_decode_attention)
    wanted = KVCache.init(B, 9, K * group, H, V, jnp.float32)
    wanted = wanted.append(*(x.repeat(group, axis=2) for x in tokens))
    got = KVCache.init(B, 9, K, H, V, jnp.float32).append(*tokens)
    assert_close("out", run(query, got), run(query, wanted), kind="resumed")


@pytest.mark.parametrize(
    ("scorer", "selection"), [("quantized", "head"), ("quest", "group"), ("socket", "head")]
)
def test_vmap_over_rows_equals_a_loop(assert_close, scorer, selection):
    """One row is short enough for dense attention. Each has planes of its own."""
    config = config_of(scorer, selection=selection, dense_below=20)
    query, key, value = draw_tokens(np.random.default_rng(6), B, 50, N, K, H, V)
    mask = np.arange(50) < LENGTHS[:, None]
    last = jnp.stack([q[n - T : n] for q, n in zip(query, LENGTHS, strict=True)])

    def row(seed, query, *tokens):
        cache = SparseCache.init(seed, 1, C, K, H, V, jnp.float32, config=config)
        key, value, mask = (x[None] for x in tokens)
        cache = cache.append(key, value, key_value_mask=mask)
        found = sparse_decode_attention(query[None], cache, return_report=True)
        kv = KVCache.init(1, C, K, H, V, jnp.float32).append(key, value, key_value_mask=mask)
        return *found, dense_decode_attention(query[None], kv), cache.codes

    arrays = jax.random.split(jax.random.key(1), B), last, key, value, mask
    run = quick.jit(row)
    alone = [run(*(x[b] for x in arrays)) for b in range(B)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    got = quick.jit(jax.vmap(row))(*arrays)
    assert got[1].is_dense.tolist() == [False, False, True]
    assert_close("vmap", got, want, kind="resumed")


def errors():
    """Calls of a sparse cache that are refused, beside those of tests/sparse/test_sparse.py."""
    _, cache, query, key, value = problem("sign_linear")
    query, key, value = (jnp.asarray(x) for x in (query, key[:, :1], value[:, :1]))
    pages = empty(config_of("quest"))
    call = functools.partial(sparse_decode_attention, cache=cache)
    return {
        "rank": (lambda: call(query[0]), ValueError, "query (B, T, N, H) = (3, 4, 16) does not"),
        "heads": (lambda: call(query[:, :, :3]), ValueError,
                  "(3, 3, 3, 16) does not meet a cache of 3 rows and 2 key/value heads of 16; N "
                  "must be a multiple of 2"),
        "width": (lambda: call(query[..., :8]), ValueError, "(3, 3, 4, 8) does not meet a cache"),
        "rows": (lambda: call(query[:2]), ValueError, "(2, 3, 4, 16) does not meet a cache"),
        "integers": (lambda: call(query.astype(int)), TypeError, "query must be floating"),
        "no token": (lambda: call(query[:, :0]), ValueError, "query has no token"),
        "mask": (lambda: call(query, query_mask=jnp.ones((B, 1), bool)), ValueError,
                 "query_mask must be (B, S) = (3, 3)"),
        "config": (lambda: call(query, config="quantized"), TypeError,
                   "config must be a SparseConfig; got str"),
        "key": (lambda: cache.append(key.astype(jnp.bfloat16), value), TypeError,
                "key is bfloat16; the cache holds float32"),
        "value": (lambda: cache.append(key, value.astype(int)), TypeError,
                  "value is int32; the cache holds float32"),
        "width of a key": (lambda: cache.append(key[..., :8], value), ValueError,
                           "key must be (3, T, 2, 16) as the cache holds it; got (3, 1, 2, 8)"),
        "cut": (lambda: cache.truncate(jnp.array([51, 37, 9])), ValueError,
                "length=51 is not from 0 to the 50 tokens of row 0"),
        "pages": (lambda: pages.grow(70), ValueError,
                  "capacity=70 must be a multiple of page_size=4; 72 is"),
        "smaller": (lambda: cache.grow(C), ValueError, "capacity=64 must be above the present 64"),
        "temperature": (lambda: socket_sharpness(0.0, 128), ValueError,
                        "temperature=0.0 must be a finite number above 0"),
        "head dim": (lambda: socket_sharpness(0.4, 0), ValueError, "head_dim=0 must be at least"),
        "ratio": (lambda: budget_for(100, 0.5), ValueError, "ratio=0.5 must be at least 1"),
        "context": (lambda: budget_for(0, 2), ValueError, "context=0 and ratio=2 must be"),
    }  # fmt: skip


def test_bad_calls_are_refused_in_words():
    check_refusals(errors())


@pytest.mark.parametrize("scorer", SCORERS)
def test_an_option_that_a_scorer_does_not_use_is_refused(scorer):
    options = dict.fromkeys(("num_rotations", "num_tables", "num_planes", "page_size"), 2)
    options |= {"code_bits": 2, "sharpness": 0.5, "value_weighting": True}
    uses = {name for name, value in SCORERS[scorer]._asdict().items() if value is not None}
    uses |= {"sharpness"} if "temperature" in uses else set()
    for name in options.keys() - uses:
        with pytest.raises(ValueError, match=f"{name}=.* has no effect with scorer='{scorer}'"):
            SparseConfig(scorer=scorer, **{name: options[name]})


def test_what_runs_on_a_cpu_is_said():
    _, cache, query, *_ = problem("quantized")
    choice = explain(jnp.asarray(query), cache)
    assert choice.implementation == "xla"
    assert "CUDA" in choice.reason
