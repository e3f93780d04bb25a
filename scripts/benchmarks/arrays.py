"""Random arrays, also those that fill most of a device.

An array is normal, near enough, and written once: each number is a hash of its own place, so XLA
makes all of them in one pass and holds next to nothing beside the result: 64 MiB where that is
16 GiB of bfloat16.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Random:
    """How one random array is drawn: `finish(mean + deviation * normal)`.

    Attributes:
      shape: its shape.
      dtype: its dtype.
      mean: what is added to the normal numbers.
      deviation: what they are multiplied by first.
      finish: a function of the array, or None.
      split: how it is spread over the devices of a mesh.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    mean: float = 0.0
    deviation: float = 1.0
    finish: Callable[[jax.Array], jax.Array] | None = None
    split: PartitionSpec = REPLICATED

    @property
    def nbytes(self) -> int:
        """The size of the array."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    def sharding(self, mesh: Mesh | None) -> NamedSharding | None:
        """How the array lies on the devices of a mesh; None is JAX's first device."""
        return mesh and NamedSharding(mesh, self.split)

    def struct(self, mesh: Mesh | None = None) -> jax.ShapeDtypeStruct:
        """The array's shape and dtype, to compile for."""
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self.sharding(mesh))

    def prepare(self, mesh: Mesh | None = None) -> None:
        """Compiles what draws the array."""
        maker(self, mesh)

    def draw(self, name: str, mesh: Mesh | None = None) -> jax.Array:
        """The array. Its seed follows from the name, so programs may share what they call alike."""
        return maker(self, mesh)(jnp.uint32(zlib.crc32(name.encode())))


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Arrays that a function draws, such as a model's initial parameters, the same on all devices.

    Attributes:
      make: a function without arguments that returns a pytree of arrays.
      split: as that of `Random`.
    """

    make: Callable[[], Any]
    split: PartitionSpec = REPLICATED

    def struct(self, mesh: Mesh | None = None) -> Any:
        """The shapes and dtypes, to compile for."""
        sharding = mesh and NamedSharding(mesh, self.split)

        def shape(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(shape, jax.eval_shape(self.make))

    def prepare(self, mesh: Mesh | None = None) -> None:
        """Does nothing: the function is compiled where it is called."""

    def draw(self, name: str, mesh: Mesh | None = None) -> Any:
        """The arrays, whatever their name."""
        del name
        return jax.jit(self.make, out_shardings=mesh and NamedSharding(mesh, self.split))()


@functools.cache
def maker(random: Random, mesh: Mesh | None = None) -> Callable[[jax.Array], jax.Array]:
    """A compiled function from a seed to the array."""

    def fill(seed: jax.Array) -> jax.Array:
        bits = mixed(seed)
        # Axis by axis: the number of an element may be past 2**32.
        for axis in range(len(random.shape)):
            place = jax.lax.broadcasted_iota(jnp.uint32, random.shape, axis)
            bits = mixed(bits ^ (place * jnp.uint32(0x9E3779B9) + jnp.uint32(axis + 1)))
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - (1 - 2.0**-24)  # inside (-1, 1)
        array = random.mean + random.deviation * 2**0.5 * jax.lax.erf_inv(uniform)
        return (random.finish(array) if random.finish else array).astype(random.dtype)

    seed = jax.ShapeDtypeStruct((), jnp.uint32)
    return jax.jit(fill, out_shardings=random.sharding(mesh)).lower(seed).compile()


def mixed(bits: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit given (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
