"""The delta rule on RACE's features equals its definition in NumPy, token by token, in float64.

The gradients of the definition are taken by central differences.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import race_jax
from race_jax.layers.race_delta import RACEDeltaAttention, RACEDeltaConfig
from race_jax.models import ModelConfig, TransformerLM
from tests.models.small import draw

B, T, D, N, K, H = 2, 9, 3, 4, 2, 3
SIZES = {"num_heads": N, "in_features": D, "num_kv_heads": K, "head_dim": H}
BARE = {"short_conv": None, "output_norm": None, "output_gate": None}
FORMS = {
    "one table": {"num_tables": 1, "num_planes": 3},
    "a gate": {"num_tables": 2, "num_planes": 2, "forget_gate": "data"},
    "tanh": {"num_tables": 5, "num_planes": 1, "use_tanh": True},
}
STEP = 1e-5  # of the central differences, whose error is about its square


def make(**options):
    """Returns a layer with random numbers for all parameters."""
    config = RACEDeltaConfig(**SIZES | options)
    return draw(lambda: RACEDeltaAttention(config, rngs=nnx.Rngs(0)))


def problem(rng):
    """Returns hidden states, a mask with holes, and the ids of two documents of each row."""
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    mask = jnp.asarray(rng.random((B, T)) < 0.8).at[:, 0].set(True)
    return x, mask, jnp.broadcast_to(jnp.arange(T) // 5, (B, T))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def features(x, planes, beta, use_tanh):
    """Returns the features of one vector x (H,), each as a product over the planes of a table."""
    z = planes @ x  # (L, P)
    u = np.tanh(z) if use_tanh else z
    corners = np.array(list(itertools.product((-1, 1), repeat=planes.shape[1])))  # (R, P)
    phi = sigmoid(2 * beta * u[:, None] * corners).prod(axis=-1).ravel()
    return phi / np.sqrt((phi**2).sum())


def definition(config, planes, params, x, mask, ids):
    """Returns the output (B, T, D) of a layer without convolutions, norm and output gate."""
    out = np.zeros((B, T, N, H))
    for b, n in itertools.product(range(B), range(N)):
        k, matrix, document = n // (N // K), None, None
        beta = np.exp(params["log_sharpness"][k])
        for t in np.flatnonzero(mask[b]):
            if ids[b, t] != document:
                matrix, document = np.zeros((config.features, H)), ids[b, t]
            query, key, value = (
                x[b, t] @ params[name]["kernel"][:, head] + params[name]["bias"][head]
                for name, head in (("query", n), ("key", k), ("value", k))
            )
            query, key = (features(y, planes, beta, config.use_tanh) for y in (query, key))
            rate = sigmoid(x[b, t] @ params["rate_kernel"][:, k])
            if config.forget_gate == "data":
                logit = x[b, t] @ params["gate_kernel"][:, k] + params["gate_bias"][k]
                matrix = sigmoid(logit) * matrix
            matrix = matrix - rate * np.outer(key, key) @ matrix + rate * np.outer(key, value)
            out[b, t, n] = matrix.T @ query
    return np.einsum("btnv,nvd->btd", out, params["out"]["kernel"]) + params["out"]["bias"]


def differences(function, arrays):
    """Returns the gradients of a function of a tree of arrays, entry by entry."""
    leaves, structure = jax.tree.flatten(arrays)
    gradients = [np.zeros_like(leaf) for leaf in leaves]
    for leaf, gradient in zip(leaves, gradients, strict=True):
        for place in np.ndindex(leaf.shape):
            kept, ends = leaf[place], []
            for leaf[place] in (kept + STEP, kept - STEP):
                ends.append(function(jax.tree.unflatten(structure, leaves)))
            leaf[place] = kept
            gradient[place] = (ends[0] - ends[1]) / (2 * STEP)
    return jax.tree.unflatten(structure, gradients)


def wide(tree):
    return jax.tree.map(lambda x: np.array(x, np.float64), tree)


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_gradients_are_the_definition(rng, assert_close, form):
    layer = make(**BARE, **FORMS[form])
    x, mask, ids = problem(rng)
    cotangent = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    graph, params, fixed = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def run(params, x):
        def call(params, x):
            layer = nnx.merge(graph, params, fixed)
            return layer(x, mask=mask, segment_ids=ids, is_causal=True)

        out, pull_back = jax.vjp(call, params, x)
        d_params, d_x = pull_back(cotangent)
        return out, {**nnx.to_pure_dict(d_params), "x": d_x}

    with jax.default_matmul_precision("highest"):
        out, gradients = results = run(params, x)
        assert_close("again", run(params, x), results, kind="rerun")

    planes, weights = wide(layer.planes[...]), wide(cotangent)
    arrays = {**wide(nnx.to_pure_dict(params)), "x": wide(x)}
    of = lambda arrays: definition(  # noqa: E731
        layer.config, planes, arrays, arrays["x"], np.asarray(mask), np.asarray(ids)
    )
    assert_close("out", out, of(arrays), kind="outputs")
    want = differences(lambda arrays: (of(arrays) * weights).sum(), arrays)
    assert_close("gradients", gradients, want, kind="gradients")


def test_bfloat16_is_near_the_definition(rng, assert_close):
    layer = make(**BARE, **FORMS["a gate"], dtype=jnp.bfloat16)
    x, mask, ids = problem(rng)
    x = x.astype(jnp.bfloat16)
    out = layer(x, mask=mask, segment_ids=ids, is_causal=True)
    assert out.dtype == jnp.bfloat16
    params = wide(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    planes = wide(layer.planes[...])
    want = definition(layer.config, planes, params, wide(x), np.asarray(mask), np.asarray(ids))
    assert_close("out", out, want, kind="outputs", dtype="bfloat16")


@pytest.mark.parametrize("forget_gate", [None, "data", "softplus"])
def test_pieces_with_a_carried_state_are_the_whole(rng, assert_close, forget_gate):
    layer = make(num_tables=3, forget_gate=forget_gate)
    x, mask, ids = problem(rng)

    @jax.jit
    def call(x, mask, ids, state):
        return layer(x, mask=mask, segment_ids=ids, is_causal=True, state=state)

    want, want_state = call(x, mask, ids, layer.init_state(B))
    assert want_state.memory.matrix.shape == (B, K, 3 * 4, H)
    state, rows = layer.init_state(B), []
    for span in (slice(0, 1), slice(1, 6), slice(6, 6), slice(6, T)):
        row, state = call(x[:, span], mask[:, span], ids[:, span], state)
        rows.append(row)
    assert_close("out", jnp.concatenate(rows, axis=1), want, kind="resumed")
    assert_close("matrix", state.memory.matrix, want_state.memory.matrix, kind="resumed")
    np.testing.assert_array_equal(state.memory.segment, want_state.memory.segment)


def test_transforms_keep_outputs_and_gradients(rng, assert_close):
    """nnx.remat, and vmap over a further axis of the batch, are the plain call."""
    layer = make(num_tables=3)
    x = problem(rng)[0]
    graph, variables = nnx.split(layer)

    def plain(variables, x):
        return nnx.merge(graph, variables)(x, is_causal=True)

    def loss(function):
        return jax.jit(jax.value_and_grad(lambda v, x: (function(v, x) ** 2).sum(), (0, 1)))

    def by_row(variables, x):
        return jax.vmap(lambda row: plain(variables, row[None])[0])(x)

    want = loss(plain)(variables, x)
    for name, function in (("remat", jax.checkpoint(plain)), ("vmap", by_row)):
        assert_close(name, loss(function)(variables, x), want, kind="gradients")


@pytest.mark.once
def test_a_key_that_comes_again_replaces_its_value(rng, assert_close):
    """With rate 1, the last value of a key is returned, and not a mean."""
    layer = make(**BARE, num_tables=4)
    layer.rate_kernel[...] = jnp.full_like(layer.rate_kernel[...], 1e3)
    layer.query.kernel[...] = jnp.zeros_like(layer.query.kernel[...])
    layer.key.kernel[...] = jnp.zeros_like(layer.key.kernel[...])
    layer.query.bias[...] = jnp.ones_like(layer.query.bias[...])
    layer.key.bias[...] = jnp.ones_like(layer.key.bias[...])
    x = jnp.asarray(rng.uniform(0.5, 1.0, size=(1, T, D)), jnp.float32)
    value = jnp.repeat(layer.value(x), N // K, axis=2)
    assert_close("out", layer(x, is_causal=True), layer.out(value), kind="outputs")


@pytest.mark.once
def test_planes_are_fixed_differ_by_layer_and_have_a_stream_of_their_own():
    config = ModelConfig(num_layers=2, width=16, num_heads=2, attention="race_delta")

    def planes(**streams):
        model = TransformerLM(config, 5, keep_rngs=False, rngs=nnx.Rngs(**streams))
        trained = nnx.to_flat_state(nnx.state(model, nnx.Param))
        assert not any("planes" in path for path, _ in trained)
        return [np.asarray(x) for x in jax.tree.leaves(nnx.state(model, race_jax.HashPlanes))]

    first, second = planes(params=0, planes=1)
    assert first.shape == second.shape == (16, 2, 8)
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, planes(params=5, planes=1)[0])
    assert not np.array_equal(first, planes(params=0, planes=2)[0])


@pytest.mark.once
def test_learned_planes_are_a_parameter():
    learned = RACEDeltaAttention(RACEDeltaConfig(**SIZES, learn_planes=True), rngs=nnx.Rngs(0))
    fixed = RACEDeltaAttention(RACEDeltaConfig(**SIZES), rngs=nnx.Rngs(0))
    assert isinstance(learned.planes, nnx.Param)
    np.testing.assert_array_equal(learned.planes[...], fixed.planes[...])
