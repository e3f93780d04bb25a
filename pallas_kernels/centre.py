"""The part that all buckets of a state share, and states from which it has been subtracted.

The gradient dz depends only on the differences between buckets. After many tokens, the means of the
buckets S_f / Z_f differ little from each other. The adjoints of the buckets also differ little if
many tokens are still to come. If S, Z and Λ themselves were rounded to bfloat16, these differences
would be lost. The kernels therefore use a reference for each state, and round only what is left
after the reference is subtracted.

The inputs are the numerators and masses of states, or of their adjoints. The outputs are the
references and the states without them. The equations below are exact for every m and λ.

For the queries the reference is a value m. Outputs are affine in v. With S' = S - Z mᵀ, μ = do·m
and δ' = do·(o - m) = δ - μ,

    dφq = ρ (do Sᵀ - δ Z) = ρ (do S'ᵀ - δ' Z)

For the keys the reference is [λ | λ_Z]. The features of a table sum to 1, so dz of the keys does
not change if the same number is subtracted from every entry of a row of dφk. With
[Λ' | Λ_Z'] = [Λ | Λ_Z] - 1 [λ | λ_Z],

    dφk = v Λᵀ + Λ_Z = v Λ'ᵀ + Λ_Z' + (v·λ + λ_Z)
    dv = φk Λ = φk Λ' + L λ

Back in time, Λ' follows the recurrence of Λ from the end of its split, provided that λ decays in
the same way.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import TINY


class Common(NamedTuple):
    """The reference [λ | λ_Z] of the adjoints of states."""

    numerator: jax.Array  # (..., V)
    mass: jax.Array  # (...,)


def mean_value(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns m (..., V), the mean value over all buckets of states (..., F, V) and (..., F).

    It is 0 for an empty state. It is rounded to bfloat16, so that a product that takes it as an
    operand does not round it again.
    """
    total, weight = numerator.sum(axis=-2), mass.sum(axis=-1)[..., None]
    mean = jnp.where(weight >= TINY, total / jnp.maximum(weight, TINY), 0.0)
    return _operand(mean)


def centred(numerator: jax.Array, mass: jax.Array, mean: jax.Array) -> jax.Array:
    """Returns S' = S - Z mᵀ."""
    return numerator - mass[..., :, None] * mean[..., None, :]


def less_common(numerator: jax.Array, mass: jax.Array, common: Common) -> tuple:
    """Returns Λ' and Λ_Z', the adjoints without their reference."""
    return numerator - common.numerator[..., None, :], mass - common.mass[..., None]


def common_adjoint(numerator: jax.Array, mass: jax.Array, buckets: int) -> Common:
    """Returns the mean over the buckets of adjoints (..., F, V) and (..., F).

    Buckets from index `buckets` on are padding and hold zeros. λ is rounded to bfloat16, as m is.
    """
    return Common(_operand(numerator.sum(axis=-2) / buckets), mass.sum(axis=-1) / buckets)


def _operand(x: jax.Array) -> jax.Array:
    # XLA may remove a cast to bfloat16 and back on a GPU, as excess precision. The number that is
    # subtracted from a state would then differ from the number that the kernels add back.
    # `reduce_precision` is never removed.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
