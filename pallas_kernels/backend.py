"""The only module that uses Pallas's Triton backend: it launches kernels and does tile arithmetic.

Nothing here is specific to RACE.
"""

import dataclasses
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
# The compute capability that the kernels are compiled for, and the names of cards that have it.
# The names are needed because a device that is only described to JAX has no capability.
CAPABILITY = "9.0"
HOPPER_CARDS = ("H100", "H200", "H800", "H20", "GH200")
# An exact product is made of six bfloat16 products. Its measured error against float64 is within
# 3e-7; that of three TF32 products is 4e-7. The IEEE form unrolls to scalar code that takes minutes
# to compile.
_EXACT_PRODUCT = lax.DotAlgorithmPreset.BF16_BF16_F32_X6
_TF32_PRODUCT = lax.DotAlgorithmPreset.TF32_TF32_F32
# Up to this number of columns, a product with signs is a float32 product, which is faster if it
# fits.
NARROW_SIGNS = 64
# The least log2 sigmoid that goes into a product in float16, whose range ends at -65504.
LEAST_EXPONENT = -60000.0
_CONTRACT = {"nn": ((1,), (0,)), "nt": ((1,), (1,)), "tn": ((0,), (0,))}


@dataclasses.dataclass(frozen=True)
class Output:
    """The shape, dtype and block of one kernel output."""

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
    """Runs `kernel` over the grid. An absent input or output is None, in the kernel and outside."""
    given = {key: pair for key, pair in inputs.items() if pair[0] is not None}
    wanted = {key: out for key, out in outputs.items() if out is not None}
    absent = dict.fromkeys([*inputs, *outputs])
    names = [*given, *wanted]

    def body(*refs):
        kernel(SimpleNamespace(**(absent | dict(zip(names, refs, strict=True)))))

    axes = varying_axes([array for array, _ in given.values()])
    call = pl.pallas_call(
        body,
        out_shape=[varying_shape(out.shape, out.dtype, axes) for out in wanted.values()],
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


def varying_axes(arrays: Any) -> frozenset[str]:
    """Returns the axes of an enclosing `jax.shard_map` over which any of the arrays varies."""
    types = [jax.typeof(array).manual_axis_type for array in jax.tree.leaves(arrays)]
    return frozenset().union(*(kind.varying for kind in types))


def varying_shape(shape: tuple[int, ...], dtype: Any, axes: frozenset[str]) -> jax.ShapeDtypeStruct:
    """Returns the shape of an output that varies over these axes."""
    kind = jax.sharding.ManualAxisType(varying=axes) if axes else jax.typeof(0.0).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


def vary(arrays: Any, axes: frozenset[str]) -> Any:
    """Marks the arrays as varying over these axes. No data are moved."""

    def one(array):
        missing = axes - jax.typeof(array).manual_axis_type.varying
        return lax.pcast(array, tuple(sorted(missing)), to="varying") if missing else array

    return jax.tree.map(one, arrays)


def load(ref: Any, index: tuple, rows: jax.Array | None = None) -> jax.Array:
    """Returns `ref[index]`. Rows (C,) that are False are not read and give zero.

    Rows may also be a mask of single elements, in the shape of the result.
    """
    if rows is None:
        return ref[index]
    view = ref.at[index]
    return plt.load(view, mask=_rows_mask(rows, view.shape), other=jnp.zeros((), ref.dtype))


def store(ref: Any, index: tuple, value: jax.Array, rows: jax.Array | None = None) -> None:
    """Sets `ref[index] = value`. Rows (C,) that are False are not written."""
    value = value.astype(ref.dtype)
    if rows is None:
        ref[index] = value
    else:
        view = ref.at[index]
        plt.store(view, value, mask=_rows_mask(rows, view.shape))


def _rows_mask(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(rows.reshape(rows.shape + (1,) * (len(shape) - rows.ndim)), shape)


def bits_of_bytes(x: jax.Array, shift: int, count: int, interpret: bool) -> jax.Array:
    """Returns the bits ``shift`` to ``shift + count - 1`` of every element of an int8 tile.

    On the GPU one instruction serves four bytes.
    """
    if interpret:
        shifted = lax.shift_right_logical(x, jnp.int8(shift))
        return shifted & jnp.int8(2**count - 1)
    mask = (2**count - 1) * 0x01010101
    [result] = plt.elementwise_inline_asm(
        f"{{ .reg .b32 x; shr.b32 x, $1, {shift}; and.b32 $0, x, {mask}; }}",
        args=[x],
        constraints="=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.int8)],
    )
    return result


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Products and special functions on tiles, in the precision that `dtype` and `exact` ask for.

    Products of float32 tiles are either exact to 3e-7, or TF32 products, whose operands have 10
    bits after the binary point. On the GPU, bfloat16 and TF32 use the hardware's approximate
    special functions. Their errors are about 2**-22, or 2**-11 for the tanh that bfloat16 uses, and
    lie below the rounding of the operands.
    """

    dtype: Any
    interpret: bool
    packed: bool = False
    exact: bool = True

    @property
    def approximate(self) -> bool:
        return not self.interpret and (self.dtype == jnp.bfloat16 or self.tf32)

    @property
    def tf32(self) -> bool:
        return self.dtype == jnp.float32 and not self.exact

    def cast(self, x: jax.Array) -> jax.Array:
        """Rounds a tile to the operand type of the matrix products."""
        x = x.astype(self.dtype)
        if not self.tf32:
            return x
        # The matrix units would truncate the last 13 bits, which makes sums of features too small.
        return lax.reduce_precision(x, 8, 10) if self.interpret else _ptx("cvt.rna.tf32.f32", x)

    def rounded(self, x: jax.Array) -> jax.Array:
        """Returns a float32 tile with the values that `cast` gives."""
        if self.interpret and self.dtype == jnp.bfloat16:
            # XLA may remove a cast and its inverse, as excess precision.
            return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return self.cast(x).astype(jnp.float32)

    def halves(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """Returns operands whose sum is a float32 tile, with twice the bits of one operand.

        A float32 operand holds the tile by itself, so there is only one.
        """
        if self.dtype == jnp.float32:
            return (x,)
        coarse = self.rounded(x)
        return self.cast(coarse), self.cast(x - coarse)

    def exponent_dot(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Computes a product of exponents and signs. It is in float16 if `dtype` is bfloat16.

        The exponents lie within the range of float16, and its three more bits make φ eight times as
        exact.
        """
        if self.dtype == jnp.float32:
            return self.dot_signs(a, b)
        a, b = jnp.maximum(a, LEAST_EXPONENT).astype(jnp.float16), b.astype(jnp.float16)
        return lax.dot_general(
            a, b, (_CONTRACT["nn"], ((), ())), preferred_element_type=jnp.float32
        )

    def dot(self, a: jax.Array, b: jax.Array, form: str = "nn") -> jax.Array:
        """Computes a matrix product in float32. `form` says which operand is transposed."""
        # The precision is always given, because JAX's global setting would otherwise apply here.
        precision = lax.Precision.DEFAULT
        if self.dtype == jnp.float32:
            precision = _EXACT_PRODUCT if self.exact else _TF32_PRODUCT
            precision = lax.Precision.HIGHEST if self.interpret else precision
        return lax.dot_general(
            self.cast(a),
            self.cast(b),
            (_CONTRACT[form], ((), ())),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    def dot_signs(self, a: jax.Array, signs: jax.Array, form: str = "nn") -> jax.Array:
        """Computes the product with a constant matrix that bfloat16 holds exactly.

        If the matrix is wide, a float32 tile is split into as many bfloat16 parts as its precision
        needs, two or three. The matrix then takes half the shared memory.
        """
        if self.dtype == jnp.bfloat16 or self.interpret or signs.shape[1] <= NARROW_SIGNS:
            return self.dot(a, signs, form)
        parts = []
        for _ in range(3 if self.exact else 2):
            parts.append(a.astype(jnp.bfloat16))
            a = a - parts[-1].astype(jnp.float32)
        products = [
            lax.dot_general(
                part, signs, (_CONTRACT[form], ((), ())),
                precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32,
            )
            for part in reversed(parts)
        ]  # fmt: skip
        return sum(products[1:], start=products[0])

    def tanh(self, x: jax.Array) -> jax.Array:
        if not self.approximate:
            return jnp.tanh(x)
        if self.tf32:  # the hardware's tanh would double the error of a TF32 result
            return 1.0 - 2.0 * self.reciprocal(1.0 + self.exp2(x * (2.0 * LOG2_E)))
        return _ptx("tanh.approx.f32", x)

    def exp2(self, x: jax.Array) -> jax.Array:
        return _ptx("ex2.approx.ftz.f32", x) if self.approximate else jnp.exp2(x)

    def power(self, x: jax.Array) -> jax.Array:
        """Returns 2**x for features, two at a time if `packed`. The products round them anyway."""
        if not (self.packed and self.approximate and not self.tf32):
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
    """Applies one PTX instruction to every element of a float32 tile."""
    [result] = plt.elementwise_inline_asm(
        f"{instruction} $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def has_warpgroups() -> bool:
    """Returns whether this version of JAX has what warpgroup.py needs."""
    return tuple(int(part) for part in jax.__version__.split(".")[:2]) >= (0, 11)


def missing(kind: str = "RACE") -> str | None:
    """Returns what this installation or its card lacks for the compiled kernels, or None.

    The warpgroup kernels use instructions that exist only on compute capability 9.0 (sm_90a), and
    not on later ones. The other kernels have not been run on any other capability.
    """
    if not has_warpgroups():
        return f"the {kind} kernels need jax >= 0.11; found {jax.__version__}"
    for device in _devices():
        capability = getattr(device, "compute_capability", None)
        if capability is None:
            fits = any(name in device.device_kind for name in HOPPER_CARDS)
            capability = "another one"
        else:
            fits = str(capability) == CAPABILITY
        if not fits:
            return (
                f"the {kind} kernels need compute capability {CAPABILITY} (H100, H200); "
                f"{device.device_kind} has {capability}"
            )
    return None


def _devices() -> list[Any]:
    """Returns the device that a mesh describes, or the CUDA devices of this host."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return [described]
    try:
        return jax.devices("cuda")
    except RuntimeError:
        return []
