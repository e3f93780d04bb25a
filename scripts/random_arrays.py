"""Random arrays that may fill most of a device.

In: a shape and a dtype. Out: a compiled function from a seed to an array that is normal, near
enough, and written once: each number is a hash of its own place, so XLA makes all in one pass and
holds next to nothing beside the result: 64 MiB where that is 16 GiB of bfloat16.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def mixed(bits: jax.Array) -> jax.Array:
    """Every bit of the result depends on every bit given (the finaliser of MurmurHash3)."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)


@functools.cache
def normal(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Callable[[int], jax.Array]:
    """A compiled maker of such arrays."""

    def fill(seed: jax.Array) -> jax.Array:
        bits = mixed(seed)
        # Axis by axis: the number of an element may be past 2**32.
        for axis in range(len(shape)):
            place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
            bits = mixed(bits ^ (place * jnp.uint32(0x9E3779B9) + jnp.uint32(axis + 1)))
        uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - (1 - 2.0**-24)  # inside (-1, 1)
        return (2**0.5 * jax.lax.erf_inv(uniform)).astype(dtype)

    compiled = jax.jit(fill).lower(jax.ShapeDtypeStruct((), jnp.uint32)).compile()
    return lambda seed: compiled(jnp.uint32(seed))
