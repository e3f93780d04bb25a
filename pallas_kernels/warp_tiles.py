"""What all warpgroup kernels share: features and weights of a chunk as tiles, and their fetching.

z, values or cotangents, and per-token numbers arrive chunk by chunk in shared memory. φ, its
derivative, and tiles times D are computed in registers. The equations are those of features.py and
tiles.py, with D_ts = exp(γ_t - γ_s) for s <= t within a segment.
"""

import dataclasses
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import warpgroup as wg
from pallas_kernels.backend import LEAST_EXPONENT, LOG2_E
from pallas_kernels.blocks import Pipeline
from pallas_kernels.features import corner_signs
from pallas_kernels.tiles import Problem, Shared

FEATURES = wg.CHUNK  # F is padded to the width of one tile
NUMBERS = ("gamma", "segment", "enter", "leave", "valid")


def token_numbers(problem: Problem, shared: Shared) -> dict[str, jax.Array | None]:
    """Returns per-token numbers (B, heads or 1, T padded to chunks), by name.

    They are γ, the segment, the factors in and out, and the mask.
    """
    pad = [(0, 0), (0, problem.chunks * problem.chunk - problem.length)]
    gamma, enter, leave = shared.gamma, None, None
    if gamma is not None:
        chunks = gamma.reshape(*gamma.shape[:2], problem.chunks, problem.chunk)
        enter, leave = jnp.exp(chunks), jnp.exp(chunks[..., -1:] - chunks)
        gamma = gamma * LOG2_E
    segment = None
    if shared.segment_ids is not None:
        segment = jnp.pad(shared.segment_ids, pad, mode="edge")[:, None]
        chunks = segment.reshape(problem.batch, 1, problem.chunks, problem.chunk)
        last = chunks[..., -1:]
        before = jnp.concatenate([shared.initial_segment[:, None], last[:, 0, :-1, 0]], axis=1)
        enters, leaves = chunks == before[:, None, :, None], chunks == last
        enter = jnp.where(enters, 1.0 if enter is None else enter, 0.0)
        leave = jnp.where(leaves, 1.0 if leave is None else leave, 0.0)
    valid = shared.mask
    if valid is None and problem.ragged:
        valid = jnp.ones((problem.batch, problem.length))
    if valid is not None:
        valid = jnp.pad(valid.astype(jnp.float32), pad)[:, None]
    flat = lambda x: None if x is None else x.reshape(*x.shape[:2], -1)  # noqa: E731
    return dict(zip(NUMBERS, (gamma, segment, flat(enter), flat(leave), valid), strict=True))


def constants(problem: Problem, sharpness: jax.Array) -> dict[str, jax.Array]:
    """Returns corner signs, ones and β, which are inputs of every kernel."""
    signs = corner_signs(problem.tables, problem.planes, problem.projections, FEATURES)
    positive, negative = (jnp.asarray(x, jnp.bfloat16) for x in signs)
    return {
        # Products of exponents are in float16. Its three more bits make φ eight times as exact.
        "positive_rows_of": positive.astype(jnp.float16),
        "negative_rows_of": negative.astype(jnp.float16),
        "positive_columns_of": positive,
        "negative_columns_of": negative,
        "ones": jnp.ones((8, wg.CHUNK), jnp.bfloat16),
        "sharpness": sharpness.astype(jnp.float32),
    }


def key_memory(
    problem: Problem,
    pipeline: Pipeline,
    numbers: Mapping[str, jax.Array | None],
    *,
    readers: int = 2,
    more_constants: int = 0,
) -> dict[str, Any]:
    """Returns shared memory for constants and for fetched keys, which `readers` warpgroups free.

    The signs are stored twice, once as rows and once as columns of an operand. A kernel's own
    constants may arrive at the same barrier.
    """
    slots, counted = pipeline.key_slots, sum(x is not None for x in numbers.values())
    return {
        "positive_rows": wg.narrow_operand(problem.projections, FEATURES, dtype=jnp.float16),
        "negative_rows": wg.narrow_operand(problem.projections, FEATURES, dtype=jnp.float16),
        "positive_columns": wg.operand(problem.projections, FEATURES),
        "negative_columns": wg.operand(problem.projections, FEATURES),
        "ones_columns": wg.operand(8, wg.CHUNK),
        "constants_full": wg.barrier(num_arrivals=5 + more_constants),
        "zk_tiles": wg.plain(slots, wg.CHUNK, problem.projections, dtype=jnp.bfloat16),
        "value_tiles": wg.operand(slots, wg.CHUNK, problem.value_dim),
        "keys_full": wg.barrier(num_arrivals=2 + counted, num_barriers=slots),
        "keys_free": wg.barrier(num_arrivals=readers, num_barriers=slots),
    } | {
        f"{name}_numbers": None if x is None else wg.plain(slots, wg.CHUNK, dtype=x.dtype)
        for name, x in numbers.items()
    }


def fitting(
    pipeline: Pipeline, memory: Callable[[Pipeline], Mapping[str, Any]], *, key_slots: int = 1
) -> Pipeline:
    """Removes slots from the pipeline, one at a time, until `memory(pipeline)` fits into a program.

    At least `key_slots` slots for keys are kept, because the kernel uses this number at once.
    """
    least = {"key_slots": key_slots, "query_slots": 1}
    while not wg.fits(memory(pipeline)):
        spare = {name: getattr(pipeline, name) - few for name, few in least.items()}
        most = max(spare, key=spare.get)
        if spare[most] == 0:
            raise ValueError(
                f"{pipeline} does not fit into shared memory; use a Block in place of the Pipeline"
            )
        pipeline = dataclasses.replace(pipeline, **{most: getattr(pipeline, most) - 1})
    return pipeline


def fetch_constants(refs: SimpleNamespace) -> None:
    """Starts the copies of the constants.

    Every warpgroup must call `wait(refs.constants_full)` before it uses them.
    """
    for sign in ("positive", "negative"):
        for form in ("rows", "columns"):
            tiles = getattr(refs, f"{sign}_{form}")
            wg.fetch(getattr(refs, f"{sign}_{form}_of"), tiles, refs.constants_full)
    wg.fetch(refs.ones, refs.ones_columns, refs.constants_full)


def fetch_keys(place: "Place", pipeline: Pipeline, refs: SimpleNamespace, turn: jax.Array) -> None:
    """Starts the copies of a chunk's zk, values and numbers, once its slot is free."""
    slot, tokens = lax.rem(turn, pipeline.key_slots), place.tokens(turn)

    @pl.when(turn >= pipeline.key_slots)
    def _():
        wg.wait(refs.keys_free.at[slot])

    full, where = refs.keys_full.at[slot], (place.batch, tokens, place.head)
    wg.fetch(refs.zk.at[where], refs.zk_tiles.at[slot], full)
    wg.fetch(refs.value.at[where], refs.value_tiles.at[slot], full)
    for name in NUMBERS:
        if (source := getattr(refs, name)) is not None:
            head = place.head if source.shape[1] > 1 else 0  # all heads share one mask
            source = source.at[place.batch, head, tokens]
            wg.fetch(source, getattr(refs, f"{name}_numbers").at[slot], full)


class TileFeatures:
    """φ(z; β) of one head, in a warpgroup's registers."""

    def __init__(self, place: "Place", refs: SimpleNamespace):
        self.refs, self.sharpness = refs, refs.sharpness[place.head]
        self.use_tanh = place.problem.use_tanh

    def squash(self, z: Any) -> jax.Array:
        """Returns u (64, LP), which is tanh z or z, from shared memory."""
        return jnp.tanh(wg.load(z)) if self.use_tanh else wg.load(z)

    def start(self, exponent: Any, squashed: jax.Array) -> None:
        """Starts the product that computes log2 φ (64, F), in an accumulator."""
        scaled = self._scaled(squashed)
        # These are log2 sigmoid of both signs. They are exponents, so that only their absolute
        # error matters.
        plus = jnp.minimum(scaled, 0.0) - jnp.log2(1.0 + jnp.exp2(-jnp.abs(scaled)))
        minus = plus - scaled
        for x, signs in ((plus, self.refs.positive_rows), (minus, self.refs.negative_rows)):
            x = jnp.maximum(x, LEAST_EXPONENT).astype(jnp.float16)
            wg.multiply(exponent, x, signs)

    def expand(self, squashed: jax.Array) -> jax.Array:
        """Returns φ (64, F) in float32."""
        (exponent,) = wg.together(lambda exponent: self.start(exponent, squashed), FEATURES)
        return jnp.exp2(exponent)

    def hash(self, z: Any) -> jax.Array:
        """Returns φ (64, F) in float32, from z in shared memory."""
        return self.expand(self.squash(z))

    def gradient(self, squashed, phi: jax.Array, d_phi: jax.Array, *, halves: bool = False):
        """Returns dz (64, LP), and the terms whose sum is dβ, from φ and dφ (64, F) in float32.

        With `halves`, φ dφ is multiplied with twice the bits of an operand.
        """
        weight = phi * d_phi
        parts = [weight.astype(jnp.bfloat16)]
        if halves:
            parts.append((weight - parts[0].astype(jnp.float32)).astype(jnp.bfloat16))

        def body(up, down):
            for part in parts:
                wg.multiply(up, part, self.refs.positive_columns.transpose((1, 0)))
                wg.multiply(down, part, self.refs.negative_columns.transpose((1, 0)))

        up, down = wg.together(body, *squashed.shape[1:], *squashed.shape[1:])
        below = 1.0 / (1.0 + jnp.exp2(self._scaled(squashed)))
        d_scaled = up * below - down * (1.0 - below)
        d_z = d_scaled * (2.0 * self.sharpness)
        if self.use_tanh:
            d_z *= 1.0 - squashed * squashed
        return d_z, d_scaled * (2.0 * squashed)

    def _scaled(self, squashed: jax.Array) -> jax.Array:
        return squashed * (2.0 * LOG2_E * self.sharpness)


class Weights:
    """The factors of one chunk, from its numbers in shared memory. Absent factors are 1."""

    def __init__(self, refs: SimpleNamespace, slot: jax.Array):
        self._numbers = {
            name: None if (ref := getattr(refs, f"{name}_numbers")) is None else ref.at[slot]
            for name in NUMBERS
        }

    def _rows(self, name: str) -> jax.Array | None:
        ref = self._numbers[name]
        return None if ref is None else wg.load(ref, wg.ROWS)

    def times(self, name: str, tile: jax.Array) -> jax.Array:
        """Multiplies each row of a tile (64, X) by its number `name`."""
        rows = self._rows(name)
        return tile if rows is None else tile * wg.by_rows(rows, tile.shape[1])

    def has(self, name: str) -> bool:
        return self._numbers[name] is not None

    def times_rows(self, name: str, rows: jax.Array) -> jax.Array:
        """Multiplies numbers per row (64,) by the numbers `name`."""
        factor = self._rows(name)
        return rows if factor is None else rows * factor

    def keep(self, tile: jax.Array) -> jax.Array:
        """Sets the rows of padded tokens in a tile to zero, by a select."""
        rows = self._rows("valid")
        if rows is None:
            return tile
        return jnp.where(wg.by_rows(rows, tile.shape[1]) > 0.0, tile, 0.0)

    def keep_rows(self, rows: jax.Array) -> jax.Array:
        """Sets numbers of padded tokens to zero, by a select."""
        valid = self._rows("valid")
        return rows if valid is None else jnp.where(valid > 0.0, rows, 0.0)

    def carry(self, *tiles: jax.Array) -> tuple[jax.Array, ...]:
        """Multiplies states by a, the part of a state that remains after the chunk.

        a is the factor `in` of the last token.
        """
        enter = self._numbers["enter"]
        if enter is None:
            return tiles
        last = enter[wg.CHUNK - 1]
        return tuple(tile * last for tile in tiles)

    def decay(self, *, transposed: bool = False) -> jax.Array:
        """Returns D (queries, keys), or its transpose, in float32."""
        at, of = (1, 0) if transposed else (0, 1)
        mask = wg.index(at) >= wg.index(of)
        if self.has("segment"):
            mask &= self._spread("segment", at) == self._spread("segment", of)
        if not self.has("gamma"):
            return jnp.where(mask, 1.0, 0.0)
        # The exponent is masked first, because exp2 could overflow above the diagonal.
        exponent = self._spread("gamma", at) - self._spread("gamma", of)
        return jnp.exp2(jnp.where(mask, exponent, -1e30))

    def _spread(self, name: str, axis: int) -> jax.Array:
        if axis == 0:
            return wg.by_rows(wg.load(self._numbers[name], wg.ROWS))
        return wg.by_columns(wg.load(self._numbers[name], wg.COLUMNS))


def visible(tile: jax.Array, decay: Any, *, transposed: bool = False) -> jax.Array:
    """Multiplies a tile (queries, keys), or its transpose, by D (the operand `decay`, or None)."""
    if decay is not None:
        return tile * wg.load(decay)
    at, of = (1, 0) if transposed else (0, 1)
    return jnp.where(wg.index(at) >= wg.index(of), tile, 0.0)


@dataclasses.dataclass(frozen=True)
class Place:
    """The position of a program: its sequence, head, split, and the chunks of the split."""

    problem: Problem
    reverse: bool = False

    @property
    def batch(self) -> jax.Array:
        return lax.axis_index("batch")

    @property
    def head(self) -> jax.Array:
        return lax.axis_index("head")

    @property
    def split(self) -> jax.Array:
        return lax.axis_index("split")

    @property
    def grid(self) -> dict[str, int]:
        """The grid. Heads come last, so that programs of a token's heads share its cache lines."""
        problem = self.problem
        return {"batch": problem.batch, "split": problem.splits, "head": problem.kv_heads}

    @property
    def count(self) -> jax.Array:
        """The number of chunks in this split. The last split may have fewer."""
        per_split = self.problem.split // self.problem.chunk
        return jnp.minimum(per_split, self.problem.chunks - self.split * per_split)

    def chunk(self, turn: jax.Array) -> jax.Array:
        """Returns a chunk of this split, counted from the start of the sequence."""
        within = self.count - 1 - turn if self.reverse else turn
        return self.split * (self.problem.split // self.problem.chunk) + within

    def tokens(self, turn: jax.Array) -> Any:
        """Returns the tokens of a chunk of this split."""
        return pl.ds(self.chunk(turn) * self.problem.chunk, self.problem.chunk)

    def items_before(self, turn: jax.Array, member: jax.Array | int) -> jax.Array:
        """Returns the number of chunks of single query heads that come before this one."""
        return turn * self.problem.group + member

    def query_head(self, member: jax.Array | int) -> jax.Array:
        return self.head * self.problem.group + member

    def for_group(self, body: Callable, carry: Any) -> Any:
        """Folds `body(member, carry)` over the query heads of the group."""
        group = self.problem.group
        return body(0, carry) if group == 1 else lax.fori_loop(0, group, body, carry)
