"""`supports` names the limit that a call exceeds, and splits cover a sequence."""

import re

import jax
import pytest

import pallas_kernels
from pallas_kernels import backend
from race_jax.core import dispatch, implementations


def shapes(*, tables=4, planes=4, value_dim=64, dtype="bfloat16", length=8):
    z = jax.ShapeDtypeStruct((1, length, 2, tables, planes), dtype)
    return z, z, jax.ShapeDtypeStruct((1, length, 2, value_dim), dtype)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"tables": 8, "planes": 5}, r"up to 128 features .*; got L=8, P=5, F=256"),
        (
            {"planes": 5, "dtype": "float32"},
            r"up to 64 features with float32 values and exact products; got L=4, P=5, F=128",
        ),
        ({"value_dim": 300}, r"value head dims from 1 to 256; got 300"),
        ({"dtype": "float16"}, r"float32 and bfloat16; query projections have float16"),
        ({"length": 0}, r"no empty arrays; got value of shape \(1, 0, 2, 64\)"),
    ],
)
def test_a_limit_is_named_with_what_was_given(changed, sentence):
    reason = pallas_kernels.supports(*shapes(**changed), is_causal=True)
    assert re.search(sentence, reason), reason


def test_products_in_tf32_allow_more_features():
    said = pallas_kernels.supports(
        *shapes(tables=8, planes=5, dtype="float32"), is_causal=True, exact=False
    )
    assert re.search("up to 128 features with float32 values and TF32 products; got L=8", said)
    wide = shapes(tables=8, dtype="float32")
    assert pallas_kernels.supports(*wide, is_causal=True, exact=False) == backend.missing()


class Card:
    """A device with the two attributes of a CUDA device that the kernels read."""

    def __init__(self, device_kind, compute_capability):
        self.device_kind, self.compute_capability = device_kind, compute_capability


@pytest.fixture
def newest_jax(monkeypatch):
    monkeypatch.setattr(backend, "has_warpgroups", lambda: True)


@pytest.mark.parametrize("capability", ["8.0", "9.0", "10.0", "12.0"])
def test_the_kernels_need_the_capability_they_are_compiled_for(capability, newest_jax, monkeypatch):
    cards = [Card("NVIDIA H100", "9.0"), Card("NVIDIA X", capability)]
    monkeypatch.setattr(jax, "devices", lambda platform=None: cards)
    reason = pallas_kernels.supports(*shapes(), is_causal=True)
    if capability == "9.0":
        assert reason is None
    else:
        want = f"need compute capability 9.0 (H100, H200); NVIDIA X has {capability}"
        assert reason == f"the RACE kernels {want}"


@pytest.mark.parametrize(
    ("capability", "runs"), [("9.0", "pallas on cuda, xla elsewhere"), ("10.0", "xla")]
)
def test_another_card_runs_xla_and_says_why(capability, runs, newest_jax, monkeypatch):
    cards = [Card("NVIDIA X", capability)]
    monkeypatch.setattr(jax, "devices", lambda platform=None: cards)
    z, _, value = shapes()
    x = jax.ShapeDtypeStruct((*z.shape[:3], 16), value.dtype)
    planes = jax.ShapeDtypeStruct((4, 4, 16), value.dtype)
    choice = dispatch.explain(x, x, value, planes, is_causal=True)
    assert choice.implementation == runs
    assert (capability == "9.0") or f"NVIDIA X has {capability}" in choice.reason


@pytest.mark.parametrize(("kind", "fits"), [("NVIDIA H200", True), ("NVIDIA B200", False)])
def test_a_described_device_is_known_by_its_name(kind, fits, newest_jax):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=132, platform="gpu")
    axes = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device, axis_types=axes)
    with jax.sharding.use_abstract_mesh(mesh):
        assert (backend.missing() is None) == fits


@pytest.mark.parametrize(
    ("precision", "exact"),
    [(None, False), ("default", False), ("tensorfloat32", False), ("high", False),
     ("highest", True), ("float32", True), ("BF16_BF16_F32_X6", True)],
)  # fmt: skip
def test_float32_products_follow_the_setting_of_jax(precision, exact):
    with jax.default_matmul_precision(precision):
        plan = implementations.Plan(dispatch.PALLAS_ASKED, (4, 4))
    assert plan.kernel_options["exact"] is exact


def test_float32_takes_the_kernels_where_they_were_faster(newest_jax, monkeypatch):
    cards = [Card("NVIDIA H100", "9.0")]
    monkeypatch.setattr(jax, "devices", lambda platform=None: cards)

    def chosen(**sizes):
        z, _, value = shapes(**sizes, dtype="float32")
        return dispatch.choose(
            z, z, value, is_causal=True, packed=False, normalization="global", implementation=None
        )

    assert chosen(length=1024) is dispatch.BY_PLATFORM
    assert chosen(length=1023) is dispatch.SHORT_FLOAT32
    assert chosen(length=1024, planes=5) is dispatch.WIDE_FLOAT32
    with jax.default_matmul_precision("highest"):
        assert "exact products" in chosen(length=1024, planes=5).reason


def test_a_call_within_the_limits_depends_on_the_installation():
    reason = pallas_kernels.supports(*shapes(), is_causal=False)
    assert reason == backend.missing()
    if jax.__version_info__ < (0, 11):
        assert reason == f"the RACE kernels need jax >= 0.11; found {jax.__version__}"
        assert backend.missing("sparse") == reason.replace("RACE", "sparse")


@pytest.mark.parametrize("length", [1, 63, 64, 4096, 1_000_001, 1 << 27])
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_splits_cover_the_sequence_in_whole_chunks(length, rows):
    split = pallas_kernels.split_length(length, rows)
    count = -(-length // split)
    assert split % 64 == 0
    assert count <= 512
