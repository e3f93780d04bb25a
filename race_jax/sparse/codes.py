"""Codes of keys and queries: signs or low-bit levels of their projections, packed into words.

Keys (..., H) become words (..., W) uint32, which are stored once per token and key/value head. With
random rotations R (M, H), M = r H, z = R k and b bits a coordinate,

    level_i = 2 clip(floor(z_i sqrt(H) / (|k| step_b)), -2^(b-1), 2^(b-1) - 1) + 1
    factor  = |k|^2 / sum_i level_i z_i

so that factor * level . (R q) estimates q . k, and is exact for q = k. A code of one bit is the
sign of z, where 0 counts as positive.

Layout. A code of levels is 4 W bytes, lowest byte of a word first. Byte i holds the coordinates
i, i + 4 W, i + 8 W, ... from its lowest bits on, each as (level + 2^b - 1) / 2. The code of a hash
table is a number of P bits whose highest bit is the first plane, as corners are ordered in
`soft_hash`. A word holds 32 // P tables, from its lowest bits on.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from race_jax.core.hashing import init_planes, init_rotations

STEPS = {1: 1.0, 2: 0.9957, 4: 0.3352}  # of a coordinate of standard deviation one
EXACT_BELOW = 2**24  # float32 holds all integers up to this one
TILE = 4096  # tokens that are coded at once
FACTOR_LIMIT = 65504.0  # of float16


def draw(key: jax.Array, coding, head_dim: int) -> jax.Array:
    """Draws what a scorer needs: rotations ``(M, H)``, planes ``(L P, H)`` or a seed ``(1,)``.

    Rotations and planes are rounded to bfloat16, so that every implementation has the same ones.
    """
    if coding.num_rotations is not None:
        bits = coding.code_bits or 1
        largest = 127 * (2**bits - 1) * coding.num_rotations * head_dim
        if largest >= EXACT_BELOW:
            raise ValueError(
                f"num_rotations={coding.num_rotations} of {bits} bits with heads of {head_dim} "
                f"gives scores up to {largest:,}; below {EXACT_BELOW:,} they are exact. Use fewer."
            )
        planes = init_rotations(key, num_rotations=coding.num_rotations, head_dim=head_dim)
    elif coding.num_tables is not None:
        sizes = {"num_tables": coding.num_tables, "num_planes": coding.num_planes}
        planes = init_planes(key, head_dim=head_dim, **sizes).reshape(-1, head_dim)
    else:
        return jax.random.bits(key, (1,), jnp.uint32)
    return planes.astype(jnp.bfloat16)


def project(x: jax.Array, planes: jax.Array) -> jax.Array:
    """Returns z = W x, ``(..., M)``, exact to float32 on every device."""
    x, planes = x.astype(jnp.float32), planes.astype(jnp.float32)
    return jnp.einsum("...h,mh->...m", x, planes, precision=jax.lax.Precision.HIGHEST)


def words_of_levels(coordinates: int, bits: int) -> int:
    """Returns W, the words that a code of levels takes."""
    return -(-coordinates * bits // 32)


def words_of_tables(tables: int, planes: int) -> int:
    """Returns W, the words that the codes of hash tables take."""
    return -(-tables // (32 // planes))


def code_levels(key: jax.Array, planes: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Quantizes keys.

    Args:
      key: ``(..., H)``.
      planes: rotations ``(M, H)``, or other planes.
      bits: b, 1, 2 or 4.

    Returns:
      Words ``(..., W)`` uint32, and factors ``(...)`` float16, which are 0 for a key of zeros.
    """
    z, key = project(key, planes), key.astype(jnp.float32)
    norm = jnp.linalg.norm(key, axis=-1, keepdims=True)
    scale = math.sqrt(key.shape[-1]) / STEPS[bits]
    scaled = z * jnp.where(norm > 0, scale / jnp.where(norm > 0, norm, 1), 0)
    half = 2 ** (bits - 1)
    unsigned = jnp.clip(jnp.floor(scaled), -half, half - 1) + half
    levels = 2 * unsigned - (2**bits - 1)
    product = (levels * z).sum(axis=-1)
    factor = jnp.where(product > 0, norm[..., 0] ** 2 / jnp.where(product > 0, product, 1), 0)
    factor = jnp.minimum(factor, FACTOR_LIMIT).astype(jnp.float16)
    return pack_levels(unsigned.astype(jnp.uint32), bits), factor


def pack_levels(unsigned: jax.Array, bits: int) -> jax.Array:
    """Packs coordinates ``(..., M)`` uint32 below 2^b into words ``(..., W)``."""
    *lead, count = unsigned.shape
    words = words_of_levels(count, bits)
    padding = [(0, 0)] * len(lead) + [(0, 32 // bits * words - count)]
    parts = jnp.pad(unsigned, padding).reshape(*lead, 8 // bits, words, 4)
    shifts = bits * jnp.arange(8 // bits)[:, None, None] + 8 * jnp.arange(4)
    return (parts << shifts.astype(jnp.uint32)).sum(axis=(-3, -1), dtype=jnp.uint32)


def unpack_levels(words: jax.Array, bits: int, count: int) -> jax.Array:
    """Returns the levels ``(..., M)`` float32 of words ``(..., W)``: odd integers."""
    shifts = bits * jnp.arange(8 // bits)[:, None, None] + 8 * jnp.arange(4)
    parts = words[..., None, :, None] >> shifts.astype(jnp.uint32)
    unsigned = (parts & (2**bits - 1)).reshape(*words.shape[:-1], words.shape[-1] * 32 // bits)
    unsigned = unsigned[..., :count]
    return 2 * unsigned.astype(jnp.float32) - (2**bits - 1)


def code_tables(key: jax.Array, planes: jax.Array, num_planes: int) -> jax.Array:
    """Returns the hash codes of keys ``(..., H)`` under planes ``(L P, H)``, as ``(..., W)``."""
    z = project(key, planes)
    tables = len(planes) // num_planes
    signs = (z >= 0).astype(jnp.uint32).reshape(*z.shape[:-1], tables, num_planes)
    weights = 2 ** jnp.arange(num_planes - 1, -1, -1, dtype=jnp.uint32)
    return pack_tables((signs * weights).sum(axis=-1, dtype=jnp.uint32), num_planes)


def pack_tables(codes: jax.Array, num_planes: int) -> jax.Array:
    """Packs the codes ``(..., L)`` uint32 of hash tables into words ``(..., W)``."""
    *lead, tables = codes.shape
    per_word, words = 32 // num_planes, words_of_tables(tables, num_planes)
    padding = [(0, 0)] * len(lead) + [(0, per_word * words - tables)]
    parts = jnp.pad(codes, padding).reshape(*lead, words, per_word)
    shifts = num_planes * jnp.arange(per_word, dtype=jnp.uint32)
    return (parts << shifts).sum(axis=-1, dtype=jnp.uint32)


def code_of_table(words: jax.Array, table: jax.Array, num_planes: int) -> jax.Array:
    """Returns the code ``(...)`` uint32 of one table from words ``(..., W)``."""
    per_word = 32 // num_planes
    word = jax.lax.dynamic_index_in_dim(words, table // per_word, axis=-1, keepdims=False)
    shift = (num_planes * (table % per_word)).astype(jnp.uint32)
    return (word >> shift) & jnp.uint32(2**num_planes - 1)


def signs(query: jax.Array, planes: jax.Array) -> jax.Array:
    """Returns the sides of the planes on which queries ``(..., H)`` lie: 1 or -1, ``(..., M)``."""
    return jnp.where(project(query, planes) >= 0, 1.0, -1.0)


def round_query(query: jax.Array, planes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds rotated queries ``(..., H)`` to 8 bits.

    Returns:
      Integers from -127 to 127 as float32, ``(..., M)``, and what a one is worth, ``(..., 1)``.
    """
    z = project(query, planes)
    unit = jnp.abs(z).max(axis=-1, keepdims=True) / 127
    return jnp.round(z / jnp.where(unit > 0, unit, 1)), unit
