"""Every attention layer equals its definition, with the parts that it takes, and refuses in words.

Outputs and the gradients of all parameters and of the input are compared by name.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.core import favor
from race_jax.layers import registry
from race_jax.models import ModelConfig, Transformer, TransformerLM
from tests import newest, quick
from tests.attentions import DEFINITIONS, layer_by_definition
from tests.models.small import draw

B, T, D, N, K, H = 2, 9, 6, 4, 2, 3
SIZES = {"num_heads": N, "in_features": D, "num_kv_heads": K, "head_dim": H}
PARTS = {"short_conv": "qkv", "output_norm": "rms", "output_gate": "sigmoid"}
BEFORE = {"short_conv": "before", "qkv_activation": "silu", "output_gate": "silu"}
CASES = {
    "softmax, gate": ("softmax", {"forget_gate": "data", **PARTS}, True),
    "softmax, rope": ("softmax", {"positions": "rope", "rope_base": 30.0, "head_dim": 4}, True),
    "linear": ("linear", BEFORE, False),
    "linear, gate": ("linear", {"forget_gate": "learned", **PARTS}, True),
    "performer": ("performer", {"num_features": 7}, False),
    "performer, gate": ("performer", {"num_features": 7, "forget_gate": "data", **BEFORE}, True),
    "sigmoid": ("sigmoid", PARTS, False),
    "sigmoid, alibi": ("sigmoid", {"positions": "alibi", "forget_gate": "learned"}, True),
    "sigmoid, rope": ("sigmoid", {"positions": "rope", "rope_base": 30.0, "head_dim": 4}, True),
    "sigmoid, fixed bias": ("sigmoid", {"bias": -1.5}, True),
    "angular": ("angular", {"degree": 3.0, **BEFORE}, False),
    "angular, rope": ("angular", {"positions": "rope", "rope_base": 30.0, "head_dim": 4}, True),
    "angular, gate": ("angular", {"forget_gate": "data"}, True),
    "linformer": ("linformer", {"max_length": T + 2, "rank": 4, **PARTS}, False),
    "gated linear": ("gated_linear", {"gate_rank": 2}, True),
    "gated linear, one gate a head": ("gated_linear", {"forget_gate": "data", **BEFORE}, True),
    "gated delta": ("gated_delta", {}, True),
    "race delta": ("race_delta", {"num_tables": 3}, True),
    "race delta, gate": (
        "race_delta",
        {"num_tables": 2, "num_planes": 3, "use_tanh": True, "forget_gate": "data", **BEFORE},
        True,
    ),
    "race delta, learned planes": (
        "race_delta",
        {
            "num_tables": 4,
            "num_planes": 1,
            "learn_planes": True,
            "shared_sharpness": True,
            "forget_gate": "softplus",
        },
        True,
    ),
    "sliding window": ("sliding_window", {"window": 3, **PARTS}, True),
    "sliding window, rope": (
        "sliding_window",
        {"window": 4, "positions": "rope", "rope_base": 30.0, "head_dim": 4},
        True,
    ),
    "sliding window, alibi": (
        "sliding_window",
        {"window": 20, "positions": "alibi", **PARTS},
        True,
    ),
}


def make(name, is_causal, **options):
    """Returns a layer with random numbers for all parameters."""
    kind = registry.find(name)
    config = kind.config_class(**SIZES | options)
    return draw(lambda: kind.from_config(config, is_causal=is_causal, rngs=nnx.Rngs(0)))


# The newest JAX runs each attention once.
NEWEST = (
    *("softmax, gate", "linear", "performer, gate", "sigmoid", "angular, gate", "linformer"),
    *("gated linear", "gated delta", "race delta", "sliding window, rope"),
)


@pytest.mark.parametrize("case", newest.examples(CASES, NEWEST))
def test_a_layer_is_its_definition(rng, assert_close, case):
    name, options, is_causal = CASES[case]
    layer = make(name, is_causal, **options)
    x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    cotangent = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
    mask = jnp.asarray(rng.random((B, T)) < 0.8).at[:, 0].set(True)
    segments = jnp.broadcast_to(jnp.arange(T) // (T if name == "linformer" else 5), (B, T))
    place = jnp.broadcast_to(jnp.arange(T), (B, T))
    graph, variables = nnx.split(layer)
    call = {"mask": mask, "is_causal": is_causal}
    packed = call if name == "linformer" else call | {"segment_ids": segments}

    # The optimizer of XLA would take most of the time here.
    @quick.jit
    def both(variables, x):
        def run(function):
            # Queries in padded slots are not compared.
            kept = lambda v, x: function(nnx.merge(graph, v), x) * mask[..., None]  # noqa: E731
            out, pull_back = jax.vjp(kept, variables, x)
            return out, pull_back(cotangent)

        return (
            run(lambda layer, x: layer(x, positions=place, **packed)),
            run(lambda layer, x: layer_by_definition(layer, x, segment_ids=segments, **call)),
        )

    with jax.default_matmul_precision("highest"):
        (out, gradients), (want, want_gradients) = both(variables, x)
    assert_close("out", out, want, kind="outputs")
    assert_close("gradients", gradients, want_gradients, kind="gradients")


def test_every_attention_but_race_has_its_definition():
    assert set(DEFINITIONS) == set(registry.ATTENTIONS) - {"race"}
    assert set(DEFINITIONS) == {name for name, _, _ in CASES.values()}


@pytest.mark.parametrize("name", ["gated_linear", "gated_delta", "race_delta", "sliding_window"])
def test_a_method_that_reads_in_order_refuses_an_encoder(name):
    with pytest.raises(ValueError, match=f"{name} attention reads tokens in their order"):
        Transformer(ModelConfig(attention=name), 5, is_causal=False, rngs=nnx.Rngs(0))
    layer = make(name, True)
    with pytest.raises(ValueError, match="needs a causal model"):
        layer(jnp.zeros((B, T, D)), is_causal=False)


def test_linformer_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="linformer attention mixes all tokens"):
        TransformerLM(ModelConfig(attention="linformer"), 5, rngs=nnx.Rngs(0))
    layer = make("linformer", False, max_length=T, rank=2)
    with pytest.raises(NotImplementedError, match="cannot keep packed documents apart"):
        layer(jnp.zeros((B, T, D)), segment_ids=jnp.zeros((B, T), int))
    with pytest.raises(ValueError, match=f"has 10 tokens, .* at most max_length={T}"):
        layer(jnp.zeros((B, 10, D)))


def test_a_method_without_a_state_refuses_one():
    layer = make("linformer", False, max_length=T, rank=2)
    assert layer.init_state(1) is None
    with pytest.raises(NotImplementedError, match="linformer attention carries no state"):
        layer(jnp.zeros((B, T, D)), state=make("linear", True).init_state(B))


@pytest.mark.parametrize("name", ["softmax", "sigmoid", "angular"])
@pytest.mark.parametrize("gate", [None, "data"])
def test_a_method_over_all_pairs_takes_a_cache_and_no_other_state(name, gate):
    layer = make(name, True, forget_gate=gate)
    assert layer.init_state(1) is None
    with pytest.raises(TypeError, match="with a cache of keys and values"):
        layer(jnp.zeros((B, T, D)), is_causal=True, state=make("linear", True).init_state(B))
    out, state = layer(jnp.ones((B, T, D)), is_causal=True, state=layer.init_cache(B, T))
    assert out.shape == (B, T, D)
    assert state.memory.length.tolist() == [T] * B
    assert (state.memory.decay is None) == (gate is None)


def test_states_of_other_sizes_are_refused_by_name():
    x = jnp.zeros((B, T, D))
    linear, softmax = make("linear", True), make("softmax", True)
    wide, convolved = make("linear", True, head_dim=H + 1), make("linear", True, short_conv="qkv")
    gated = make("softmax", True, forget_gate="data")
    cases = (
        (linear, linear.init_state(B + 1), ValueError,
         r"state.memory.numerator has shape \(3, 2, 3, 3\), and this linear layer needs "
         r"\(2, 2, 3, 3\); pass the state of an earlier call of the layer, or init_state\(2\)"),
        (linear, wide.init_state(B), ValueError, r"numerator has shape \(2, 2, 4, 4\)"),
        (linear, convolved.init_state(B), TypeError, "state belongs to another layer"),
        (convolved, linear.init_state(B), TypeError, "state belongs to another layer"),
        (softmax, softmax.init_cache(B + 1, T), ValueError,
         r"state.memory.key has shape \(3, 9, 2, 3\).* or init_cache\(2, 9\)"),
        (softmax, gated.init_cache(B, T), TypeError, "state belongs to another layer"),
        (gated, softmax.init_cache(B, T), TypeError, "state belongs to another layer"),
    )  # fmt: skip
    for layer, state, kind, words in cases:
        with pytest.raises(kind, match=words):
            layer(x, is_causal=True, state=state)


def test_a_state_of_another_kind_is_refused():
    layer = make("linear", True)
    with pytest.raises(TypeError, match="state must be an AttentionState"):
        layer(jnp.zeros((B, T, D)), is_causal=True, state=layer.init_memory(B))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("performer", {"num_features": 0}, "num_features must be at least 1, got 0"),
        ("linformer", {"rank": 0}, "rank must be at least 1, got 0"),
        ("angular", {"degree": 0.0}, "degree must be > 0 and finite, got 0.0"),
        ("sigmoid", {"bias": float("inf")}, "bias must be finite, or None"),
        ("gated_linear", {"gate_rank": 0}, "gate_rank must be at least 1, got 0"),
        ("gated_linear", {"forget_gate": "softplus"}, "one of 'channel', None, 'fixed'"),
        ("gated_delta", {"forget_gate": "channel"}, "one of 'softplus', None, 'fixed'"),
        ("race_delta", {"num_planes": 11}, "num_planes must be at most 10, got 11; use more tab"),
        ("race_delta", {"num_tables": 0}, "num_tables must be an integer and at least 1, got 0"),
        ("race_delta", {"sharpness": -1.0}, "sharpness must be > 0 and finite, got -1.0"),
        ("linear", {"short_conv": "k"}, "short_conv must be one of None, 'before', 'qkv'"),
        ("linear", {"forget_gate": "fixed"}, "needs half_life"),
        ("gated_linear", {"half_life": 64.0}, "no effect with forget_gate='channel'"),
        ("sliding_window", {"window": 0}, "window must be at least 1 token, got 0"),
        ("sliding_window", {"forget_gate": "data"}, "forget_gate must be"),
    ],
)
def test_bad_options_are_refused_in_words(name, options, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(attention=name, **{name: options}).validate()


@pytest.mark.once
def test_random_directions_are_orthogonal_and_gaussian(assert_close):
    """In every block of H they are orthogonal, and the mean of w wᵀ is the identity."""
    draw_all = jax.vmap(lambda key: favor.draw_directions(key, 10, 4))
    w = np.asarray(jax.jit(draw_all)(jax.random.split(jax.random.key(0), 2000)))
    unit = w / np.linalg.norm(w, axis=-1, keepdims=True)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):
        cosines = np.einsum("imh,inh->imn", unit[:, rows], unit[:, rows])
        want = np.broadcast_to(np.eye(cosines.shape[1]), cosines.shape)
        assert_close("cosines", cosines, want, kind="outputs")
    np.testing.assert_allclose(np.einsum("imh,img->hg", w, w) / 20_000, np.eye(4), atol=0.05)


@pytest.mark.once
def test_random_features_approximate_the_softmax_kernel(rng):
    """The mean over many drawings is exp(q . k / sqrt(H)), without bias."""
    query, key = jnp.asarray(0.7 * rng.normal(size=(2, 1, 1, 1, 4)), jnp.float32)

    @jax.jit
    @jax.vmap
    def estimate(seed):
        w = favor.draw_directions(seed, 64, 4)
        phi_q, phi_k = favor.key_features(query, w), favor.key_features(key, w)
        return jnp.vdot(phi_q, phi_k)

    got = np.asarray(estimate(jax.random.split(jax.random.key(0), 4000)))
    want = np.exp(np.vdot(query, key) / 2)
    error = got.std() / np.sqrt(got.size)
    assert error < 0.02 * want
    assert abs(got.mean() - want) < 4 * error


@pytest.mark.once
def test_directions_are_redrawn_in_training_only():
    options = {"num_features": 4, "redraw": True}
    config = ModelConfig(1, 8, 2, attention="performer", performer=options)
    model = TransformerLM(config, 5, keep_rngs=False, rngs=nnx.Rngs(0))
    tokens = jnp.array([[1, 2, 3, 4]])

    @nnx.jit
    def train(model, key):
        return model(tokens, deterministic=False, rngs=nnx.Rngs(dropout=key))

    first, second, again = (train(model, jax.random.key(seed)) for seed in (0, 1, 0))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(model(tokens), model(tokens))
    with pytest.raises(ValueError, match=r"pass rngs=nnx.Rngs\(dropout=seed\)"):
        model(tokens, deterministic=False)


@pytest.mark.once
def test_extreme_keys_of_performer_stay_finite():
    layer = make("performer", True, num_features=7)
    x = jnp.full((1, 4, D), 1e3)
    assert np.isfinite(layer(x, is_causal=True)).all()
