"""The kernels of sparse decoding, against definitions in NumPy, interpreted and on a card."""

import functools
import re
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import backend, sparse
from pallas_kernels.sparse import Forced
from pallas_kernels.sparse.codes import Tile as CodeTile
from pallas_kernels.sparse.keys import sampled_slots
from pallas_kernels.sparse.scores import Tile
from race_jax import SparseCache, SparseConfig, sparse_decode_attention
from race_jax.core import dispatch, shards
from race_jax.core.hashing import init_rotations
from race_jax.sparse import codes
from race_jax.sparse.coded import kinds_of
from tests.sparse.problems import draw_tokens

HOW = [
    pytest.param(True, id="interpreted"),
    pytest.param(False, marks=pytest.mark.gpu, id="compiled"),
]
TILES = [
    Tile(1024, 128, 4, 3),
    Tile(1024, 128, 4, 1),
    Tile(256, 256, 8, 1),
    Tile(512, 64, 2, 4),
    Tile(2048, 256, 8, 3),
]
SMALL = Tile(128, 64)


class Case(NamedTuple):
    """The sizes of a call. Its rows end at different tokens, one of them at the capacity."""

    batch: int = 2
    queries: int = 1
    kv_heads: int = 2
    group: int = 4
    capacity: int = 300
    coordinates: int = 128
    bits: int = 4


SCORES = {
    "signs": Case(coordinates=256, bits=1),
    "two bits, G = 8": Case(group=8, bits=2, capacity=256),
    "four bits, G = 16": Case(group=16, capacity=129),
    "G = 1, few bytes": Case(batch=3, group=1, coordinates=32, bits=1),
    "G = 2, no power of two": Case(group=2, coordinates=96, capacity=65),
    "T = 4": Case(queries=4, capacity=193),
    "T = 3, G = 2": Case(queries=3, group=2, coordinates=24, bits=2),
    "one token": Case(batch=1, capacity=1),
}
FORCED = Forced(sink=3, window=9)


def draw(case: Case):
    """Rounded queries, words, factors, positions and units. The first query of row 0 is padded."""
    rng = np.random.default_rng(3)
    batch, queries, kv_heads, group, capacity, coordinates, bits = case
    words = codes.words_of_levels(coordinates, bits)
    rounded = rng.integers(-127, 128, (batch, queries, kv_heads * group, coordinates))
    code = rng.integers(0, 2**32, (batch, kv_heads, capacity, words), dtype=np.uint32)
    factor = rng.uniform(0.1, 2, (batch, kv_heads, capacity)).astype(np.float16)
    last = np.linspace(capacity - 1, queries - 1, batch).astype(int)
    positions = last[:, None] + np.arange(1 - queries, 1)
    factor[np.arange(capacity) > last[:, None, None] + 0 * factor.astype(int)] = np.nan
    if queries > 1:
        positions[0, 0] = -1
    unit = rng.uniform(0.1, 2, rounded.shape[:3])
    return (
        rounded.astype(np.float32), code, factor, positions.astype(np.int32),
        unit.astype(np.float32),
    )  # fmt: skip


def defined(rounded, words, factor, positions, unit, *, bits, forced):
    """Scores as integers, then in float32, with the forced and the hidden tokens."""
    count, kv_heads = rounded.shape[-1], words.shape[1]
    byte = words[..., None] >> np.arange(0, 32, 8, dtype=np.uint32) & 255
    byte = byte.reshape(*words.shape[:3], -1)
    levels = np.concatenate([byte >> s & 2**bits - 1 for s in range(0, 8, bits)], axis=-1)
    levels = 2 * levels[..., :count].astype(np.int64) - (2**bits - 1)
    grouped = rounded.astype(np.int64).reshape(*rounded.shape[:2], kv_heads, -1, count)
    product = np.einsum("btkgm,bkcm->btkgc", grouped, levels).astype(np.float32)
    if factor is None:
        scores = (product - count) / 2
    else:
        scores = product * factor.astype(np.float32)[:, None, :, None]
    scores = scores.reshape(*rounded.shape[:3], -1)
    if unit is not None:
        scores = (scores * unit[..., None]).reshape(*grouped.shape[:4], -1).max(axis=3)
    slots, positions = np.arange(words.shape[2]), positions[:, :, None, None]
    scores[np.broadcast_to((slots < 3) | (slots > positions - forced.window), scores.shape)] = (
        np.inf
    )
    return scores, np.broadcast_to(slots <= positions, scores.shape)


def check_scores(case, tile, interpret, group=False, hamming=False):
    rounded, words, factor, positions, unit = draw(case)
    if hamming:
        rounded, factor = np.where(rounded >= 0, 1.0, -1.0), None
    inputs = rounded, words, factor, positions, unit if group else None
    options = {"bits": case.bits, "forced": FORCED}
    how = {"most_sampled": 32, "tile": tile, "interpret": interpret}
    run = jax.jit(functools.partial(sparse.linear_scores, **options, **how))
    got, sample = (np.asarray(x) for x in run(*inputs))
    want, seen = defined(*inputs, **options)
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got[seen], want[seen])
    assert np.isfinite(want[seen]).sum() > 0 or case.capacity == 1
    np.testing.assert_array_equal(np.asarray(run(*inputs)[0])[seen], want[seen])
    # Slots of an array that is not written hold NaN in the interpreter.
    chunks = -(-(positions.max(axis=1) + 1) // tile.chunk) * tile.chunk
    unwritten = np.arange(case.capacity) >= chunks[:, None, None, None]
    unwritten = np.broadcast_to(unwritten, got.shape)
    assert not interpret or np.isnan(got[unwritten]).all()
    hidden = ~seen & ~unwritten
    assert (got[hidden] == -np.inf).all()
    for row, end in enumerate(positions.max(axis=1) + 1):
        shift = next(i for i in range(32) if sample.shape[-1] << i >= end)
        slots = np.asarray(sampled_slots(jnp.arange(sample.shape[-1]), jnp.int32(shift)))
        np.testing.assert_array_equal(slots >> shift, np.arange(sample.shape[-1]))
        seen = slots < end
        np.testing.assert_array_equal(sample[row][..., seen], got[row][..., slots[seen]])
        assert end <= sample.shape[-1] or 2 * seen.sum() >= sample.shape[-1] - 1


@pytest.mark.parametrize("interpret", HOW)
@pytest.mark.parametrize("group", [False, True], ids=["head", "group"])
@pytest.mark.parametrize("case", SCORES.values(), ids=SCORES)
def test_scores_are_their_definition(case, group, interpret):
    check_scores(case, SMALL, interpret, group)


@pytest.mark.parametrize("interpret", HOW)
@pytest.mark.parametrize("group", [False, True], ids=["head", "group"])
def test_hamming_scores_count_differing_signs(group, interpret):
    check_scores(SCORES["signs"], SMALL, interpret, group, hamming=True)


QUERIES = {  # B, T, N, K, H, M, b
    "one of 32 heads": (1, 1, 32, 8, 128, 128, 4),
    "two rotations": (2, 1, 8, 2, 64, 128, 1),
    "odd width": (1, 3, 4, 1, 24, 48, 2),
    "many queries": (1, 8, 4, 2, 128, 256, 2),
}


@pytest.mark.parametrize("interpret", HOW)
@pytest.mark.parametrize("signs", [False, True], ids=["levels", "signs"])
@pytest.mark.parametrize("case", QUERIES.values(), ids=QUERIES)
def test_queries_are_rounded_as_by_xla(case, signs, interpret, rng):
    batch, queries, heads, kv_heads, width, count, bits = case
    query = jnp.asarray(rng.standard_normal((batch, queries, heads, width)), jnp.bfloat16)
    query = query.at[0, 0, 0].set(0)
    planes = jnp.asarray(rng.standard_normal((count, width)) * width**-0.5, jnp.bfloat16)
    want, unit = codes.round_query(query, planes)
    if signs:
        want, unit = codes.signs(query, planes), jnp.ones_like(unit)
    code_bytes = 4 * codes.words_of_levels(count, bits)
    parts = 8 // bits
    want = np.pad(np.asarray(want), [(0, 0)] * 3 + [(0, parts * code_bytes - count)])
    want = want.reshape(batch, queries, kv_heads, -1, parts, code_bytes)
    want = want.transpose(0, 2, 4, 1, 3, 5).reshape(batch, kv_heads, parts, -1, code_bytes)
    run = functools.partial(sparse.rounded_queries, kv_heads=kv_heads, bits=bits, signs=signs)
    got, found = jax.jit(functools.partial(run, interpret=interpret))(query, planes)
    got = np.asarray(got, int)
    used = want.shape[3]
    difference = np.abs(got[:, :, :, :used, :code_bytes] - want)
    assert difference.max() <= (0 if interpret else 1)
    assert (difference > 0).mean() < 1e-3
    assert not got[:, :, :, used:].any()
    assert not got[..., code_bytes:].any()
    np.testing.assert_allclose(found, unit[..., 0], rtol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_every_tile_gives_the_same_scores(bits, tile):
    check_scores(Case(capacity=4001, bits=bits), tile, interpret=False)


def test_scores_under_vmap():
    inputs = draw(SCORES["T = 3, G = 2"])[:4]
    run = functools.partial(sparse.linear_scores, bits=2, forced=FORCED, tile=SMALL, interpret=True)
    (want, _), seen = run(*inputs), defined(*inputs, None, bits=2, forced=FORCED)[1]
    twice = [np.stack([x, x[::-1]]) for x in inputs]
    got, _ = jax.vmap(run)(*twice)
    np.testing.assert_array_equal(np.asarray(got[0])[seen], np.asarray(want)[seen])
    np.testing.assert_array_equal(np.asarray(got[1])[::-1][seen], np.asarray(want)[seen])


KEYS = {  # length, head dim, rotations, bits
    "signs": (70, 64, 2, 1),
    "two bits": (65, 24, 1, 2),
    "four bits": (64, 128, 1, 4),
    "one token": (1, 80, 1, 4),
    "few bytes": (9, 16, 1, 1),
}


@pytest.mark.parametrize("interpret", HOW)
@pytest.mark.parametrize("name", KEYS)
def test_codes_are_those_of_xla_and_do_not_depend_on_other_keys(name, interpret):
    length, width, rotations, bits = KEYS[name]
    planes = init_rotations(jax.random.key(1), num_rotations=rotations, head_dim=width)
    planes = planes.astype(jnp.bfloat16)
    key = jax.random.normal(jax.random.key(2), (2, length, 2, width), jnp.bfloat16)
    key = key.at[1, length // 2].set(0)
    run = jax.jit(functools.partial(sparse.level_codes, bits=bits, interpret=interpret))
    words, factor = run(key, planes)
    xla = [jnp.swapaxes(x, 1, 2) for x in codes.code_levels(key, planes, bits)]
    levels, wanted = (codes.unpack_levels(x, bits, len(planes)) for x in (words, xla[0]))
    # A coordinate may round to the other side of a border.
    assert np.mean(levels != wanted) <= 1e-3
    assert np.abs(levels - wanted).max() <= 2
    same = np.asarray((words == xla[0]).all(axis=-1))
    np.testing.assert_array_max_ulp(np.asarray(factor)[same], np.asarray(xla[1])[same], 1)
    assert not np.asarray(factor)[1, :, length // 2].any()
    for t in {0, length // 2, length - 1}:
        alone = run(key[:, t : t + 1], planes)
        np.testing.assert_array_equal(alone[0][:, :, 0], words[:, :, t])
        np.testing.assert_array_equal(alone[1][:, :, 0], factor[:, :, t])
    spoilt = run(key.at[:, : length // 2].set(jnp.nan), planes)
    np.testing.assert_array_equal(spoilt[0][:, :, length // 2 :], words[:, :, length // 2 :])


CONFIGS = {
    "sign_linear": {"selection": "head"},
    "quantized": {"selection": "group"},
    "hamming": {"selection": "group"},
}


def decode(config, implementation, count=3):
    """The result of a ragged cache and the queries of its last tokens, one of which is padded."""
    rng = np.random.default_rng(5)
    query, key, value = draw_tokens(rng, 3, 60, 4, 2, 16, 32, jnp.bfloat16)
    lengths = np.array([60, 37, 9])
    cache = SparseCache.init(jax.random.key(3), 3, 64, 2, 16, 32, config=config)
    cache = cache.append(key, value, key_value_mask=jnp.arange(60) < lengths[:, None])
    last = jnp.stack([q[n - count : n] for q, n in zip(query, lengths, strict=True)])
    run = jax.jit(
        functools.partial(
            sparse_decode_attention, return_report=True, implementation=implementation
        )
    )
    mask = jnp.arange(count) > jnp.array([[0], [-1], [-1]])
    return cache, *run(last, cache, query_mask=mask)


@pytest.mark.parametrize("scorer", CONFIGS)
def test_decoding_by_interpreted_kernels_is_that_of_xla(scorer, monkeypatch, assert_close):
    config = SparseConfig(
        budget=12, sink=2, window=4, dense_below=0, scorer=scorer, **CONFIGS[scorer]
    )
    want = decode(config, "xla")
    seen = []

    def interpreted(function, **options):
        def run(*arrays, **given):
            seen.append(function.__name__)
            return function(*arrays, **given, **options, interpret=True)

        return run

    named = (
        sparse.level_codes,
        sparse.rounded_queries,
        sparse.select,
        sparse.listed_attention,
    )
    kernels = SimpleNamespace(
        Forced=Forced,
        linear_scores=interpreted(sparse.linear_scores, tile=SMALL),
        **{function.__name__: interpreted(function) for function in named},
        **dict.fromkeys(
            (
                *("supports", "supports_queries", "supports_selection"),
                *("supports_attention", "supports_codes"),
            ),
            lambda *_, **__: None,
        ),
    )
    monkeypatch.setattr(dispatch, "kernels", lambda: SimpleNamespace(sparse=kernels))
    monkeypatch.setattr(dispatch, "without_cuda", lambda _: None)
    monkeypatch.setattr(dispatch, "decide", lambda *_: dispatch.PALLAS_ASKED)
    got = decode(config, "pallas")
    assert list(dict.fromkeys(seen)) == [
        "level_codes",
        "rounded_queries",
        "linear_scores",
        "select",
        "listed_attention",
    ]
    assert_close("report", got[2], want[2], kind="rerun")
    assert_close("out", got[1], want[1], kind="outputs", dtype="bfloat16")
    np.testing.assert_array_equal(got[0].codes[0, :, :60], want[0].codes[0, :, :60])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 3, 9])
@pytest.mark.parametrize("scorer", CONFIGS)
def test_decoding_by_kernels_is_that_of_xla(scorer, count, assert_close):
    config = SparseConfig(
        budget=12, sink=2, window=4, dense_below=0, scorer=scorer, **CONFIGS[scorer]
    )
    _, want, report = decode(config, "xla", count)
    _, got, found = decode(config, "pallas", count)
    assert_close("report", found, report, kind="rerun")
    assert_close("out", got, want, kind="outputs", dtype="bfloat16")


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("group", [False, True], ids=["head", "group"])
def test_every_tile_lowers_for_cuda(tile, group, on_h200):
    inputs = draw(Case(queries=2, capacity=1000))
    inputs = inputs if group else (*inputs[:4], None)
    run = functools.partial(sparse.linear_scores, bits=4, forced=FORCED, tile=tile)
    with on_h200():
        lowered = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count('name = "sparse_scores"') == 1


@pytest.mark.parametrize("tokens", [64, 128])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_the_kernel_of_codes_lowers_for_cuda(bits, tokens, on_h200):
    key = jax.ShapeDtypeStruct((2, 65, 2, 80), jnp.bfloat16)
    planes = jax.ShapeDtypeStruct((160, 80), jnp.bfloat16)
    run = functools.partial(sparse.level_codes, bits=bits, tile=CodeTile(tokens))
    with on_h200():
        lowered = jax.jit(run).trace(key, planes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count('name = "sparse_codes"') == 1


def limit(*, scorer="quantized", heads=4, kv_heads=2, capacity=8, words=16, batch=1):
    query = jax.ShapeDtypeStruct((batch, 1, heads, 16), jnp.bfloat16)
    code = jax.ShapeDtypeStruct((batch, kv_heads, capacity, words), jnp.uint32)
    return sparse.supports(query, code, scorer=scorer)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"scorer": "socket"}, "scorers sign_linear, quantized, hamming; got 'socket'"),
        ({"heads": 34}, "at most 16 query heads of a key/value head; got 34 query heads and 2"),
        ({"words": 33}, "codes up to 1024 bits; got 1056"),
        ({"batch": 8, "kv_heads": 32, "heads": 32, "capacity": 2**17},
         r"codes below 2 GiB; got 2.0 GiB of shape \(8, 32, 131072, 16\), so split the batch"),
        ({"batch": 0}, "no empty arrays"),
    ],
)  # fmt: skip
def test_a_limit_of_scores_is_named_with_what_was_given(changed, sentence):
    assert re.search(sentence, limit(**changed))


def test_a_limit_of_codes_is_named_with_what_was_given():
    def said(dtype="bfloat16", width=16, count=32, bits=4, length=1):
        key = jax.ShapeDtypeStruct((1, length, 2, width), dtype)
        return sparse.supports_codes(key, jax.ShapeDtypeStruct((count, width), dtype), bits=bits)

    assert "bfloat16 keys; got float32" in said("float32")
    assert "heads of up to 256; got 272" in said(width=272)
    assert "codes up to 1024 bits; got 1088" in said(count=272)
    assert "no empty arrays" in said(length=0)
    assert said() == limit() == backend.missing("sparse")


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_they_lower_for_cuda_where_rows_and_heads_are_split(kind):
    """On an Explicit mesh, and inside ``jax.shard_map``, with dense attention for short rows."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    sizes = (2, 2), ("data", "model")
    mesh = jax.sharding.AbstractMesh(*sizes, abstract_device=device, axis_types=(kind,) * 2)
    config = SparseConfig(budget=256, dense_below=300)
    shape = 4, 512, 2, 64
    cache = jax.eval_shape(lambda: SparseCache.init(jax.random.key(0), *shape, config=config))
    arrays = cache, *(jax.ShapeDtypeStruct((4, 1, heads, 64), jnp.bfloat16) for heads in (8, 2))
    tokens, tables = P("data", None, "model"), P("data", "model")
    by_kind = {shards.TOKENS: tokens, shards.TABLES: tables, shards.ROWS: P("data")}
    kinds = kinds_of(cache), shards.TOKENS, shards.TOKENS
    specs = jax.tree.map(lambda kind: by_kind.get(kind, P()), kinds)

    def step(cache, query, key):
        cache = cache.append(key, key)
        out, report = sparse_decode_attention(query, cache, return_report=True)
        return cache, out, report.indices, report.count

    with jax.sharding.use_abstract_mesh(mesh):
        if kind == AxisType.Explicit:
            run, split = step, lambda x, spec: x.update(sharding=NamedSharding(mesh, spec))
            arrays = jax.tree.map(split, arrays, specs)
        else:
            run = jax.shard_map(step, in_specs=specs, out_specs=(specs[0], *[tokens] * 3))
        text = jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    for name in ("codes", "queries", "scores", "threshold", "attend"):
        assert f'name = "sparse_{name}"' in text
    assert 'name = "dense_attend"' in text
