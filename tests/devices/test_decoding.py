"""Decoding from a cache whose rows or heads lie on several devices equals that of one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from race_jax import SparseCache, SparseConfig, dense_decode_attention, sparse
from race_jax.core import shards
from race_jax.models import ModelConfig, TransformerLM
from race_jax.models.decode import Sampling, generate
from race_jax.sparse import coded, score, sparse_decode_attention
from tests import newest
from tests.sparse.problems import draw_tokens

B, C, K, N, H, V, T = 4, 64, 4, 8, 16, 5, 3
AXES = {"rows": ("data", None), "heads": (None, "model"), "both": ("data", "model")}
OWN = {
    "quantized": {},
    "socket": {"num_tables": 7, "num_planes": 3, "value_weighting": True},
    "quest": {"page_size": 4},
}


def specs(kinds, rows, heads):
    """The specs of arrays of these kinds, as they are split over the rows and the heads."""
    of = {
        shards.TOKENS: P(rows, None, heads),
        shards.TABLES: P(rows, heads),
        shards.ROWS: P(rows),
        shards.SLOTS: P(rows),
        shards.SHARED: P(),
    }
    return jax.tree.map(of.get, kinds)


def decode(cache, query, key, value, mask):
    """Appends, cuts and appends again, and attends to all tokens and to the best of them."""
    for piece in (slice(0, 17), slice(9, 30)):
        room = mask[:, : piece.start].sum(axis=1)
        cache = cache.truncate(room)
        tokens = key[:, piece], value[:, piece]
        kv = cache.kv.append(*tokens, key_value_mask=mask[:, piece])
        cache = cache.append(*tokens, key_value_mask=mask[:, piece])
    options = {"query_mask": mask[:, -T:]}
    query = query[:, -T:]
    out, report = sparse_decode_attention(query, cache, **options, return_report=True)
    dense = dense_decode_attention(query, kv, **options)
    visible = jnp.ones((len(query), T, 1), bool) & (jnp.arange(C) < 9)
    best = sparse.select(score(query, cache), forced=visible & False, visible=visible, budget=5)
    listed = sparse.attend(query, cache.kv, best)
    return cache, (out, dense, listed, *best, report.indices, report.count)


def problem(scorer, selection, least=20):
    """A cache, and tokens of which the first rows have fewer than 20."""
    config = SparseConfig(
        12, scorer, sink=2, window=4, selection=selection, dense_below=20, **OWN[scorer]
    )
    cache = SparseCache.init(jax.random.key(3), B, C, K, H, V, jnp.float32, config=config)
    rng = np.random.default_rng(5)
    tokens = [jnp.asarray(x) for x in draw_tokens(rng, B, 30, N, K, H, V)]
    lengths = np.maximum([[11], [19], [30], [25]], least)
    mask = rng.permuted(np.arange(30) < lengths, axis=1)
    kinds = coded.kinds_of(cache), *3 * [shards.TOKENS], shards.SLOTS
    return (cache, *tokens, jnp.asarray(mask)), kinds


CASES = "quantized rows head", "quantized heads group", "socket both group", "quest both head"


@pytest.mark.parametrize("case", newest.examples(CASES, CASES[:2]))
def test_an_explicit_mesh_and_shard_map_give_what_one_device_gives(case, assert_close):
    """On the mesh, the rows of one device are short enough for dense attention, but not all are."""
    scorer, split, selection = case.split()
    split, sizes, one = AXES[split], ((2, 4), ("data", "model")), jax.jit(decode)
    arrays, kinds = problem(scorer, selection, least=1)
    want = one(*arrays)
    with jax.set_mesh(jax.make_mesh(*sizes)):
        placed = jax.device_put(jax.device_get(arrays), specs(kinds, *split))
        got = jax.jit(decode)(*placed)
        assert jax.typeof(got[1][0]).sharding.spec == P(split[0], None, split[1], None)
    assert_close("on an Explicit mesh", jax.device_get(got), want, kind="resumed")
    arrays, _ = problem(scorer, selection)
    run = jax.shard_map(
        decode,
        mesh=jax.make_mesh(*sizes, axis_types=(AxisType.Auto,) * 2),
        in_specs=specs(kinds, *split),
        out_specs=specs((kinds[0], (shards.TOKENS,) * 7), *split),
    )
    assert_close("in shard_map", jax.jit(run)(*arrays), one(*arrays), kind="resumed")


def test_a_sharded_cache_is_coded_and_grown_where_it_lies(assert_close):
    """Nothing is compiled as one program here, as in a shell."""
    (cache, _, key, value, mask), _ = problem("quantized", "head")
    kv = cache.kv.append(key, value, key_value_mask=mask)

    def coded_again(kv):
        cache = SparseCache.of(jax.random.key(3), kv, cache_config)
        return cache.grow(80).reset(jnp.arange(B) == 1)

    cache_config = cache.config
    want = coded_again(kv)
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "model"))):
        kinds = coded.kinds_of(cache)
        placed = jax.device_put(kv, specs(kinds.kv, "data", "model"))
        got = coded_again(placed)
        assert jax.typeof(got.codes).sharding.spec[:2] == ("data", "model")
        with pytest.raises(ValueError, match="row 0 holds 20 of 80 tokens; 90 more do not fit"):
            got.append(*(x.repeat(3, 1) for x in (key, value)))
        assert_close("cache", jax.device_get(got), jax.device_get(want), kind="rerun")


def test_a_model_decodes_sparsely_on_a_mesh():
    config = ModelConfig(num_layers=1, width=16, num_heads=2, attention="softmax")
    model = TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0))
    prompt = np.arange(28, dtype=np.int32).reshape(4, 7) * 7 % 20
    options = {"max_tokens": 3, "sampling": Sampling(greedy=True)}
    few = SparseConfig(4, sink=1, window=2, dense_below=0)
    want = generate(model, prompt, sparse=few, **options)
    with jax.set_mesh(jax.make_mesh((4,), ("data",), devices=jax.devices()[:4])):
        got = generate(model, jax.device_put(prompt, P("data")), sparse=few, **options)
    np.testing.assert_array_equal(got, want)
