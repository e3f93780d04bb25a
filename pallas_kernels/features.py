"""Soft-hash features of a tile of tokens, and their derivative, on the matrix units.

    log φ_r = Σ_p log sigmoid(2 β u_p c_rp)

Here u = tanh z or u = z. This is the corner softmax in factors. φ (C, F) is computed from hash
projections z (C, LP) and the sharpness β, and dz and dβ from dφ.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import LOG2_E, Arithmetic

# The weight of padding columns. The two log2 sigmoids of a plane add up to -2 or less, so that this
# gives an exponent of -1024 or less, and 2**-1024 is an exact zero.
_SILENT = 512.0


def corner_signs(
    tables: int, planes: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns two 0/1 matrices (rows, columns): corners where a plane is +1, and where it is -1.

    Row l·P + p is plane p of table l. Column l·R + r is corner r of table l; the first plane is the
    most significant bit. Columns past L·R carry a weight that makes their feature exactly zero.
    """
    corners = 2**planes
    bits = (np.arange(corners) >> np.arange(planes - 1, -1, -1)[:, None]) & 1  # (P, R)
    positive, negative = np.zeros((2, rows, columns), np.float32)
    used = np.s_[: tables * planes, : tables * corners]
    positive[used] = np.kron(np.eye(tables), bits)
    negative[used] = np.kron(np.eye(tables), 1 - bits)
    positive[0, tables * corners :] = _SILENT
    negative[0, tables * corners :] = _SILENT
    return positive, negative


class FeatureMap:
    """φ(z; β) for one key/value head. It is made inside a kernel, once before its loop."""

    def __init__(
        self,
        positive: jax.Array,
        negative: jax.Array,
        sharpness: jax.Array,
        arithmetic: Arithmetic,
        use_tanh: bool,
    ):
        self.positive, self.negative = positive, negative  # (LP, F)
        self.sharpness, self.use_tanh = sharpness, use_tanh
        self.arithmetic = arithmetic

    def squash(self, z: jax.Array) -> jax.Array:
        """Returns u, which is tanh z or z, in float32."""
        z = z.astype(jnp.float32)
        return self.arithmetic.tanh(z) if self.use_tanh else z

    def expand(self, squashed: jax.Array) -> jax.Array:
        """Returns φ (C, F) in float32 from u (C, LP)."""
        math, scaled = self.arithmetic, self._scaled(squashed)
        # These are log2 sigmoid of +t and of -t. Each keeps its relative precision when rounded.
        # The form β u c - log cosh(β u) would not, because two large numbers cancel in it.
        softplus = math.log2(1.0 + math.exp2(-jnp.abs(scaled)))
        plus, minus = jnp.minimum(scaled, 0.0) - softplus, -jnp.maximum(scaled, 0.0) - softplus
        return math.power(
            math.exponent_dot(plus, self.positive) + math.exponent_dot(minus, self.negative)
        )

    def gradient(
        self, squashed: jax.Array, phi: jax.Array, d_phi: jax.Array, *, halves: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Returns dz (C, LP), and the terms (C, LP) whose sum is dβ, from dφ (C, F).

        With `halves`, φ dφ is multiplied with twice the bits of an operand.
        """
        math, scaled = self.arithmetic, self._scaled(squashed)
        weight = phi.astype(jnp.float32) * d_phi
        decayed = math.exp2(-jnp.abs(scaled))
        larger = math.reciprocal(1.0 + decayed)
        smaller = decayed * larger
        up = scaled >= 0.0
        weights = math.halves(weight) if halves else (weight,)
        positive = sum(math.dot_signs(x, self.positive, "nt") for x in weights)
        negative = sum(math.dot_signs(x, self.negative, "nt") for x in weights)
        d_scaled = positive * jnp.where(up, smaller, larger)
        d_scaled -= negative * jnp.where(up, larger, smaller)
        d_z = d_scaled * (2.0 * self.sharpness)
        if self.use_tanh:
            d_z *= 1.0 - squashed * squashed
        return d_z, d_scaled * (2.0 * squashed)

    def _scaled(self, squashed: jax.Array) -> jax.Array:
        return squashed * (2.0 * LOG2_E * self.sharpness)
