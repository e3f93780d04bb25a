"""The exact kernels that the soft hash estimates, and the error of L tables.

One table of P planes gives phi(q) . phi(k) = prod_p (1 + a_p b_p) / 2 with a_p = tanh(beta u),
u = tanh(w_p . q), and b_p likewise for k. (Without tanh, u = w_p . q.) Planes are independent, so
the mean over planes is

    soft(q, k) = ((1 + E[a b]) / 2)^P,    w ~ N(0, scale^2 I)

As beta and scale grow, it tends to the angular kernel (1 - angle / pi)^P. The mean over L tables
has the same expectation, and an error that falls as 1 / sqrt(L).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core import hashing

# E[a b] depends on w only through its part in the plane that q and k span, a normal vector with
# polar coordinates (r, t). In r, the rule of Gauss and Legendre is used; in t, where the integrand
# is periodic, equal steps. For projections of order one the error is below 1e-5. The paper's planes
# give projections of order ten and nearly hard signs, where an angle is known to a step only.
RADII, LONGEST_RADIUS, ANGLES = 16, 6.0, 512


class Errors(NamedTuple):
    """The error of the hash by the number of its tables.

    Attributes:
      tables: the numbers of tables L.
      mean: for each L, the mean over independent draws of the planes of `distance`.
      deviation: for each L, the deviation of a sample over these draws.
    """

    tables: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @property
    def slope(self) -> float:
        """The power of L that the error follows, by least squares; the theory says -1/2."""
        return float(np.polyfit(np.log(self.tables), np.log(self.mean), 1)[0])


def hash_kernel(
    query: jax.Array,
    key: jax.Array,
    planes: jax.Array,
    sharpness: jax.typing.ArrayLike = 1.0,
    *,
    use_tanh: bool = True,
) -> jax.Array:
    """Computes what the tables give for every pair, 1/L sum_l phi_l(q) . phi_l(k).

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``; query head n uses key head ``n // (N // K)``.
      planes: ``(L, P, H)``.
      sharpness: beta, a scalar or ``(K,)``.
      use_tanh: whether projections go through tanh, as in the paper.

    Returns:
      ``(B, N, T, S)``.

    Example:
      >>> x = jnp.ones((1, 3, 2, 4))
      >>> hash_kernel(x, x, jnp.ones((5, 2, 4)), 2.0).shape
      (1, 2, 3, 3)
    """
    return _by_table(query, key, planes, sharpness, use_tanh).mean(axis=0)


def soft_kernel(
    query: jax.Array,
    key: jax.Array,
    *,
    num_planes: int,
    sharpness: jax.typing.ArrayLike = 1.0,
    scale: float = 1.0,
    use_tanh: bool = True,
) -> jax.Array:
    """Computes the expectation of `hash_kernel` over planes of independent normal entries.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``.
      num_planes: P.
      sharpness: beta, a scalar or ``(K,)``.
      scale: the standard deviation of the planes' entries.
      use_tanh: as for `hash_kernel`.

    Returns:
      ``(B, N, T, S)``. Its error is below 1e-5 where ``scale`` times the norms of q and k is of
      order one, and below 2e-3 where it is large.

    Example:
      >>> x = jnp.eye(2).reshape(1, 2, 1, 2)
      >>> float(soft_kernel(x, x, num_planes=1)[0, 0, 0, 1])  # of two orthogonal vectors
      0.5

    Source: arXiv 2510.04008, Section 3; the integral goes beyond the paper.
    """
    query, key, beta = _aligned(query, key, sharpness)
    lengths = [scale * jnp.linalg.norm(x, axis=-1) for x in (query, key)]
    angle = _angle(query, key)
    return _expectation(*lengths, angle, beta, num_planes, use_tanh)


def angular_kernel(query: jax.Array, key: jax.Array, *, num_planes: int) -> jax.Array:
    """Computes the limit of `soft_kernel` for hard buckets, (1 - angle / pi)^P.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``.
      num_planes: P.

    Returns:
      ``(B, N, T, S)``.

    Example:
      >>> x = jnp.eye(2).reshape(1, 2, 1, 2)
      >>> float(angular_kernel(x, x, num_planes=2)[0, 0, 0, 1])
      0.25

    Source: arXiv 2510.04008, Section 3.
    """
    query, key, _ = _aligned(query, key, 1.0)
    return (1 - _angle(query, key) / math.pi) ** num_planes


def softmax_kernel(query: jax.Array, key: jax.Array) -> jax.Array:
    """Computes the kernel of softmax attention, exp(q . k / sqrt(H)), with a largest entry of 1.

    Args:
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``.

    Returns:
      ``(B, N, T, S)``. Each row is divided by its largest entry, which leaves its weights as they
      are.

    Example:
      >>> x = jnp.array([[[[0.0]], [[1.0]]]])  # two tokens of one head of width 1
      >>> [round(float(w), 3) for w in softmax_kernel(x, x)[0, 0, 1]]
      [0.368, 1.0]
    """
    query, key, _ = _aligned(query, key, 1.0)
    logits = jnp.einsum("bnth,bnsh->bnts", query, key, precision="highest") / query.shape[-1] ** 0.5
    return jnp.exp(logits - logits.max(axis=-1, keepdims=True))


def attention_weights(kernel: jax.Array, *, is_causal: bool = False) -> jax.Array:
    """Divides the rows of a kernel by their sums.

    Args:
      kernel: ``(..., T, S)``, >= 0.
      is_causal: whether query t sees keys 0 to t only.

    Returns:
      ``(..., T, S)``.

    Raises:
      ValueError: if `is_causal` and there are not as many queries as keys.

    Example:
      >>> attention_weights(jnp.ones((2, 2)), is_causal=True).tolist()
      [[1.0, 0.0], [0.5, 0.5]]
    """
    if is_causal:
        if kernel.shape[-2] != kernel.shape[-1]:
            raise ValueError(
                f"is_causal=True needs as many queries as keys, got {kernel.shape[-2]} queries and "
                f"{kernel.shape[-1]} keys"
            )
        kernel = jnp.tril(kernel)
    return kernel / kernel.sum(axis=-1, keepdims=True)


def distance(got: jax.Array, want: jax.Array) -> jax.Array:
    """Computes how much attention goes to the wrong keys: 1/2 sum_s |got_ts - want_ts|.

    It lies between 0 and 1. The outputs differ by at most twice this share of the largest value.

    Args:
      got: weights ``(..., T, S)`` whose rows sum to one.
      want: the same of another attention.

    Returns:
      The mean over all axes except S and those that only `got` has.

    Example:
      >>> distance(jnp.array([[1.0, 0.0]]), jnp.array([[0.25, 0.75]])).item()
      0.75
    """
    rows = 0.5 * jnp.abs(got - want).sum(axis=-1)
    return rows.mean(axis=tuple(range(rows.ndim - want.ndim + 1, rows.ndim)))


def errors_by_tables(
    rng_key: jax.Array,
    query: jax.Array,
    key: jax.Array,
    *,
    num_planes: int,
    num_tables: Sequence[int] = (1, 2, 4, 8, 16, 32),
    sharpness: jax.typing.ArrayLike = 1.0,
    scale: float | None = None,
    use_tanh: bool = True,
    is_causal: bool = False,
    want: jax.Array | None = None,
    draws: int = 4,
) -> Errors:
    """Measures the error of L tables for several L.

    All pairs of queries and keys are compared, so that time and memory grow with the square of the
    length. A few hundred tokens are enough.

    Args:
      rng_key: a ``jax.random`` key, from which the planes are drawn.
      query: ``(B, T, N, H)``.
      key: ``(B, S, K, H)``.
      num_planes: P.
      num_tables: the numbers L.
      sharpness: beta, a scalar or ``(K,)``.
      scale: the standard deviation of the planes' entries, which is ``H**-0.5`` if None, as in
        `race_jax.RACEAttention`. The paper's is 1.
      use_tanh: as for `hash_kernel`.
      is_causal: whether query t sees keys 0 to t only.
      want: the exact kernel ``(B, N, T, S)``, which is `soft_kernel` if None.
      draws: the number of independent draws of the planes for the largest L. Smaller L have
        more draws.

    Returns:
      `distance` between the weights of the tables and the exact ones, by L.

    Raises:
      ValueError: if there are fewer than two draws, or `num_tables` is empty.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 16, 1, 8))
      >>> errors = errors_by_tables(
      ...     jax.random.key(1), x, x, num_planes=2, num_tables=(1, 16), scale=0.35)
      >>> bool(errors.mean[0] > 2 * errors.mean[1])
      True
    """
    tables = sorted(set(num_tables))
    if draws < 2 or not tables:
        raise ValueError(
            f"draws must be at least 2 and num_tables must name a number, got {draws} and {tables}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if want is None:
        want = soft_kernel(
            query,
            key,
            num_planes=num_planes,
            sharpness=sharpness,
            scale=scale,
            use_tanh=use_tanh,
        )
    want = attention_weights(want, is_causal=is_causal)

    @jax.jit
    def of_one_draw(rng_key: jax.Array) -> list[jax.Array]:
        planes = hashing.init_planes(
            rng_key,
            num_tables=tables[-1],
            num_planes=num_planes,
            head_dim=query.shape[-1],
            scale=scale,
        )
        kernels = _by_table(query, key, planes, sharpness, use_tanh)
        groups = (
            kernels[: len(kernels) // number * number].reshape(-1, number, *kernels.shape[1:])
            for number in tables
        )
        return [
            distance(attention_weights(group.mean(axis=1), is_causal=is_causal), want)
            for group in groups
        ]

    found = jax.lax.map(of_one_draw, jax.random.split(rng_key, draws))
    samples = [np.asarray(values, np.float64).reshape(-1) for values in found]
    return Errors(
        np.array(tables),
        np.array([values.mean() for values in samples]),
        np.array([values.std(ddof=1) for values in samples]),
    )


def _by_table(
    query: jax.Array,
    key: jax.Array,
    planes: jax.Array,
    sharpness: jax.typing.ArrayLike,
    use_tanh: bool,
) -> jax.Array:
    """Returns phi_l(q) . phi_l(k) of every table, ``(L, B, N, T, S)``."""
    query, key, beta = _aligned(query, key, sharpness)
    phi_q, phi_k = (
        hashing.soft_hash(
            hashing.hash_projections(x, planes), beta[:, None], use_tanh=use_tanh
        ).reshape(*x.shape[:-1], planes.shape[0], -1)
        for x in (query, key)
    )
    return jnp.einsum("bntlr,bnslr->lbnts", phi_q, phi_k, precision="highest")


def _aligned(
    query: jax.Array, key: jax.Array, sharpness: jax.typing.ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries and keys ``(B, N, T, H)`` in float32 or wider, and beta ``(N,)``."""
    heads, kv_heads = query.shape[-2], key.shape[-2]
    if query.ndim != 4 or key.ndim != 4 or heads % kv_heads or query.shape[0] != key.shape[0]:
        raise ValueError(
            f"query must be (B, T, N, H) and key (B, S, K, H) with K dividing N, got "
            f"{query.shape} and {key.shape}"
        )
    dtype = jnp.result_type(query, key, jnp.float32)
    beta = jnp.broadcast_to(jnp.asarray(sharpness, dtype), (kv_heads,))
    beta = jnp.repeat(beta, heads // kv_heads)
    key = jnp.repeat(key, heads // kv_heads, axis=-2)
    query, key = (x.astype(dtype).swapaxes(1, 2) for x in (query, key))
    return query, key, beta


def _angle(query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the angles of all pairs, ``(B, N, T, S)``. A zero vector is orthogonal to all."""
    tiny = jnp.finfo(query.dtype).tiny
    query, key = (
        x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), tiny) for x in (query, key)
    )
    cosine = jnp.einsum("bnth,bnsh->bnts", query, key, precision="highest")
    return jnp.arccos(jnp.clip(cosine, -1, 1))


@functools.partial(jax.jit, static_argnames=("num_planes", "use_tanh"))
def _expectation(
    query_length: jax.Array,
    key_length: jax.Array,
    angle: jax.Array,
    sharpness: jax.Array,
    num_planes: int,
    use_tanh: bool,
) -> jax.Array:
    """Integrates over planes, for lengths ``(B, N, T)`` and ``(B, N, S)``, one query at a time."""
    x, weight = np.polynomial.legendre.leggauss(RADII)
    radius = (x + 1) * LONGEST_RADIUS / 2
    weight = weight * radius * np.exp(-(radius**2) / 2)
    weight = jnp.asarray(weight / weight.sum() / ANGLES, angle.dtype)
    turn = jnp.asarray((np.arange(ANGLES) + 0.5) * np.pi / ANGLES, angle.dtype)  # half a circle
    radius = jnp.asarray(radius, angle.dtype)[:, None]

    def one_query(inputs: tuple[jax.Array, ...]) -> jax.Array:
        own, others, angles, beta = inputs  # (), (S,), (S,), ()
        soft_sign = lambda z: jnp.tanh(beta * (jnp.tanh(z) if use_tanh else z))  # noqa: E731
        a = soft_sign(own * radius * jnp.cos(turn))
        b = soft_sign(others[:, None, None] * radius * jnp.cos(turn - angles[:, None, None]))
        mean = jnp.einsum("rt,srt,r->s", a, b, weight, precision="highest")
        return ((1 + mean) / 2) ** num_planes

    batch, heads, queries, _ = angle.shape
    rows = (
        query_length,
        jnp.broadcast_to(key_length[:, :, None], angle.shape),
        angle,
        jnp.broadcast_to(sharpness[:, None], (batch, heads, queries)),
    )
    flat = [x.reshape(batch * heads * queries, *x.shape[3:]) for x in rows]
    return jax.lax.map(one_query, tuple(flat)).reshape(angle.shape)
