"""The functions of the kernels in dense form, and random arguments for both.

The dense form is written from the equations alone, over all pairs of tokens. It runs in float64 on
any platform.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    BidirectionalOperands,
    BidirectionalSteps,
    Blocks,
    CausalOperands,
    CausalSteps,
)
from pallas_kernels.blocks import choose_blocks
from pallas_kernels.tiles import padded, padded_features
from race_jax.core import passes
from race_jax.core.xla.chunk import Sums
from tests import quick

CAUSAL_GRADIENTS = (
    "zq", "zk", "value", "sharpness", "log_decay", "initial_numerator", "initial_mass",
)  # fmt: skip
CausalGradients = NamedTuple("CausalGradients", [(name, Any) for name in CAUSAL_GRADIENTS])
BidirectionalGradients = NamedTuple(
    "BidirectionalGradients", [(name, Any) for name in CAUSAL_GRADIENTS if name != "log_decay"]
)


class Case(NamedTuple):
    """Sizes and options of one call."""

    batch: int = 1
    length: int = 64
    heads: int = 2
    kv_heads: int = 2
    tables: int = 2
    planes: int = 2
    value_dim: int = 16
    gate: bool = False
    mask: bool = False
    packed: bool = False
    dtype: str = "float32"
    sharpness: float = 2.0
    queries: int | None = None  # T, if it differs from S in a bidirectional call
    # The number of tokens in each bucket before the call and after it. If it is not 0, values and
    # cotangents have a mean, and the buckets of the state and of its adjoint hardly differ.
    around: int = 0
    means: tuple[float, float] = (0.0, 0.0)  # added to every value, and to every cotangent of o
    use_tanh: bool = True


def draw(case: Case) -> tuple[dict[str, Any], list[Any]]:
    """Returns arguments by name as a caller prepares them, and cotangents of the three results."""
    rng = np.random.default_rng(7)
    b, t, n, k = case.batch, case.length, case.heads, case.kv_heads
    features = case.tables * 2**case.planes

    def normal(*shape, dtype=case.dtype):
        return np.asarray(jnp.asarray(rng.standard_normal(shape), dtype))

    mask = rng.random((b, t)) > 0.2 if case.mask else None
    segments = np.cumsum(rng.random((b, t)) < 4 / t, axis=1) if case.packed else None
    given = {
        "zq": normal(b, case.queries or t, n, case.tables, case.planes),
        "zk": normal(b, t, k, case.tables, case.planes),
        "value": normal(b, t, k, case.value_dim),
        "sharpness": (case.sharpness * rng.uniform(0.5, 1, k)).astype(np.float32),
        "log_decay": -rng.exponential(0.05, (b, t, k)).astype(np.float32) if case.gate else None,
        "key_value_mask": mask,
        "segment_ids": None if segments is None else segments.astype(np.int32),
        "initial_numerator": normal(b, k, features, case.value_dim, dtype="float32"),
        "initial_mass": np.abs(normal(b, k, features, dtype="float32")),
        "initial_segment": np.zeros((b,), np.int32),
    }
    d_numerator, d_mass = (given[f"initial_{x}"][::-1].copy() for x in ("numerator", "mass"))
    d_out = normal(b, case.queries or t, n, case.value_dim)
    if case.around:
        mean, d_mean = normal(k, 1, case.value_dim), normal(1, case.value_dim)
        deviation = np.float32(case.around**0.5)
        given["initial_mass"] = case.around + deviation * normal(b, k, features, dtype="float32")
        common = given["initial_mass"][..., None] * mean.astype(np.float32)
        given["initial_numerator"] = common + deviation * given["initial_numerator"]
        given["value"] = given["value"] + mean[:, 0]
        # A query's denominator is about as large as a bucket's mass.
        d_numerator = d_mean.astype(np.float32) + d_numerator / deviation
        d_mass = (d_mass / deviation - 1).astype(np.float32)
        d_out = d_out + d_mean
    value_mean, d_out_mean = case.means
    given["value"] = (given["value"] + value_mean).astype(given["value"].dtype)
    d_out = (d_out + d_out_mean).astype(d_out.dtype)
    if mask is not None:
        for name in ("zq", "zk", "value", "log_decay"):
            if given[name] is not None and given[name].shape[1] == t:
                keep = mask.reshape(b, t, *[1] * (given[name].ndim - 2))
                given[name] = np.where(keep, given[name], 0).astype(given[name].dtype)
    return given, [d_out, d_numerator, d_mass]


def programs(case: Case) -> Blocks:
    """Returns blocks for which no kernel is one of several warpgroups."""
    features, itemsize = padded_features(case.tables, case.planes), jnp.dtype(case.dtype).itemsize
    return choose_blocks(features, padded(case.value_dim), itemsize, gate=case.gate)


def features(z, sharpness, use_tanh):
    """Returns φ (B, T, heads, L·R), by the softmax over corners."""
    planes = z.shape[-1]
    corners = jnp.asarray(list(itertools.product((-1.0, 1.0), repeat=planes)), z.dtype)
    logits = (
        jnp.einsum("bthlp,rp->bthlr", jnp.tanh(z) if use_tanh else z, corners)
        * sharpness[:, None, None]
    )
    return jax.nn.softmax(logits, axis=-1).reshape(*z.shape[:3], -1)


def _read(numerator, denominator, allowed=True):
    seen = (denominator >= 1e-30) & allowed
    return jnp.where(seen[..., None], numerator / jnp.where(seen, denominator, 1)[..., None], 0)


def causal(given: dict[str, Any], use_tanh: bool = True) -> tuple:
    """Returns outputs, the final numerator and the final mass, from all pairs of tokens."""
    mask, segments = given["key_value_mask"], given["segment_ids"]
    batch, length, kv_heads = given["zk"].shape[:3]
    group = given["zq"].shape[2] // kv_heads
    by_query = lambda x, axis=2: jnp.repeat(x, group, axis)  # noqa: E731
    phi_q = features(given["zq"], by_query(given["sharpness"], 0), use_tanh)
    phi_k = features(given["zk"], given["sharpness"], use_tanh)
    decay = given["log_decay"]
    total = jnp.zeros(phi_k.shape[:3]) if decay is None else jnp.cumsum(decay, axis=1)
    visible = jnp.tril(jnp.ones((length, length), bool))[None]
    entering, allowed = jnp.ones((batch, length), bool), True
    if segments is not None:
        visible = visible & (segments[:, :, None] == segments[:, None, :])
        entering = segments == given["initial_segment"][:, None]
    if mask is not None:
        phi_k, allowed = phi_k * mask[..., None, None], mask[..., None]
    since = total[:, :, None] - total[:, None, :]
    weight = jnp.where(visible[..., None], jnp.exp(jnp.where(visible[..., None], since, 0)), 0)
    weight = by_query(weight, 3) * jnp.einsum("btnf,bsnf->btsn", phi_q, by_query(phi_k))
    enter = by_query(jnp.exp(total) * entering[..., None])
    state = by_query(given["initial_numerator"], 1), by_query(given["initial_mass"], 1)
    numerator = jnp.einsum("btsn,bsnv->btnv", weight, by_query(given["value"]))
    numerator += jnp.einsum("btnf,bnfv,btn->btnv", phi_q, state[0], enter)
    denominator = weight.sum(2) + jnp.einsum("btnf,bnf,btn->btn", phi_q, state[1], enter)
    leave, kept = jnp.exp(total[:, -1:] - total), jnp.exp(total[:, -1])
    if segments is not None:
        leave = leave * (segments == segments[:, -1:])[..., None]
        kept = kept * (segments[:, -1] == given["initial_segment"])[:, None]
    final = jnp.einsum("bskf,bskv,bsk->bkfv", phi_k, given["value"], leave)
    mass = jnp.einsum("bskf,bsk->bkf", phi_k, leave)
    final += kept[..., None, None] * given["initial_numerator"]
    mass += kept[..., None] * given["initial_mass"]
    return _read(numerator, denominator, allowed), final, mass


def bidirectional(given: dict[str, Any], use_tanh: bool = True) -> tuple:
    """Returns outputs, the total numerator and the total mass."""
    group = given["zq"].shape[2] // given["zk"].shape[2]
    phi_q = features(given["zq"], jnp.repeat(given["sharpness"], group), use_tanh)
    phi_k = features(given["zk"], given["sharpness"], use_tanh)
    if given["key_value_mask"] is not None:
        phi_k = phi_k * given["key_value_mask"][..., None, None]
    total = given["initial_numerator"] + jnp.einsum("bskf,bskv->bkfv", phi_k, given["value"])
    mass = given["initial_mass"] + phi_k.sum(1)
    numerator = jnp.einsum("btnf,bnfv->btnv", phi_q, jnp.repeat(total, group, 1))
    denominator = jnp.einsum("btnf,bnf->btn", phi_q, jnp.repeat(mass, group, 1))
    return _read(numerator, denominator), total, mass


def oracle(function, given: dict[str, Any], cotangents: list) -> tuple[dict, dict]:
    """Returns outputs and gradients by name, in float64. The CPU runs it: it compiles fastest."""

    @jax.jit
    def run(moving, fixed, cotangents):
        out, pull = jax.vjp(lambda x: function(fixed | x), moving)
        return out, pull(cotangents)[0]

    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        exact = {name: _as_float64(x) for name, x in given.items()}
        moving = {x: exact.pop(x) for x in CAUSAL_GRADIENTS if exact.get(x) is not None}
        out, gradients = run(moving, exact, tuple(_as_float64(x) for x in cotangents))
        return _outputs(out), {name: np.asarray(x) for name, x in gradients.items()}


def _as_float64(x):
    if x is None or np.asarray(x).dtype.kind in "bi":
        return x
    return jnp.asarray(np.asarray(x, np.float64))


def _outputs(results) -> dict:
    return dict(zip(("out", "numerator", "mass"), map(np.asarray, results), strict=True))


def causal_kernels(
    given: dict[str, Any],
    cotangents: list,
    *,
    interpret: bool,
    config: Blocks | None = None,
    **options: bool,
) -> tuple:
    """Returns results and gradients of the causal kernels. It is meant to be traced."""
    operands = causal_operands(given)
    hash_shape = given["zq"].shape[3:]
    steps = CausalSteps.of(operands, hash_shape, interpret=interpret, config=config, **options)
    out, final, starts = passes.causal_forward(steps, operands)
    d_out, *d_final = cotangents
    found = passes.causal_backward(steps, operands, final, starts, d_out, Sums(*d_final))
    return (out, *final), CausalGradients(*found[:5], *found.sums)


def causal_operands(given: dict[str, Any]) -> CausalOperands:
    """Returns the arguments in the form that the steps take."""
    sums = Sums(given["initial_numerator"], given["initial_mass"])
    names = "zq", "zk", "value", "sharpness", "log_decay", "key_value_mask", "segment_ids"
    return CausalOperands(*(given[name] for name in names), sums, given["initial_segment"])


def bidirectional_kernels(
    given: dict[str, Any],
    cotangents: list,
    *,
    interpret: bool,
    config: Blocks | None = None,
    **options: bool,
) -> tuple:
    """Returns results and gradients of the bidirectional kernels. It is meant to be traced."""
    names = "zq", "zk", "value", "sharpness", "key_value_mask"
    sums = Sums(given["initial_numerator"], given["initial_mass"])
    operands = BidirectionalOperands(*(given[name] for name in names), sums)
    hash_shape = given["zq"].shape[3:]
    steps = BidirectionalSteps(hash_shape, interpret=interpret, config=config, **options)
    out, totals = passes.bidirectional_forward(steps, operands)
    d_out, *d_totals = cotangents
    found = passes.bidirectional_backward(steps, operands, totals, d_out, Sums(*d_totals))
    return (out, *totals), BidirectionalGradients(*found[:4], *found.sums)


def runner(kernels, *, interpret: bool, config: Blocks | None = None, **options: bool):
    """Returns a function from arguments and cotangents to outputs and gradients of `kernels`.

    Both results are by name. The function compiles only once. The options are `exact` and
    `use_tanh`.
    """
    function = functools.partial(kernels, interpret=interpret, config=config, **options)
    # To compile interpreted kernels takes far longer than to run them.
    compiled = (quick.jit if interpret else jax.jit)(function)
    return lambda given, cotangents: named(given, *compiled(given, cotangents))


def run(kernels, given: dict[str, Any], cotangents: list, **options) -> tuple[dict, dict]:
    """Calls the function of `runner` once."""
    return runner(kernels, **options)(given, cotangents)


def named(given: dict[str, Any], results, gradients) -> tuple[dict, dict]:
    """Returns results and gradients of the kernels in the form in which `oracle` returns them."""
    found = gradients._asdict().items()
    return _outputs(results), {n: np.asarray(x) for n, x in found if given[n] is not None}
