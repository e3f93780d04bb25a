"""The state of RACE attention: sums that summarise a span of tokens for the tokens after it.

Its size does not depend on the length of the span:

    numerator_f = sum_s exp(G_end - G_s) phi_f(k_s) v_s      mass_f = the same with v = 1

States have an associative merge, so that chunks, devices, parts of a stream and decoding steps
combine.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from race_jax.core import masking, scan

EMPTY = -1  # the segment of a state that has seen no token
# A smaller denominator is an underflow in float32, and the row counts as seeing no key.
MIN_MASS = 1e-30
# This is added to each bucket's mass if normalization="bucket", as in the paper's code.
BUCKET_EPSILON = 1e-6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RACEState:
    """Running sums of RACE attention over a span of tokens.

        numerator = sum_s exp(G_end - G_s) phi(k_s) v_sᵀ,   mass = sum_s exp(G_end - G_s) phi(k_s)

    The sums run over the tokens of the last segment in the span. They are float32, or float64 under
    x64.

    Attributes:
      numerator: ``(B, K, F, V)``.
      mass: ``(B, K, F)``.
      log_decay: ``(B, K)``, the total log decay of the span.
      segment: ``(B,)`` int32, the segment of the last token, or -1 before the first token.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> state = race_jax.RACEState.init(batch=1, kv_heads=2, features=8, value_dim=4)
      >>> state.numerator.shape, state.mass.shape, int(state.segment[0])
      ((1, 2, 8, 4), (1, 2, 8), -1)

    Source: the sums are those of arXiv 2510.04008, Algorithm 2. Decay, segments and the merge go
    beyond it.
    """

    numerator: jax.Array
    mass: jax.Array
    log_decay: jax.Array
    segment: jax.Array

    @classmethod
    def init(
        cls,
        batch: int,
        kv_heads: int,
        features: int,
        value_dim: int,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> RACEState:
        """Returns the state before any token, with sums of zero and no segment.

        Args:
          batch: B.
          kv_heads: K.
          features: F = num_tables * 2**num_planes.
          value_dim: V.
          dtype: the dtype of the sums, float32 or wider.

        Returns:
          An empty state.

        Example:
          >>> import race_jax
          >>> race_jax.RACEState.init(1, 2, 8, 4).log_decay.shape
          (1, 2)
        """
        return cls(
            numerator=jnp.zeros((batch, kv_heads, features, value_dim), dtype),
            mass=jnp.zeros((batch, kv_heads, features), dtype),
            log_decay=jnp.zeros((batch, kv_heads), dtype),
            segment=jnp.full((batch,), EMPTY, jnp.int32),
        )

    def update(
        self,
        phi_k: jax.Array,
        value: jax.Array,
        *,
        log_decay: jax.Array | None = None,
        key_value_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> RACEState:
        """Returns the state after a further span of tokens.

        Args:
          phi_k: ``(B, S, K, F)``, features of the keys.
          value: ``(B, S, K, V)``.
          log_decay: ``(B, S, K)``, <= 0, or None.
          key_value_mask: ``(B, S)`` bool, True where there is a token.
          segment_ids: ``(B, S)`` int >= 0, in contiguous runs.

        Returns:
          ``merge(self, state of the span)``.

        Raises:
          ValueError: if a shape or a value is wrong.
          TypeError: if a dtype is wrong.

        Example:
          >>> import jax.numpy as jnp, race_jax
          >>> state = race_jax.RACEState.init(1, 1, 2, 1)
          >>> state = state.update(jnp.full((1, 3, 1, 2), 0.5), jnp.ones((1, 3, 1, 1)))
          >>> state.mass.tolist(), int(state.segment[0])
          ([[[1.5, 1.5]]], 0)
        """
        batch, heads, features, value_dim = self.numerator.shape
        sizes = {"phi_k": (phi_k, "F", features), "value": (value, "V", value_dim)}
        for name, (array, letter, size) in sizes.items():
            if array.shape != (batch, *phi_k.shape[1:2], heads, size):
                raise ValueError(
                    f"{name} must be (B, S, K, {letter}) = ({batch}, S, {heads}, {size}) to match "
                    f"this state, got shape {array.shape}"
                )
        length = phi_k.shape[1]
        masking.check_key_value_mask(key_value_mask, (batch, length))
        masking.check_segment_ids(segment_ids, (batch, length), key_value_mask)
        masking.check_log_decay(log_decay, (batch, length, heads), key_value_mask)
        phi_k, value = jnp.asarray(phi_k), jnp.asarray(value)
        segments = masking.fill_segments(segment_ids, key_value_mask, self.segment)
        segment = masking.last_segment(segments, key_value_mask, self.segment, length)
        phi = masking.select_tokens(phi_k.astype(self.mass.dtype), key_value_mask)
        value = masking.select_tokens(value.astype(self.numerator.dtype), key_value_mask)
        gate = masking.bound_log_decay(log_decay, key_value_mask, self.mass.dtype)
        total = jnp.zeros_like(self.log_decay) if gate is None else gate.sum(axis=1)
        if gate is not None:
            # The decay that follows each token. It is summed from the end, so that it is most
            # accurate for the last tokens, which decay least.
            after = jax.lax.cumsum(gate, axis=1, reverse=True) - gate
            phi = phi * jnp.exp(after)[..., None]
        if segments is not None:
            phi = jnp.where((segments == segment[:, None])[..., None, None], phi, 0.0)
        span = RACEState(
            numerator=jnp.einsum("bskf,bskv->bkfv", phi, value),
            mass=phi.sum(axis=1),
            log_decay=total,
            segment=segment,
        )
        return merge(self, span)

    def read(
        self,
        phi_q: jax.Array,
        *,
        normalization: str = "global",
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the attention of queries to the tokens that the state summarises.

            out = phi(q) . numerator / phi(q) . mass

        Args:
          phi_q: ``(B, T, N, F)``, features of the queries. N must be a multiple of K.
          normalization: ``"global"`` (the paper) or ``"bucket"`` (the released code).
          segment_ids: ``(B, T)`` int. A query reads the state only if both have the same segment.

        Returns:
          ``(B, T, N, V)`` in the state's dtype, zero where nothing is visible.

        Raises:
          ValueError: if the normalization is unknown, N is not a multiple of K, or a shape is
            wrong.

        Example:
          >>> import jax.numpy as jnp, race_jax
          >>> state = race_jax.RACEState.init(1, 1, 2, 1)
          >>> state = state.update(jnp.full((1, 3, 1, 2), 0.5), jnp.ones((1, 3, 1, 1)))
          >>> state.read(jnp.full((1, 1, 1, 2), 0.5)).tolist()
          [[[[1.0]]]]
        """
        check_normalization(normalization)
        rows, kv_heads, features = self.mass.shape
        if phi_q.ndim != 4 or phi_q.shape[0] != rows or phi_q.shape[3] != features:
            raise ValueError(
                f"phi_q must be (B, T, N, F) = ({rows}, T, N, {features}) to match this state, got "
                f"shape {phi_q.shape}"
            )
        batch, length, heads, _ = phi_q.shape
        if heads % kv_heads:
            raise ValueError(
                f"query heads {heads} must be a multiple of the state's {kv_heads} key/value heads"
            )
        masking.check_segment_ids(segment_ids, (batch, length), None)
        phi = jnp.asarray(phi_q).astype(self.mass.dtype)
        phi = phi.reshape(batch, length, kv_heads, heads // kv_heads, features)
        if segment_ids is not None:
            same = segment_ids == self.segment[:, None]
            phi = jnp.where(same[..., None, None, None], phi, 0.0)
        if normalization == "bucket":
            tables = phi.sum(axis=-1, keepdims=True)  # features of one table sum to one
            phi = phi / (self.mass + BUCKET_EPSILON)[:, None, :, None]
            phi = phi / jnp.where(tables > 0, tables, 1.0)
            out = jnp.einsum("btkgf,bkfv->btkgv", phi, self.numerator)
        else:
            numerator = jnp.einsum("btkgf,bkfv->btkgv", phi, self.numerator)
            out = normalize(numerator, jnp.einsum("btkgf,bkf->btkg", phi, self.mass))
        return out.reshape(batch, length, heads, out.shape[-1])


def merge(earlier: RACEState, later: RACEState) -> RACEState:
    """Returns the state of two adjoining spans.

        sums = later + exp(later.log_decay) * earlier

    The earlier sums are dropped if the later span ends in another segment. The operation is
    associative, and the empty state is its identity.

    Args:
      earlier: the state of the first span.
      later: the state of the span that follows it.

    Returns:
      The state of both spans together.

    Raises:
      ValueError: if the two do not have the same shapes.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> empty = race_jax.RACEState.init(1, 1, 2, 1)
      >>> one = empty.update(jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 1)))
      >>> race_jax.merge(one, race_jax.merge(empty, one)).mass.tolist()
      [[[2.0, 2.0]]]

    Source: beyond the paper. The operation suits ``jax.lax.associative_scan``.
    """
    for field in dataclasses.fields(RACEState):
        shapes = getattr(earlier, field.name).shape, getattr(later, field.name).shape
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"states differ in the shape of {field.name}: {shapes[0]} and {shapes[1]}; merge "
                "states of equal batch, heads, features and value dim"
            )
    empty = later.segment == EMPTY
    keep = empty | (earlier.segment == later.segment)
    factor = jnp.where(keep[:, None], jnp.exp(later.log_decay), 0.0)
    spans = ((1.0, (earlier.numerator, earlier.mass)), (factor, (later.numerator, later.mass)))
    _, (numerator, mass) = scan.combine(*spans)
    return RACEState(
        numerator=numerator,
        mass=mass,
        log_decay=later.log_decay + earlier.log_decay,
        segment=jnp.where(empty, earlier.segment, later.segment),
    )


def check_normalization(normalization: str) -> None:
    """Checks that a normalization is one of the two that exist."""
    if normalization not in ("global", "bucket"):
        raise ValueError(f'normalization must be "global" or "bucket", got {normalization!r}')


def normalize(numerator: jax.Array, mass: jax.Array) -> jax.Array:
    """Returns numerator / mass, and zero with zero gradients where the mass is zero."""
    seen = mass > MIN_MASS
    mass = jnp.where(seen, mass, 1.0)
    # The gradient of an inverse has the square of the mass, which may be too small for float32.
    # That of `mass * scale` is one.
    scale = jax.lax.stop_gradient(1.0 / mass)
    inverse = jnp.where(seen, scale / (mass * scale), 0.0)
    return jnp.where(seen[..., None], numerator, 0.0) * inverse[..., None]
