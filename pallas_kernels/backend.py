"""The one file that names Pallas's Triton form: launching a kernel, and the arithmetic inside it.

In: a kernel over named references, its grid and block; or the tiles of one operation.
Out: the kernel's outputs by name; or the operation's tile. No equation of RACE lives here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.blocks import Block

LOG2_E = math.log2(math.e)
# Six bfloat16 products, within 3e-7 of float64 where measured (three TF32 products: 4e-7). The
# IEEE form unrolls to scalar code that takes minutes to compile.
_FLOAT32_PRODUCT = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
LEAST_EXPONENT = -60000.0  # of log2 φ in float16, whose range ends at 65504
_CONTRACT = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


@dataclasses.dataclass(frozen=True)
class Output:
    """Shape, dtype and block of one kernel output."""

    shape: tuple[int, ...]
    dtype: Any
    spec: pl.BlockSpec


def launch(
    kernel: Callable[[SimpleNamespace], None],
    *,
    name: str,
    grid: tuple[int, ...],
    inputs: Mapping[str, tuple[jax.Array | None, pl.BlockSpec]],
    outputs: Mapping[str, Output | None],
    block: Block,
    interpret: bool,
) -> SimpleNamespace:
    """Runs `kernel` over the grid; absent inputs and outputs are None on both sides."""
    given = {key: pair for key, pair in inputs.items() if pair[0] is not None}
    wanted = {key: out for key, out in outputs.items() if out is not None}
    absent = dict.fromkeys([*inputs, *outputs])
    names = [*given, *wanted]

    def body(*refs):
        kernel(SimpleNamespace(**(absent | dict(zip(names, refs, strict=True)))))

    call = pl.pallas_call(
        body,
        out_shape=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in wanted.values()],
        grid=grid,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[out.spec for out in wanted.values()],
        interpret=interpret,
        name=name,
        compiler_params=plt.CompilerParams(num_warps=block.num_warps, num_stages=block.num_stages),
    )
    with jax.named_scope(f"race_attention/{name}"):
        results = call(*(array for array, _ in given.values()))
    return SimpleNamespace(**(dict.fromkeys(outputs) | dict(zip(wanted, results, strict=True))))


def load(ref: Any, index: tuple, rows: jax.Array | None = None) -> jax.Array:
    """`ref[index]`; where `rows` (C,) is False nothing is read and zero comes back."""
    if rows is None:
        return ref[index]
    view = ref.at[index]
    return plt.load(view, mask=_rows_mask(rows, view.shape), other=jnp.zeros((), ref.dtype))


def store(ref: Any, index: tuple, value: jax.Array, rows: jax.Array | None = None) -> None:
    """`ref[index] = value`; where `rows` (C,) is False nothing is written."""
    value = value.astype(ref.dtype)
    if rows is None:
        ref[index] = value
    else:
        view = ref.at[index]
        plt.store(view, value, mask=_rows_mask(rows, view.shape))


def _rows_mask(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(rows.reshape(rows.shape + (1,) * (len(shape) - 1)), shape)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Products and special functions on tiles, in the precision that `dtype` asks for.

    bfloat16 compiled for the GPU takes the hardware's approximate special functions, whose errors
    (about 2**-11 for tanh, 2**-22 for the others) lie below bfloat16's own rounding.
    """

    dtype: Any
    interpret: bool
    packed: bool = False

    @property
    def approximate(self) -> bool:
        return self.dtype == jnp.bfloat16 and not self.interpret

    def cast(self, x: jax.Array) -> jax.Array:
        """Rounds a tile to the operand type of the matrix products."""
        return x.astype(self.dtype)

    def rounded(self, x: jax.Array) -> jax.Array:
        """A float32 tile with the values that `cast` gives."""
        if self.interpret and self.dtype == jnp.bfloat16:
            # XLA may drop a cast and its inverse as excess precision.
            return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return self.cast(x).astype(jnp.float32)

    def halves(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Operands whose sum is a float32 tile to twice the bits of one; of float32 only one."""
        if self.dtype == jnp.float32:
            return (x,)
        coarse = self.rounded(x)
        return self.cast(coarse), self.cast(x - coarse)

    def exponent_dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """A product of exponents and signs: in float16 where `dtype` is bfloat16.

        Exponents lie within its range, and its three more bits make φ eight times as exact.
        """
        if self.dtype == jnp.float32:
            return self.dot(a, b)
        a, b = jnp.maximum(a, LEAST_EXPONENT).astype(jnp.float16), b.astype(jnp.float16)
        return lax.dot_general(
            a, b, (_CONTRACT["nn"], ((), ())), preferred_element_type=jnp.float32
        )

    def dot(self, a: jax.Array, b: jax.Array, form: str = "nn") -> jax.Array:
        """Matrix product accumulated in float32; `form` says which operand is transposed."""
        precision = None
        if self.dtype == jnp.float32:
            precision = lax.Precision.HIGHEST if self.interpret else _FLOAT32_PRODUCT
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (_CONTRACT[form], ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def tanh(self, x: jax.Array) -> jax.Array:
        return _ptx("tanh.approx.f32", x) if self.approximate else jnp.tanh(x)

    def exp2(self, x: jax.Array) -> jax.Array:
        return _ptx("ex2.approx.ftz.f32", x) if self.approximate else jnp.exp2(x)

    def power(self, x: jax.Array) -> jax.Array:
        """2**x for features, which the products round anyway: in pairs where `packed`."""
        if not (self.packed and self.approximate):
            return self.exp2(x)
        [pairs] = plt.elementwise_inline_asm(
            "{ .reg .b32 x; cvt.rn.f16x2.f32 x, $2, $1; ex2.approx.f16x2 $0, x; }",
            args=[x],
            constraints="=r,f,f",
            pack=2,
            result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float16)],
        )
        return pairs.astype(jnp.float32)

    def log2(self, x: jax.Array) -> jax.Array:
        return _ptx("lg2.approx.ftz.f32", x) if self.approximate else jnp.log(x) * LOG2_E

    def reciprocal(self, x: jax.Array) -> jax.Array:
        return _ptx("rcp.approx.ftz.f32", x) if self.approximate else 1.0 / x


def _ptx(instruction: str, x: jax.Array) -> jax.Array:
    """One PTX instruction on every element of a float32 tile."""
    [result] = plt.elementwise_inline_asm(
        f"{instruction} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def has_warpgroups() -> bool:
    """Whether this JAX has what warpgroup.py builds on."""
    return tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)


@functools.cache
def missing() -> str | None:
    """What this installation or its card lacks for the compiled kernels, or None."""
    if not has_warpgroups():
        return f"the RACE kernels need jax >= 0.11; found {jax.__version__}"
    try:
        cards = jax.devices("cuda")
    except RuntimeError:
        return None
    for card in cards:
        capability = getattr(card, "compute_capability", None)
        if capability is not None and float(capability) < 9.0:
            return (
                "the RACE kernels need a GPU of compute capability 9.0 or newer; "
                f"{card.device_kind} has {capability}"
            )
    return None
