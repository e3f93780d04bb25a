"""Hash projections z = W x of a query or key x, and its soft buckets phi(z).

x has the shape (..., H) and the planes W have (L, P, H). z is (..., L, P), and phi is
(..., L * 2**P):

    phi_l,r = softmax over corners r of beta * sum_p u_l,p c_r,p
            = prod_p sigmoid(2 beta u_l,p c_r,p)

Here u = tanh z as in the paper, or u = z.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

MAX_PLANES = 10  # 2**10 buckets per table; larger tables do not fit into a cache


def init_planes(
    key: jax.Array,
    *,
    num_tables: int,
    num_planes: int,
    head_dim: int,
    scale: float = 1.0,
    orthogonal: bool = False,
    num_kv_heads: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Draws the hyperplanes that hash queries and keys.

    Every row is drawn from N(0, scale**2 I). With ``scale=1`` (the paper) and inputs of norm
    sqrt(H), projections have standard deviation sqrt(H) and tanh saturates. With
    ``scale=head_dim**-0.5`` projections are of order one, and gradients reach queries and keys.

    Args:
      key: a ``jax.random`` key.
      num_tables: L >= 1, the number of independent hash tables.
      num_planes: P in 1..10, the number of planes per table. A table has 2**P buckets.
      head_dim: H >= 1, the width of queries and keys.
      scale: the standard deviation of an entry, > 0.
      orthogonal: whether the P rows of a table are orthogonal. Their norms are drawn as those of
        Gaussian rows, chi-distributed with H degrees of freedom. This needs P <= H.
      num_kv_heads: None for one set of planes, or K for one set per key/value head.
      dtype: the floating dtype of the result.

    Returns:
      Planes of shape ``(L, P, H)``, or ``(K, L, P, H)`` with ``num_kv_heads``.

    Raises:
      ValueError: if a size is below 1, P is above 10, the scale is not positive, or P > H with
        ``orthogonal``.
      TypeError: if the dtype is not floating.

    Example:
      >>> import jax, race_jax
      >>> race_jax.init_planes(
      ...     jax.random.key(0), num_tables=4, num_planes=3, head_dim=64, scale=64**-0.5
      ... ).shape
      (4, 3, 64)

    Source: arXiv 2510.04008, Algorithm 1. ``scale``, ``orthogonal`` and planes per head go beyond
    the paper.
    """
    _check_sizes(num_tables, num_planes, head_dim, num_kv_heads)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype of planes must be floating, got {jnp.dtype(dtype).name}")
    if not scale > 0:
        raise ValueError(
            f"scale must be > 0, got {scale}; use 1.0 as in the paper, or head_dim**-0.5 for a "
            "softer hash"
        )
    lead = () if num_kv_heads is None else (num_kv_heads,)
    shape = (*lead, num_tables, num_planes, head_dim)
    if not orthogonal:
        return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)
    if num_planes > head_dim:
        raise ValueError(
            f"orthogonal planes need num_planes <= head_dim, got {num_planes} > {head_dim}; "
            "pass orthogonal=False"
        )
    key_direction, key_norm = jax.random.split(key)
    rows = _orthogonal_rows(key_direction, shape)
    norms = jnp.linalg.norm(jax.random.normal(key_norm, shape, jnp.float32), axis=-1)
    return (scale * norms[..., None] * rows).astype(dtype)


def init_rotations(key: jax.Array, *, num_rotations: int, head_dim: int) -> jax.Array:
    """Draws random rotations, one below the other.

    Args:
      key: a ``jax.random`` key.
      num_rotations: r >= 1.
      head_dim: H >= 1.

    Returns:
      ``(r * H, H)`` float32, whose rows r' * H to (r' + 1) * H are orthonormal.

    Raises:
      ValueError: if a size is below 1.

    Example:
      >>> import jax
      >>> from race_jax.core.hashing import init_rotations
      >>> init_rotations(jax.random.key(0), num_rotations=2, head_dim=8).shape
      (16, 8)

    Source: beyond the paper.
    """
    for name, size in (("num_rotations", num_rotations), ("head_dim", head_dim)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return _orthogonal_rows(key, (num_rotations, head_dim, head_dim)).reshape(-1, head_dim)


def _orthogonal_rows(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws matrices ``(..., P, H)`` with P <= H whose rows are orthonormal."""
    *lead, rows, width = shape
    gaussian = jax.random.normal(key, (*lead, width, rows), jnp.float32)
    directions, triangle = jnp.linalg.qr(gaussian)
    # QR fixes the signs of Q by convention. Multiplying by the signs of R's diagonal makes the
    # directions uniformly distributed again.
    signs = jnp.sign(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    return jnp.swapaxes(directions * signs[..., None, :], -1, -2)


def _check_sizes(num_tables: int, num_planes: int, head_dim: int, num_kv_heads: int | None) -> None:
    sizes = {"num_tables": num_tables, "num_planes": num_planes, "head_dim": head_dim}
    if num_kv_heads is not None:
        sizes["num_kv_heads"] = num_kv_heads
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if num_planes > MAX_PLANES:
        raise ValueError(
            f"num_planes must be at most {MAX_PLANES}, got {num_planes} (2**{num_planes} buckets "
            "per table); use more tables instead"
        )


def hash_projections(x: jax.Array, planes: jax.Array) -> jax.Array:
    """Projects queries or keys onto the hash planes: z = W x.

    Args:
      x: a floating array ``(..., H)``, or ``(..., K, H)`` with planes per key/value head.
      planes: ``(L, P, H)``, or ``(K, L, P, H)``.

    Returns:
      ``(..., L, P)``, or ``(..., K, L, P)``, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: if the last axes of x and planes do not match, or planes have a wrong rank.
      TypeError: if x or planes are not floating.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> planes = race_jax.init_planes(jax.random.key(0), num_tables=4, num_planes=3, head_dim=8)
      >>> race_jax.hash_projections(jnp.ones((2, 5, 8)), planes).shape
      (2, 5, 4, 3)

    Source: arXiv 2510.04008, Algorithm 1.
    """
    check_floating(x=x, planes=planes)
    if planes.ndim not in (3, 4):
        raise ValueError(f"planes must be (L, P, H) or (K, L, P, H), got shape {planes.shape}")
    wanted = planes.shape[-1:] if planes.ndim == 3 else (planes.shape[0], planes.shape[-1])
    if x.shape[-len(wanted) :] != wanted:
        raise ValueError(
            f"x of shape {x.shape} must end in {wanted} to match planes of shape {planes.shape}"
        )
    x, planes = jnp.asarray(x), jnp.asarray(planes)
    dtype = jnp.result_type(x, planes, jnp.float32)
    equation = "...h,lph->...lp" if planes.ndim == 3 else "...kh,klph->...klp"
    # Both operands are widened first. Planes rounded to bfloat16 would have the same error at every
    # token, which shows in the gradient of sharpness. On a GPU, x is widened as it enters the
    # product.
    return jnp.einsum(equation, x.astype(dtype), planes.astype(dtype))


def flat_planes(planes: jax.Array, columns: int | None) -> jax.Array:
    """Joins all planes into one table ``(..., 1, columns, H)``, with zero planes at its end.

    Projections onto the result are those of all tables side by side, followed by zeros. If
    ``columns`` is None, the planes ``(..., L, P, H)`` are returned unchanged.
    """
    if columns is None:
        return planes
    *lead, tables, number, head_dim = planes.shape
    flat = planes.reshape(*lead, 1, tables * number, head_dim)
    padding = [(0, 0)] * (flat.ndim - 2) + [(0, columns - tables * number), (0, 0)]
    return jnp.pad(flat, padding)


def fold_planes(kernel: jax.Array, planes: jax.Array) -> jax.Array:
    """Folds the planes into a projection kernel, so that z comes directly from the hidden state.

    If q = x A + b and z = W q, then z = x (A Wᵀ) + W b, so that q itself is never formed.

    Args:
      kernel: ``(D, N, H)``, a projection's kernel, or its bias ``(N, H)``. For keys, N is K.
      planes: ``(L, P, H)``, or ``(K, L, P, H)`` with K dividing N.

    Returns:
      ``(D, N, L, P)``, or ``(N, L, P)``, in float32 (float64 for float64 inputs).

    Raises:
      ValueError: if the shapes do not match.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> planes = race_jax.init_planes(jax.random.key(0), num_tables=4, num_planes=3, head_dim=8)
      >>> fold_planes(jnp.ones((16, 2, 8)), planes).shape
      (16, 2, 4, 3)

    Source: beyond the paper; exact, because RACE uses queries and keys only through z.
    """
    if planes.ndim == 4:
        heads, sets = kernel.shape[-2], planes.shape[0]
        if heads % sets:
            raise ValueError(
                f"planes {planes.shape} are for {sets} heads, which must divide the {heads} heads "
                f"of kernel {kernel.shape}; pass (L, P, H) planes to use one set for all heads"
            )
        planes = jnp.repeat(planes, heads // sets, axis=0)
    dtype = jnp.result_type(kernel, planes, jnp.float32)
    return hash_projections(kernel.astype(dtype), planes.astype(dtype))


def soft_hash(
    projections: jax.Array, sharpness: jax.typing.ArrayLike = 1.0, *, use_tanh: bool = True
) -> jax.Array:
    """Turns hash projections into soft buckets.

        phi_l,r = prod_p sigmoid(2 beta u_l,p c_r,p),   c_r in {-1, +1}^P

    u is tanh z, or z itself without ``use_tanh``. This equals the softmax over the 2**P corners of
    beta * u . c, but never forms it.

    Args:
      projections: ``(..., L, P)``, floating.
      sharpness: beta > 0, a scalar or any array that broadcasts to ``projections.shape[:-2]``.
      use_tanh: whether projections go through tanh. With it, no bucket is ever nearer to one than
        sigmoid(2 beta)**P. Without it, a projection can be as decisive as it is large.

    Returns:
      ``(..., L * 2**P)``, in float32 or wider. The features of one table are adjacent and sum to
      one.
      Corners are ordered as binary numbers: the first plane is the most significant bit, and -1
      comes before +1.

    Raises:
      ValueError: if there are fewer than two axes, P is outside 1..10, or sharpness does not
        broadcast or is not positive.
      TypeError: if projections are not floating.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> phi = race_jax.soft_hash(jnp.array([[0.0], [30.0]]), sharpness=2.0)  # L=2, P=1
      >>> [round(float(p), 3) for p in phi]
      [0.5, 0.5, 0.018, 0.982]

    Source: arXiv 2510.04008, Algorithm 1; the factorised form is exact algebra. The form without
    tanh goes beyond the paper.
    """
    check_floating(projections=projections)
    if projections.ndim < 2 or not 1 <= projections.shape[-1] <= MAX_PLANES:
        raise ValueError(
            f"projections must be (..., L, P) with P in 1..{MAX_PLANES}, got {projections.shape}"
        )
    projections = jnp.asarray(projections)
    dtype = jnp.result_type(projections, jnp.float32)
    beta = jnp.asarray(sharpness, dtype)
    lead = projections.shape[:-2]
    axes = zip(reversed(beta.shape), reversed(lead), strict=False)
    if beta.ndim > len(lead) or any(size not in (1, wanted) for size, wanted in axes):
        raise ValueError(f"sharpness of shape {beta.shape} does not broadcast to {lead}")
    if not isinstance(beta, jax.core.Tracer) and not (beta > 0).all():
        raise ValueError(f"sharpness must be > 0, got {beta.min()}; train its logarithm instead")
    beta = beta.reshape(*(1,) * (len(lead) - beta.ndim), *beta.shape, 1, 1)
    if not lead:
        return soft_buckets(projections.astype(dtype)[..., None], beta[..., None], use_tanh)[..., 0]
    # The longest axis goes last. With a last axis of size one, jaxlib 0.10.2 crashes on a CPU in a
    # fusion of the gradient.
    longest = lead.index(max(lead))
    z, beta = (jnp.moveaxis(x, longest, -1) for x in (projections.astype(dtype), beta))
    return jnp.moveaxis(soft_buckets(z, beta, use_tanh), -1, longest)


def soft_buckets(projections: jax.Array, sharpness: jax.Array, use_tanh: bool) -> jax.Array:
    """Computes ``soft_hash`` with the tokens on the last axis.

    ``(..., L, P, C)`` becomes ``(..., L * 2**P, C)``. With tokens on the last axis, every step is a
    long vector operation, which is fast on a CPU.
    """
    logits = 2.0 * sharpness * (jnp.tanh(projections) if use_tanh else projections)
    # The sigmoid is taken of both signs, because 1 - sigmoid would lose the precision of the
    # smaller factor. The signs come from a product, because XLA's CPU code for a concatenation is
    # not vectorised.
    signs = jnp.array([[-1.0], [1.0]], logits.dtype)
    sides = jax.nn.sigmoid(
        logits[..., None, :] * jnp.expand_dims(signs, range(logits.ndim - 1))
    )  # (..., L, P, 2, C)
    *lead, tables, planes, _, tokens = sides.shape
    phi = sides[..., 0, :, :]  # (..., L, 2, C); every plane doubles the number of corners
    for plane in range(1, planes):
        phi = phi[..., :, None, :] * sides[..., plane, None, :, :]
        phi = phi.reshape(*lead, tables, 2 ** (plane + 1), tokens)
    return phi.reshape(*lead, tables * 2**planes, tokens)


def soft_buckets_pullback(
    projections: jax.Array,
    sharpness: jax.Array,
    use_tanh: bool,
    phi: jax.Array,
    d_phi: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Computes the gradient of ``soft_buckets`` with respect to projections and sharpness.

    With Psi = phi . dphi, the corner signs M (L*P, F) and the table sums E (L, F),

        du = beta (M Psi - tanh(beta u) . E Psi),   dbeta = sum u . du / beta

    and dz = du (1 - u**2) where u = tanh z, or dz = du where u = z.
    This is one small product with constants. Automatic differentiation would build a tree of narrow
    reductions instead.

    Returns:
      The cotangent of projections, ``(..., L, P, C)``, and terms ``(..., L, P, C)`` whose sum is
      the cotangent of sharpness.
    """
    *lead, tables, planes, tokens = projections.shape
    u = jnp.tanh(projections) if use_tanh else projections
    corners = np.array(list(itertools.product((-1.0, 1.0), repeat=planes)), phi.dtype).T  # (P, R)
    rows = np.concatenate([corners, np.ones_like(corners[:1])])  # (P + 1, R)
    rows = np.kron(np.eye(tables, dtype=phi.dtype), rows)  # (L * (P + 1), F)
    sums = jnp.broadcast_to(rows, (*lead, *rows.shape)) @ (phi * d_phi)
    sums = sums.reshape(*lead, tables, planes + 1, tokens)
    scaled = sums[..., :planes, :] - jnp.tanh(sharpness * u) * sums[..., planes:, :]
    d_u = sharpness * scaled
    return d_u * (1.0 - u * u) if use_tanh else d_u, u * scaled


def check_floating(**arrays: jax.Array) -> None:
    """Raises TypeError for an argument that is not a floating array."""
    for name, array in arrays.items():
        if not hasattr(array, "dtype"):
            raise TypeError(f"{name} must be an array, got a {type(array).__name__}")
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating, got {array.dtype}; convert it first")
