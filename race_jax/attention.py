"""The operation itself: checks, hash projections, the chosen implementation, the state.

Comes in: query, key, value and planes (or hash projections). Goes out: outputs in value's dtype
and, when asked for, the state after the last token.

    out_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s)
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from race_jax import checks, dispatch, hashing, masking
from race_jax.aggregate import bidirectional, causal, rescan
from race_jax.aggregate.chunk import Sums
from race_jax.state import RACEState, check_normalization


def race_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    planes: jax.Array,
    *,
    sharpness: jax.typing.ArrayLike = 1.0,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    normalization: str = "global",
    initial_state: RACEState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Attention by soft hashing, at a cost linear in the length.

        out_t = sum_s w_ts v_s / sum_s w_ts
        w_ts  = visible(t, s) exp(G_t - G_s) (1/L) sum_l phi_l(q_t) . phi_l(k_s)

    phi are the soft buckets of ``soft_hash``; G is the running sum of ``log_decay``. Outputs are
    convex averages of visible values; a query that sees no key returns zeros. Sums are kept in
    float32 whatever the inputs are; inputs and outputs may be bfloat16.

    Args:
      query: ``(B, T, N, H)``, floating.
      key: ``(B, S, K, H)``; query head n reads key/value head ``n // (N // K)``.
      value: ``(B, S, K, V)``; its dtype is the output's.
      planes: ``(L, P, H)``, or ``(K, L, P, H)`` for planes per key/value head.
      sharpness: beta > 0, a scalar or ``(K,)``; how hard the hash is.
      is_causal: a token sees itself and what came before; needs T == S.
      log_decay: ``(B, S, K)``, <= 0, the forgetting gate (causal only); below -80 counts as -80.
      key_value_mask: ``(B, S)`` bool, True where there is a token. Padded slots may hold anything.
      segment_ids: ``(B, T)`` int >= 0, contiguous runs: tokens see their own segment only; needs
        T == S.
      normalization: ``"global"`` (the paper), or ``"bucket"`` (its released code, for comparison).
      initial_state: the state that the tokens continue.
      return_state: also return the state after the last token.
      implementation: ``"xla"``, ``"pallas"`` (GPU kernels; raises where they cannot run), or None:
        the kernels where they support the call and it runs on a GPU, else XLA.

    Returns:
      ``(B, T, N, V)``, or that and a ``RACEState``. Both are differentiable, in reverse mode.

    Raises:
      ValueError: shapes that do not fit, values out of range, arguments that exclude each other.
      TypeError: arrays of a wrong dtype; forward-mode differentiation.
      NotImplementedError: ``implementation="pallas"`` where the kernels cannot run.

    Example:
      >>> import jax, race_jax
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> query, key, value = (jax.random.normal(k, (1, 100, 4, 32)) for k in keys)
      >>> planes = race_jax.init_planes(
      ...     jax.random.key(1), num_tables=4, num_planes=3, head_dim=32, scale=32**-0.5
      ... )
      >>> race_jax.race_attention(query, key, value, planes, sharpness=2.0, is_causal=True).shape
      (1, 100, 4, 32)

    Source: arXiv 2510.04008, Algorithms 1 and 2; gate, packing and state go beyond the paper.
    """
    checks.check_inputs(query, key, value, planes)
    masking.check_key_value_mask(key_value_mask, key.shape[:2])
    # Junk in padded slots must not reach a product: the planes' gradient would be 0 * NaN.
    key = masking.select_tokens(key, key_value_mask)
    if is_causal and query.shape[1] == key.shape[1]:
        query = masking.select_tokens(query, key_value_mask)
    with jax.named_scope("race_attention/hash"):
        z_q = _hash_queries(query, planes)
        z_k = hashing.hash_projections(key, planes)
    return race_attention_from_projections(
        z_q,
        z_k,
        value,
        sharpness=sharpness,
        is_causal=is_causal,
        log_decay=log_decay,
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        normalization=normalization,
        initial_state=initial_state,
        return_state=return_state,
        implementation=implementation,
    )


def race_attention_from_projections(
    query_projections: jax.Array,
    key_projections: jax.Array,
    value: jax.Array,
    *,
    sharpness: jax.typing.ArrayLike = 1.0,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    normalization: str = "global",
    initial_state: RACEState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """RACE attention from ready hash projections z = W x.

    Queries and keys enter RACE only through z, L * P numbers a token and head. A layer that folds
    the planes into its projections calls this and never makes queries and keys.

    Args:
      query_projections: ``(B, T, N, L, P)``, floating.
      key_projections: ``(B, S, K, L, P)``.
      value: ``(B, S, K, V)``.
      sharpness: as for ``race_attention``, here and below.
      is_causal: see there.
      log_decay: see there.
      key_value_mask: see there.
      segment_ids: see there.
      normalization: see there.
      initial_state: see there.
      return_state: see there.
      implementation: see there.

    Returns:
      ``(B, T, N, V)``, or that and a ``RACEState``.

    Raises:
      ValueError, TypeError, NotImplementedError: as ``race_attention``.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> z_q, z_k = jnp.zeros((1, 5, 4, 2, 3)), jnp.zeros((1, 5, 2, 2, 3))
      >>> race_jax.race_attention_from_projections(z_q, z_k, jnp.ones((1, 5, 2, 8))).shape
      (1, 5, 4, 8)

    Source: beyond the paper; the algebra is exact.
    """
    z_q, z_k = query_projections, key_projections
    checks.check_projections(z_q, z_k, value)
    batch, length, kv_heads, value_dim = value.shape
    checks.check_modes(
        is_causal=is_causal,
        lengths=(z_q.shape[1], length),
        gated=log_decay is not None,
        packed=segment_ids is not None,
        stateful=return_state or initial_state is not None,
    )
    masking.check_key_value_mask(key_value_mask, (batch, length))
    masking.check_segment_ids(segment_ids, (batch, z_q.shape[1]), key_value_mask)
    masking.check_log_decay(log_decay, (batch, length, kv_heads), key_value_mask)
    check_normalization(normalization)
    checks.check_sharpness(jnp.asarray(sharpness), z_q.shape[2], kv_heads)
    choice = dispatch.choose(
        z_q,
        z_k,
        value,
        is_causal=is_causal,
        packed=segment_ids is not None,
        normalization=normalization,
        implementation=implementation,
    )
    dtype = jnp.promote_types(jnp.result_type(z_q, z_k, value), jnp.float32)
    features = z_q.shape[3] * 2 ** z_q.shape[4]
    start = initial_state
    if start is None:
        start = RACEState.init(batch, kv_heads, features, value_dim, dtype)
    checks.check_state(start, batch, kv_heads, features, value_dim)
    segments = masking.fill_segments(segment_ids, key_value_mask, start.segment)
    if is_causal:
        z_q = masking.select_tokens(z_q, key_value_mask)
    operands = causal.Operands(
        z_q=_widen(z_q, dtype),
        z_k=_widen(masking.select_tokens(z_k, key_value_mask), dtype),
        value=masking.select_tokens(value, key_value_mask),
        sharpness=jnp.broadcast_to(jnp.asarray(sharpness, dtype), (kv_heads,)),
        log_decay=masking.bound_log_decay(log_decay, key_value_mask),
        mask=key_value_mask,
        segment=segments,
        sums=Sums(start.numerator.astype(dtype), start.mass.astype(dtype)),
        initial_segment=start.segment,
    )
    run = _causal if is_causal else _bidirectional
    out, sums = run(operands, normalization, choice)
    if not return_state:
        return out
    decay = jnp.zeros_like(start.log_decay)
    if is_causal:
        gate = operands.log_decay
        decay = start.log_decay if gate is None else start.log_decay + gate.sum(axis=1)
    segment = masking.last_segment(segments, key_value_mask, start.segment, length)
    return out, RACEState(sums.numerator, sums.mass, decay, segment)


def _hash_queries(query: jax.Array, planes: jax.Array) -> jax.Array:
    """z of the queries; with planes per key/value head, those of the head that a query reads."""
    if planes.ndim == 3:
        return hashing.hash_projections(query, planes)
    grouped = jnp.moveaxis(
        query.reshape(*query.shape[:2], planes.shape[0], -1, query.shape[3]), 3, 2
    )
    z_q = hashing.hash_projections(grouped, planes)  # (B, T, G, K, L, P)
    return jnp.moveaxis(z_q, 2, 3).reshape(*query.shape[:3], *z_q.shape[-2:])


def _widen(z: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """float64 hash projections where anything is float64; else as they are."""
    return z.astype(jnp.promote_types(z.dtype, dtype)) if dtype == jnp.float64 else z


def _causal(
    operands: causal.Operands, normalization: str, choice: dispatch.Choice
) -> tuple[jax.Array, Sums]:
    if operands.value.shape[1] == 0:
        return _empty(operands), operands.sums
    if normalization == "bucket":
        return rescan.causal_bucket(operands)
    return _reverse_mode(dispatch.run_causal, choice, operands)


def _bidirectional(
    operands: causal.Operands, normalization: str, choice: dispatch.Choice
) -> tuple[jax.Array, Sums]:
    z_q, z_k, value, sharpness, _, mask, segment, sums, _ = operands
    if segment is not None and value.shape[1]:
        bucket = normalization == "bucket"
        packed = rescan.bidirectional_packed_bucket if bucket else rescan.bidirectional_packed
        return packed(operands), sums
    whole = bidirectional.Operands(z_q, z_k, value, sharpness, mask, sums)
    if normalization == "bucket":
        return rescan.bidirectional_bucket(whole)
    return _reverse_mode(dispatch.run_bidirectional, choice, whole)


def _empty(operands: causal.Operands) -> jax.Array:
    return jnp.zeros((*operands.z_q.shape[:3], operands.value.shape[3]), operands.value.dtype)


def _reverse_mode(
    run: Callable, choice: dispatch.Choice, operands: tuple
) -> tuple[jax.Array, Sums]:
    try:
        return run(choice, operands)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "race_attention has a written-out gradient, for reverse mode (jax.grad, jax.vjp) only; "
            "for forward mode (jax.jvp, jax.hessian) differentiate race_jax.reference instead"
        ) from error
