"""Soft-hash features of a tile of tokens, and their derivative, on the matrix units.

In: hash projections z (C, LP) and the sharpness. Out: φ (C, F), or dz and dβ from dφ.
Equation: log φ_r = Σ_p log sigmoid(2 β tanh(z_p) c_rp), the corner softmax in factors.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.backend import LOG2_E, Arithmetic

# Times a log2 sigmoid pair, whose sum is at most -2, this reaches 2**-1024: an exact zero.
_SILENT = 512.0


def corner_signs(
    tables: int, planes: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """0/1 matrices (rows, columns): the corners where a plane is +1, and where it is -1.

    Row l·P + p is plane p of table l and column l·R + r corner r of table l; the first plane is the
    slowest bit. Columns past L·R carry a weight that makes their feature exactly zero.
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
    """φ(z; β) for one key/value head: a value inside a kernel, made once before its loop."""

    def __init__(self, positive: jax.Array, negative: jax.Array, sharpness: jax.Array, arithmetic):
        self.positive, self.negative = positive, negative  # (LP, F)
        self.sharpness = sharpness
        self.arithmetic: Arithmetic = arithmetic

    def squash(self, z: jax.Array) -> jax.Array:
        """u = tanh z in float32."""
        return self.arithmetic.tanh(z.astype(jnp.float32))

    def expand(self, squashed: jax.Array) -> jax.Array:
        """φ (C, F) in float32 from u (C, LP)."""
        math, scaled = self.arithmetic, self._scaled(squashed)
        # log2 sigmoid of +t and of -t. Each keeps its own relative precision when rounded, which
        # β u c - log cosh(β u) does not: there two large numbers cancel.
        softplus = math.log2(1.0 + math.exp2(-jnp.abs(scaled)))
        plus, minus = jnp.minimum(scaled, 0.0) - softplus, -jnp.maximum(scaled, 0.0) - softplus
        return math.power(
            math.exponent_dot(plus, self.positive) + math.exponent_dot(minus, self.negative)
        )

    def gradient(
        self, squashed: jax.Array, phi: jax.Array, d_phi: jax.Array, *, halves: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """dz (C, LP), and the terms (C, LP) whose sum is dβ, from dφ (C, F).

        With `halves` φ dφ is multiplied to twice the bits of an operand.
        """
        math, scaled = self.arithmetic, self._scaled(squashed)
        weight = phi.astype(jnp.float32) * d_phi
        decayed = math.exp2(-jnp.abs(scaled))
        larger = math.reciprocal(1.0 + decayed)
        smaller = decayed * larger
        up = scaled >= 0.0
        weights = math.halves(weight) if halves else (weight,)
        positive = sum(math.dot(x, self.positive, "nt") for x in weights)
        negative = sum(math.dot(x, self.negative, "nt") for x in weights)
        d_scaled = positive * jnp.where(up, smaller, larger)
        d_scaled -= negative * jnp.where(up, larger, smaller)
        d_z = d_scaled * (2.0 * self.sharpness) * (1.0 - squashed * squashed)
        return d_z, d_scaled * (2.0 * squashed)

    def _scaled(self, squashed: jax.Array) -> jax.Array:
        return squashed * (2.0 * LOG2_E * self.sharpness)
