"""Attention operations as programs: RACE and softmax, forward, or forward and backward.

The floor in bytes: forward reads its inputs and writes the output; backward reads the inputs and
the output's cotangent and writes gradients of all inputs but the planes. So from q, k, v it is 4
and 4 + 7 tensors of equal size. The floor in operations, forward, per token and head, is
4 F (V + 1) + 4 L P H for RACE, 2 T (H + V) for softmax and half of that if causal; the backward
pass counts twice.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import race_jax
from benchmarks.arrays import Random
from benchmarks.programs import Inputs, Program

K, M = 2**10, 2**20
BY_HEADS = PartitionSpec(None, None, "heads")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """One attention problem but for its length: B, N, H, V, L, P, dtype and whether it forgets."""

    batch: int = 1
    heads: int = 4
    head_dim: int = 128
    value_dim: int = 128
    tables: int = 3
    planes: int = 3
    dtype: str = "float32"
    decay: bool = False


@dataclasses.dataclass(frozen=True)
class Problem(Sizes):
    """One attention problem.

    `resident` is a training step of the longest sequence a card holds: a loss of the outputs, and
    gradients of it beside q, k, v, but no output or cotangent given or kept.
    """

    length: int
    causal: bool = True
    resident: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to compute attention.

    Attributes:
      call: the output of a problem from its inputs.
      from_z: whether queries and keys come as hash projections.
      hashes: whether it is RACE, which has planes and can forget.
      resident: whether the GPU's table has resident lines of it.
      longest: the longest sequence in the GPU's table, or None.
    """

    call: Callable[[Problem, Inputs], jax.Array]
    from_z: bool = False
    hashes: bool = True
    resident: bool = False
    longest: int | None = None

    @property
    def growth(self) -> int:
        """The power of T that its time grows with."""
        return 1 if self.hashes else 2

    def runs(self, problem: Problem) -> bool:
        """Whether the GPU's table has a line of it for this problem."""
        able = (self.hashes or not problem.decay) and (self.resident or not problem.resident)
        return able and (self.longest is None or problem.length <= self.longest)


def race(problem: Problem, inputs: Inputs, implementation: str | None = None) -> jax.Array:
    """RACE from queries and keys; by default as the library chooses to compute it."""
    return race_jax.race_attention(
        *(inputs[name] for name in ("query", "key", "value", "planes")),
        is_causal=problem.causal,
        log_decay=inputs.get("log_decay"),
        implementation=implementation,
    )


def race_from_z(problem: Problem, inputs: Inputs) -> jax.Array:
    """RACE from hash projections."""
    return race_jax.race_attention_from_projections(
        *(inputs[name] for name in ("query", "key", "value")),
        is_causal=problem.causal,
        log_decay=inputs.get("log_decay"),
        implementation="pallas",
    )


def softmax(problem: Problem, inputs: Inputs, implementation: str | None = None) -> jax.Array:
    """JAX's own softmax attention."""
    return jax.nn.dot_product_attention(
        *(inputs[name] for name in ("query", "key", "value")),
        is_causal=problem.causal,
        implementation=implementation,
    )


METHODS = {
    "race": Method(race),
    "softmax": Method(softmax, hashes=False),
    "pallas from z": Method(race_from_z, from_z=True),
    "pallas from qkv": Method(functools.partial(race, implementation="pallas"), resident=True),
    "xla from qkv": Method(functools.partial(race, implementation="xla"), longest=M),
    "cudnn softmax": Method(
        functools.partial(softmax, implementation="cudnn"), hashes=False, longest=64 * K
    ),
}


def input_arrays(problem: Problem, method: Method, *, backward: bool) -> dict[str, Random]:
    """The inputs of a program; the output's cotangent among them where gradients are asked for.

    Rows have a norm of about sqrt(H), planes give z of order one, and the gate is mild.
    """
    lead = (problem.batch, problem.length, problem.heads)
    inner = (problem.tables, problem.planes) if method.from_z else (problem.head_dim,)
    arrays = dict.fromkeys(("query", "key"), Random((*lead, *inner), problem.dtype, split=BY_HEADS))
    arrays["value"] = Random((*lead, problem.value_dim), problem.dtype, split=BY_HEADS)
    if problem.decay and method.hashes:
        arrays["log_decay"] = Random(lead, mean=3.0, finish=jax.nn.log_sigmoid, split=BY_HEADS)
    if method.hashes and not method.from_z:
        shape = (problem.tables, problem.planes, problem.head_dim)
        arrays["planes"] = Random(shape, deviation=problem.head_dim**-0.5)
    if backward and not problem.resident:
        arrays["cotangent"] = arrays["value"]
    return arrays


def floor_bytes(problem: Problem, method: Method, *, backward: bool) -> int:
    """What must be read and written, forward or in both directions."""
    arrays = input_arrays(problem, method, backward=False)
    arrays.pop("planes", None)
    inputs, output = sum(x.nbytes for x in arrays.values()), arrays["value"].nbytes
    return inputs + output + (inputs + output + inputs if backward else 0)


def floor_operations(problem: Problem, method: Method, *, backward: bool) -> float:
    """The fewest operations, forward or in both directions."""
    if method.hashes:
        features = problem.tables * 2**problem.planes
        each = 4 * features * (problem.value_dim + 1)
        each += 4 * problem.tables * problem.planes * problem.head_dim
    else:
        each = (
            (1 if problem.causal else 2) * problem.length * (problem.head_dim + problem.value_dim)
        )
    return each * problem.batch * problem.length * problem.heads * (3 if backward else 1)


def program(problem: Problem, name: str, *, backward: bool) -> Program:
    """A method of `METHODS` on a problem, forward or in both directions."""
    method = METHODS[name]
    return Program(
        name=name,
        call=function(problem, method, backward=backward),
        inputs=input_arrays(problem, method, backward=backward),
        floor_bytes=floor_bytes(problem, method, backward=backward),
        floor_operations=floor_operations(problem, method, backward=backward),
        split=BY_HEADS,
    )


def function(problem: Problem, method: Method, *, backward: bool) -> Callable[[Inputs], object]:
    """The output; with `backward` output and gradients; where resident, gradients alone.

    Nothing is donated: a caller keeps q, k, v, and gradients and inputs are what must fit.
    """

    def gradients(inputs: Inputs) -> object:
        moving = {name: x for name, x in inputs.items() if name not in ("planes", "cotangent")}
        fixed = {name: x for name, x in inputs.items() if name == "planes"}

        def run(moving: Inputs) -> jax.Array:
            return method.call(problem, moving | fixed)

        if problem.resident:
            # Of squares: the cotangent is as large as the output, where a mean's is one number.
            return jax.grad(lambda m: jnp.square(run(m).astype(jnp.float32)).sum())(moving)
        output, pull_back = jax.vjp(run, moving)
        return output, pull_back(inputs["cotangent"])[0]

    return gradients if backward else functools.partial(method.call, problem)
