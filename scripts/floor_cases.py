"""What the GPU's table measures: attention problems, implementations, their inputs and floors.

In: a case and an implementation by name. Out: shapes of the inputs, programs to run on them, and
the floor, the bytes that must pass through memory: forward reads its inputs and writes the output;
backward reads the inputs and the output's cotangent and writes gradients of all inputs but the
planes. So from q, k, v it is 4 and 4 + 7 tensors of equal size.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

import race_jax
from random_arrays import normal

Inputs = dict[str, jax.Array]

K, M = 2**10, 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem, B = 1, H = V, bfloat16: T, whether causal and forgetting, L, P, N, H.

    `resident` is a training step of the longest sequence a card holds: a loss of the outputs, and
    gradients of it beside q, k, v, but no output or cotangent given or kept.
    """

    length: int
    causal: bool = True
    gate: bool = False
    resident: bool = False
    tables: int = 4
    planes: int = 4
    heads: int = 4
    width: int = 128

    @property
    def form(self) -> str:
        """As the table names it."""
        words = ["causal" if self.causal else "bidirectional"]
        return ", ".join(words + ["gate"] * self.gate + ["resident"] * self.resident)


THREE = {"tables": 3, "planes": 3}

# A star: each sweep leaves the base point, Case(length), in one direction.
SWEEPS = {
    "lengths": [Case(t) for t in (K, 2 * K, 4 * K, 16 * K, 64 * K, 256 * K, M, 4 * M, 16 * M)],
    "features": [Case(M, tables=2, planes=2), Case(M, **THREE)],
    "heads": [Case(t, heads=32) for t in (32 * K, 128 * K)],
    "widths": [Case(M, width=64)],
    "gate": [Case(M, gate=True, **THREE), Case(M, gate=True)],
    "bidirectional": [
        *(Case(t, causal=False, **THREE) for t in (M, 4 * M, 12 * M)),
        Case(M, causal=False),
    ],
    "resident": [Case(t, resident=True, **THREE) for t in (12 * M, 16 * M)],
}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """What to call, whether queries and keys come as hash projections, and up to which T."""

    call: Callable[[Case, Inputs], jax.Array]
    from_z: bool = False
    hashes: bool = True
    resident: bool = False
    longest: int | None = None

    def runs(self, case: Case) -> bool:
        """Whether the table has a line of it for this case."""
        able = (self.hashes or not case.gate) and (self.resident or not case.resident)
        return able and (self.longest is None or case.length <= self.longest)


def race(case: Case, inputs: Inputs, implementation: str) -> jax.Array:
    """RACE from queries and keys."""
    return race_jax.race_attention(
        *(inputs[name] for name in ("query", "key", "value", "planes")),
        is_causal=case.causal,
        log_decay=inputs.get("log_decay"),
        implementation=implementation,
    )


def race_from_z(case: Case, inputs: Inputs) -> jax.Array:
    """RACE from hash projections."""
    return race_jax.race_attention_from_projections(
        *(inputs[name] for name in ("query", "key", "value")),
        is_causal=case.causal,
        log_decay=inputs.get("log_decay"),
        implementation="pallas",
    )


def softmax(case: Case, inputs: Inputs) -> jax.Array:
    """Softmax attention by cuDNN's fused kernels."""
    return jax.nn.dot_product_attention(
        *(inputs[name] for name in ("query", "key", "value")),
        is_causal=case.causal,
        implementation="cudnn",
    )


IMPLEMENTATIONS = {
    "pallas from z": Implementation(race_from_z, from_z=True),
    "pallas from qkv": Implementation(
        functools.partial(race, implementation="pallas"), resident=True
    ),
    "xla from qkv": Implementation(functools.partial(race, implementation="xla"), longest=M),
    "cudnn softmax": Implementation(softmax, hashes=False, longest=64 * K),
}


def input_shapes(
    case: Case, implementation: Implementation, *, backward: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """The inputs of a program; the output's cotangent among them where gradients are asked for."""
    lead = (1, case.length, case.heads)
    inner = (case.tables, case.planes) if implementation.from_z else (case.width,)
    half = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    full = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    shapes = dict.fromkeys(("query", "key"), half((*lead, *inner)))
    shapes["value"] = half((*lead, case.width))
    if case.gate:
        shapes["log_decay"] = full(lead)
    if implementation.hashes and not implementation.from_z:
        shapes["planes"] = full((case.tables, case.planes, case.width))
    if backward and not case.resident:
        shapes["cotangent"] = shapes["value"]
    return shapes


def draw(case: Case, name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """One random input: rows of norm sqrt(H), planes that give z of order one, a mild gate."""
    seed = ("query", "key", "value", "log_decay", "planes", "cotangent").index(name)
    array = normal(shape.shape, shape.dtype)(seed)
    if name == "planes":
        return array * case.width**-0.5
    return jax.nn.log_sigmoid(3 + array) if name == "log_decay" else array


def array_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """The size of an array."""
    return math.prod(shape.shape) * shape.dtype.itemsize


def floor_bytes(case: Case, implementation: Implementation, *, backward: bool) -> int:
    """What must be read and written, forward or in both directions."""
    shapes = input_shapes(case, implementation, backward=False)
    shapes.pop("planes", None)
    inputs, output = sum(map(array_bytes, shapes.values())), array_bytes(shapes["value"])
    return inputs + output + (inputs + output + inputs if backward else 0)


def program(
    case: Case, implementation: Implementation, *, backward: bool
) -> Callable[[Inputs], object]:
    """The output; with `backward` output and gradients; where resident, gradients alone.

    Nothing is donated: a caller keeps q, k, v, and gradients and inputs are what must fit.
    """

    def gradients(inputs: Inputs) -> object:
        moving = {name: x for name, x in inputs.items() if name not in ("planes", "cotangent")}
        fixed = {name: x for name, x in inputs.items() if name == "planes"}

        def run(moving: Inputs) -> jax.Array:
            return implementation.call(case, moving | fixed)

        if case.resident:
            # Of squares: the cotangent is as large as the output, where a mean's is one number.
            return jax.grad(lambda m: jnp.square(run(m).astype(jnp.float32)).sum())(moving)
        output, pull_back = jax.vjp(run, moving)
        return output, pull_back(inputs["cotangent"])[0]

    return gradients if backward else functools.partial(implementation.call, case)
