"""The mathematics of one chunk of C consecutive tokens, forward and backward.

X are the sums of everything before the chunk, and X' those after it. D is the decay between two
tokens of the chunk, ``into`` the decay from its start, ``out_of`` the decay to its end, and
``across`` that of the whole chunk:

    [N | z] = ((phi_q phi_kᵀ) . D) [v | 1] + into . (phi_q X)
    X'      = across X + (out_of . phi_k)ᵀ [v | 1]
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import hashing, state
from race_jax.core.shapes import (
    HeadMass,
    HeadOutputs,
    HeadValues,
    KeyFeatures,
    Mass,
    Numerator,
    QueryFeatures,
    Sharpness,
    Weights,
)


class Tokens(NamedTuple):
    """The arrays of a span of tokens. An argument that is not used is None.

    Attributes:
      z_q: ``(B, C, K, G, L, P)``, hash projections of the queries.
      z_k: ``(B, C, K, L, P)``, hash projections of the keys.
      value: ``(B, C, K, V)``.
      log_decay: ``(B, C, K)``.
      mask: ``(B, C)`` bool, True where there is a token.
      segment: ``(B, C)`` int32.
      before: ``(B, C)`` int32, the segment of the slot before each slot.
    """

    z_q: jax.Array
    z_k: jax.Array
    value: jax.Array
    log_decay: jax.Array | None
    mask: jax.Array | None
    segment: jax.Array | None
    before: jax.Array | None


class Sums(NamedTuple):
    """The table sums X = [numerator (B, K, F, V) | mass (B, K, F)]."""

    numerator: Numerator
    mass: Mass


def zeros_like(sums: Sums) -> Sums:
    """Returns the sums before any token."""
    return jax.tree.map(jnp.zeros_like, sums)


class Decay(NamedTuple):
    """Factors in [0, 1] by which weights decay. None stands for a factor of one.

    Attributes:
      within: ``(B or 1, K or 1, 1, C, C)``, from key s to query t, zero where t does not see s.
      into: ``(B, K or 1, C)``, from the chunk's start.
      out_of: ``(B, K or 1, C)``, to the chunk's end.
      across: ``(B, K or 1)``, from start to end.
    """

    within: jax.Array
    into: jax.Array | None
    out_of: jax.Array | None
    across: jax.Array | None


def decay_factors(tokens: Tokens, *, inclusive: bool = True) -> Decay:
    """Returns causality, gate and segments of a chunk as factors. No exponent is above zero."""
    length = tokens.value.shape[1]
    visible = jnp.tril(jnp.ones((length, length), bool), 0 if inclusive else -1)[None, None, None]
    into = out_of = across = None
    if tokens.segment is not None:
        segment = tokens.segment
        visible &= (segment[:, :, None] == segment[:, None, :])[:, None, None]
        start, end = tokens.before[:, :1], segment[:, -1:]
        into, out_of = (segment == start)[:, None], (segment == end)[:, None]
        across = start == end
    if tokens.log_decay is None:
        factors = (visible, into, out_of, across)
        return Decay(*(x if x is None else x.astype(jnp.float32) for x in factors))
    total = jnp.cumsum(jnp.moveaxis(tokens.log_decay, 1, 2), axis=-1)  # (B, K, C), from the start
    difference = (total[..., :, None] - total[..., None, :])[:, :, None]
    # The exponent is masked before exp, because it is positive above the diagonal and could
    # overflow.
    within = jnp.exp(jnp.where(visible, difference, -jnp.inf))
    into = _select(into, jnp.exp(total))
    out_of = _select(out_of, jnp.exp(total[..., -1:] - total))
    across = _select(across, jnp.exp(total[..., -1]))
    return Decay(within, into, out_of, across)


def _select(keep: jax.Array | None, factor: jax.Array) -> jax.Array:
    return factor if keep is None else jnp.where(keep, factor, 0.0)


@dataclasses.dataclass(frozen=True)
class SoftHash:
    """The map from hash projections to soft buckets, with one sharpness per key/value head.

    The head axes of features come first, so that products batch over them. Tokens come last, which
    makes long vectors.

    Attributes:
      sharpness: ``(K,)``.
      use_tanh: whether projections go through tanh.
    """

    sharpness: Sharpness
    use_tanh: bool

    def features(self, z: jax.Array) -> jax.Array:
        """Returns phi ``(B, K, .., F, C)`` of z ``(B, C, K, .., L, P)``."""
        return hashing.soft_buckets(*self._heads_first(z), self.use_tanh)

    def key_features(self, tokens: Tokens) -> KeyFeatures:
        """Returns phi_k ``(B, K, F, C)``, zero in padded slots."""
        phi = self.features(tokens.z_k)
        return phi if tokens.mask is None else jnp.where(tokens.mask[:, None, None], phi, 0.0)

    def pull(self, z: jax.Array, phi: jax.Array, d_phi: jax.Array) -> tuple[jax.Array, Sharpness]:
        """Returns the cotangents of z ``(B, C, K, .., L, P)`` and of sharpness ``(K,)``."""
        heads_first = self._heads_first(z)
        d_z, d_sharpness = hashing.soft_buckets_pullback(*heads_first, self.use_tanh, phi, d_phi)
        axes = tuple(axis for axis in range(d_z.ndim) if axis != 1)
        return jnp.moveaxis(d_z, -1, 1), d_sharpness.sum(axes)

    def _heads_first(self, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        z = jnp.moveaxis(z, 1, -1).astype(self.sharpness.dtype)
        return z, self.sharpness.reshape(1, -1, *(1,) * (z.ndim - 2))


def head_values(value: jax.Array, dtype: jnp.dtype) -> HeadValues:
    """Returns values ``(B, C, K, V)`` as ``(B, K, C, V)``, in the dtype of the sums."""
    return jnp.moveaxis(value, 1, 2).astype(dtype)


def scale(factor: jax.Array | None, x: jax.Array, axes: int) -> jax.Array:
    """Returns ``factor * x``. The factor lacks the last ``axes`` axes of x; None stands for one."""
    return x if factor is None else factor.reshape(*factor.shape, *(1,) * axes) * x


def scale_tokens(factor: jax.Array | None, phi: jax.Array) -> jax.Array:
    """Multiplies features ``(B, K, .., F, C)`` by a factor ``(B, K, C)``; None stands for one."""
    if factor is None:
        return phi
    return factor.reshape(*factor.shape[:2], *(1,) * (phi.ndim - 3), factor.shape[2]) * phi


def add_keys(phi_k: KeyFeatures, value: HeadValues, decay: Decay, sums: Sums) -> Sums:
    """Returns the sums after the chunk, X' = across X + (out_of . phi_k)ᵀ [v | 1]."""
    phi_k = scale_tokens(decay.out_of, phi_k)
    return Sums(
        scale(decay.across, sums.numerator, 2) + jnp.einsum("bkfs,bksv->bkfv", phi_k, value),
        scale(decay.across, sums.mass, 1) + phi_k.sum(axis=-1),
    )


def forward(
    phi_q: QueryFeatures, phi_k: KeyFeatures, value: HeadValues, decay: Decay, sums: Sums
) -> tuple[HeadOutputs, HeadMass]:
    """Returns N ``(B, K, G, C, V)`` and z ``(B, K, G, C)`` of a chunk's queries."""
    weights = jnp.einsum("bkgft,bkfs->bkgts", phi_q, phi_k) * decay.within
    phi_in = scale_tokens(decay.into, phi_q)
    numerator = jnp.einsum("bkgts,bksv->bkgtv", weights, value)
    numerator += jnp.einsum("bkgft,bkfv->bkgtv", phi_in, sums.numerator)
    mass = weights.sum(axis=-1) + jnp.einsum("bkgft,bkf->bkgt", phi_in, sums.mass)
    return numerator, mass


def running_mass(phi_k: KeyFeatures, decay: Decay, sums: Sums) -> KeyFeatures:
    """Returns the bucket masses A_f(t) that token t sees, ``(B, K, F, C)``."""
    within = jnp.broadcast_to(decay.within[:, :, 0], (*phi_k.shape[:2], *decay.within.shape[-2:]))
    own = jnp.einsum("bkfs,bkts->bkft", phi_k, within)
    return own + scale_tokens(decay.into, jnp.broadcast_to(sums.mass[..., None], own.shape))


class Rows(NamedTuple):
    """Intermediate results of the backward pass of o = N / z, from which all gradients follow.

    Attributes:
      phi_in: ``into . phi_q``.
      weights: ``(phi_q phi_kᵀ) . D``.
      d_weights: their cotangent ``do vᵀ / z + dz``.
      d_state: ``do Sᵀ / z + dz Z``, the cotangent of phi_in.
      d_numerator: dN = do / z, zero where nothing is seen.
      d_mass: dz = -(do . o) / z.
    """

    phi_in: QueryFeatures
    weights: Weights
    d_weights: Weights
    d_state: QueryFeatures
    d_numerator: HeadOutputs
    d_mass: HeadMass


def backward_rows(
    phi_q: QueryFeatures,
    phi_k: KeyFeatures,
    value: HeadValues,
    decay: Decay,
    sums: Sums,
    d_out: HeadOutputs,
) -> Rows:
    """Recomputes N and z, and takes the cotangent through the division.

    do . o is formed from products that the gradient needs anyway, so that the output need not be
    saved.
    """
    weights = jnp.einsum("bkgft,bkfs->bkgts", phi_q, phi_k) * decay.within
    phi_in = scale_tokens(decay.into, phi_q)
    mass = weights.sum(axis=-1) + jnp.einsum("bkgft,bkf->bkgt", phi_in, sums.mass)
    along = jnp.einsum("bkgtv,bksv->bkgts", d_out, value)
    from_state = jnp.einsum("bkfv,bkgtv->bkgft", sums.numerator, d_out)
    seen = mass > state.MIN_MASS
    inverse = jnp.where(seen, 1.0 / jnp.where(seen, mass, 1.0), 0.0)
    d_out_numerator = (weights * along).sum(axis=-1) + (phi_in * from_state).sum(axis=-2)
    d_mass = -(d_out_numerator * inverse) * inverse  # 1 / z**2 would overflow sooner
    return Rows(
        phi_in=phi_in,
        weights=weights,
        d_weights=along * inverse[..., None] + d_mass[..., None],
        d_state=from_state * inverse[..., None, :]
        + d_mass[..., None, :] * sums.mass[:, :, None, :, None],
        d_numerator=d_out * inverse[..., None],
        d_mass=d_mass,
    )


def add_rows(rows: Rows, decay: Decay, d_sums: Sums) -> Sums:
    """Returns the cotangent of the sums that enter a chunk, from that of the sums that leave it."""
    return Sums(
        scale(decay.across, d_sums.numerator, 2)
        + jnp.einsum("bkgft,bkgtv->bkfv", rows.phi_in, rows.d_numerator),
        scale(decay.across, d_sums.mass, 1)
        + jnp.einsum("bkgft,bkgt->bkf", rows.phi_in, rows.d_mass),
    )


def backward(
    phi_q: QueryFeatures,
    phi_k: KeyFeatures,
    value: HeadValues,
    decay: Decay,
    rows: Rows,
    d_sums: Sums,
) -> tuple[QueryFeatures, KeyFeatures, HeadValues]:
    """Returns the cotangents of phi_q, phi_k and value, from that of the sums after the chunk."""
    d_weights = rows.d_weights * decay.within
    d_phi_q = jnp.einsum("bkfs,bkgts->bkgft", phi_k, d_weights)
    d_phi_q += scale_tokens(decay.into, rows.d_state)
    later = jnp.einsum("bkfv,bksv->bkfs", d_sums.numerator, value) + d_sums.mass[..., None]
    d_phi_k = jnp.einsum("bkgft,bkgts->bkfs", phi_q, d_weights) + scale_tokens(decay.out_of, later)
    d_value = jnp.einsum("bkgts,bkgtv->bksv", rows.weights, rows.d_numerator)
    phi_out = scale_tokens(decay.out_of, phi_k)
    d_value += jnp.einsum("bkfs,bkfv->bksv", phi_out, d_sums.numerator)
    return d_phi_q, d_phi_k, d_value


def log_decay_gradient(
    phi_q: QueryFeatures,
    phi_k: KeyFeatures,
    d_phi_q: QueryFeatures,
    d_phi_k: KeyFeatures,
    later: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns the gate's gradient dg ``(B, C, K)``, and its value at the chunk's start ``(B, K)``.

    dg_t = later + sum over u >= t in the chunk of (phi_q . dphi_q - phi_k . dphi_k). Here ``later``
    is the same sum over all later tokens, plus the term of the final sums.
    """
    rows = (phi_q * d_phi_q).sum(axis=(2, 3))
    columns = (phi_k * d_phi_k).sum(axis=2)
    gradient = later[..., None] + jax.lax.cumsum(rows - columns, axis=2, reverse=True)
    return jnp.moveaxis(gradient, 2, 1), gradient[..., 0]
