"""Compares layers and models on two devices with the same on one, with JAX's defaults.

Each case is run three times: on one device, on a mesh with Explicit axes (``jax.make_mesh`` and
``jax.set_mesh``), and inside ``jax.shard_map`` with ``check_vma=True``. The batch is split.

This file runs in a Python of its own, because the number of devices is fixed at first use.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.sharding import PartitionSpec

import race_jax
from race_jax.core.linear import linear_attention
from race_jax.models import ModelConfig, TransformerLM
from race_jax.models import decode as decode_module
from race_jax.models.decode import Sampling, generate
from tests import quick
from tests.conftest import compare
from tests.models.small import draw

B, T, D, N, K = 2, 12, 8, 4, 2
ROWS, WHOLE = PartitionSpec("shards"), PartitionSpec()
HASH = {"num_tables": 2, "num_planes": 2}
OWN = HASH | {"short_conv": "before", "output_norm": "rms", "output_gate": "silu"}


class Case(NamedTuple):
    """``run(shared, split)``, where `shared` are parameters and `split` has the batch in front."""

    run: Callable[[Any, Any], Any]
    shared: Any
    split: dict[str, jax.Array]


def normal(*shape: int) -> jax.Array:
    """Random numbers."""
    return jax.random.normal(jax.random.key(0), shape)


MASK = jnp.arange(T)[None] < jnp.array([[T], [9]])
PACKED = {"mask": MASK, "segment_ids": jnp.broadcast_to(jnp.arange(T) // 5, (B, T))}


def nnx_module(make: Callable[[], nnx.Module], split: dict) -> Case:
    """An NNX layer; a state in `split` is carried on."""
    graph, variables = nnx.split(draw(make))

    def run(variables, split):
        return nnx.merge(graph, variables)(split["x"], **_rest(split))

    return Case(run, variables, {"x": normal(B, T, D), **split})


def linen_module(module: linen.Module, split: dict) -> Case:
    """A Linen layer; a state in `split` is carried on."""
    x = normal(B, T, D)

    def run(variables, split):
        return module.apply(variables, split["x"], **_rest(split))

    return Case(run, drawn(lambda: module.init(jax.random.key(0), x)), {"x": x, **split})


def drawn(make: Callable[[], Any], *, least: float = -1.0) -> Any:
    """Random numbers from `least` to 1 in the shapes of what `make` would return."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(least, 1.0, x.shape), x.dtype), jax.eval_shape(make)
    )


def linear_operation(split: dict, **options: Any) -> Case:
    """Linear attention over given features."""
    tokens = {"phi_q": jnp.abs(normal(B, T, N, 3)), "phi_k": jnp.abs(normal(B, T, K, 3)) + 0.1}
    tokens["value"] = normal(B, T, K, 5)
    return Case(lambda _, split: linear_attention(**split, **options), {}, tokens | split)


def language_model(split: dict, **options: Any) -> Case:
    """A language model; a state in `split` is carried on."""
    model = make_model(**options)
    graph, params, fixed = nnx.split(model, nnx.Param, ...)

    def run(params, split):
        return nnx.merge(graph, params, fixed)(split["x"], **_rest(split, mask="key_value_mask"))

    return Case(run, params, {"x": jnp.arange(B * T).reshape(B, T) % 20, **split})


def make_model(**options: Any) -> TransformerLM:
    """A small language model."""
    config = ModelConfig(num_layers=1, width=D, num_heads=2, max_length=32, **options)
    return draw(lambda: TransformerLM(config, vocab_size=20, rngs=nnx.Rngs(0)))


def drawn_state(**options: Any) -> dict[str, Any]:
    """A state of a small language model, in the middle of its first segments."""
    return {"state": drawn(lambda: make_model(**options).init_state(B), least=0.1)}


def _rest(split: dict, **names: str) -> dict:
    return {names.get(name, name): x for name, x in split.items() if name != "x"}


def cases() -> dict[str, Callable[[], Case]]:
    """What is compared, by name."""
    planes = race_jax.init_planes(jax.random.key(1), **HASH, head_dim=D // N, scale=1.0)
    causal_fn = race_jax.attention_fn(planes, is_causal=True)
    flax_nnx = functools.partial(nnx.MultiHeadAttention, N, D, decode=False)
    flax_linen = functools.partial(linen.MultiHeadDotProductAttention, N, deterministic=True)
    by_flax = {"mask": MASK[:, None, None]}

    # An output gate normalizes the heads, and the gradient of the state's mass would cancel.
    gated = HASH | {"short_conv": "before", "is_causal": True, "forget_gate": "data"}
    layer = race_jax.linen.RACEAttention(N, num_kv_heads=K, **gated)
    stateful = PACKED | {"state": drawn(lambda: layer.init_state(B, D), least=0.1)}
    plain = race_jax.linen.RACEAttention(N, num_kv_heads=K, **HASH, learn_planes=True)

    vectors = {"key_value_mask": MASK, "segment_ids": PACKED["segment_ids"]}
    linear_state = {"initial_state": drawn(lambda: race_jax.RACEState.init(B, K, 3, 5), least=0.1)}
    gate = {"log_decay": -jnp.abs(normal(B, T, K))}
    linear = {"attention": "linear", "linear": {"forget_gate": "data"}}
    fresh = {"state": make_model(race=OWN).init_state(B)}
    return {
        "NNX, causal": lambda: nnx_module(
            lambda: race_jax.RACEAttention(N, D, num_kv_heads=K, **gated, rngs=nnx.Rngs(0)),
            stateful,
        ),
        "Linen, causal": lambda: linen_module(layer, stateful),
        "Linen, bidirectional": lambda: linen_module(plain, PACKED),
        "attention_fn, NNX": lambda: nnx_module(
            lambda: flax_nnx(attention_fn=race_jax.attention_fn(planes), rngs=nnx.Rngs(0)), by_flax
        ),
        "attention_fn, Linen": lambda: linen_module(flax_linen(attention_fn=causal_fn), by_flax),
        "linear, causal": lambda: linear_operation(
            gate | vectors | linear_state, is_causal=True, return_state=True
        ),
        "linear, bidirectional": lambda: linear_operation(vectors),
        "model of RACE": lambda: language_model(PACKED | fresh, race=OWN, remat=True),
        "model of linear attention": lambda: language_model(PACKED, **linear),
        "model of gated linear attention": lambda: language_model(
            PACKED | drawn_state(attention="gated_linear"), attention="gated_linear"
        ),
        "model of the gated delta net": lambda: language_model(
            PACKED | drawn_state(attention="gated_delta"), attention="gated_delta"
        ),
        "model of the delta rule on RACE's features": lambda: language_model(
            PACKED | drawn_state(attention="race_delta"), attention="race_delta"
        ),
        "model of sliding windows": lambda: language_model(
            PACKED | drawn_state(attention="sliding_window", positions="alibi"),
            attention="sliding_window",
            positions="alibi",
        ),
        "model of sigmoid attention": lambda: language_model(
            PACKED, attention="sigmoid", positions="alibi"
        ),
        "model of softmax": lambda: language_model(PACKED, attention="softmax", positions="alibi"),
    }


def outputs_and_gradients(case: Case, shared: Any, split: dict) -> tuple:
    """Outputs, and gradients of their squares by parameters and inputs."""
    of_floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    floats, others = (
        jax.tree.map(lambda x, want=want: x if of_floats(x) == want else None, split)
        for want in (True, False)
    )

    def loss(shared, floats):
        merged = jax.tree.map(
            lambda x, y: y if x is None else x, floats, others, is_leaf=lambda x: x is None
        )
        out = case.run(shared, merged)
        squares = (jnp.sum(x**2) / 500 for x in jax.tree.leaves(out) if of_floats(x))
        return sum(squares), out

    gradients, out = jax.grad(loss, (0, 1), has_aux=True)(shared, floats)
    return out, gradients


def compare_case(name: str, case: Case) -> None:
    """Runs a case in all three ways and compares."""
    run = functools.partial(outputs_and_gradients, case)
    want, want_gradients = jax.device_get(quick.jit(run)(case.shared, case.split))
    with jax.set_mesh(jax.make_mesh((2,), ("shards",))):
        given = jax.device_put(case.shared, WHOLE), jax.device_put(case.split, ROWS)
        inside = jax.shard_map(run, in_specs=(WHOLE, ROWS), out_specs=(ROWS, (WHOLE, ROWS)))
        for how, function in (("Explicit mesh", run), ("shard_map", inside)):
            got, gradients = quick.jit(function)(*given)
            for x in jax.tree.leaves(got):
                assert jax.typeof(x).sharding.spec[0] == "shards", jax.typeof(x)
            compare(f"{name}, {how}: ", got, want, kind="resumed")
            compare(f"{name}, {how}: ", gradients, want_gradients, kind="gradients")
    print(f"{name}: equal")


def decoding(**options: Any) -> None:
    """A prompt whose rows are split is continued as on one device. It is read in two pieces."""
    decode_module.PROMPT_SEGMENT = 3
    model = make_model(**options)
    prompt = np.arange(8).reshape(2, 4)
    mask = np.array([[True] * 4, [False, True, True, True]])
    sampling = Sampling(top_k=5, top_p=0.9)
    want = generate(model, prompt, key_value_mask=mask, max_tokens=3, sampling=sampling)
    with jax.set_mesh(jax.make_mesh((2,), ("shards",))):
        graph, variables = nnx.split(model)
        model = nnx.merge(graph, jax.device_put(variables, WHOLE))
        prompt = jax.device_put(prompt, ROWS)
        got = generate(model, prompt, key_value_mask=mask, max_tokens=3, sampling=sampling)
    np.testing.assert_array_equal(got, want)


def main() -> None:
    """Compares everything; prints a line for each comparison that held."""
    for name, make in cases().items():
        compare_case(name, make())
    for options in ({"race": OWN, "positions": "learned"}, {"attention": "softmax"}):
        decoding(**options)
        print(f"decoding {options}: equal")


if __name__ == "__main__":
    main()
