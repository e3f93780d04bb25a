"""The reference from which values are measured in the queries' gradient.

In: numerators and masses of states. Out: m, one vector of the values' space a state, and numerators
of the values v - m.
Equation: o is affine in v, so with S' = S - Z mᵀ and μ = do·m the row δ' = do·(o - m) is δ - μ, and
    dφq = ρ (do Sᵀ - δ Z) = ρ (do S'ᵀ - δ' Z)    for every m.

Why: after many tokens the buckets' means S_f / Z_f differ little from each other, and dz depends on
what they differ by alone. Rounded to bfloat16, S and Z lose it behind what they have in common.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import TINY


def mean_value(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """m (..., V) of states (..., F, V) and (..., F): the mean of all buckets, 0 of an empty state.

    Rounded to bfloat16, so that a product with it as an operand is exact.
    """
    total, weight = numerator.sum(axis=-2), mass.sum(axis=-1)[..., None]
    mean = jnp.where(weight >= TINY, total / jnp.maximum(weight, TINY), 0.0)
    return mean.astype(jnp.bfloat16).astype(jnp.float32)


def centred(numerator: jax.Array, mass: jax.Array, mean: jax.Array) -> jax.Array:
    """S' = S - Z mᵀ."""
    return numerator - mass[..., :, None] * mean[..., None, :]
