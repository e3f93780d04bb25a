"""`jax.vmap` of the kernels gives the outputs and gradients that a loop of calls gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from tests import quick
from tests.kernels import dense
from tests.kernels.dense import Case

# The kernels of warpgroups take lengths of 136 and 200, but not of 65. Mosaic copies a chunk as one
# piece if there is one head.
ALONE = Case(length=136, heads=1, kv_heads=1, tables=4, planes=4, value_dim=128, dtype="bfloat16")
CAUSAL = {
    "warpgroups": ALONE,
    "warpgroups, everything": ALONE._replace(length=200, gate=True, mask=True, packed=True),
    "warpgroups, a group of heads": ALONE._replace(batch=2, heads=2, value_dim=64, gate=True),
    "programs": ALONE._replace(length=65, gate=True, packed=True),
    "programs, float32": ALONE._replace(length=65, mask=True, dtype="float32"),
}
BIDIRECTIONAL = {
    "programs": ALONE._replace(length=65),
    "masked, float32": ALONE._replace(mask=True, heads=2, dtype="float32"),
}
FORMS = [(True, case) for case in CAUSAL.values()] + [(False, c) for c in BIDIRECTIONAL.values()]
FORM_NAMES = [f"causal, {x}" for x in CAUSAL] + [f"bidirectional, {x}" for x in BIDIRECTIONAL]
DIFFERENTIATED = ("zq", "zk", "value", "sharpness", "log_decay")


def call(is_causal: bool, given: dict, cotangent: jax.Array) -> dict:
    """Returns the output of one call of the kernels, and its gradients by name."""

    def attend(moving):
        return race_jax.race_attention_from_projections(
            moving["zq"],
            moving["zk"],
            moving["value"],
            sharpness=moving["sharpness"],
            log_decay=moving.get("log_decay"),
            key_value_mask=given["key_value_mask"],
            segment_ids=given["segment_ids"],
            is_causal=is_causal,
            implementation="pallas",
        )

    moving = {name: given[name] for name in DIFFERENTIATED if given[name] is not None}
    out, pull_back = jax.vjp(attend, moving)
    return {"out": out} | pull_back(cotangent)[0]


def several(case: Case, count: int) -> tuple[dict, jax.Array]:
    """Returns arguments and cotangents of `count` calls, stacked. All of them differ."""
    given, (cotangent, *_) = dense.draw(case._replace(batch=case.batch * count))
    given = {name: given[name] for name in (*DIFFERENTIATED, "key_value_mask", "segment_ids")}
    per_call = {name: x for name, x in given.items() if x is not None and name != "sharpness"}
    stacked = jax.tree.map(
        lambda x: jnp.asarray(x).reshape(count, case.batch, *x.shape[1:]), (per_call, cotangent)
    )
    return given | stacked[0], stacked[1]


@pytest.mark.gpu
@pytest.mark.parametrize(("is_causal", "case"), FORMS, ids=FORM_NAMES)
def test_vmap_equals_a_loop_of_calls(is_causal, case, assert_close):
    # In float32, sums in another order could round TF32 operands differently.
    with jax.default_matmul_precision("highest"):
        check(is_causal, case, assert_close)


def check(is_causal, case, assert_close):
    given, cotangents = several(case, 4)
    axes = {name: None if x is None or name == "sharpness" else 0 for name, x in given.items()}
    run = functools.partial(call, is_causal)
    nth = lambda tree, i: {  # noqa: E731
        name: x if axes[name] is None else x[i] for name, x in tree.items()
    }
    single = jax.jit(run)
    want = [single(nth(given, i), cotangents[i]) for i in range(4)]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    flat = jax.jit(jax.vmap(run, in_axes=(axes, 0)))(given, cotangents)
    assert_close("vmap", flat, want, kind="resumed", dtype=case.dtype)

    # The calls are mapped two by two. The axis of the inner map is the last one of the values.
    pairs, pair_cotangents = jax.tree.map(
        lambda x: x.reshape(2, 2, *x.shape[1:]),
        ({n: x for n, x in given.items() if axes[n] is not None}, cotangents),
    )
    inner = axes | {"value": -1}
    pairs = given | pairs | {"value": jnp.moveaxis(pairs["value"], 1, -1)}
    nested = jax.vmap(jax.vmap(run, in_axes=(inner, 0)), in_axes=(axes, 0))
    got = jax.jit(nested)(pairs, pair_cotangents)
    got = jax.tree.map(lambda x: np.asarray(x).reshape(4, *x.shape[2:]), got)
    assert_close("vmap of vmap", got, want, kind="resumed", dtype=case.dtype)


@pytest.mark.gpu
def test_vmap_over_heads_and_over_planes(assert_close):
    keys = jax.random.split(jax.random.key(3), 4)
    shapes = (2, 200, 3, 64), (2, 200, 3, 64), (2, 200, 3, 128)
    query, key, value = (
        jax.random.normal(k, shape, jnp.bfloat16) for k, shape in zip(keys, shapes, strict=False)
    )
    planes = 0.125 * jax.random.normal(keys[3], (3, 4, 4, 64))

    def gradients(query, key, value, planes):
        attend = functools.partial(
            race_jax.race_attention, sharpness=2.0, is_causal=True, implementation="pallas"
        )
        out, pull_back = jax.vjp(attend, query, key, value, planes)
        return (out, *pull_back(jnp.cos(out)))

    heads = [x[:, :, None] for x in (query, key, value)]  # (B, T, 1, heads, ...)
    mapped = jax.jit(jax.vmap(gradients, in_axes=(3, 3, 3, 0), out_axes=0))
    got = mapped(*heads, planes)
    single = jax.jit(gradients)
    want = [single(*(x[:, :, :, i] for x in heads), planes[i]) for i in range(3)]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    assert_close("over heads and planes", got, want, kind="resumed", dtype="bfloat16")

    # The same tokens are hashed by several planes, so only z is batched.
    one = [x[:, :, :, 0] for x in heads]
    got = jax.jit(jax.vmap(gradients, in_axes=(None, None, None, 0)))(*one, planes)
    want = jax.tree.map(lambda *x: np.stack(x), *(single(*one, planes[i]) for i in range(3)))
    assert_close("over planes", got, want, kind="resumed", dtype="bfloat16")


def test_warpgroups_take_hash_projections_in_whole_chunks(on_h200):
    """Mosaic may copy a chunk of z in one piece, so every sequence is padded to whole chunks."""
    given, cotangents = dense.draw(ALONE)
    three = jax.tree.map(lambda x: np.stack([x] * 3), (given, cotangents))
    run = jax.vmap(functools.partial(dense.causal_kernels, interpret=False))
    with on_h200():
        program = jax.jit(run).trace(*three).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in program.splitlines() if "@mosaic_gpu" in line]
    assert len(calls) == 3
    for line in calls:
        assert "3x1x192x1x16xbf16" in line
        assert "x136x1x16xbf16" not in line


def test_vmap_equals_a_loop_of_interpreted_calls(assert_close):
    case = Case(length=70, heads=2, kv_heads=1, gate=True, mask=True, packed=True)
    given, cotangents = dense.draw(case)
    twice = jax.tree.map(lambda x: np.stack([x, x[::1] if x.dtype.kind in "bi" else -x]), given)
    twice["sharpness"] = np.stack([given["sharpness"], 2 * given["sharpness"]])
    twice["log_decay"] = np.stack([given["log_decay"], 2 * given["log_decay"]])
    twice["initial_mass"] = np.stack([given["initial_mass"]] * 2)
    run = functools.partial(dense.causal_kernels, interpret=True)
    one = quick.jit(run)
    both = quick.jit(jax.vmap(run, in_axes=(0, None)))
    want = [one(jax.tree.map(lambda x, i=i: x[i], twice), cotangents) for i in range(2)]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    assert_close("vmap", both(twice, cotangents), want, kind="resumed")
