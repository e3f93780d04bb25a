"""A cache of keys and values that also holds what a scorer needs of every token.

It is a `KVCache` and codes beside it, with the same slots and lengths:

    codes[b, k, s], factor[b, k, s] = code(key[b, s, k]),   value_norm[b, k, s] = |value[b, s, k]|
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import dispatch, shards
from race_jax.sparse import cache as cache_module
from race_jax.sparse import codes
from race_jax.sparse.cache import KVCache
from race_jax.sparse.config import SparseConfig

# What is stored beside the keys and values, and comes and goes with the scorer.
PARTS = ("codes", "factor", "value_norm", "pages")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseCache:
    """Keys and values with their codes. It has the methods of `KVCache`, and behaves like it.

    Attributes:
      kv: the keys and values.
      codes: ``(B, K, C, W)`` uint32, or None if the scorer has no codes.
      factor: ``(B, K, C)`` float16, what a code is multiplied by, or None.
      value_norm: ``(B, K, C)`` float32, or None.
      pages: ``(B, K, pages, 2, H)``, the minima and maxima of the keys of every full page, or None.
      planes: the rotations or hash planes ``(M, H)`` bfloat16, or a seed ``(1,)`` uint32.
      config: the configuration, which is static. What it says of codes cannot be changed later.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> config = race_jax.SparseConfig(budget=4, sink=1, window=1, scorer="quantized")
      >>> cache = race_jax.SparseCache.init(
      ...     jax.random.key(0), 1, 8, kv_heads=2, head_dim=32, dtype=jnp.float32, config=config
      ... )
      >>> token = jnp.ones((1, 3, 2, 32))
      >>> cache.append(token, token).length.tolist(), cache.codes.shape
      ([3], (1, 2, 8, 4))

    Source: beyond the paper, but for the codes of "socket".
    """

    kv: KVCache
    codes: jax.Array | None
    factor: jax.Array | None
    value_norm: jax.Array | None
    pages: jax.Array | None
    planes: jax.Array
    config: SparseConfig = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(
        cls,
        key: jax.Array,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        *,
        config: SparseConfig,
    ) -> SparseCache:
        """Returns an empty cache.

        Args:
          key: a ``jax.random`` key, from which rotations or planes are drawn.
          batch: B.
          capacity: C, for "quest" a multiple of the page size.
          kv_heads: K.
          head_dim: H.
          value_dim: V, or None for H.
          dtype: the dtype of keys and values.
          config: the configuration.

        Raises:
          ValueError: if the capacity is out of range, or scores would not be exact integers.

        Example:
          >>> import jax, race_jax
          >>> config = race_jax.SparseConfig(scorer="oracle")
          >>> race_jax.SparseCache.init(jax.random.key(0), 1, 8, 2, 4, config=config).capacity
          8
        """
        kv = KVCache.init(batch, capacity, kv_heads, head_dim, value_dim, dtype)
        return cls.of(key, kv, config)

    @classmethod
    def of(cls, key: jax.Array, kv: KVCache, config: SparseConfig) -> SparseCache:
        """Returns a cache with the tokens of `kv`, which are coded now.

        A prompt can so be read with dense attention, and the tokens after it with sparse attention.

        Args:
          key: a ``jax.random`` key, from which rotations or planes are drawn.
          kv: the keys and values.
          config: the configuration.

        Raises:
          ValueError: as `init`.
          TypeError: if `kv` is not a `KVCache`, or `config` not a `SparseConfig`.
          NotImplementedError: if the tokens have a forget gate.

        Example:
          >>> import jax, jax.numpy as jnp, race_jax
          >>> token = jnp.ones((1, 3, 2, 32), jnp.bfloat16)
          >>> kv = race_jax.KVCache.init(1, 8, kv_heads=2, head_dim=32).append(token, token)
          >>> config = race_jax.SparseConfig(budget=4, sink=1, window=1)
          >>> race_jax.SparseCache.of(jax.random.key(0), kv, config).length.tolist()
          [3]
        """
        if isinstance(kv, SparseCache):
            raise TypeError("this cache has codes already; pass cache.kv to code it anew.")
        if not isinstance(kv, KVCache):
            raise TypeError(f"kv must be a KVCache; got {type(kv).__name__}.")
        if not isinstance(config, SparseConfig):
            raise TypeError(f"config must be a SparseConfig; got {type(config).__name__}.")
        if kv.decay is not None:
            raise NotImplementedError(
                "sparse scores know nothing of a forget gate; decode without a SparseConfig."
            )
        coding = config.coding()
        size = coding.page_size
        if size is not None and kv.capacity % size:
            raise ValueError(
                f"capacity={kv.capacity} must be a multiple of page_size={size}; "
                f"{-(-kv.capacity // size) * size} is."
            )
        planes = codes.draw(key, coding, kv.key.shape[-1])
        parts = shards.over_shards(
            lambda arrays, _: _of_all_slots(**arrays, coding=coding),
            {"kv": kv, "planes": planes},
            {"kv": cache_module.kinds_of(kv), "planes": shards.SHARED},
            dict.fromkeys(PARTS, shards.TABLES),
            kv_heads=kv.key.shape[2],
            splits_sequence=False,
        )
        return cls(kv, **parts, planes=planes, config=config)

    @property
    def length(self) -> jax.Array:
        """The number of tokens of each row, ``(B,)`` int32."""
        return self.kv.length

    @property
    def capacity(self) -> int:
        """C, the number of tokens that a row has room for."""
        return self.kv.capacity

    @property
    def segment(self) -> jax.Array:
        """The segment of the last token of each row, ``(B,)``: 0, or -1 before the first token."""
        return self.kv.segment

    def append(
        self, key: jax.Array, value: jax.Array, *, key_value_mask: jax.Array | None = None
    ) -> SparseCache:
        """Returns the cache with the tokens added and coded, as `KVCache.append`."""
        cache_module.check_append(self.kv, key, value, key_value_mask)
        arrays = {"cache": self, "key": key, "value": value}
        kinds = {"cache": kinds_of(self), "key": shards.TOKENS, "value": shards.TOKENS}
        if key_value_mask is not None:
            arrays["mask"], kinds["mask"] = key_value_mask, shards.SLOTS
        parts = shards.over_shards(
            lambda arrays, _: _with_tokens(**arrays),
            arrays,
            kinds,
            dict.fromkeys(PARTS, shards.TABLES) | {"kv": cache_module.kinds_of(self.kv)},
            kv_heads=self.kv.key.shape[2],
            splits_sequence=False,
        )
        return dataclasses.replace(self, **parts)  # the planes stay those of all devices

    def first(self, slots: int) -> SparseCache:
        """Returns a cache of the first ``slots`` slots, beyond which no row may hold a token."""
        kv = dataclasses.replace(
            self.kv, key=self.kv.key[:, :slots], value=self.kv.value[:, :slots]
        )
        return self._resized(kv, lambda x, size, axis: jax.lax.slice_in_dim(x, 0, size, axis=axis))

    def truncate(self, length: jax.Array) -> SparseCache:
        """Returns the cache cut back to ``length`` ``(B,)`` tokens, as `KVCache.truncate`."""
        return dataclasses.replace(self, kv=self.kv.truncate(length))

    def reset(self, rows: jax.Array) -> SparseCache:
        """Returns the cache with the rows emptied where ``rows`` ``(B,)`` bool is True."""
        return dataclasses.replace(self, kv=self.kv.reset(rows))

    def grow(self, capacity: int) -> SparseCache:
        """Returns a copy with room for ``capacity`` tokens a row, as `KVCache.grow`."""
        size = self.config.coding().page_size
        if size is not None and capacity % size:
            raise ValueError(
                f"{capacity=} must be a multiple of page_size={size}; "
                f"{-(-capacity // size) * size} is."
            )
        return self._resized(self.kv.grow(capacity), cache_module.grown)

    def _resized(self, kv: KVCache, resize: Callable[..., jax.Array]) -> SparseCache:
        """Returns the cache with other keys and values, and codes of as many slots."""
        sizes = dict.fromkeys(("codes", "factor", "value_norm"), kv.capacity)
        if self.pages is not None:
            sizes["pages"] = kv.capacity // self.config.coding().page_size
        parts = {
            name: resize(x, size, axis=2)
            for name, size in sizes.items()
            if (x := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, kv=kv, **parts)


def kinds_of(cache: SparseCache) -> SparseCache:
    """Returns the kind of each array of a cache, for `shards.over_shards`."""
    parts = {name: None if getattr(cache, name) is None else shards.TABLES for name in PARTS}
    kv = cache_module.kinds_of(cache.kv)
    return dataclasses.replace(cache, kv=kv, planes=shards.SHARED, **parts)


def _with_tokens(cache: SparseCache, key, value, mask=None) -> dict[str, Any]:
    """Returns what `SparseCache.append` changes, on one device."""
    old, count, coding = cache.length, key.shape[1], cache.config.coding()
    kv = cache_module.with_tokens(cache.kv, key, value, mask)
    slots = cache_module.new_slots(old, mask, count, cache.capacity)
    rows = jnp.arange(len(old))[:, None]
    parts = {
        name: x if x is None else _written(getattr(cache, name), x, rows, slots)
        for name, x in _code(key, value, cache.planes, coding).items()
    }
    pages = cache.pages
    if pages is not None:
        size = coding.page_size
        touched = old[:, None] // size + jnp.arange(-(-count // size) + 1)
        at = touched[..., None] * size + jnp.arange(size)
        keys = kv.key.at[rows, at.reshape(len(old), touched.shape[1] * size)].get(mode="clip")
        found = _bounds(keys.reshape(*touched.shape, size, *keys.shape[2:]))
        pages = _written(pages, found, rows, touched)
    return {"kv": kv, "pages": pages, **parts}


def _of_all_slots(kv: KVCache, planes: jax.Array, coding: Any) -> dict[str, Any]:
    """Returns what is stored of every slot, on one device."""
    pages, size = None, coding.page_size
    if size is not None:
        by_page = len(kv.length), kv.capacity // size, size, *kv.key.shape[2:]
        pages = _bounds(kv.key.reshape(by_page))
    return _tiled(kv, planes, coding) | {"pages": pages}


def _code(key: jax.Array, value: jax.Array, planes: jax.Array, coding: Any) -> dict[str, Any]:
    """Returns what is stored of tokens ``(B, T, K, ...)``, each ``(B, K, T, ...)`` or None."""
    words = factor = norm = None
    if coding.num_rotations is not None:
        words, factor = _levels(key, planes, coding.code_bits or 1)
        factor = None if coding.scorer == "hamming" else factor
    elif coding.num_tables is not None:
        words = jnp.swapaxes(codes.code_tables(key, planes, coding.num_planes), 1, 2)
        if coding.value_weighting:
            norm = jnp.linalg.norm(value.astype(jnp.float32), axis=-1)
    norm = None if norm is None else jnp.swapaxes(norm, 1, 2)
    return {"codes": words, "factor": factor, "value_norm": norm}


def _levels(key: jax.Array, planes: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Returns words ``(B, K, T, W)`` and factors ``(B, K, T)``, from the kernel where it can."""

    def xla(key: jax.Array, planes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return tuple(jnp.swapaxes(x, 1, 2) for x in codes.code_levels(key, planes, bits))

    def pallas(key: jax.Array, planes: jax.Array) -> tuple[jax.Array, jax.Array]:
        return dispatch.kernels().sparse.level_codes(key, planes, bits=bits)

    def limit() -> str | None:
        if reason := dispatch.without_cuda("sparse"):
            return reason
        return dispatch.kernels().sparse.supports_codes(key, planes, bits=bits)

    # A new cache codes no tokens. That the kernels do not support this is no news to the user.
    choice = dispatch.decide("xla" if 0 in key.shape else None, limit)
    run = dispatch.by_platform(choice, xla, pallas)
    return run(*jax.lax.stop_gradient((key, planes)))


def _tiled(kv: KVCache, planes: jax.Array, coding: Any) -> dict[str, Any]:
    """Codes all slots. Projections are several times as large as keys, hence one tile at a time."""
    if kv.capacity <= codes.TILE:
        return _code(kv.key, kv.value, planes, coding)
    whole = kv.capacity // codes.TILE * codes.TILE

    def tiles(x: jax.Array) -> jax.Array:
        x = x[:, :whole].reshape(len(x), whole // codes.TILE, codes.TILE, *x.shape[2:])
        return jnp.moveaxis(x, 1, 0)

    parts = jax.lax.map(lambda pair: _code(*pair, planes, coding), (tiles(kv.key), tiles(kv.value)))
    rest = _code(kv.key[:, whole:], kv.value[:, whole:], planes, coding)

    def joined(tiles: jax.Array, rest: jax.Array) -> jax.Array:
        tiles = jnp.moveaxis(tiles, 0, 2)  # (B, K, number, TILE, ...)
        return jnp.concatenate([tiles.reshape(*tiles.shape[:2], whole, *tiles.shape[4:]), rest], 2)

    return jax.tree.map(joined, parts, rest)


def _bounds(keys: jax.Array) -> jax.Array:
    """Returns minima and maxima ``(B, K, pages, 2, H)`` of keys ``(B, pages, size, K, H)``."""
    return jnp.moveaxis(jnp.stack([keys.min(axis=2), keys.max(axis=2)], axis=3), 1, 2)


def _written(held: jax.Array, new: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes ``(B, K, T, ...)`` to the slots ``(B, T)`` of an array ``(B, K, C, ...)``."""
    # With an index on both sides of a slice, NumPy's rule brings the indexed axes to the front.
    return held.at[rows, :, slots].set(jnp.swapaxes(new, 1, 2), mode="drop")
