"""`race_attention` passes hash projections to the kernels in the flat form that they take.

The kernels are interpreted. The other case is XLA's code on the CPU of a host that has a GPU, which
gets the same flat projections.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import pallas_kernels
import race_jax
from race_jax.core import dispatch, implementations
from tests import quick

CHOICES = {"pallas": dispatch.PALLAS_ASKED, "by platform": dispatch.BY_PLATFORM}


@pytest.fixture(params=CHOICES)
def choose_kernels(request, monkeypatch):
    """Makes every call choose the interpreted kernels, and records the shapes of z in them."""
    shapes = []

    options = {"interpret": True, "exact": True}  # XLA's products on the CPU are exact too

    def steps(operands, hash_shape, **given):
        shapes.append(operands.z_q.shape[3:])
        return pallas_kernels.CausalSteps.of(operands, hash_shape, **given | options)

    class Bidirectional(pallas_kernels.BidirectionalSteps):
        def outputs(self, operands, totals):
            shapes.append(operands.z_q.shape[3:])
            return super().outputs(operands, totals)

    kernels = SimpleNamespace(
        CausalSteps=SimpleNamespace(of=steps),
        BidirectionalSteps=lambda **given: Bidirectional(**given | options),
        projection_columns=pallas_kernels.projection_columns,
    )
    monkeypatch.setattr(implementations, "kernels", lambda: kernels)

    def start():
        monkeypatch.setattr(dispatch, "choose", lambda *_, **__: CHOICES[request.param])
        return shapes

    return start


def results(function, arguments):
    """Returns the output and every gradient, by name."""

    def run(arguments):
        out, pull_back = jax.vjp(function, arguments)
        cotangent = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
        return {"out": out, "gradients": pull_back(cotangent)[0]}

    return quick.jit(run)(arguments)


@pytest.mark.parametrize(
    ("is_causal", "per_head"), [(True, False), (False, True)], ids=["causal", "planes per head"]
)
def test_flat_projections_change_nothing(is_causal, per_head, choose_kernels, assert_close):
    keys = jax.random.split(jax.random.key(0), 4)
    lead = (2,) if per_head else ()
    shapes = (1, 70, 4, 8), (1, 70, 2, 8), (1, 70, 2, 16), (*lead, 3, 3, 8)
    names = "query", "key", "value", "planes"
    drawn = (jax.random.normal(k, shape) for k, shape in zip(keys, shapes, strict=True))
    arguments = dict(zip(names, drawn, strict=True)) | {"sharpness": jnp.array([1.0, 2.0])}
    mask = jnp.arange(70)[None] < 60

    def attend(arguments):
        return race_jax.race_attention(**arguments, is_causal=is_causal, key_value_mask=mask)

    want = results(attend, arguments)
    seen = choose_kernels()
    got = results(attend, arguments)
    assert set(seen) == {(1, 16)}  # nine columns, and seven of zeros
    assert_close("out", got["out"], want["out"], kind="outputs")
    assert_close("gradients", got["gradients"], want["gradients"], kind="gradients")


def test_a_layer_makes_flat_projections(choose_kernels, assert_close):
    layer = race_jax.RACEAttention(
        4,
        in_features=12,
        qkv_features=32,
        num_kv_heads=2,
        num_tables=3,
        num_planes=3,
        fold_planes=True,
        rngs=nnx.Rngs(0),
    )
    definition, state = nnx.split(layer)
    inputs = jax.random.normal(jax.random.key(1), (2, 70, 12))

    def apply(state):
        return nnx.merge(definition, state)(inputs, is_causal=True)

    want = results(apply, state)
    seen = choose_kernels()
    got = results(apply, state)
    assert set(seen) == {(1, 16)}
    assert_close("out", got["out"], want["out"], kind="outputs")
    assert_close("gradients", got["gradients"], want["gradients"], kind="gradients")
