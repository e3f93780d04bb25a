"""RACE attention for the ``attention_fn`` argument of Flax's own attention modules.

    out_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = visible(t, s) phi(q_t) . phi(k_s)

Flax is not imported here. Its modules call the function that this module makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core import masking
from race_jax.core.attention import race_attention


def attention_fn(
    planes: jax.Array,
    *,
    sharpness: jax.typing.ArrayLike = 1.0,
    use_tanh: bool = True,
    is_causal: bool = False,
    normalization: str = "global",
    implementation: str | None = None,
) -> Callable[..., jax.Array]:
    """Makes RACE attention for the ``attention_fn`` argument of Flax's attention modules.

        out_t = sum_s w_ts v_s / sum_s w_ts,   w_ts = visible(t, s) phi(q_t) . phi(k_s)

    The result works in ``nnx.MultiHeadAttention`` (also with ``num_kv_heads`` and ``decode``), in
    ``nn.MultiHeadDotProductAttention``, and in code written for ``jax.nn.dot_product_attention``.
    Planes and sharpness are constants in it. Use `race_jax.RACEAttention` if they should be part of
    the model, or if the memory of decoding should not grow with the length.

    Args:
      planes: ``(L, P, H)`` or ``(K, L, P, H)``, from `race_jax.init_planes`. With ``scale=H**-0.5``
        the gradients of queries and keys do not vanish.
      sharpness: beta > 0, a scalar or ``(K,)``.
      use_tanh: whether hash projections go through tanh, as in the paper.
      is_causal: whether a token sees only itself and earlier tokens. A single call can ask for this
        too. It is ignored for one query with a mask, because this is how Flax decodes: the mask
        then selects the filled part of the cache.
      normalization: ``"global"`` (the paper) or ``"bucket"`` (the released code).
      implementation: None, ``"xla"`` or ``"pallas"``, as for `race_jax.race_attention`.

    Returns:
      A function ``attend(query, key, value, bias=None, mask=None, *, ...)`` of ``(..., T, N, H)``,
      ``(..., S, K, H)`` and ``(..., S, K, V)``, which returns ``(..., T, N, V)``. N is a multiple
      of K. ``mask`` marks keys and must broadcast to ``(..., 1, 1, S)``. Packed documents are
      marked by ``segment_ids`` ``(..., T)``. Sums are kept in float32 or wider, whatever
      ``precision`` is.
      ``NotImplementedError`` is raised for a bias, a scale, a local window, attention dropout, sown
      weights and residuals, because they need the weight matrix, which RACE never forms.

    Raises:
      ValueError: if planes are neither ``(L, P, H)`` nor ``(K, L, P, H)``.

    Example:
      >>> import jax, jax.numpy as jnp, race_jax
      >>> from flax import nnx
      >>> planes = race_jax.init_planes(
      ...     jax.random.key(0), num_tables=4, num_planes=3, head_dim=8, scale=8**-0.5
      ... )
      >>> layer = nnx.MultiHeadAttention(
      ...     num_heads=2, in_features=16, decode=False, rngs=nnx.Rngs(0),
      ...     attention_fn=race_jax.attention_fn(planes, sharpness=2.0, is_causal=True),
      ... )
      >>> layer(jnp.ones((1, 5, 16))).shape
      (1, 5, 16)

    Source: arXiv 2510.04008, Algorithms 1 and 2.
    """
    if planes.ndim not in (3, 4):
        raise ValueError(f"planes must be (L, P, H) or (K, L, P, H), got shape {planes.shape}")
    causal_always = is_causal

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        scale: float | None = None,
        is_causal: bool = False,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        local_window_size: Any = None,
        return_residual: bool = False,
        segment_ids: jax.Array | None = None,
        input_positions: jax.Array | None = None,
    ) -> jax.Array:
        """Computes RACE attention, with the argument names of Flax and of jax.nn."""
        # These are accepted for compatibility and are unused.
        del broadcast_dropout, dropout_rng, precision, input_positions
        _refuse(
            bias=bias is not None,
            scale=scale is not None,
            local_window_size=local_window_size is not None,
            dropout_rate=dropout_rate > 0 and not deterministic,
            module=module is not None,
            return_residual=return_residual,
        )
        lead = _leading_axes(query, key, value)
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        decoding = mask is not None and query.shape[-3] == 1
        batch = math.prod(lead)
        if segment_ids is not None:
            segment_ids = jnp.reshape(segment_ids, (batch, query.shape[-3]))
        out = race_attention(
            *(x.astype(dtype).reshape(batch, *x.shape[-3:]) for x in (query, key, value)),
            planes,
            sharpness=sharpness,
            use_tanh=use_tanh,
            is_causal=(is_causal or causal_always) and not decoding,
            key_value_mask=_visible_keys(mask, key_value_seq_lengths, lead, key.shape[-3]),
            segment_ids=segment_ids,
            normalization=normalization,
            implementation=implementation,
        )
        if query_seq_lengths is not None:
            present = _present(query_seq_lengths, query.shape[-3])
            out = jnp.where(present[..., None, None], out, 0)
        return out.reshape(*lead, *out.shape[1:])

    return attend


def key_padding(mask: jax.Array | None, lead: tuple[int, ...], length: int) -> jax.Array | None:
    """Turns an attention mask in Flax's form into one boolean per key.

    Args:
      mask: None, or an array that broadcasts to ``(*lead, 1, 1, S)``, nonzero where there is a key.
      lead: the leading axes.
      length: S.

    Returns:
      ``(prod(lead), S)`` bool, or None.

    Raises:
      ValueError: if the mask differs between heads or between queries, or has a wrong shape; or
        if it has negative numbers, as masks have that are added to logits (not seen under jit).
    """
    if mask is None:
        return None
    masking.check_array("mask", mask)
    shape = (*lead, 1, 1, length)
    if mask.ndim != len(shape) or any(
        given not in (1, size) for given, size in zip(mask.shape, shape, strict=True)
    ):
        raise ValueError(
            f"mask must broadcast to {shape}, got shape {mask.shape}. RACE attention takes "
            "key-padding masks only, such as mask[:, None, None, :] of a boolean for each key; for "
            "causal use is_causal=True, for packing use segment_ids"
        )
    values = masking.concrete(mask if mask.dtype != jnp.bool_ else None)
    if values is not None and (values < 0).any():
        raise ValueError(
            "mask has negative numbers, as masks have that are added to logits. RACE attention "
            "takes masks that are True or nonzero where there is a token; pass mask == 0"
        )
    return jnp.broadcast_to(mask != 0, shape).reshape(math.prod(lead), length)


_REASONS = {
    "bias": "a bias is added to the logarithm of each weight; encode it in the input instead",
    "scale": "there are no dot products to scale; use sharpness, or the scale of the planes",
    "local_window_size": "a window masks single weights; use the forget_gate of RACEAttention",
    "dropout_rate": "attention dropout drops single weights; pass deterministic=True, or use the "
    "dropout_rate of RACEAttention, which acts on the layer's output",
    "module": "there are no attention weights to sow; pass sow_weights=False",
    "return_residual": "there is no log-sum-exp; use return_state of race_attention",
}


def _refuse(**asked: bool) -> None:
    """Raises NotImplementedError for the first requested option that needs the weight matrix."""
    for name, is_asked in asked.items():
        if is_asked:
            raise NotImplementedError(
                f"{name} is not supported, because RACE never forms the weight matrix: "
                f"{_REASONS[name]}"
            )


def _leading_axes(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[int, ...]:
    shapes = query.shape, key.shape, value.shape
    if min(map(len, shapes)) < 3 or len({shape[:-3] for shape in shapes}) > 1:
        raise ValueError(
            "query (..., T, N, H), key (..., S, K, H) and value (..., S, K, V) must have the same "
            f"leading axes, got {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    return query.shape[:-3]


def _visible_keys(
    mask: jax.Array | None, lengths: jax.Array | None, lead: tuple[int, ...], length: int
) -> jax.Array | None:
    visible = key_padding(mask, lead, length)
    if lengths is None:
        return visible
    present = _present(lengths, length)
    return present if visible is None else visible & present


def _present(lengths: jax.Array, length: int) -> jax.Array:
    """Turns lengths ``(B,)`` into a mask ``(B, length)``, True below each length."""
    masking.check_array("sequence lengths", lengths)
    return jnp.arange(length)[None] < lengths.reshape(lengths.size, 1)
