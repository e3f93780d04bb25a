"""Sparse decoding keeps what its definition keeps, for every scorer, shape and length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax import (
    SparseCache,
    SparseConfig,
    dense_decode_attention,
    sparse_decode_attention,
)
from race_jax.sparse import (
    SCORERS,
    codes,
    kept,
    reference,
    score,
    scores,
    sparse_attention,
)
from tests import quick
from tests.sparse.problems import check_refusals, draw_tokens

B, C, K, N, H, V, T = 3, 64, 2, 4, 16, 5, 3
SMALL = {"budget": 12, "sink": 2, "window": 4, "dense_below": 0}
OWN = {
    "socket": {"num_tables": 7, "num_planes": 3},
    "socket_unit": {"num_tables": 7, "num_planes": 3},
    "quest": {"page_size": 4},
}
LENGTHS = np.array([50, 37, 9])


def config_of(scorer, **changes):
    return SparseConfig(scorer=scorer, **SMALL | OWN.get(scorer, {}) | changes)


def empty(config, capacity=C, rows=B, dtype=jnp.float32):
    return SparseCache.init(jax.random.key(3), rows, capacity, K, H, V, dtype, config=config)


append = quick.jit(SparseCache.append)
attend = quick.jit(
    functools.partial(sparse_decode_attention, return_report=True), static_argnames="config"
)


@functools.cache
def problem(scorer, value_weighting=None):
    """A ragged cache, its tokens by row, and the queries of the last T tokens of every row."""
    rng = np.random.default_rng(5)
    query, key, value = draw_tokens(rng, B, 50, N, K, H, V)
    mask = np.arange(50) < LENGTHS[:, None]
    config = config_of(scorer, value_weighting=value_weighting)
    cache = append(empty(config), key, value, key_value_mask=mask)
    last = np.stack([q[n - T : n] for q, n in zip(query, LENGTHS, strict=True)])
    return config, cache, last, key, value


def defined_scores(config, cache, query, key, value, length, t, n):
    """The scores of one query head by the definitions, for the tokens of one row."""
    planes = np.asarray(cache.planes, float)
    q, k = query.astype(float), key[:length].astype(float)
    match config.scorer:
        case "socket" | "socket_unit":
            unit = q / np.linalg.norm(q) if config.scorer == "socket_unit" else q
            tables = planes.reshape(7, 3, H)
            found = reference.socket_scores(unit, k, tables, config.sharpness_for(H))
            norm = np.linalg.norm(value[:length], axis=-1)
            return found * norm if config.value_weighting else found
        case "sign_linear" | "quantized":
            rounded, unit = codes.round_query(jnp.asarray(query), cache.planes)
            bits = config.coding().code_bits
            return float(unit[0]) * reference.linear_scores(np.asarray(rounded), k, planes, bits)
        case "hamming":
            return -((planes @ q >= 0) != (k @ planes.T >= 0)).sum(axis=-1)
        case "quest":
            return reference.quest_scores(q, k, 4)
        case "oracle":
            return k @ q
        case "random":
            positions = jnp.array([[t]])
            drawn = scores.random(jnp.zeros((1, 1, N, H)), cache, config, positions)
            return np.asarray(drawn)[0, 0, n, :length]


@pytest.mark.parametrize("scorer", SCORERS)
def test_in_xla_the_free_slots_are_not_read(assert_close, monkeypatch, scorer):
    config, cache, query, *_ = problem(scorer)
    read = []

    def recorded(query, cache, *rest):
        read.append(cache.capacity)
        return xla(query, cache, *rest)

    xla = sparse_attention.steps.XLA.scores
    steps = sparse_attention.steps.XLA._replace(scores=recorded)
    monkeypatch.setattr(sparse_attention.steps, "XLA", steps)
    calls = {}
    for shortest in (4096, 12):
        monkeypatch.setattr(sparse_attention, "SHORTEST_PREFIX", shortest)
        attend = functools.partial(sparse_attention._sparse_of_prefix, config)
        calls[shortest] = quick.jit(lambda *arrays, attend=attend: attend(*arrays))
        for lengths in ([12, 7, 9], [48, 37, 9], LENGTHS):
            cut = cache.truncate(jnp.array(lengths))
            positions = jnp.array(lengths)[:, None] - T + jnp.arange(T)
            calls[shortest, *lengths] = calls[shortest](query, cut, positions)
    assert set(read) == {12, 48, C}
    for lengths in ([12, 7, 9], [48, 37, 9], LENGTHS):
        (want, listed), (out, report) = (calls[shortest, *lengths] for shortest in (4096, 12))
        np.testing.assert_array_equal(report.indices, listed.indices)
        np.testing.assert_array_equal(report.count, listed.count)
        assert_close("out", out, want, kind="outputs")


@pytest.mark.parametrize("selection", ["head", "group"])
@pytest.mark.parametrize("scorer", [*SCORERS, "socket with values"])
def test_it_is_its_definition(assert_close, scorer, selection):
    """Every query of a ragged batch, against one query after another in float64."""
    weighting = True if scorer == "socket with values" else None
    config, cache, query, key, value = problem(scorer.split()[0], weighting)
    config = dataclasses.replace(config, selection=selection)
    out, report = attend(query, cache, config)
    assert not report.is_dense
    group = N // K
    wanted = np.zeros((B, T, N, V))
    for b, t, n in np.ndindex(B, T, N):
        length = LENGTHS[b] - T + t + 1
        heads = [n] if selection == "head" else range(n // group * group, (n // group + 1) * group)
        tokens = key[b, :, n // group], value[b, :, n // group]
        found = [
            defined_scores(config, cache, query[b, t, m], *tokens, length, length - 1, m)
            for m in heads
        ]
        inputs = query[b, t, n], tokens[0][:length], tokens[1][:length]
        wanted[b, t, n], positions = reference.attend(*inputs, np.max(found, axis=0), config)
        m = n if selection == "head" else n // group
        assert report.count[b, t, m] == len(positions) == min(12, length)
        assert report.indices[b, t, m, : len(positions)].tolist() == positions
        assert kept(config, length) == (len(positions), False)
    assert_close("out", out, wanted, kind="outputs")


@pytest.mark.parametrize("scorer", ["sign_linear", "quantized", "quest", "socket"])
def test_pieces_and_cuts_leave_the_same_codes(assert_close, scorer):
    config, whole, query, key, value = problem(scorer)
    mask = np.arange(50) < LENGTHS[:, None]
    cache = empty(config)
    for piece in (slice(0, 1), slice(1, 30), slice(20, 50)):  # ten tokens are cut and added again
        kept_before = mask[:, : piece.start].sum(axis=1)
        cache = append(
            cache.truncate(jnp.asarray(kept_before)),
            key[:, piece],
            value[:, piece],
            key_value_mask=mask[:, piece],
        )
    coded = SparseCache.of(jax.random.key(3), whole.kv, config)
    want = attend(query, whole, config)
    for name, other in (("pieces", cache), ("of", coded), ("grown", cache.grow(96))):
        assert_close(name, attend(query, other, config), want, kind="rerun")
    if whole.codes is not None:
        seen = np.arange(C) < LENGTHS[:, None, None]
        differing = (np.asarray(cache.codes) != np.asarray(whole.codes)).any(axis=-1) & seen
        assert differing.sum() <= 1  # a projection within rounding of a border


@pytest.mark.parametrize("scorer", ["sign_linear", "quest", "socket"])
@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_what_lies_beyond_a_row_changes_nothing(assert_close, scorer, junk):
    config, cache, query, _, _ = problem(scorer)
    want = attend(query, cache, config)
    beyond = np.arange(C)[:, None, None] >= LENGTHS[:, None, None, None]
    kv = dataclasses.replace(
        cache.kv,
        key=jnp.where(beyond, junk, cache.kv.key),
        value=jnp.where(beyond, junk, cache.kv.value),
    )
    again = SparseCache.of(jax.random.key(3), kv, config)
    assert_close("junk", attend(query, again, config), want, kind="rerun")


def test_a_large_budget_and_short_sequences_are_dense(assert_close):
    config, cache, query, _, _ = problem("quantized")
    dense = quick.jit(dense_decode_attention)(query, cache.kv)
    everything = dataclasses.replace(config, budget=60)
    out, report = attend(query, cache, everything)
    assert_close("budget", out, dense, kind="outputs")
    assert report.count[:, -1, 0].tolist() == LENGTHS.tolist()
    below = dataclasses.replace(config, dense_below=51)
    out, report = attend(query, cache, below)
    assert report.is_dense
    assert_close("dense_below", out, dense, kind="rerun")
    assert report.count[:, -1, 0].tolist() == LENGTHS.tolist()
    assert not attend(query, cache, dataclasses.replace(config, dense_below=50))[1].is_dense


def test_many_queries_are_single_steps_and_padded_ones_are_zero(assert_close):
    config, cache, query, _, _ = problem("quantized")
    out, report = attend(query, cache, config)
    for t in range(T):
        length = jnp.asarray(LENGTHS - T + t + 1)
        one, single = attend(query[:, t : t + 1], cache.truncate(length), config)
        assert_close("out", one, out[:, t : t + 1], kind="resumed")
        np.testing.assert_array_equal(single.indices, report.indices[:, t : t + 1])
    mask = np.array([[True, False, True]] * B)
    spoilt = np.where(mask[..., None, None], query, np.nan)
    padded, _ = attend(spoilt, cache, config, query_mask=mask)
    assert np.isfinite(padded).all()
    assert not np.asarray(padded)[:, 1].any()
    assert_close("last", padded[:, 2], out[:, 2], kind="resumed")


def test_rows_do_not_depend_on_each_other(assert_close):
    config, cache, query, _, _ = problem("sign_linear")
    want = attend(query, cache, config)
    for row in range(B):
        alone = jax.tree.map(lambda x, row=row: x[row : row + 1], cache.kv)
        alone = SparseCache.of(jax.random.key(3), alone, config)
        got = attend(query[row : row + 1], alone, config)
        assert_close("out", got[0], want[0][row : row + 1], kind="resumed")
        np.testing.assert_array_equal(got[1].indices, want[1].indices[row : row + 1])


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("scorer", ["sign_linear", "socket", "quest"])
def test_grouped_heads_read_what_heads_of_their_own_would(assert_close, scorer, group):
    """Repeated keys have equal codes. In a group of one, the group selects what the head does."""
    config, rng = config_of(scorer), np.random.default_rng(group)
    query, *tokens = draw_tokens(rng, B, 50, K * group, K, H, V)
    query, mask = query[:, -T:], np.arange(50) < LENGTHS[:, None]

    def cache_of(key, value):
        sizes = B, C, key.shape[2], H, V, jnp.float32
        cache = SparseCache.init(jax.random.key(3), *sizes, config=config)
        return append(cache, key, value, key_value_mask=mask)

    grouped, repeated = cache_of(*tokens), cache_of(*(x.repeat(group, axis=2) for x in tokens))
    if config.scorer != "quest":
        np.testing.assert_array_equal(repeated.codes, np.repeat(grouped.codes, group, axis=1))
    (got, report), (want, own) = attend(query, grouped, config), attend(query, repeated, config)
    assert_close("out", got, want, kind="resumed")
    np.testing.assert_array_equal(report.indices, own.indices)
    if group == 1:
        together = attend(query, grouped, dataclasses.replace(config, selection="group"))
        assert_close("group of one", together, (got, report), kind="rerun")


@pytest.mark.parametrize("scorer", ["sign_linear", "quantized", "socket", "socket_unit", "oracle"])
def test_the_order_of_the_candidates_does_not_matter(assert_close, scorer):
    """Only forced tokens have a place. The others are drawn by their scores, wherever they are."""
    config, rng = config_of(scorer), np.random.default_rng(4)
    query, key, value = draw_tokens(rng, B, 50, N, K, H, V)
    first, last = config.sink, 50 - config.window
    order = np.r_[:first, first + rng.permutation(last - first), last:50]
    want, report = attend(query[:, -1:], append(empty(config), key, value), config)
    moved = append(empty(config), key[:, order], value[:, order])
    got, other = attend(query[:, -1:], moved, config)
    assert_close("out", got, want, kind="outputs")
    np.testing.assert_array_equal(np.sort(order[other.indices], axis=-1), report.indices)
    assert (np.asarray(other.indices) != np.asarray(report.indices)).any()


def test_scale_of_a_key_counts_only_in_linear_scores(assert_close):
    """Quest has scores of full pages, which the first eight tokens fill."""
    linear = dict.fromkeys(("sign_linear", "quantized", "oracle", "quest"), 2.0)
    signs = dict.fromkeys(("socket", "socket_unit", "hamming"), 1.0)
    for scorer, factor in (signs | linear).items():
        config, _, query, key, value = problem(scorer)
        once, twice = (append(empty(config), x * key[:, :9], value[:, :9]) for x in (1, 2))
        got = score(jnp.asarray(query), twice)[..., :8]
        assert_close(scorer, got, factor * score(jnp.asarray(query), once)[..., :8], kind="outputs")


def test_a_row_beyond_its_room_gives_nan_and_one_program_serves_all_lengths(monkeypatch):
    """Prefixes of 16, 64, 256 and 300 slots are read in turn, dense attention first."""
    monkeypatch.setattr(sparse_attention, "SHORTEST_PREFIX", 16)
    config = config_of("quantized", dense_below=20)
    rng = np.random.default_rng(2)
    query, key, value = draw_tokens(rng, 1, 302, N, K, H, V)
    cache, compiled = empty(config, capacity=300, rows=1), []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, *token):
        compiled.append(1)
        cache = cache.append(*token[1:])
        return cache, *sparse_decode_attention(token[0], cache, return_report=True)

    for t in range(302):
        cache, out, report = step(cache, *(x[:, t : t + 1] for x in (query, key, value)))
        assert np.isfinite(out).all() == (t < 300)
        assert report.is_dense == (t + 1 < 20)
        if 20 <= t < 300:
            listed = np.asarray(report.indices)[0, 0]
            assert {0, 1, t - 3, t - 2, t - 1, t} <= set(listed[0].tolist())
            assert (np.diff(listed, axis=-1) > 0).all()
    assert len(compiled) == 1
    shapes = jax.eval_shape(lambda: empty(config, capacity=4096, rows=1))
    tokens = [jax.ShapeDtypeStruct((1, 1, n, w), jnp.float32) for n, w in ((N, H), (K, H), (K, V))]
    memory = step.lower(shapes, *tokens).compile().memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    assert memory.alias_size_in_bytes == held


def errors():
    config, cache, query, key, value = problem("sign_linear")
    call = functools.partial(sparse_decode_attention, query)
    make = SparseConfig
    return {
        "scorer": (lambda: make(scorer="sockt"), ValueError,
                   "scorer='sockt' is unknown; choose one of ['socket', "),
        "sink": (lambda: make(budget=128, sink=128), ValueError,
                 "budget=128 must hold sink=128 and window=128; give at least 256, or smaller"),
        "window": (lambda: make(window=0), ValueError, "window=0 must be an integer of at least 1"),
        "budget": (lambda: make(budget=0), ValueError, "budget=0 must be an integer of at least 1"),
        "bits": (lambda: make(scorer="quantized", code_bits=3), ValueError,
                 "code_bits=3 is not supported by scorer='quantized'; it takes 2 or 4"),
        "rotations": (lambda: make(num_rotations=0), ValueError, "num_rotations=0 must be"),
        "planes": (lambda: make(scorer="socket", num_planes=11), ValueError, "at most 10"),
        "sharpness": (lambda: make(scorer="socket", sharpness=0.0), ValueError,
                      "sharpness=0.0 must be a finite number above 0"),
        "infinite": (lambda: make(scorer="socket", sharpness=np.inf), ValueError, "sharpness=inf"),
        "half a rotation": (lambda: make(num_rotations=1.5), ValueError,
                            "num_rotations=1.5 must be an integer of at least 1"),
        "words": (lambda: make(scorer="socket", num_tables="2"), ValueError, "num_tables='2' must"),
        "weighting": (lambda: make(scorer="socket", value_weighting="no"), ValueError,
                      "value_weighting='no' must be True or False"),
        "list": (lambda: make(scorer=["socket"]), ValueError, "scorer=['socket'] is unknown"),
        "no effect": (lambda: make(num_tables=60), ValueError,
                      "num_tables=60 has no effect with scorer='quantized'; leave it out"),
        "pages": (lambda: make(scorer="quest", window=8), ValueError,
                  "page_size=16 must be at most window=8"),
        "selection": (lambda: make(selection="all"), ValueError, "selection='all' is unknown"),
        "capacity": (lambda: empty(SparseConfig(scorer="quest"), capacity=1000), ValueError,
                     "capacity=1000 must be a multiple of page_size=16; 1008 is"),
        "coding": (lambda: call(cache, config_of("quantized")), ValueError,
                   "coded for scorer='sign_linear', num_rotations=2, code_bits=1; config asks for "
                   "scorer='quantized', num_rotations=1, code_bits=4: make a cache with"),
        "no codes": (lambda: call(cache.kv, config), ValueError,
                     "this cache has no codes; make a SparseCache, or call dense_decode_attention"),
        "no cache": (lambda: call(None), TypeError, "cache must be a SparseCache; got NoneType"),
        "too many": (lambda: sparse_decode_attention(query.repeat(20, 1), cache), ValueError,
                     "query has 60 tokens, but row 0 of the cache holds 50; append their keys"),
        "room": (lambda: cache.append(key, value), ValueError,
                 "row 0 holds 50 of 64 tokens; 50 more do not fit: cache.grow(128)"),
        "kernels": (lambda: call(cache, implementation="pallas"), NotImplementedError,
                    "the sparse kernels run on CUDA devices, and this host has none; pass"),
        "gradient": (lambda: jax.grad(lambda q: sparse_decode_attention(q, cache).sum())(query),
                     NotImplementedError, "decode attention has no gradient; train with"),
    }  # fmt: skip


def test_bad_calls_are_refused_in_words():
    check_refusals(errors())


def test_integers_of_any_kind_are_sizes():
    config = SparseConfig(budget=np.int64(512), num_rotations=np.int32(2))
    assert config == SparseConfig(budget=512, num_rotations=2)
    assert hash(config) == hash(SparseConfig(budget=512, num_rotations=2))


def test_the_paper_s_setting_is_600_bits():
    config = SparseConfig.paper(budget=1024)
    coding = config.coding()
    assert coding.num_tables * coding.num_planes == 600
    assert (config.sink, config.window, config.value_weighting) == (128, 128, True)
