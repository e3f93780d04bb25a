"""The layer equals its definition in numpy when folded, split or padded, and refuses bad calls."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.layers.functional import LayerState, init_state, race_layer
from race_jax.layers.race_config import RACEConfig

BATCH, LENGTH, WIDTH = 2, 9, 8
ALL = {  # every option that may stand beside the others, in a causal layer
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 3,
    "value_dim": 5,
    "out_features": 7,
    "num_tables": 2,
    "num_planes": 2,
    "forget_gate": "data",
    "short_conv": "before",
    "output_norm": "rms",
    "output_gate": "silu",
}
QKV = {"short_conv": "qkv", "qkv_activation": "silu", "output_gate": "sigmoid"}
MASK = np.array([[1, 1, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 0, 1, 0, 1, 1, 1]], bool)
SEGMENTS = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1], [3, 3, 3, 3, 5, 5, 5, 5, 6]])


def make(rng, **options):
    """Returns settings, random parameters and planes. No parameter has its initial value."""
    s = RACEConfig(**{"in_features": WIDTH, **options})

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32) * shape[0] ** -0.5

    heads, kv_heads = (s.num_heads, s.head_dim), (s.num_kv_heads, s.head_dim)
    value_heads = s.num_kv_heads, s.value_dim
    params = {
        "query": {"kernel": normal(s.in_features, *heads), "bias": normal(*heads)},
        "key": {"kernel": normal(s.in_kv_features, *kv_heads), "bias": normal(*kv_heads)},
        "value": {"kernel": normal(s.in_kv_features, *value_heads), "bias": normal(*value_heads)},
        "out": {
            "kernel": normal(s.num_heads, s.value_dim, s.out_features),
            "bias": normal(s.out_features),
        },
    }
    if s.normalize_qk:
        params |= {f"{name}_ln": {"scale": 1 + normal(s.head_dim)} for name in ("query", "key")}
    for name, init in s.own_parameters().items():
        start = np.asarray(init(jax.random.key(0)))
        params[name] = start + 0.3 * rng.normal(size=start.shape).astype(np.float32)
    return s, params, normal(s.num_tables, s.num_planes, s.head_dim)


def layer_of(params, *args, **options):
    """Returns `race_layer` with norms as functions, in place of Flax's modules."""

    def norm(scale, x):
        x -= x.mean(axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

    norms = {
        name: functools.partial(norm, params[name]["scale"]) for name in params if "_ln" in name
    }
    return race_layer(params | norms, *args, **options)


def naive_features(x, planes, beta):
    corners = np.array(list(itertools.product((-1, 1), repeat=planes.shape[1])))
    phi = np.exp(beta * np.tanh(np.einsum("th,lph->tlp", x, planes)) @ corners.T)
    return (phi / phi.sum(-1, keepdims=True)).reshape(len(x), -1)


def naive_norm(x):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def naive_convolution(x, kernel, mask, ids):
    out = np.zeros_like(x)
    for t in np.flatnonzero(mask):
        seen = [s for s in range(t + 1) if mask[s] and ids[s] == ids[t]][-4:]
        out[t] = sum(k * x[s] for k, s in zip(kernel, seen[::-1], strict=False))
    return out


def naive_layer(s, params, planes, x_q, x_k, *, mask, ids_q, ids_k, is_causal):
    """Computes one sequence from all pairs in float64, in the order of the definition."""
    params, x_q, x_k = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, x_q, x_k))
    if s.short_conv == "before":
        x_q = x_k = naive_convolution(x_q, params["conv_kernel"], mask, ids_k)

    def project(x, name):
        heads = np.tensordot(x, params[name]["kernel"], 1) + params[name]["bias"]
        if s.short_conv == "qkv":
            heads = naive_convolution(heads, params[f"{name}_conv_kernel"], mask, ids_k)
        return heads / (1 + np.exp(-heads)) if s.qkv_activation == "silu" else heads

    query, key, value = project(x_q, "query"), project(x_k, "key"), project(x_k, "value")
    if s.normalize_qk:
        query = naive_norm(query) * params["query_ln"]["scale"]
        key = naive_norm(key) * params["key_ln"]["scale"]
    beta = np.exp(params["log_sharpness"]) if s.learn_sharpness else s.sharpness
    beta = np.broadcast_to(beta, s.num_kv_heads)
    gate = np.zeros((len(x_k), s.num_kv_heads))
    if s.forget_gate == "fixed":
        gate += -np.log(2) / np.geomspace(2, s.half_life, s.num_kv_heads)
    elif s.forget_gate:
        data = x_k @ params["gate_kernel"] if s.forget_gate == "data" else 0
        gate -= np.log1p(np.exp(-(data + params["gate_bias"])))
    total = np.cumsum(np.where(mask[:, None], gate, 0), axis=0)
    heads = np.zeros((len(x_q), s.num_heads, s.value_dim))
    for n in range(s.num_heads):
        k = n // (s.num_heads // s.num_kv_heads)
        phi_q = naive_features(query[:, n], planes, beta[k])
        phi_k = naive_features(key[:, k], planes, beta[k])
        weights = phi_q @ phi_k.T * mask * (ids_q[:, None] == ids_k)
        if is_causal:
            weights *= np.exp(np.minimum(total[:, None, k] - total[:, k], 0))
            weights *= np.tri(len(x_q)) * mask[:, None]
        sums = weights.sum(-1, keepdims=True)
        heads[:, n] = weights @ value[:, k] / np.where(sums > 0, sums, 1)
    if s.output_norm:
        heads /= np.sqrt(np.mean(heads**2, axis=-1, keepdims=True) + 1e-6)
        heads *= params["out_norm_scale"]
    if s.output_gate:
        gate = np.tensordot(x_q, params["out_gate_kernel"], 1)
        heads *= (gate if s.output_gate == "silu" else 1) / (1 + np.exp(-gate))
    return np.tensordot(heads, params["out"]["kernel"], 2) + params["out"]["bias"]


CASES = {
    "paper, bidirectional": ({"num_heads": 2, "shared_sharpness": True}, {}),
    "everything, causal": (ALL, {"is_causal": True, "mask": MASK, "segment_ids": SEGMENTS}),
    "everything, folded": (
        ALL | {"fold_planes": True, "forget_gate": "learned"},
        {"is_causal": True, "mask": MASK[:, None, None], "segment_ids": SEGMENTS},
    ),
    "convolutions on queries, keys and values, causal": (
        ALL | QKV | {"fold_planes": True, "output_norm": None},
        {"is_causal": True, "mask": MASK, "segment_ids": SEGMENTS},
    ),
    "an activation alone, bidirectional": (
        {"num_heads": 2, "fold_planes": True, "qkv_activation": "silu", "output_norm": "rms"},
        {"mask": MASK},
    ),
    "fixed gate": (
        {"num_heads": 2, "forget_gate": "fixed", "half_life": 6.0, "learn_sharpness": False},
        {"is_causal": True},
    ),
    # By default heads have two dimensions here. LayerNorm then keeps only the sign of their
    # difference. If the two are nearly equal, it multiplies their rounding errors by up to a
    # thousand.
    "bidirectional, masked, packed": (
        {
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "normalize_qk": True,
            "short_conv": "before",
        },
        {"mask": MASK, "segment_ids": SEGMENTS},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_is_its_definition(rng, assert_close, case):
    options, call = CASES[case]
    s, params, planes = make(rng, **options)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    got = jax.jit(functools.partial(layer_of, settings=s, is_causal="is_causal" in call))(
        params, planes, x, **{name: call[name] for name in call if name != "is_causal"}
    )
    mask = MASK if "mask" in call else np.ones_like(MASK)
    ids = call.get("segment_ids", np.zeros_like(SEGMENTS))
    want = [
        naive_layer(
            s, params, planes, x[b], x[b], mask=mask[b], ids_q=ids[b], ids_k=ids[b],
            is_causal="is_causal" in call,
        )
        for b in range(BATCH)
    ]  # fmt: skip
    assert_close(case, np.asarray(got)[mask], np.stack(want)[mask], kind="outputs")


def test_cross_attention_is_its_definition(rng, assert_close):
    s, params, planes = make(
        rng, num_heads=2, in_kv_features=6, output_norm="rms", output_gate="silu"
    )
    x_q = rng.normal(size=(BATCH, 4, WIDTH)).astype(np.float32)
    x_k = rng.normal(size=(BATCH, LENGTH, 6)).astype(np.float32)
    got = jax.jit(functools.partial(race_layer, settings=s))(params, planes, x_q, x_k, mask=MASK)
    ids = np.zeros(LENGTH)
    want = [
        naive_layer(
            s, params, planes, x_q[b], x_k[b], mask=MASK[b], ids_q=ids[:4], ids_k=ids,
            is_causal=False,
        )
        for b in range(BATCH)
    ]  # fmt: skip
    assert_close("output", got, np.stack(want), kind="outputs")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_folded_planes_give_the_same_outputs_and_gradients(rng, assert_close, dtype):
    s, params, planes = make(rng, num_heads=4, num_kv_heads=2, num_tables=2, num_planes=3)
    x, weights = rng.normal(size=(2, BATCH, LENGTH, WIDTH)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=3)
    @functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    def run(params, planes, x, fold):
        settings = RACEConfig(**vars(s) | {"fold_planes": fold})
        out = race_layer(params, planes, x, settings=settings, mask=jnp.asarray(MASK))
        return jnp.sum(weights * out), out

    given = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, planes, x))
    with jax.enable_x64(dtype == "float64"):
        got, want = run(*given, True), run(*given, False)
    assert_close("gradients and output", got, want, kind="folded", dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [pytest.param(ALL, marks=pytest.mark.once, id="before"), pytest.param(ALL | QKV, id="qkv")],
)
def test_split_anywhere_gives_the_whole(rng, assert_close, options):
    """One call with a state takes a prompt, one token, many tokens, or none."""
    s, params, planes = make(rng, **options)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, splits):
        state, parts = init_state(s, BATCH), []
        for start, stop in itertools.pairwise((0, *splits, LENGTH)):
            now = slice(start, stop)
            mask, segment_ids = jnp.asarray(MASK[:, now]), jnp.asarray(SEGMENTS[:, now])
            part, state = race_layer(
                params, planes, x[:, now], settings=s, is_causal=True, state=state,
                mask=mask, segment_ids=segment_ids,
            )  # fmt: skip
            parts.append(part)
        return jnp.concatenate(parts, axis=1), state

    got, want = run(params, x, (0, 5, 6)), run(params, x, ())
    assert_close("output and state", got, want, kind="resumed")


@pytest.mark.once  # tests/test_transforms.py has the operation in a scan
def test_gradients_flow_through_the_carried_state(rng, assert_close):
    """A scan over pieces gives the gradients of the whole."""
    s, params, planes = make(rng, **ALL | QKV)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    weights = rng.normal(size=(BATCH, LENGTH, s.out_features)).astype(np.float32)

    def loss(params, x, pieces):
        def cut(array):
            return jnp.stack(jnp.split(jnp.asarray(array), pieces, axis=1))

        def step(state, piece):
            x, mask, weights = piece
            out, state = race_layer(
                params, planes, x, settings=s, is_causal=True, state=state, mask=mask
            )
            return state, jnp.sum(weights * out)

        _, losses = jax.lax.scan(step, init_state(s, BATCH), (cut(x), cut(MASK), cut(weights)))
        return losses.sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    assert_close("gradients", grad(params, x, 3), grad(params, x, 1), kind="gradients")


@pytest.mark.parametrize("is_causal", [True, False])
def test_junk_in_padded_slots_changes_nothing(rng, assert_close, is_causal):
    s, params, planes = make(rng, **ALL | {"forget_gate": "data" if is_causal else None})
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    mask = jnp.asarray(MASK)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(params, x):
        out = race_layer(params, planes, x, settings=s, is_causal=is_causal, mask=mask)
        return jnp.sum(out**2), out

    junk = np.where(MASK[..., None], x, rng.choice([np.nan, np.inf, 1e30], size=x.shape))
    got, want = run(params, junk.astype(np.float32)), run(params, x)
    assert_close("output and gradients", got, want, kind="rerun")
    (_, out), (_, input_gradient) = got
    assert not np.asarray(input_gradient)[~MASK].any()
    if is_causal:
        padded = np.asarray(out)[~MASK]
        np.testing.assert_array_equal(padded, np.broadcast_to(params["out"]["bias"], padded.shape))


def test_bfloat16_is_close_to_float32_and_keeps_sums_in_float32(rng, assert_close):
    s, params, planes = make(rng, **ALL)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(jnp.bfloat16).astype(np.float32)

    @jax.jit
    def both(params, x):
        return [
            race_layer(
                params,
                planes,
                x,
                settings=RACEConfig(**vars(s) | {"dtype": dtype}),
                is_causal=True,
                state=init_state(s, BATCH),
            )
            for dtype in (jnp.bfloat16, jnp.float32)
        ]

    (low, state), (high, _) = both(params, x)
    assert low.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    assert_close("output", low, high, kind="outputs", dtype=jnp.bfloat16)


@pytest.fixture(scope="module")
def plain_layer():
    s, params, planes = make(np.random.default_rng(0), num_heads=2)
    return functools.partial(race_layer, params, planes, settings=s)


X = jnp.zeros((BATCH, LENGTH, WIDTH))


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[..., :5],), {}, r"inputs_q must be \(batch, length, 8\), got shape \(2, 9, 5\)"),
        ((X[0],), {}, "use jax.vmap for more batch axes"),
        ((X, None, X), {}, "inputs_v without inputs_k"),
        ((X, X, X[:, :4]), {}, "keys and values one length"),
        ((X, X[:1]), {}, "one batch size"),
        ((X[:, :4], X), {"is_causal": True}, "as many keys as queries, got 9 keys and 4 queries"),
        ((X,), {"mask": np.ones((2, 1, 9, 9), bool)}, "key-padding masks only, such as"),
        ((X,), {"mask": np.ones((2, 9, 9), bool)}, "for packing use segment_ids"),
        ((X,), {"mask": np.ones((2, 5), bool)}, r"broadcast to \(2, 1, 1, 9\), got shape"),
    ],
)
def test_bad_calls_are_refused_in_words(plain_layer, args, options, message):
    if "mask" in options:
        options = {"mask": jnp.asarray(options["mask"])}
    with pytest.raises(ValueError, match=message):
        plain_layer(*args, **options)


def test_what_a_layer_cannot_do_is_refused_in_words(rng):
    s, params, planes = make(rng, **ALL)
    layer = functools.partial(race_layer, params, planes, settings=s)
    with pytest.raises(ValueError, match=r"forget_gate='data' has a direction.*is_causal=True"):
        layer(X)
    with pytest.raises(ValueError, match="runs along one sequence"):
        layer(X, X + 1, is_causal=True)
    with pytest.raises(ValueError, match=r"segment_ids must be \(B, T\) = \(2, 9\)"):
        layer(X, is_causal=True, segment_ids=jnp.zeros((BATCH, 4), int))
    state = init_state(s, BATCH)
    with pytest.raises(ValueError, match="has a direction"):
        layer(X, state=state)
    with pytest.raises(ValueError, match=r"taps of shape \(2, 3, 8\).*for batch 2"):
        layer(X, is_causal=True, state=LayerState(state.race, None))
    with pytest.raises(ValueError, match=r"race.numerator of shape \(2, 2, 8, 5\).*for batch 2"):
        layer(X, is_causal=True, state=init_state(s, 1))
    with pytest.raises(TypeError, match="LayerState"):
        layer(X, is_causal=True, state=state.race)


def test_a_state_needs_causality(plain_layer):
    settings = plain_layer.keywords["settings"]
    with pytest.raises(ValueError, match="pass is_causal=True with state="):
        plain_layer(X, state=init_state(settings, BATCH))
