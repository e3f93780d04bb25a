"""An implementation is chosen with a reason, and a named implementation never falls back."""

import jax
import jax.numpy as jnp
import pytest

import race_jax
from race_jax.core import dispatch

ON_CPU_ONLY = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="says what happens on a machine without an accelerator"
)


def arguments(**options):
    x = jnp.ones((1, 3, 2, 4))
    return {"query": x, "key": x, "value": x, "planes": jnp.ones((1, 2, 4))} | options


@ON_CPU_ONLY
@pytest.mark.parametrize("is_causal", [True, False])
def test_none_works_and_says_why(is_causal, assert_close):
    given = arguments(is_causal=is_causal)
    choice = dispatch.explain(**given)
    assert choice.implementation == "xla"
    assert len(choice.reason) > 10
    got = race_jax.race_attention(**given)
    assert_close("out", got, race_jax.race_attention(**given, implementation="xla"), kind="rerun")


@ON_CPU_ONLY
@pytest.mark.parametrize("is_causal", [True, False])
def test_pallas_raises_with_the_reason_and_never_falls_back(is_causal):
    given = arguments(is_causal=is_causal, implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"(?is).{10,}implementation=.?xla"):
        race_jax.race_attention(**given)
    with pytest.raises(NotImplementedError, match=r"(?is).{10,}implementation=.?xla"):
        jax.jit(lambda query: race_jax.race_attention(**(given | {"query": query})))(given["query"])


def test_pallas_refuses_bucket_normalization():
    given = arguments(normalization="bucket", implementation="pallas")
    with pytest.raises(NotImplementedError, match=r"(?is)bucket"):
        race_jax.race_attention(**given)


def test_a_name_means_exactly_that():
    choice = dispatch.explain(**arguments(implementation="xla"))
    assert choice.implementation == "xla"
    with pytest.raises(ValueError, match=r"xla.*pallas.*triton|triton.*xla.*pallas"):
        dispatch.explain(**arguments(implementation="triton"))


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernels need jax >= 0.11")
@pytest.mark.parametrize(
    ("dtype", "length", "kernels"),
    [("bfloat16", 64, True), ("float32", 1023, False), ("float32", 1024, True)],
)
def test_none_takes_the_kernels_where_they_are_faster(dtype, length, kernels, on_h200):
    x = jax.ShapeDtypeStruct((1, length, 2, 64), dtype)
    with on_h200():
        choice = dispatch.explain(**arguments(query=x, key=x, value=x, is_causal=True))
        named = dispatch.explain(
            **arguments(query=x, key=x, value=x, is_causal=True, implementation="pallas")
        )
    assert ("pallas" in choice.implementation) == kernels
    assert named.implementation == "pallas"


def test_explain_takes_shapes():
    shapes = jax.eval_shape(lambda: arguments())
    assert dispatch.explain(**shapes) == dispatch.explain(**arguments())


def test_the_op_needs_no_flax_and_no_kernels(run_python):
    printed = run_python(
        """
        import sys
        import race_jax
        race_jax.race_attention, race_jax.RACEState, race_jax.merge, race_jax.init_planes
        for name in ("flax", "pallas_kernels", "jax.experimental.pallas"):
            print(name, name in sys.modules)
        from jax._src import xla_bridge
        print("devices asked for", xla_bridge.backends_are_initialized())
        """
    )
    assert printed.split("\n")[:4] == [
        "flax False",
        "pallas_kernels False",
        "jax.experimental.pallas False",
        "devices asked for False",
    ]


def test_public_names():
    for name in (
        "RACEAttention",
        "RACEState",
        "attention_fn",
        "hash_projections",
        "init_planes",
        "merge",
        "race_attention",
        "race_attention_from_projections",
        "soft_hash",
    ):
        assert callable(getattr(race_jax, name)), name
        assert getattr(race_jax, name).__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        race_jax.no_such_name  # noqa: B018
    with pytest.raises(AttributeError, match="import race_jax"):
        race_jax.__getattr__("train")
