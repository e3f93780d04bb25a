"""The cache of keys and values, which decoding reads instead of the tokens.

Keys (B, T, K, H) and values (B, T, K, V) of new tokens go in. Every row of the batch has a length
of its own, and its tokens lie side by side in the slots before it:

    key[b, length[b] + i] = the i-th new key of row b that the mask does not hide

With a forget gate, the running sum of its logarithm up to each token lies beside them.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core import masking, shards

CAPACITY_LIMIT = 2**31  # slots are counted in int32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far, with room for more.

    The cache is a value. Methods return a new one, and keeping an old one is all it takes to go
    back. Slots from ``length`` on are never read, whatever they hold. If a row would pass the
    capacity, its length says so, and attention gives NaN for it until the row is cut back.

    Attributes:
      key: ``(B, C, K, H)``, as attention reads them, which is after rotary positions.
      value: ``(B, C, K, V)``.
      length: ``(B,)`` int32, the number of tokens of each row.
      decay: ``(B, C, K)`` float32, the sum G of the log decay up to and with each token, or None
        without a forget gate.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> cache = race_jax.KVCache.init(
      ...     batch=1, capacity=8, kv_heads=2, head_dim=4, dtype=jnp.float32
      ... )
      >>> token = jnp.ones((1, 3, 2, 4))
      >>> cache = cache.append(token, token, key_value_mask=jnp.array([[False, True, True]]))
      >>> cache.capacity, cache.length.tolist(), cache.truncate(jnp.array([1])).length.tolist()
      (8, [2], [1])

    Source: beyond the paper.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array
    decay: jax.Array | None = None

    @classmethod
    def init(
        cls,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        dtype: jax.typing.DTypeLike = jnp.bfloat16,
        has_decay: bool = False,
    ) -> KVCache:
        """Returns an empty cache.

        Args:
          batch: B.
          capacity: C, the number of tokens that a row has room for, at least 1.
          kv_heads: K.
          head_dim: H.
          value_dim: V, or None for H.
          dtype: the dtype of keys and values.
          has_decay: whether the tokens have a forget gate.

        Raises:
          ValueError: if the capacity is out of range, or there are no heads.
          TypeError: if the dtype is not floating, or has fewer than 16 bits.

        Example:
          >>> import race_jax
          >>> race_jax.KVCache.init(2, 16, kv_heads=4, head_dim=8).key.shape
          (2, 16, 4, 8)
        """
        capacity = whole_number("capacity", capacity)
        if not 1 <= capacity < CAPACITY_LIMIT:
            raise ValueError(f"{capacity=} must be at least 1 and below 2**31, as slots are int32.")
        if kv_heads < 1 or head_dim < 1:
            raise ValueError(f"{kv_heads=} and {head_dim=} must be at least 1.")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"dtype must be floating, such as jnp.bfloat16; got {dtype}.")
        if jnp.dtype(dtype).itemsize < 2:
            raise TypeError(f"dtype must have at least 16 bits, as jnp.bfloat16; got {dtype}.")
        value_dim = head_dim if value_dim is None else value_dim
        return cls(
            jnp.zeros((batch, capacity, kv_heads, head_dim), dtype),
            jnp.zeros((batch, capacity, kv_heads, value_dim), dtype),
            jnp.zeros(batch, jnp.int32),
            jnp.zeros((batch, capacity, kv_heads), jnp.float32) if has_decay else None,
        )

    @property
    def capacity(self) -> int:
        """C, the number of tokens that a row has room for."""
        return self.key.shape[1]

    @property
    def segment(self) -> jax.Array:
        """The segment of the last token of each row, ``(B,)``: 0, or -1 before the first token."""
        return jnp.where(self.length > 0, 0, -1)

    def append(
        self,
        key: jax.Array,
        value: jax.Array,
        *,
        key_value_mask: jax.Array | None = None,
        log_decay: jax.Array | None = None,
    ) -> KVCache:
        """Returns the cache with the tokens added. Prefill and decoding are the same call.

        Args:
          key: ``(B, T, K, H)``, in the dtype of the cache.
          value: ``(B, T, K, V)``, in the dtype of the cache.
          key_value_mask: ``(B, T)`` bool, True where there is a token, or None. Padded slots are
            left out, wherever they are, so that the tokens of a row lie side by side.
          log_decay: ``(B, T, K)``, <= 0, the forget gate of the tokens, for a cache that has one.

        Raises:
          ValueError: if shapes do not fit, if the gate is missing or the cache has no place for
            it, or if the tokens are known not to fit the capacity. In traced code a row beyond its
            capacity gives NaN instead.
          TypeError: if a dtype differs from that of the cache.
        """
        check_append(self, key, value, key_value_mask, log_decay)
        arrays = {"cache": self, "key": key, "value": value, "mask": key_value_mask}
        arrays["log_decay"] = log_decay
        kinds = {"key": shards.TOKENS, "value": shards.TOKENS, "mask": shards.SLOTS}
        kinds["log_decay"] = shards.TOKENS
        kinds = {name: kind for name, kind in kinds.items() if arrays[name] is not None}
        arrays = {name: arrays[name] for name in (*kinds, "cache")}
        return shards.over_shards(
            lambda arrays, _: with_tokens(**arrays),
            arrays,
            kinds | {"cache": kinds_of(self)},
            kinds_of(self),
            kv_heads=self.key.shape[2],
            splits_sequence=False,
        )

    def truncate(self, length: jax.Array) -> KVCache:
        """Returns the cache cut back to ``length`` ``(B,)`` tokens. Nothing is copied or cleared.

        Raises:
          ValueError: if a row is known to hold fewer tokens than that, or a length is below 0. In
            traced code a length is brought into this range instead.
          TypeError: if lengths are not integers.
        """
        length = jnp.asarray(length)
        if not jnp.issubdtype(length.dtype, jnp.integer):
            raise TypeError(f"length must hold integers; got {length.dtype}.")
        length = length.astype(jnp.int32)
        if length.shape != self.length.shape:
            raise ValueError(f"length must have shape {self.length.shape}; got {length.shape}.")
        wanted, held = masking.concrete(length), masking.concrete(self.length)
        if wanted is not None and held is not None:
            for row in np.flatnonzero((wanted > held) | (wanted < 0)):
                raise ValueError(
                    f"length={wanted[row]} is not from 0 to the {held[row]} tokens of row {row}."
                )
        return dataclasses.replace(self, length=jnp.clip(length, 0, self.length))

    def reset(self, rows: jax.Array) -> KVCache:
        """Returns the cache with the rows emptied where ``rows`` ``(B,)`` bool is True.

        Raises:
          ValueError: if there is not one entry a row.
          TypeError: if the entries are not bool, such as the numbers of rows.
        """
        rows = jnp.asarray(rows)
        if rows.shape != self.length.shape:
            raise ValueError(
                f"rows must have shape {self.length.shape}, True where a row is emptied; "
                f"got {rows.shape}."
            )
        if rows.dtype != jnp.bool_:
            raise TypeError(f"rows must be bool, True where a row is emptied; got {rows.dtype}.")
        return dataclasses.replace(self, length=jnp.where(rows, 0, self.length))

    def grow(self, capacity: int) -> KVCache:
        """Returns a copy with room for ``capacity`` tokens a row. Programs compile anew for it.

        Tokens that had no room are lost, so a row that has passed its capacity is no longer whole.
        In traced code it goes on giving NaN.

        Raises:
          ValueError: if the cache has that room already, or a row is known to have lost tokens.
        """
        held = masking.concrete(self.length)
        for row in () if held is None else np.flatnonzero(held > self.capacity):
            raise ValueError(_lost(row, held[row], self.capacity))
        lost = self.length > self.capacity
        return dataclasses.replace(
            self,
            length=jnp.where(lost, jnp.maximum(self.length, capacity + 1), self.length),
            key=grown(self.key, capacity, axis=1),
            value=grown(self.value, capacity, axis=1),
            decay=None if self.decay is None else grown(self.decay, capacity, axis=1),
        )


def kinds_of(cache: KVCache) -> KVCache:
    """Returns the kind of each array of a cache, for `shards.over_shards`."""
    decay = None if cache.decay is None else shards.TOKENS
    return KVCache(key=shards.TOKENS, value=shards.TOKENS, length=shards.ROWS, decay=decay)


def grown(x: jax.Array, capacity: int, *, axis: int) -> jax.Array:
    """Returns an array with zeros behind it, so that ``axis`` has ``capacity`` slots."""
    capacity = whole_number("capacity", capacity)
    if not x.shape[axis] < capacity < CAPACITY_LIMIT:
        raise ValueError(f"{capacity=} must be above the present {x.shape[axis]} and below 2**31.")
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, capacity - x.shape[axis])
    return jnp.pad(x, widths)


def whole_number(name: str, value: Any) -> int:
    """Returns an integer of Python, whatever kind of integer it is."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}={value!r} must be an integer.") from None


def _lost(row: int, held: int, capacity: int) -> str:
    return (
        f"row {row} was given {held:,} tokens and has room for {capacity:,}, so the last ones are "
        "lost; go on from an earlier cache, or empty the row with reset."
    )


def new_slots(length: jax.Array, mask: jax.Array | None, count: int, capacity: int) -> jax.Array:
    """Returns the slot ``(B, T)`` of each new token. A padded one gets the slot ``capacity``.

    A slot from ``capacity`` on is outside the cache, where writes are dropped.
    """
    if mask is None:
        return length[:, None] + jnp.arange(count, dtype=jnp.int32)
    slots = length[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1
    return jnp.where(mask, slots, capacity)


def with_tokens(cache: KVCache, key, value, mask=None, log_decay=None) -> KVCache:
    """Returns the cache with tokens that have been checked, on one device."""
    count = key.shape[1]
    slots = new_slots(cache.length, mask, count, cache.capacity)
    rows = jnp.arange(key.shape[0])[:, None]
    added = count if mask is None else mask.sum(axis=1, dtype=jnp.int32)
    decay = cache.decay
    if decay is not None:
        sums = total_decay(cache, cache.length[:, None] - 1)
        sums += jnp.cumsum(masking.bound_log_decay(log_decay, mask), axis=1, dtype=jnp.float32)
        decay = decay.at[rows, slots].set(sums, mode="drop")
    return KVCache(
        cache.key.at[rows, slots].set(key, mode="drop"),
        cache.value.at[rows, slots].set(value, mode="drop"),
        cache.length + added,
        decay,
    )


def total_decay(cache: KVCache, positions: jax.Array) -> jax.Array:
    """Returns G ``(B, T, K)`` at positions ``(B, T)``, and 0 before the first token."""
    held = jnp.take_along_axis(cache.decay, positions[..., None], axis=1, mode="clip")
    return jnp.where(positions[..., None] < 0, 0.0, held)


def check_append(cache: KVCache, key, value, mask: jax.Array | None, log_decay=None) -> None:
    """Checks the shapes and dtypes of new tokens and, if the lengths are known, the room."""
    for name, x, held in (("key", key, cache.key), ("value", value, cache.value)):
        if x.ndim != 4 or x.shape[0] != held.shape[0] or x.shape[2:] != held.shape[2:]:
            rows, _, heads, width = held.shape
            raise ValueError(
                f"{name} must be ({rows}, T, {heads}, {width}) as the cache holds it; "
                f"got {x.shape}."
            )
        if x.dtype != held.dtype:
            raise TypeError(f"{name} is {x.dtype}; the cache holds {held.dtype}.")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must share tokens; got {key.shape} and {value.shape}.")
    masking.check_key_value_mask(mask, key.shape[:2])
    if (log_decay is None) != (cache.decay is None):
        has, needs = ("no", "leave out") if cache.decay is None else ("a", "pass")
        raise ValueError(
            f"the cache holds {has} decay of its tokens: {needs} log_decay, or make a cache with "
            f"has_decay={cache.decay is None}."
        )
    masking.check_log_decay(log_decay, key.shape[:3], mask)
    check_room(cache, key.shape[1], mask)


def check_room(cache: KVCache, count: int, mask: jax.Array | None) -> None:
    """Raises if ``count`` more slots ``(B, T)`` are known not to fit into a row."""
    held, kept = masking.concrete(cache.length), masking.concrete(mask)
    if held is None or (mask is not None and kept is None):
        return
    added = np.full(held.shape, count) if kept is None else kept.sum(axis=1)
    for row in np.flatnonzero(held > cache.capacity):
        raise ValueError(_lost(row, held[row], cache.capacity))
    for row in np.flatnonzero(held + added > cache.capacity):
        room = 1 << int(held[row] + added[row] - 1).bit_length()
        raise ValueError(
            f"row {row} holds {held[row]:,} of {cache.capacity:,} tokens; {added[row]:,} more do "
            f"not fit: cache.grow({room})."
        )
