"""What all kernels share: the sizes of a call, its block specifications, and decay factors.

The factors of one chunk are

    D_ts = exp(γ_t - γ_s),   in_t = exp(γ_t),   out_s = exp(Γ - γ_s),   a = exp(Γ)

with γ the running log decay of the chunk and Γ its last value. Each factor is 0 across a segment
border.
"""

import dataclasses
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.backend import LOG2_E, Arithmetic, Output, load
from pallas_kernels.blocks import Block
from pallas_kernels.features import FeatureMap, corner_signs

# The number of equal columns that hold a mass, which is the width of the narrowest product operand.
MASS = 16
# A query with a smaller denominator counts as seeing no key.
TINY = 1e-30


def power_of_two(size: int) -> int:
    """Returns the least power of two that is not below a size, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def padded(size: int) -> int:
    """Returns the next power of two that a matrix product takes, at least 16."""
    return max(16, power_of_two(size))


def padded_features(tables: int, planes: int) -> int:
    """Returns F, padded to the 64 rows that Hopper's product needs in the update of a state."""
    return max(64, padded(tables * 2**planes))


@dataclasses.dataclass(frozen=True)
class Shared:
    """The arrays of a call that every kernel takes."""

    sharpness: jax.Array  # (K,)
    gamma: jax.Array | None = None  # (B, K, T padded to chunks)
    mask: jax.Array | None = None  # (B, T)
    segment_ids: jax.Array | None = None  # (B, T)
    initial_segment: jax.Array | None = None  # (B,)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static sizes of one call. L and P are as given. F, V and L·P are padded."""

    batch: int
    length: int
    kv_heads: int
    group: int  # query heads of one key/value head
    tables: int
    planes: int
    value_dim: int
    split: int  # tokens of a split, a multiple of chunk
    chunk: int
    value_block: int
    dtype: Any
    interpret: bool
    packed: bool = False
    exact: bool = True  # float32 products, or TF32 ones
    use_tanh: bool = True  # whether u = tanh z, or u = z

    @property
    def projections(self) -> int:
        return padded(self.tables * self.planes)

    @property
    def features(self) -> int:
        return padded_features(self.tables, self.planes)

    @property
    def buckets(self) -> int:
        """F without padding."""
        return self.tables * 2**self.planes

    @property
    def value_blocks(self) -> int:
        return self.value_dim // self.value_block

    @property
    def splits(self) -> int:
        return math.ceil(self.length / self.split)

    @property
    def chunks(self) -> int:
        return math.ceil(self.length / self.chunk)

    @property
    def ragged(self) -> bool:
        return self.length % self.chunk != 0

    @property
    def grid(self) -> tuple[int, int, int]:
        """The grid. Heads come first, so that their programs run together and share cache lines."""
        return self.kv_heads * self.value_blocks, self.splits, self.batch

    @property
    def arithmetic(self) -> Arithmetic:
        return Arithmetic(self.dtype, self.interpret, self.packed, self.exact)

    def cut(self, block: Block) -> "Problem":
        """Returns the same problem as one kernel sees it."""
        value_block = min(block.value, self.value_dim)
        return dataclasses.replace(self, value_block=value_block, packed=block.packed)

    # These are block specifications, named after the arrays that they cut. Their docstrings give
    # the shapes of those arrays.

    def constant(self, *shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda h, s, b: (0,) * len(shape))

    def tokens(self) -> pl.BlockSpec:
        """(B, T)"""
        return pl.BlockSpec((None, self.length), lambda h, s, b: (b, 0))

    def key_projections(self) -> pl.BlockSpec:
        """(B, T, K, LP)"""
        n, shape = self.value_blocks, (None, self.length, None, self.projections)
        return pl.BlockSpec(shape, lambda h, s, b: (b, 0, h // n, 0))

    def query_projections(self) -> pl.BlockSpec:
        """(B, T, N, LP), with the query heads of a group together"""
        n, shape = self.value_blocks, (None, self.length, self.group, self.projections)
        return pl.BlockSpec(shape, lambda h, s, b: (b, 0, h // n, 0))

    def values(self) -> pl.BlockSpec:
        """(B, T, K, V)"""
        n, shape = self.value_blocks, (None, self.length, None, self.value_block)
        return pl.BlockSpec(shape, lambda h, s, b: (b, 0, h // n, h % n))

    def outputs(self) -> pl.BlockSpec:
        """(B, T, N, V), with the query heads of a group together"""
        n, shape = self.value_blocks, (None, self.length, self.group, self.value_block)
        return pl.BlockSpec(shape, lambda h, s, b: (b, 0, h // n, h % n))

    def numerators(self) -> pl.BlockSpec:
        """(B, K, splits, F, V)"""
        n, shape = self.value_blocks, (None, None, None, self.features, self.value_block)
        return pl.BlockSpec(shape, lambda h, s, b: (b, h // n, s, 0, h % n))

    def share(self, spec: pl.BlockSpec) -> pl.BlockSpec:
        """Returns the specification for an array that has a leading axis of value blocks."""
        n, index = self.value_blocks, spec.index_map
        return pl.BlockSpec((None, *spec.block_shape), lambda h, s, b: (h % n, *index(h, s, b)))

    def masses(self) -> pl.BlockSpec:
        """(B, K, splits, F)"""
        n, shape = self.value_blocks, (None, None, None, self.features)
        return pl.BlockSpec(shape, lambda h, s, b: (b, h // n, s, 0))

    def means(self) -> pl.BlockSpec:
        """(B, K, splits, V)"""
        n, shape = self.value_blocks, (None, None, None, self.value_block)
        return pl.BlockSpec(shape, lambda h, s, b: (b, h // n, s, h % n))

    def single(self, spec: pl.BlockSpec) -> pl.BlockSpec:
        """Returns the specification of a state that all splits share."""
        index = spec.index_map
        return pl.BlockSpec(spec.block_shape, lambda h, s, b: index(h, 0, b))

    # Each value block writes its own part of these outputs. The parts are summed outside.

    def partial(self, shape: tuple[int, ...], dtype: Any, spec: pl.BlockSpec) -> Output:
        """Returns an output with a leading axis of value blocks."""
        return Output((self.value_blocks, *shape), dtype, self.share(spec))

    def row_statistic(self, heads: int) -> Output:
        """(value blocks, B, heads, T padded to chunks) float32, contiguous in time"""
        shape = (self.batch, heads, self.chunks * self.chunk)
        return self.partial(shape, jnp.float32, self.row_spec(heads // self.kv_heads))

    def program_scalar(self) -> Output:
        """(value blocks, B, K, splits) float32"""
        shape = (self.batch, self.kv_heads, self.splits)
        return self.partial(shape, jnp.float32, self.scalar_spec())

    def row_spec(self, heads: int | None = None) -> pl.BlockSpec:
        """(B, heads, T padded to chunks)"""
        n, heads = self.value_blocks, self.group if heads is None else heads
        shape = (None, heads, self.chunks * self.chunk)
        return pl.BlockSpec(shape, lambda h, s, b: (b, h // n, 0))

    def scalar_spec(self) -> pl.BlockSpec:
        """(B, K, splits)"""
        n = self.value_blocks
        return pl.BlockSpec((None, None, None), lambda h, s, b: (b, h // n, s))

    def shared_inputs(self, shared: "Shared") -> dict:
        """Returns the inputs that every kernel takes, cut for this problem's value blocks."""
        positive, negative = corner_signs(self.tables, self.planes, self.projections, self.features)
        signs = self.constant(self.projections, self.features)
        gamma, mask = shared.gamma, shared.mask
        segments = None if shared.segment_ids is None else shared.initial_segment
        return {
            "positive": (jnp.asarray(positive, jnp.bfloat16), signs),
            "negative": (jnp.asarray(negative, jnp.bfloat16), signs),
            "sharpness": (shared.sharpness.astype(jnp.float32), self.constant(self.kv_heads)),
            "gamma": (None if gamma is None else gamma * LOG2_E, self.row_spec(1)),
            "mask": (None if mask is None else mask.astype(jnp.int32), self.tokens()),
            "segment_ids": (shared.segment_ids, self.tokens()),
            "initial_segment": (segments, pl.BlockSpec((None,), lambda h, s, b: (b,))),
        }

    # The methods below are used inside a kernel.

    def feature_map(self, refs: SimpleNamespace) -> FeatureMap:
        head = pl.program_id(0) // self.value_blocks
        signs = refs.positive[...], refs.negative[...]
        return FeatureMap(*signs, refs.sharpness[head], self.arithmetic, self.use_tanh)

    def for_chunks(self, body: Callable, carry: Any, *, reverse: bool = False) -> Any:
        """Folds `body(first token, carry)` over the chunks of this program's split."""
        per_split = self.split // self.chunk
        first = pl.program_id(1) * per_split
        count = per_split
        if self.chunks % per_split:
            count = jnp.minimum(per_split, self.chunks - first)

        def step(j, carry):
            i = count - 1 - j if reverse else j
            return body((first + i) * self.chunk, carry)

        return lax.fori_loop(0, count, step, carry)

    def once(self) -> Callable[[jax.Array], jax.Array]:
        """Returns a function that is the identity in the first value block and 0 elsewhere.

        Terms that do not depend on value columns would otherwise be counted once per block.
        """
        if self.value_blocks == 1:
            return lambda x: x
        first = pl.program_id(0) % self.value_blocks == 0
        return lambda x: jnp.where(first, x, jnp.zeros_like(x))

    @property
    def _only_head(self) -> int | jax.Array:
        """Returns 0, as an array where the interpreter needs one.

        The masked load of the interpreter in jax 0.10.2 and 0.11.2 takes no Python integer.
        """
        return jnp.int32(0) if self.interpret else 0

    def for_group(self, body: Callable, carry: Any) -> Any:
        """Folds `body(query head, carry)` over the query heads of the group."""
        return (
            body(self._only_head, carry)
            if self.group == 1
            else lax.fori_loop(0, self.group, body, carry)
        )

    def shared_heads(self, tile: Callable) -> Callable:
        """Returns `tile`, computed only once if the group has one head.

        The result is used in two places. A tile loaded twice would also take a second set of
        shared-memory buffers.
        """
        if self.group > 1:
            return tile
        only = tile(self._only_head)
        return lambda head: only


class Chunk:
    """The factors of one chunk of tokens. A factor that is 1 everywhere is None."""

    def __init__(self, problem: Problem, refs: SimpleNamespace, start: jax.Array):
        size = problem.chunk
        self.math, self.size = problem.arithmetic, size
        self.span = pl.ds(start, size)
        inside = start + lax.iota(jnp.int32, size) < problem.length
        self.rows = inside if problem.ragged else None
        self.valid = self.rows
        if refs.mask is not None:
            self.valid = load(refs.mask, (self.span,), self.rows) != 0
        self.gamma = self.total = None
        if refs.gamma is not None:
            self.gamma = refs.gamma[0, self.span]
            self.total = jnp.min(self.gamma)
        self.segment = None
        if refs.segment_ids is not None:
            self.segment = load(refs.segment_ids, (self.span,), self.rows)
            before = refs.segment_ids[jnp.maximum(start - 1, 0)]
            initial = refs.initial_segment[...]
            self.entering = jnp.where(start == 0, initial, before)
            last = jnp.minimum(start + size, problem.length) - 1
            self.leaving = refs.segment_ids[last]

    def enter(self, tile: jax.Array) -> jax.Array:
        """Multiplies `tile` (C, X) by in_t, the weight of the entering state at each token."""
        if self.gamma is not None:
            tile = tile * self.math.exp2(self.gamma)[:, None]
        if self.segment is not None:
            tile = jnp.where((self.segment == self.entering)[:, None], tile, 0.0)
        return tile

    def leave(self, tile: jax.Array) -> jax.Array:
        """Multiplies `tile` (C, X) by out_s, the weight of each token in the leaving state."""
        if self.gamma is not None:
            tile = tile * self.math.exp2(self.total - self.gamma)[:, None]
        if self.segment is not None:
            tile = jnp.where((self.segment == self.leaving)[:, None], tile, 0.0)
        return tile

    def carry(self, state: jax.Array) -> jax.Array:
        """Multiplies `state` by a, the part of the entering state that remains after the chunk."""
        if self.gamma is not None:
            state = state * jnp.exp2(self.total)
        if self.segment is not None:
            state = jnp.where(self.entering == self.leaving, state, 0.0)
        return state

    def masked(self, tile: jax.Array) -> jax.Array:
        """Sets the rows of padded tokens in `tile` (C, X) to zero."""
        return tile if self.valid is None else jnp.where(self.valid[:, None], tile, 0.0)

    def visible(self, tile: jax.Array, *, transposed: bool = False) -> jax.Array:
        """Multiplies `tile` (C queries, C keys), or its transpose, by D."""
        at = (lambda x: x[None, :]) if transposed else (lambda x: x[:, None])
        of = (lambda x: x[:, None]) if transposed else (lambda x: x[None, :])
        position = lax.iota(jnp.int32, self.size)
        mask = at(position) >= of(position)
        if self.segment is not None:
            mask &= at(self.segment) == of(self.segment)
        if self.gamma is not None:
            # The exponent is masked first, because exp could overflow above the diagonal.
            exponent = jnp.where(mask, at(self.gamma) - of(self.gamma), -jnp.inf)
            return tile * self.math.exp2(exponent)
        return jnp.where(mask, tile, 0.0)
