"""The queries, keys and gate of a layer of RACE attention, and a report of what it does with them.

for layer, x in diagnostics.layers_of(model, tokens):
print(diagnostics.report(layer, x, jax.random.key(0)).text())
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from race_jax.core.state import EMPTY
from race_jax.diagnostics import kernels
from race_jax.diagnostics.buckets import Buckets, buckets, effective_context
from race_jax.layers import gates, parts, projections
from race_jax.layers.race import RACEAttention

MOST_TOKENS = 1024  # of a report, whose time grows with their square


class Heads(NamedTuple):
    """What a layer computes attention from.

    Attributes:
      query: ``(B, T, N, H)``.
      key: ``(B, T, K, H)``.
      value: ``(B, T, K, V)``.
      planes: ``(L, P, H)``.
      sharpness: beta of each head, ``(K,)``.
      log_decay: ``(B, T, K)``, or None without a gate.
    """

    query: jax.Array
    key: jax.Array
    value: jax.Array
    planes: jax.Array
    sharpness: jax.Array
    log_decay: jax.Array | None


class Report(NamedTuple):
    """What a layer does with a batch.

    Attributes:
      num_tables: L.
      num_planes: P.
      sharpness: beta of each head, ``(K,)``.
      is_causal: whether a token is compared with itself and earlier tokens only.
      error: `distance` between the weights of the layer's own planes and those of the exact kernel,
        before any gate.
      errors: the same for other planes of the same scale, by the number of tables.
      key_buckets: how the keys are spread over the buckets.
      query_buckets: the same for the queries.
      context: the effective context ``(B, T, K)`` of the gate, or None.
    """

    num_tables: int
    num_planes: int
    sharpness: np.ndarray
    is_causal: bool
    error: float
    errors: kernels.Errors
    key_buckets: Buckets
    query_buckets: Buckets
    context: jax.Array | None

    def text(self) -> str:
        """Returns the report in words."""

        def bits(found: Buckets) -> str:
            entropy, softness = (float(x.mean()) for x in (found.entropy, found.softness))
            return f"entropy {entropy:.2f} of {self.num_planes} bits, {softness:.2f} in one token"

        beta = ", ".join(f"{value:.2f}" for value in self.sharpness)
        law = ", ".join(
            f"L = {tables}: {mean:.3f}"
            for tables, mean in zip(self.errors.tables, self.errors.mean, strict=True)
        )
        lines = [
            f"hash       L = {self.num_tables}, P = {self.num_planes}, beta {beta}",
            f"pairs      each token and {'the earlier ones' if self.is_causal else 'all tokens'}",
            f"error      {self.error:.3f} of the attention on wrong keys",
            f"by tables  {law} (power {self.errors.slope:.2f})",
            f"keys       {bits(self.key_buckets)}",
            f"queries    {bits(self.query_buckets)}",
        ]
        if self.context is not None:
            last = np.asarray(self.context[:, -1].mean(axis=0))
            words = ", ".join(f"{tokens:.1f}" for tokens in last)
            lines.append(f"gate       keeps {words} tokens at the end, by head")
        return "\n".join(lines)


def heads_of(layer: Any, x: jax.Array) -> Heads:
    """Computes what a layer computes attention from.

    Args:
      layer: a `race_jax.RACEAttention`.
      x: ``(B, T, D)``, the hidden states that the layer is called with, without padding.

    Returns:
      Queries, keys, values, planes, sharpness and the log decay.

    Raises:
      TypeError: if the layer is of another kind.

    Example:
      >>> import jax, race_jax
      >>> from flax import nnx
      >>> layer = race_jax.RACEAttention(4, 16, num_kv_heads=2, rngs=nnx.Rngs(0))
      >>> heads = heads_of(layer, jax.numpy.ones((1, 5, 16)))
      >>> heads.query.shape, heads.key.shape, heads.log_decay
      ((1, 5, 4, 4), (1, 5, 2, 4), None)
    """
    if not isinstance(layer, RACEAttention):
        raise TypeError(f"layer must be a race_jax.RACEAttention, got a {type(layer).__name__}")
    settings, params = layer.config, layer.parameters()
    x = x.astype(settings.dtype or x.dtype)
    span = parts.Span(jnp.full(len(x), EMPTY, jnp.int32), None, None)
    taps = parts.init_taps(settings, len(x))
    x, taps = parts.convolve_inputs(x, params, settings, taps, span)
    heads = tuple(projections.projected(x, name, params, settings) for name in parts.HEADS)
    (query, key, value), _ = parts.convolve_heads(heads, params, settings, taps, span)
    if settings.normalize_qk:
        query, key = params["query_ln"](query), params["key_ln"](key)
    log_decay = gates.log_decay(
        x,
        params,
        forget_gate=settings.forget_gate,
        half_life=settings.half_life,
        num_kv_heads=settings.num_kv_heads,
        precision=settings.precision,
    )
    beta = settings.current_sharpness(params)
    beta = jnp.broadcast_to(jnp.asarray(beta, jnp.float32), (settings.num_kv_heads,))
    return Heads(query, key, value, layer.planes[...], beta, log_decay)


def layers_of(model: Any, tokens: jax.Array) -> Iterator[tuple[Any, jax.Array]]:
    """Yields the attention layers of a model, each with the hidden states that it is called with.

    Args:
      model: a `race_jax.models.TransformerLM`, such as `race_jax.train.checkpoint.
        load_for_inference` returns first.
      tokens: ``(B, T)`` ids.

    Yields:
      The layer and its input ``(B, T, D)``.

    Raises:
      TypeError: if the model is of another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from race_jax.models import ModelConfig, TransformerLM
      >>> config = ModelConfig(num_layers=2, width=16, num_heads=2)
      >>> model = TransformerLM(config, 8, rngs=nnx.Rngs(0))
      >>> [x.shape for _, x in layers_of(model, jnp.zeros((1, 5), int))]
      [(1, 5, 16), (1, 5, 16)]
    """
    if not hasattr(model, "trunk"):
        raise TypeError(
            f"layers_of takes a model of race_jax.models, got a {type(model).__name__}; for a "
            "layer of your own model, call report(layer, x) with the input x of the layer"
        )
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    x = model.trunk.embedding(tokens, positions)
    for block in model.trunk.blocks:
        yield block.attention, block.attention_norm(x)
        x, _ = block(x, positions, None, None, None, None)


def report(
    layer: Any,
    x: jax.Array,
    rng_key: jax.Array,
    *,
    is_causal: bool | None = None,
    draws: int = 2,
) -> Report:
    """Measures what a layer does with a batch.

    Args:
      layer: a `race_jax.RACEAttention`.
      x: ``(B, T, D)``, the hidden states that the layer is called with, without padding. All pairs
        of the T tokens are compared, so that T is at most 1,024.
      rng_key: a ``jax.random`` key, from which other planes are drawn.
      is_causal: as for a call of the layer. None takes the layer's own, or True for a layer with a
        forget gate.
      draws: the number of draws of other planes, at least 2.

    Returns:
      The error of the hash, the use of its buckets and the context of the gate.

    Raises:
      ValueError: if there are more tokens.

    Example:
      >>> import race_jax
      >>> from flax import nnx
      >>> layer = race_jax.RACEAttention(2, 16, num_tables=2, num_planes=2, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (1, 8, 16))
      >>> print(report(layer, x, jax.random.key(1)).text().splitlines()[0])
      hash       L = 2, P = 2, beta 2.00, 2.00
    """
    if x.shape[1] > MOST_TOKENS:
        raise ValueError(
            f"report compares all pairs of tokens, of at most {MOST_TOKENS:,}, and x has "
            f"{x.shape[1]:,}; pass a part, such as x[:, :256]"
        )
    heads, settings = heads_of(layer, x), layer.config
    causal = layer.is_causal or settings.forget_gate is not None
    causal = causal if is_causal is None else is_causal
    tanh = {"use_tanh": settings.use_tanh}
    options = {"num_planes": settings.num_planes, "scale": settings.planes_scale, **tanh}
    want = kernels.soft_kernel(heads.query, heads.key, sharpness=heads.sharpness, **options)
    got = kernels.hash_kernel(heads.query, heads.key, heads.planes, heads.sharpness, **tanh)
    weights = (kernels.attention_weights(kernel, is_causal=causal) for kernel in (got, want))
    tables = settings.num_tables
    errors = kernels.errors_by_tables(
        rng_key,
        heads.query,
        heads.key,
        num_tables=sorted({1, max(tables // 2, 1), tables, 2 * tables}),
        sharpness=heads.sharpness,
        is_causal=causal,
        want=want,
        draws=draws,
        **options,
    )
    query_sharpness = jnp.repeat(heads.sharpness, settings.num_heads // settings.num_kv_heads)
    return Report(
        tables,
        settings.num_planes,
        np.asarray(heads.sharpness),
        bool(causal),
        float(kernels.distance(*weights)),
        errors,
        buckets(heads.key, heads.planes, heads.sharpness, **tanh),
        buckets(heads.query, heads.planes, query_sharpness, **tanh),
        None if heads.log_decay is None else effective_context(heads.log_decay),
    )
