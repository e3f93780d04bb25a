"""Softmax attention, as an operation and as a Flax layer, for comparison.

The operation takes query, key, value, an additive bias, and masks as vectors. Over visible keys s,

    out_t = sum_s softmax_s(q_t . k_s / sqrt(H) + bias_ts) v_s
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.layers import cached, positions
from race_jax.layers.positions import PairsConfig
from race_jax.layers.self_attention import Call

IMPLEMENTATIONS = (None, "xla", "cudnn")
Shaped = jax.Array | jax.ShapeDtypeStruct


def softmax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    aux: jax.Array | None = None,
    *,
    is_causal: bool = False,
    log_decay: jax.Array | None = None,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    initial_state: object | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    r"""Computes softmax attention with the masks of RACE attention.

    .. math::
        out_t = \sum_s \mathrm{softmax}_s(q_t \cdot k_s / \sqrt{H} + bias_{ts}) \, v_s

    The sum runs over the keys that causality, padding and segments leave visible. Time is quadratic
    in the length, and so is memory, except on cuDNN without a bias and segments. A query that sees
    no key returns zeros. In causal and packed calls, where queries and keys are the same tokens, a
    padded query returns zeros as well. The softmax is computed in float32, by
    `jax.nn.dot_product_attention`.

    Args:
        query: shape (B, T, N, H), floating.
        key: shape (B, S, K, H). Query head n uses key/value head n // (N // K).
        value: shape (B, S, K, V), with the dtype of the query. V may differ from H.
        aux: a bias that is added to the logits and broadcasts to (B, N, T, S), for instance that
            of `race_jax.layers.positions.alibi_bias`, or None.
        is_causal: whether a token sees only itself and earlier tokens. This needs T == S.
        log_decay: not supported.
        key_value_mask: shape (B, S) bool, True where there is a token. Other slots of key and value
            are never read.
        segment_ids: shape (B, T) integers. A token sees only its own segment. This needs T == S.
        initial_state: not supported.
        return_state: not supported.
        implementation: "xla", "cudnn" (which needs an NVIDIA GPU and half precision), or None,
            which is cuDNN if JAX's default backend and the inputs allow it, and XLA otherwise.

    Returns:
        Shape (B, T, N, V), with the dtype of the value.

    Raises:
        ValueError: if shapes do not fit each other, or the implementation is unknown.
        TypeError: if inputs are not floating, or a mask is not bool.
        NotImplementedError: if a state or a decay is given, or "cudnn" cannot run here.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.layers.softmax import softmax_attention
        >>> x = jnp.ones((1, 3, 2, 4))
        >>> value = jnp.arange(24.0).reshape(1, 3, 2, 4)
        >>> softmax_attention(x, x, value, is_causal=True)[0, :, 0, 0].tolist()
        [0.0, 4.0, 8.0]

    Source: Vaswani et al. 2017, section 3.2.1; the baseline of the RACE paper.
    """
    _refuse(log_decay, initial_state, return_state)
    _check_shapes(query, key, value, is_causal, key_value_mask, segment_ids)
    pairs_differ = aux is not None or segment_ids is not None
    implementation = _choose(implementation, query, value, pairs_differ)
    out_shape = (*query.shape[:3], value.shape[-1])
    if 0 in (*query.shape, *key.shape, *value.shape):
        return jnp.zeros(out_shape, value.dtype)

    same_tokens = is_causal or segment_ids is not None
    key, value = (masking.select_tokens(x, key_value_mask) for x in (key, value))
    if same_tokens:
        query = masking.select_tokens(query, key_value_mask)
    query, key, value, scale = _equal_head_dims(query, key, value)
    options = {"scale": scale, "is_causal": is_causal, "implementation": implementation}
    with jax.named_scope("softmax_attention"):
        is_odd = query.shape[1] % 2 == 1 or key.shape[1] % 2 == 1
        needs_lengths = not pairs_differ and (is_odd or key_value_mask is not None)
        if implementation == "cudnn" and needs_lengths:
            out = attend_by_lengths(query, key, value, key_value_mask, **options)
        else:
            mask = _pair_mask(query.shape[1], key.shape[1], key_value_mask, segment_ids)
            out = jax.nn.dot_product_attention(query, key, value, bias=aux, mask=mask, **options)
    out = out[..., : out_shape[-1]]
    if key_value_mask is None:
        return out
    seeing = key_value_mask if same_tokens else jnp.any(key_value_mask, axis=1, keepdims=True)
    return jnp.where(seeing[:, :, None, None], out, jnp.zeros((), out.dtype))


def attend_by_lengths(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_value_mask: jax.Array | None,
    *,
    scale: float,
    is_causal: bool,
    implementation: str,
) -> jax.Array:
    """Computes softmax attention with padding and without a T x T mask.

    The tokens of each row are moved to its front, in their order, so that a length says which keys
    are visible. cuDNN takes lengths, and does not compute the pairs behind them. Odd lengths, of
    which JAX takes no gradient on cuDNN, become even by one empty slot.

    Args:
        query: shape (B, T, N, H).
        key: shape (B, S, K, H), zero where there is no token.
        value: shape (B, S, K, H), zero where there is no token.
        key_value_mask: shape (B, S) bool, True where there is a token, or None for all.
        scale: a factor of the logits.
        is_causal: whether a token sees only itself and earlier tokens. Then T == S.
        implementation: as for `jax.nn.dot_product_attention`.

    Returns:
        Shape (B, T, N, H). What it holds for a query that sees no key is not defined.
    """
    visible = jnp.ones(key.shape[:2], bool) if key_value_mask is None else key_value_mask
    order = jnp.argsort(~visible, axis=1, stable=True)

    @jax.vmap  # so that a mesh may split the rows
    def moved(x: jax.Array, where: jax.Array) -> jax.Array:
        return x.at[where].get(unique_indices=True, mode="promise_in_bounds")

    def even(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    # cuDNN does not say what a row without keys returns. One key of zeros is harmless.
    lengths = jnp.maximum(jnp.sum(visible, axis=1, dtype=jnp.int32), 1)
    out = jax.nn.dot_product_attention(
        even(moved(query, order) if is_causal else query),
        even(moved(key, order)),
        even(moved(value, order)),
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=lengths if is_causal else None,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )[:, : query.shape[1]]
    return moved(out, jnp.argsort(order, axis=1)) if is_causal else out


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(PairsConfig):
    """Options of softmax attention, and the sizes of a layer.

    Attributes:
        implementation: as for `softmax_attention`.

    Raises:
        ValueError: if a value is not allowed, or a head of odd width has rotary positions.
    """

    NAME: ClassVar[str] = "softmax"
    IMPLEMENTATIONS: ClassVar[tuple[str | None, ...]] = IMPLEMENTATIONS

    def describe(
        self, batch: int, length: int, is_packed: bool, is_causal: bool = True
    ) -> tuple[str, str]:
        """Returns the name of the method, and which implementation runs."""
        if self.implementation is not None:
            return super().describe(batch, length, is_packed, is_causal)
        dtype = jnp.dtype(self.dtype or self.param_dtype)
        heads = jax.ShapeDtypeStruct((batch, length, self.num_heads, self.head_dim), dtype)
        has_bias = self.positions == "alibi" or self.forget_gate is not None
        obstacle = _cudnn_obstacle(heads, heads, is_packed or has_bias)
        if obstacle is None:
            return self.NAME, "implementation cudnn"
        return self.NAME, f"implementation xla, because cuDNN {obstacle}"


class SoftmaxAttention(cached.CachedAttention):
    """Self-attention by softmax. A forget gate adds its decay to the logits.

    Args:
        config: the sizes and options.
        kernel_init: the initializer of the kernels of query, key and value.
        out_kernel_init: the initializer of the kernel of ``out``, ``kernel_init`` if None.
        rngs: random streams; "params" is needed.
    """

    config_class = SoftmaxConfig

    def attend(self, query: jax.Array, key: jax.Array, value: jax.Array, call: Call) -> Any:
        """Returns the heads' outputs, and the cache if the call has one.

        The positions of the call are needed for RoPE and ALiBi.
        """
        settings = self.config
        if call.memory is not None:
            return cached.attend_and_keep(query, key, value, call, settings)
        query, key, bias = positions.place(query, key, call.positions, settings)
        if call.log_decay is not None:
            decay = positions.decay_bias(call.log_decay, call.mask, settings.num_heads)
            bias = decay if bias is None else bias + decay
        return softmax_attention(
            query, key, value, bias, implementation=settings.implementation, **call.masks()
        )


def _refuse(log_decay: object, initial_state: object, return_state: bool) -> None:
    if log_decay is not None:
        raise NotImplementedError(
            "softmax_attention has no log_decay; pass race_jax.layers.positions.decay_bias as aux."
        )
    if initial_state is not None or return_state:
        raise NotImplementedError(
            "softmax attention carries no state of fixed size; pass the whole sequence instead."
        )


def _check_shapes(query, key, value, is_causal, key_value_mask, segment_ids) -> None:
    for name, array in (("query", query), ("key", key), ("value", value)):
        if array.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, tokens, heads, head_dim); got {array.shape}."
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{name} must be floating; got {array.dtype}.")
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}."
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0]:
        raise ValueError(f"key and value must share batch, tokens and heads; {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must share head_dim; {shapes}")
    if key.shape[2] == 0 or query.shape[2] % key.shape[2]:
        raise ValueError(f"query heads must be a multiple of key/value heads; {shapes}")
    if (is_causal or segment_ids is not None) and query.shape[1] != key.shape[1]:
        raise ValueError(f"is_causal and segment_ids need as many queries as keys; {shapes}")
    masking.check_key_value_mask(key_value_mask, key.shape[:2])
    masking.check_segment_ids(segment_ids, key.shape[:2], key_value_mask)


def _check_implementation(implementation: str | None) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"{implementation=} is unknown; softmax attention takes one of {IMPLEMENTATIONS}."
        )


def _choose(implementation: str | None, query: Shaped, value: Shaped, pairs_differ: bool) -> str:
    _check_implementation(implementation)
    if implementation == "xla":
        return "xla"
    obstacle = _cudnn_obstacle(query, value, pairs_differ)
    if implementation == "cudnn" and obstacle:
        raise NotImplementedError(f"cuDNN attention {obstacle}; pass implementation='xla'.")
    return "xla" if obstacle else "cudnn"


def _cudnn_obstacle(query: Shaped, value: Shaped, pairs_differ: bool) -> str | None:
    """Returns why cuDNN cannot run this call, or None. JAX checks the same limits.

    `pairs_differ` says whether a bias or segments make an array with an entry for each pair.
    """
    width = max(query.shape[-1], value.shape[-1])
    if jax.default_backend() != "gpu":
        return f"needs an NVIDIA GPU, and JAX's default backend is {jax.default_backend()!r}"
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, got {query.dtype}"
    if width % 8 or width > 128:
        return f"needs a head width of at most 128 in multiples of 8, got {width}"
    if pairs_differ and (query.shape[1] % 2 or value.shape[1] % 2):
        return "needs even lengths where there are segments or a bias"
    return None


def _equal_head_dims(query, key, value):
    """Returns the arrays padded with zeros to one head width, and the scale 1 / sqrt(H)."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    width = max(head_dim, value_dim)

    def widened(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

    return widened(query), widened(key), widened(value), 1.0 / math.sqrt(head_dim)


def _pair_mask(num_queries: int, num_keys: int, key_value_mask, segment_ids) -> jax.Array | None:
    """Returns padding and segments as the mask (B, 1, T, S) that `jax.nn` takes, or None."""
    visible = None
    if segment_ids is not None:
        visible = segment_ids[:, :, None] == segment_ids[:, None, :]
    if key_value_mask is not None:
        present = jnp.broadcast_to(
            key_value_mask[:, None, :], (key_value_mask.shape[0], num_queries, num_keys)
        )
        visible = present if visible is None else visible & present
    return None if visible is None else visible[:, None]
