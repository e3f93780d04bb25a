"""RACE attention: the public functions, from checking the arguments to returning the state.

The attention that they compute is

    out_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = visible(t, s) exp(G_t - G_s) phi(q_t) . phi(k_s)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import checks, hashing, implementations, masking, sequence, shards
from race_jax.core.shapes import Axis
from race_jax.core.state import RACEState
from race_jax.core.xla import bidirectional, causal, rescan
from race_jax.core.xla.chunk import Sums


def race_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    planes: jax.Array,
    *,
    sharpness: jax.typing.ArrayLike = 1.0,
    use_tanh: bool = True,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    normalization: str = "global",
    initial_state: RACEState | None = None,
    return_state: bool = False,
    axis_name: Axis | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Computes attention by soft hashing, at a cost linear in the length.

        out_t = sum_s w_ts v_s / sum_s w_ts
        w_ts  = visible(t, s) exp(G_t - G_s) (1/L) sum_l phi_l(q_t) . phi_l(k_s)

    phi are the soft buckets of ``soft_hash``, and G is the running sum of ``log_decay``. Outputs
    are convex averages of visible values; a query that sees no key returns zeros. Sums are kept in
    float32 for every input dtype. Inputs and outputs may be bfloat16.

    Args:
      query: ``(B, T, N, H)``, floating.
      key: ``(B, S, K, H)``. Query head n reads key/value head ``n // (N // K)``.
      value: ``(B, S, K, V)``. The output has its dtype.
      planes: ``(L, P, H)``, or ``(K, L, P, H)`` for separate planes per key/value head.
      sharpness: beta > 0, a scalar or ``(K,)``. A larger beta makes the hash harder.
      use_tanh: whether hash projections go through tanh, as in the paper (see ``soft_hash``).
      is_causal: whether a token sees only itself and earlier tokens. This needs T == S.
      log_decay: ``(B, S, K)``, <= 0, the forgetting gate; it needs ``is_causal=True``. Values below
        -80 are treated as -80. Positive values raise an error if they are concrete, and are treated
        as 0 if they are traced.
      key_value_mask: ``(B, S)`` bool, True where there is a token. Padded slots may hold any value.
      segment_ids: ``(B, T)`` int >= 0, in contiguous runs. A token sees only its own segment. This
        needs T == S.
      normalization: ``"global"`` (the paper), or ``"bucket"`` (its released code, for comparison).
      initial_state: the state of earlier tokens, which this call continues.
      return_state: whether to return the state after the last token as well.
      axis_name: inside ``jax.shard_map``, the mesh axis over whose devices the sequence is split.
        Every device gives its own stretch of tokens, in the order of the axis. The devices exchange
        states only. ``initial_state`` and the returned state are those of the whole sequence.
      implementation: ``"xla"``; ``"pallas"``, the GPU kernels, which raises where they cannot run;
        or None, which runs the kernels on a GPU where they support the call, and XLA otherwise.

    Returns:
      The output ``(B, T, N, V)``, or the output and a ``RACEState`` if ``return_state`` is True.
      Both are differentiable in reverse mode.

    Raises:
      ValueError: if shapes do not fit, a value is out of range, or two arguments exclude each
        other.
      TypeError: if an array has a wrong dtype, or under forward-mode differentiation.
      NotImplementedError: if ``implementation="pallas"`` and the kernels cannot run.

    Example:
      >>> import jax, race_jax
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> query, key, value = (jax.random.normal(k, (1, 100, 4, 32)) for k in keys)
      >>> planes = race_jax.init_planes(
      ...     jax.random.key(1), num_tables=4, num_planes=3, head_dim=32, scale=32**-0.5
      ... )
      >>> race_jax.race_attention(query, key, value, planes, sharpness=2.0, is_causal=True).shape
      (1, 100, 4, 32)

    Source: arXiv 2510.04008, Algorithms 1 and 2. The gate, packing, the state and the form
    without tanh go beyond the paper.
    """
    options = Options(
        sharpness=sharpness,
        use_tanh=use_tanh,
        is_causal=is_causal,
        log_decay=log_decay,
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        normalization=normalization,
        initial_state=initial_state,
        return_state=return_state,
        axis_name=axis_name,
        implementation=implementation,
    )
    checks.check_inputs(query, key, value, planes, options)
    query, key, value, planes = map(jnp.asarray, (query, key, value, planes))
    # Padded slots may hold NaN. They are cleared before any product, because the gradient of the
    # planes would otherwise contain 0 * NaN.
    key = masking.select_tokens(key, key_value_mask)
    if is_causal and query.shape[1] == key.shape[1]:
        query = masking.select_tokens(query, key_value_mask)

    def project(columns):
        wide = hashing.flat_planes(planes, columns)
        with jax.named_scope("race_attention/hash"):
            return _hash_queries(query, wide), hashing.hash_projections(key, wide)

    dtype = jnp.promote_types(jnp.result_type(query, key, planes), jnp.float32)
    shape = lambda x: jax.ShapeDtypeStruct((*x.shape[:3], *planes.shape[-3:-1]), dtype)  # noqa: E731
    return attend(project, (shape(query), shape(key)), value, options)


def race_attention_from_projections(
    query_projections: jax.Array,
    key_projections: jax.Array,
    value: jax.Array,
    *,
    sharpness: jax.typing.ArrayLike = 1.0,
    use_tanh: bool = True,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    normalization: str = "global",
    initial_state: RACEState | None = None,
    return_state: bool = False,
    axis_name: Axis | None = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Computes RACE attention from hash projections z = W x that are already formed.

    RACE uses queries and keys only through z, which has L * P numbers per token and head. A layer
    that folds the planes into its projection kernels calls this function and never forms queries
    and keys.

    Args:
      query_projections: ``(B, T, N, L, P)``, floating.
      key_projections: ``(B, S, K, L, P)``.
      value: ``(B, S, K, V)``.
      sharpness: as for ``race_attention``.
      use_tanh: as for ``race_attention``.
      is_causal: as for ``race_attention``.
      log_decay: as for ``race_attention``.
      key_value_mask: as for ``race_attention``.
      segment_ids: as for ``race_attention``.
      normalization: as for ``race_attention``.
      initial_state: as for ``race_attention``.
      return_state: as for ``race_attention``.
      axis_name: as for ``race_attention``.
      implementation: as for ``race_attention``.

    Returns:
      The output ``(B, T, N, V)``, or the output and a ``RACEState`` if ``return_state`` is True.

    Raises:
      ValueError, TypeError, NotImplementedError: as for ``race_attention``.

    Example:
      >>> import jax.numpy as jnp, race_jax
      >>> z_q, z_k = jnp.zeros((1, 5, 4, 2, 3)), jnp.zeros((1, 5, 2, 2, 3))
      >>> race_jax.race_attention_from_projections(z_q, z_k, jnp.ones((1, 5, 2, 8))).shape
      (1, 5, 4, 8)

    Source: beyond the paper; the algebra is exact.
    """
    given = query_projections, key_projections
    options = Options(
        sharpness=sharpness,
        use_tanh=use_tanh,
        is_causal=is_causal,
        log_decay=log_decay,
        key_value_mask=key_value_mask,
        segment_ids=segment_ids,
        normalization=normalization,
        initial_state=initial_state,
        return_state=return_state,
        axis_name=axis_name,
        implementation=implementation,
    )
    checks.check_projections(*given, value, options)
    return attend(lambda columns: given, given, value, options)


class Options(NamedTuple):
    """The arguments of ``race_attention`` other than queries, keys, values and planes."""

    sharpness: jax.typing.ArrayLike = 1.0
    use_tanh: bool = True
    is_causal: bool = False
    log_decay: jax.Array | None = None
    key_value_mask: jax.Array | None = None
    segment_ids: jax.Array | None = None
    normalization: str = "global"
    initial_state: RACEState | None = None
    return_state: bool = False
    axis_name: Axis | None = None
    implementation: str | None = None


class _Arrays(NamedTuple):
    """The arrays of a call as the caller gave them. An argument that is not used is None."""

    z_q: Any
    z_k: Any
    value: Any
    sharpness: Any
    log_decay: Any
    mask: Any
    segment_ids: Any
    start: Any


_STATE_AXES = RACEState(shards.TABLES, shards.TABLES, shards.TABLES, shards.ROWS)
_AXES = _Arrays(
    z_q=shards.TOKENS,
    z_k=shards.TOKENS,
    value=shards.TOKENS,
    sharpness=shards.HEADS,
    log_decay=shards.TOKENS,
    mask=shards.SLOTS,
    segment_ids=shards.SLOTS,
    start=_STATE_AXES,
)


def attend(
    project: Callable[[int | None], tuple[jax.Array, jax.Array]],
    shapes: tuple[jax.Array | jax.ShapeDtypeStruct, jax.Array | jax.ShapeDtypeStruct],
    value: jax.Array,
    options: Options,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Computes RACE attention with hash projections in the form that the implementation wants.

    The arguments are those that `checks` has let pass.

    Args:
      project: ``project(columns)`` returns z of the queries and z of the keys. If ``columns`` is
        None, they have the shapes ``(..., L, P)`` that ``shapes`` gives. If it is a number, they
        may also be flat, ``(..., 1, columns)``, with zeros after the L * P projections. The flat
        form saves the kernels a copy.
      shapes: the shapes and dtypes of the two z, with L and P apart.
      value: ``(B, S, K, V)``.
      options: the other arguments of ``race_attention``.

    Returns:
      What ``race_attention`` returns.
    """
    plan = implementations.choose_plan(shapes, value, options)
    z_q, z_k = project(plan.columns)
    kv_heads = value.shape[2]
    arrays = _Arrays(
        z_q=z_q,
        z_k=z_k,
        value=value,
        sharpness=jnp.broadcast_to(jnp.asarray(options.sharpness), (kv_heads,)),
        log_decay=options.log_decay,
        mask=options.key_value_mask,
        segment_ids=options.segment_ids,
        start=options.initial_state,
    )
    arrays = jax.tree.map(jnp.asarray, arrays)
    run = functools.partial(
        _run,
        plan=plan,
        dtype=_dtype_of_sums(arrays, options.sharpness),
        is_causal=options.is_causal,
        normalization=options.normalization,
        return_state=options.return_state,
    )
    used = (kind if x is not None else None for kind, x in zip(_AXES, arrays, strict=True))
    out_axes = (shards.TOKENS, _STATE_AXES) if options.return_state else shards.TOKENS
    with _reverse_mode_only():
        return shards.over_shards(
            run,
            arrays,
            _Arrays(*used),
            out_axes,
            kv_heads=kv_heads,
            axis_name=options.axis_name,
            splits_sequence=checks.whole_sequence_only(options) is None,
        )


def _dtype_of_sums(arrays: _Arrays, sharpness: jax.typing.ArrayLike) -> jnp.dtype:
    """Returns float32, or float64 if any floating argument is float64."""
    given = jax.tree.leaves(arrays._replace(sharpness=None))
    floating = [x for x in given if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.result_type(*floating, sharpness, jnp.float32)


# Compiled as one program, so that a call outside `jax.jit` compiles once, and not its loops anew.
@functools.partial(
    jax.jit,
    static_argnames=("axis_name", "plan", "dtype", "is_causal", "normalization", "return_state"),
)
def _run(
    arrays: _Arrays,
    axis_name: Axis | None,
    *,
    plan: implementations.Plan,
    dtype: jnp.dtype,
    is_causal: bool,
    normalization: str,
    return_state: bool,
) -> jax.Array | tuple[jax.Array, RACEState]:
    """Returns the outputs and, if asked for, the state after the last token."""
    plan = dataclasses.replace(plan, axis_name=axis_name)
    operands, start = _operands(arrays, plan, dtype, is_causal=is_causal)
    if operands.value.shape[0] == 0:
        out, sums = _no_outputs(operands), operands.sums
    else:
        run = _causal if is_causal else _bidirectional
        out, sums = run(operands, normalization, plan)
    if not return_state:
        return out
    return out, _state(operands, sums, start, axis_name, is_causal=is_causal)


def _operands(
    arrays: _Arrays, plan: implementations.Plan, dtype: jnp.dtype, *, is_causal: bool
) -> tuple[causal.Operands, RACEState]:
    """Returns the arrays in the form that every implementation takes, and the state to continue."""
    z_q, z_k, value, sharpness, log_decay, mask, segment_ids, start = arrays
    batch, _, kv_heads, value_dim = value.shape
    features = plan.hash_shape[0] * 2 ** plan.hash_shape[1]
    if start is None:
        fresh = RACEState.init(batch, kv_heads, features, value_dim, dtype)
        # zeros_like makes zeros that vary over the mesh axes of the values inside shard_map.
        start = dataclasses.replace(
            fresh,
            **{
                name: jnp.zeros_like(value, dtype, shape=getattr(fresh, name).shape)
                for name in ("numerator", "mass", "log_decay")
            },
        )
    start = RACEState(
        *(x.astype(dtype) for x in (start.numerator, start.mass, start.log_decay)), start.segment
    )
    entering = Sums(start.numerator, start.mass), start.segment
    if plan.axis_name is not None:
        axis_name = plan.axis_name
        segment = sequence.entering_segment(
            segment_ids, mask, start.segment, value.shape[1], axis_name
        )
        entering = sequence.on_first(entering[0], axis_name), segment
    if is_causal:
        z_q = masking.select_tokens(z_q, mask)
    operands = causal.Operands(
        z_q=_widen(z_q, dtype),
        z_k=_widen(masking.select_tokens(z_k, mask), dtype),
        value=masking.select_tokens(value, mask),
        sharpness=sharpness.astype(dtype),
        log_decay=masking.bound_log_decay(log_decay, mask, dtype),
        mask=mask,
        segment=masking.fill_segments(segment_ids, mask, entering[1]),
        sums=entering[0],
        initial_segment=entering[1],
    )
    return operands, start


def _state(
    operands: causal.Operands,
    sums: Sums,
    start: RACEState,
    axis_name: Axis | None,
    *,
    is_causal: bool,
) -> RACEState:
    """Returns the state after the last token."""
    decay = start.log_decay if is_causal else jnp.zeros_like(start.log_decay)
    own = jnp.zeros_like(decay) if operands.log_decay is None else operands.log_decay.sum(axis=1)
    length = operands.value.shape[1]
    segment = masking.last_segment(
        operands.segment, operands.mask, operands.initial_segment, length
    )
    if axis_name is not None:
        sums, segment = sequence.from_last((sums, segment), axis_name)
        decay, own = sequence.from_last(decay, axis_name), jax.lax.psum(own, axis_name)
    decay = decay + own
    return RACEState(sums.numerator, sums.mass, decay, segment)


def _hash_queries(query: jax.Array, planes: jax.Array) -> jax.Array:
    """Returns z of the queries.

    A query head uses the planes of the key/value head that it reads.
    """
    if planes.ndim == 3:
        return hashing.hash_projections(query, planes)
    grouped = jnp.moveaxis(
        query.reshape(
            *query.shape[:2], planes.shape[0], query.shape[2] // planes.shape[0], query.shape[3]
        ),
        3,
        2,
    )
    z_q = hashing.hash_projections(grouped, planes)  # (B, T, G, K, L, P)
    return jnp.moveaxis(z_q, 2, 3).reshape(*query.shape[:3], *z_q.shape[-2:])


def _widen(z: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Converts hash projections to float64 if the sums are float64."""
    return z.astype(jnp.promote_types(z.dtype, dtype)) if dtype == jnp.float64 else z


def _causal(
    operands: causal.Operands, normalization: str, plan: implementations.Plan
) -> tuple[jax.Array, Sums]:
    if operands.value.shape[1] == 0:
        return _no_outputs(operands), operands.sums
    if normalization == "bucket":
        return rescan.causal_bucket(operands, plan.use_tanh)
    return implementations.run_causal(plan, operands)


def _bidirectional(
    operands: causal.Operands, normalization: str, plan: implementations.Plan
) -> tuple[jax.Array, Sums]:
    z_q, z_k, value, sharpness, _, mask, segment, sums, _ = operands
    if segment is not None and value.shape[1]:
        bucket = normalization == "bucket"
        packed = rescan.bidirectional_packed_bucket if bucket else rescan.bidirectional_packed
        return packed(operands, plan.use_tanh), sums
    whole = bidirectional.Operands(z_q, z_k, value, sharpness, mask, sums)
    if normalization == "bucket":
        return rescan.bidirectional_bucket(whole, plan.use_tanh)
    return implementations.run_bidirectional(plan, whole)


def _no_outputs(operands: causal.Operands) -> jax.Array:
    shape = (*operands.z_q.shape[:3], operands.value.shape[3])
    return jnp.zeros_like(operands.value, shape=shape)


@contextlib.contextmanager
def _reverse_mode_only() -> Iterator[None]:
    """Says in words what a gradient in forward mode needs."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "race_attention supports differentiation in reverse mode (jax.grad, jax.vjp) only; "
            "for forward mode (jax.jvp, jax.jacfwd) differentiate "
            "race_jax.core.reference instead"
        ) from error
