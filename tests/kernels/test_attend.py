"""The kernels of decoding attend to all slots of a row or to a list, as a loop in float64 does."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend, sparse
from pallas_kernels.sparse.attend import ROWS, Plan, plan_for
from race_jax import KVCache, dense_decode_attention
from race_jax.core import dispatch
from race_jax.sparse import attention

C = 200  # no multiple of a tile


class Case(NamedTuple):
    """The sizes of a call and how it is cut."""

    times: int = 1
    group: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    value_dim: int = 16
    dtype: str = "bfloat16"
    slopes: bool = False
    plan: Plan = Plan(splits=3)


CASES = [
    Case(),
    Case(times=4, group=4, kv_heads=1, slopes=True),
    Case(group=1, kv_heads=3, head_dim=16, value_dim=64, plan=Plan(splits=1, tile=128)),
    Case(group=8, kv_heads=1, plan=Plan(splits=7, tile=16)),
    Case(times=3, group=2, slopes=True, plan=Plan(splits=4, tile=32)),
]
FLOAT32 = Case(times=2, group=2, dtype="float32", slopes=True)  # on a card they take bfloat16 only
COMPILED = pytest.param(False, marks=pytest.mark.gpu, id="compiled")
LENGTHS = np.array([C, C - 1, 64, 65, 5])


def draw(case: Case, rng):
    """Queries at the end of rows of several lengths, keys, values and slopes."""
    rows, heads = len(LENGTHS), case.group * case.kv_heads
    shapes = {
        "query": (rows, case.times, heads, case.head_dim),
        "key": (rows, C, case.kv_heads, case.head_dim),
        "value": (rows, C, case.kv_heads, case.value_dim),
    }
    arrays = {name: jnp.asarray(rng.normal(size=s), case.dtype) for name, s in shapes.items()}
    slopes = jnp.asarray(rng.uniform(size=(case.kv_heads, case.group)), jnp.float32)
    positions = LENGTHS[:, None] - case.times + np.arange(case.times)
    return arrays, jnp.asarray(positions, jnp.int32), slopes if case.slopes else None


def beyond(array, fill):
    """The array with junk after the last token of every row."""
    hidden = np.arange(C) >= LENGTHS[:, None]
    return jnp.where(hidden[:, :, None, None], jnp.asarray(fill, array.dtype), array)


def attend_to(lists, positions, slopes, *, query, key, value):
    """Attention in float64, with `lists(b, t, n)` the slots that a query head reads."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    out = np.zeros((*query.shape[:3], value.shape[-1]))
    for b, t, n in np.ndindex(query.shape[:3]):
        slots, head = lists(b, t, n), n // group
        if len(slots) == 0:
            continue
        logits = key[b, slots, head] @ query[b, t, n] / np.sqrt(query.shape[-1])
        if slopes is not None:
            logits -= float(slopes[head, n % group]) * (int(positions[b, t]) - slots)
        weights = np.exp(logits - logits.max())
        out[b, t, n] = weights @ value[b, slots, head] / weights.sum()
    return out


@pytest.mark.parametrize("interpret", [True, COMPILED])
@pytest.mark.parametrize("case", [*CASES, FLOAT32], ids=str)
def test_dense(case, interpret, rng, assert_close):
    """Every length is right, and what lies behind it changes no bit."""
    if case.dtype == "float32" and not interpret:
        pytest.skip("the compiled kernels take bfloat16")
    arrays, positions, slopes = draw(case, rng)
    positions = positions.at[-1, 0].set(-1).at[1, 0].set(-2)  # a padded query, and one that is lost
    run = functools.partial(sparse.dense_attention, plan=case.plan, interpret=interpret)
    run = jax.jit(run)
    got = run(*arrays.values(), positions, slopes)
    seen = lambda b, t, n: np.arange(int(positions[b, t]) + 1)  # noqa: E731
    want = attend_to(seen, positions, slopes, **arrays)
    assert np.isnan(np.asarray(got[1, 0], np.float32)).all()
    got, want[1, 0] = got.at[1, 0].set(0), 0
    assert_close("out", got, want, kind="outputs", dtype=case.dtype)
    assert not np.asarray(got[-1, 0], np.float32).any()
    for fill in (np.nan, np.inf):
        junk = (beyond(arrays[name], fill) for name in ("key", "value"))
        again = run(arrays["query"], *junk, positions, slopes).at[1, 0].set(0)
        assert_close("junk", again, got, kind="rerun")


def draw_lists(case: Case, lists: int, budget: int, positions, rng):
    """Lists of every length from none to all, with other legal slots behind them."""
    shape = (*positions.shape, lists)
    indices = np.zeros((*shape, budget), np.int32)
    count = np.zeros(shape, np.int32)
    for b, t, m in np.ndindex(shape):
        seen = int(positions[b, t]) + 1
        count[b, t, m] = [0, 1, budget, budget - 1, rng.integers(budget)][(b + m) % 5]
        count[b, t, m] = min(count[b, t, m], seen)
        indices[b, t, m, : count[b, t, m]] = np.sort(rng.permutation(seen)[: count[b, t, m]])
        indices[b, t, m, count[b, t, m] :] = C - 1
    return jnp.asarray(indices), jnp.asarray(count)


@pytest.mark.parametrize("interpret", [True, COMPILED])
@pytest.mark.parametrize("shared", [False, True], ids=["by head", "by group"])
@pytest.mark.parametrize("case", [*CASES[1:4], FLOAT32], ids=str)
def test_listed(case, shared, interpret, rng, assert_close):
    if case.dtype == "float32" and not interpret:
        pytest.skip("the compiled kernels take bfloat16")
    arrays, positions, _ = draw(case, rng)
    lists = case.kv_heads * (1 if shared else case.group)
    indices, count = draw_lists(case, lists, 70, positions, rng)
    run = jax.jit(functools.partial(sparse.listed_attention, plan=case.plan, interpret=interpret))
    got = run(*arrays.values(), indices, count)

    def kept(b, t, n):
        m = n // case.group if shared else n
        return np.asarray(indices[b, t, m, : int(count[b, t, m])])

    want = attend_to(kept, positions, None, **arrays)
    assert_close("out", got, want, kind="outputs", dtype=case.dtype)
    junk = (beyond(arrays[name], np.nan) for name in ("key", "value"))
    assert_close("junk", run(arrays["query"], *junk, indices, count), got, kind="rerun")
    lost = run(*arrays.values(), indices, count, positions=positions.at[1, 0].set(-2))
    assert np.isnan(np.asarray(lost[1, 0], np.float32)).all()
    assert_close("others", lost.at[1, 0].set(0), got.at[1, 0].set(0), kind="rerun")


@pytest.mark.parametrize("interpret", [True, COMPILED])
def test_a_row_has_the_same_bits_alone(interpret, rng, assert_close):
    arrays, positions, _ = draw(CASES[0], rng)
    run = jax.jit(
        functools.partial(sparse.dense_attention, plan=Plan(splits=3), interpret=interpret)
    )
    together = run(*arrays.values(), positions)
    alone = run(*(x[2:3] for x in arrays.values()), positions[2:3])
    assert_close("row", alone, together[2:3], kind="rerun")


@pytest.mark.gpu
@pytest.mark.parametrize("warps", [2, 4, 8])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("tile", [32, 64, 128])
def test_every_cut(tile, stages, warps, rng, assert_close):
    arrays, positions, _ = draw(Case(head_dim=128, value_dim=128), rng)
    plan = Plan(splits=2, tile=tile, num_warps=warps, num_stages=stages)
    run = jax.jit(functools.partial(sparse.dense_attention, plan=plan))
    got = run(*arrays.values(), positions)
    seen = lambda b, t, n: np.arange(int(positions[b, t]) + 1)  # noqa: E731
    want = attend_to(seen, positions, None, **arrays)
    assert_close("out", got, want, kind="outputs", dtype="bfloat16")
    assert_close("rerun", run(*arrays.values(), positions), got, kind="rerun")


@pytest.fixture
def decoding(monkeypatch):
    """Calls of dense decoding by interpreted kernels, on a machine without a GPU."""
    kernels = SimpleNamespace(
        dense_attention=functools.partial(sparse.dense_attention, interpret=True),
        supports_attention=lambda *_, **__: None,
    )
    monkeypatch.setattr(dispatch, "kernels", lambda: SimpleNamespace(sparse=kernels))
    monkeypatch.setattr(dispatch, "without_cuda", lambda _: None)
    return jax.jit(dense_decode_attention, static_argnames="implementation")


def test_dense_decoding_by_kernels_is_that_of_xla(decoding, rng, assert_close):
    """With slopes, a padded query, and a row that holds more than the capacity."""
    case = CASES[-1]
    arrays, _, slopes = draw(case, rng)
    length = jnp.asarray([*LENGTHS[:-1], C + 1], jnp.int32)
    cache = KVCache(arrays["key"], arrays["value"], length)
    mask = jnp.ones((len(LENGTHS), case.times), bool).at[1, 0].set(False)
    options = {"query_mask": mask, "slopes": slopes.reshape(-1)}
    want, got = (
        decoding(arrays["query"], cache, **options, implementation=x) for x in ("xla", "pallas")
    )
    assert np.isnan(np.asarray(got[-1], np.float32)).all()
    assert_close("out", got[:-1], want[:-1], kind="outputs", dtype="bfloat16")


def test_decoding_by_kernels_has_no_gradient(decoding, rng):
    arrays, *_ = draw(CASES[0], rng)
    length = jnp.asarray(LENGTHS, jnp.int32)

    def loss(query, key):
        cache = KVCache(key, arrays["value"], length)
        return decoding(query, cache, implementation="pallas").sum()

    for argument in (0, 1):
        with pytest.raises(NotImplementedError, match="decode attention has no gradient"):
            jax.grad(loss, argument)(arrays["query"], arrays["key"])


def test_what_runs_is_said(on_h200, caplog):
    """Long prompts are XLA's without a warning. The others run by kernels, or there is a reason."""

    def choice(length=1, dtype=jnp.bfloat16):
        cache = jax.eval_shape(lambda: KVCache.init(1, 64, 1, 32, dtype=dtype))
        query = jax.ShapeDtypeStruct((1, length, 2, 32), dtype)
        with on_h200():
            return attention.choose_dense(None, query, cache)

    prompt = choice(9)
    assert (prompt.implementation, caplog.text) == ("xla", "")
    assert "up to 16 queries" in prompt.reason
    assert "bfloat16; query has float32" in choice(dtype=jnp.float32).reason
    if backend.missing("sparse") is None:
        assert choice() is dispatch.BY_PLATFORM
    else:
        assert "jax >= 0.11" in choice().reason


def test_splits_cover_a_row_and_are_few():
    assert plan_for(1, 10).splits == 1
    assert plan_for(10_000, 10**6).splits == 1
    assert 1 < plan_for(8, 131_072).splits <= 128


def test_supports_names_the_limit():
    def reason(head_dim=64, dtype=jnp.bfloat16, queries=1, length=8):
        x = jax.ShapeDtypeStruct((1, length, 2, head_dim), dtype)
        return sparse.supports_attention(x, x, x, queries=queries)

    assert "head dims in (16, 32, 64, 128, 256); key has 48" in reason(48)
    assert "support bfloat16; query has float32" in reason(dtype=jnp.float32)
    assert f"up to {ROWS} queries" in reason(queries=17)
    assert "no empty arrays" in reason(length=0)
    assert reason() == backend.missing("sparse")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_they_lower_for_cuda(case, rng, on_h200):
    arrays, positions, slopes = draw(case, rng)
    indices, count = draw_lists(case, case.kv_heads, 70, positions, rng)
    programs = {
        "dense_attend": (sparse.dense_attention, positions, slopes),
        "sparse_attend": (sparse.listed_attention, indices, count),
    }
    with on_h200():
        for name, (function, *others) in programs.items():
            run = jax.jit(functools.partial(function, plan=case.plan))
            lowered = run.trace(*arrays.values(), *others).lower(lowering_platforms=("cuda",))
            for kernel in (name, "attend_merge"):
                assert lowered.as_text().count(f'name = "{kernel}"') == 1
