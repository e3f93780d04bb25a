"""What the buckets of a state have in common, taken off where dz depends on what they differ by.

In: numerators and masses of states, or of their adjoints. Out: one reference a state, and states
measured from it.
Equations, exact for every m and λ: o is affine in v, so with S' = S - Z mᵀ and μ = do·m the row
δ' = do·(o - m) is δ - μ, and
    dφq = ρ (do Sᵀ - δ Z) = ρ (do S'ᵀ - δ' Z);
the features of a table sum to 1, so dz of the keys is the same from dφk and from dφk less what it
has in common: with [Λ' | Λ_Z'] = [Λ | Λ_Z] - 1 [λ | λ_Z]
    dφk = v Λᵀ + Λ_Z = v Λ'ᵀ + Λ_Z' + (v·λ + λ_Z),   dv = φk Λ = φk Λ' + L λ.
Back in time Λ' follows the recurrence of Λ from where its split ends, if λ decays along with it.

Why: after many tokens the buckets' means S_f / Z_f differ little from each other, and so do their
adjoints before many. Rounded to bfloat16, S, Z and Λ lose it behind what they have in common.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tiles import TINY


class Common(NamedTuple):
    """[λ | λ_Z] of states' adjoints: what all buckets have in common."""

    numerator: jax.Array  # (..., V)
    mass: jax.Array  # (...,)


def mean_value(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """m (..., V) of states (..., F, V) and (..., F): the mean of all buckets, 0 of an empty state.

    Rounded to bfloat16, so that a product with it as an operand is exact.
    """
    total, weight = numerator.sum(axis=-2), mass.sum(axis=-1)[..., None]
    mean = jnp.where(weight >= TINY, total / jnp.maximum(weight, TINY), 0.0)
    return _operand(mean)


def centred(numerator: jax.Array, mass: jax.Array, mean: jax.Array) -> jax.Array:
    """S' = S - Z mᵀ."""
    return numerator - mass[..., :, None] * mean[..., None, :]


def less_common(numerator: jax.Array, mass: jax.Array, common: Common) -> tuple:
    """Λ' and Λ_Z'."""
    return numerator - common.numerator[..., None, :], mass - common.mass[..., None]


def common_adjoint(numerator: jax.Array, mass: jax.Array, buckets: int) -> Common:
    """The mean over buckets of adjoints (..., F, V) and (..., F), zero in those past `buckets`.

    λ is rounded to bfloat16, as m is.
    """
    return Common(_operand(numerator.sum(axis=-2) / buckets), mass.sum(axis=-1) / buckets)


def _operand(x: jax.Array) -> jax.Array:
    # Not a cast and back, which XLA drops on a GPU as excess precision: then what is subtracted
    # from a state would not be what the kernels take back.
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
