"""Random arguments of the operation, and its outputs and gradients for them, by name.

A `Problem` can be evaluated by the library, or by an oracle in float64. A test compares the two
dictionaries that result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import race_jax
from race_jax.core import reference
from tests import quick

Arrays = dict[str, Any]
STATE_FIELDS = ("numerator", "mass", "log_decay")
TOKENS = ("query", "key", "value", "out")  # what has the dtype of the model; the rest is float32


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "cotangents", "masks", "state_segment"],
    meta_fields=["options"],
)
@dataclasses.dataclass(frozen=True)
class Problem:
    """Arguments of one call; a pytree, so that problems of the same shapes share a compilation.

    Attributes:
        arrays: the differentiable ones by name; the initial state's as ``state.numerator`` etc.
        cotangents: of ``out`` and of the returned state's fields.
        masks: ``key_value_mask`` and ``segment_ids``, where there are any.
        state_segment: segment of the initial state, where there is one.
        options: the static arguments as pairs.
    """

    arrays: Arrays = dataclasses.field(repr=False)
    cotangents: Arrays = dataclasses.field(repr=False)
    masks: Arrays
    state_segment: Any
    options: tuple[tuple[str, Any], ...]

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """For the report of a failing property: without the arrays."""
        del cycle
        printer.text(repr(self))

    @property
    def is_causal(self) -> bool:
        return dict(self.options)["is_causal"]

    def replace(self, **arrays: Any) -> Problem:
        """The same with some arrays, masks or the state's segment changed."""
        segment = arrays.pop("state.segment", self.state_segment)
        masks = {name: arrays.pop(name, mask) for name, mask in self.masks.items()}
        arrays = self.arrays | arrays
        return dataclasses.replace(self, arrays=arrays, masks=masks, state_segment=segment)

    def astype(self, dtype: Any, names: tuple[str, ...] = TOKENS) -> Problem:
        """The same with the named arrays and cotangents in that dtype."""

        def cast(arrays):
            return {n: np.asarray(x, dtype if n in names else None) for n, x in arrays.items()}

        return dataclasses.replace(self, arrays=cast(self.arrays), cotangents=cast(self.cotangents))


def make_problem(
    seed: int = 0,
    *,
    batch: int = 2,
    queries: int = 7,
    keys: int | None = None,
    heads: int = 2,
    kv_heads: int = 1,
    head_dim: int = 8,
    value_dim: int = 5,
    tables: int = 2,
    num_planes: int = 2,
    scale: float | None = None,
    sharpness: float = 2.0,
    gate: float | None = None,
    padding: bool = False,
    segments: int | None = None,
    state: bool = False,
    planes_per_head: bool = False,
    **options: Any,
) -> Problem:
    """Draws a problem.

    Args:
        seed: of the random numbers.
        batch: rows; with `queries`, `keys` and so on, the sizes of the arrays.
        queries: T.
        keys: S, `queries` if None.
        heads: N.
        kv_heads: K.
        head_dim: H.
        value_dim: V.
        tables: L.
        num_planes: P.
        scale: of the planes, 1/sqrt(head_dim) if None.
        sharpness: of the first key/value head; the others' are a little larger.
        gate: mean of -log_decay, or no gate.
        padding: whether rows are padded, as `padding_mask` does.
        segments: number of packed segments in a row, or none.
        state: whether there is an initial state.
        planes_per_head: whether every key/value head has planes of its own.
        **options: `is_causal`, `normalization`, `implementation`.
    """
    rng = np.random.default_rng(seed)
    keys = queries if keys is None else keys

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    features = tables * 2**num_planes
    per_head = (kv_heads,) if planes_per_head else ()
    scale = head_dim**-0.5 if scale is None else scale
    arrays = {
        "query": normal(batch, queries, heads, head_dim),
        "key": normal(batch, keys, kv_heads, head_dim),
        "value": normal(batch, keys, kv_heads, value_dim),
        "planes": scale * normal(*per_head, tables, num_planes, head_dim),
        "sharpness": sharpness * 1.1 ** np.arange(kv_heads),
    }
    if gate is not None:
        arrays["log_decay"] = -gate * rng.exponential(size=(batch, keys, kv_heads))
    if state:
        arrays["state.numerator"] = normal(batch, kv_heads, features, value_dim)
        arrays["state.mass"] = 0.1 + np.abs(normal(batch, kv_heads, features))
        arrays["state.log_decay"] = -np.abs(normal(batch, kv_heads))
    cotangents = {
        "out": normal(batch, queries, heads, value_dim),
        "state.numerator": normal(batch, kv_heads, features, value_dim),
        "state.mass": normal(batch, kv_heads, features),
        "state.log_decay": normal(batch, kv_heads),
    }
    segment = np.arange(batch, dtype=np.int32) % 2 if state else None
    masks = {"key_value_mask": padding_mask(batch, keys)} if padding else {}
    if segments is not None:
        borders = np.sort(rng.integers(0, keys + 1, (batch, segments - 1)))
        ids = (borders[:, :, None] <= np.arange(keys)).sum(1).astype(np.int32)
        masks["segment_ids"] = ids + (segment[:, None] if state else 0)
    options = {"is_causal": False} | options
    problem = Problem(arrays, cotangents, masks, segment, tuple(options.items()))
    return problem.astype(np.float32, (*arrays, *cotangents))


def padding_mask(batch: int, keys: int) -> np.ndarray:
    """True where there is a token: rows with interior, left, right, full and no padding in turn."""
    slot = np.arange(keys)
    patterns = [slot % 3 != 1, slot >= keys // 3, slot < keys - keys // 3, slot < 0, slot >= 0]
    return np.stack([patterns[row % len(patterns)] for row in range(batch)])


def call(op: Callable[..., Any], problem: Problem) -> Arrays:
    """Outputs of `op` by name: ``out`` and, where it can be had, the returned state's fields."""
    arguments = {n: x for n, x in problem.arrays.items() if not n.startswith("state.")}
    arguments |= problem.masks | dict(problem.options)
    if "segment_ids" in problem.masks and not problem.is_causal:
        return {"out": op(**arguments)}  # such segments have no common totals
    if problem.state_segment is not None:
        state_type = reference.Tables if op in ORACLES else race_jax.RACEState
        fields = {name: problem.arrays[f"state.{name}"] for name in STATE_FIELDS}
        arguments["initial_state"] = state_type(**fields, segment=problem.state_segment)
    out, state = op(**arguments, return_state=True)
    fields = {f"state.{name}": getattr(state, name) for name in (*STATE_FIELDS, "segment")}
    return {"out": out} | fields


def call_and_differentiate(op: Callable[..., Any], problem: Problem) -> tuple[Arrays, Arrays]:
    """Outputs by name, and their gradients by name as ``d_query`` and so on."""

    def differentiable(arrays):
        outputs = call(op, dataclasses.replace(problem, arrays=arrays))
        return outputs, {n: outputs.pop(n) for n in ("state.segment",) if n in outputs}

    outputs, pull_back, integers = jax.vjp(differentiable, problem.arrays, has_aux=True)
    cotangents = {n: problem.cotangents[n].astype(x.dtype) for n, x in outputs.items()}
    (gradients,) = pull_back(cotangents)
    return outputs | integers, {f"d_{name}": x for name, x in gradients.items()}


# The library compiles as its users compile it. The oracles run once each, in float64 at small
# sizes, where the compiler takes nearly all of the time: its optimiser has nothing to add there.
compiled_call = jax.jit(call, static_argnums=0)
compiled_call_and_differentiate = jax.jit(call_and_differentiate, static_argnums=0)
compiled_oracle = quick.jit(call_and_differentiate, static_argnums=0)
ORACLES = (reference.all_pairs, reference.token_by_token)


def outputs(problem: Problem, op: Callable[..., Any] = race_jax.race_attention) -> Arrays:
    """Outputs by name."""
    return jax.device_get(compiled_call(op, to_device(problem)))


def evaluate(problem: Problem, op: Callable[..., Any] = race_jax.race_attention):
    """Outputs and gradients by name."""
    return jax.device_get(compiled_call_and_differentiate(op, to_device(problem)))


def oracle(problem: Problem, form: Callable[..., Any] = reference.all_pairs):
    """What `evaluate` should give: by an oracle, in float64, from the problem's own numbers."""
    options = tuple(pair for pair in problem.options if pair[0] != "implementation")
    problem = dataclasses.replace(problem, options=options)
    wide = problem.astype(np.float64, (*problem.arrays, *problem.cotangents))
    with jax.enable_x64(True):
        return jax.device_get(compiled_oracle(form, to_device(wide)))


def to_device(problem: Problem) -> Problem:
    """The problem with jax arrays."""
    return jax.tree.map(jnp.asarray, problem)
