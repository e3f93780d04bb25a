"""The definitions of the attention layers, written out for all pairs of tokens, or token by token.

`layer_by_definition` computes what is common to the layers: projections, convolutions, gates, the
output norm. Each function of `DEFINITIONS` computes the heads of one method.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core.rotary import rotate
from race_jax.layers.positions import alibi_bias, alibi_slopes


class Pairs(NamedTuple):
    """One call: the layer, its hidden states, and which keys (B, T, S) a query sees."""

    layer: Any
    x: jax.Array
    visible: jax.Array
    decay: jax.Array  # (B, T, S, N), zero for pairs that are not visible
    mask: jax.Array


def layer_by_definition(layer, x, *, mask, segment_ids, is_causal):
    """Returns the layer's output (B, T, D). That of padded slots is not defined."""
    settings = layer.config
    x = jnp.where(mask[..., None], x, 0.0)
    real = mask[:, None, :] & mask[:, :, None]
    together = real & (segment_ids[:, :, None] == segment_ids[:, None])
    past = jnp.tril(jnp.ones(mask.shape[1:] * 2, bool))
    if settings.short_conv == "before":
        x = convolution(x, layer.conv_kernel[...], together & past, mask)
    heads = {}
    for name in ("query", "key", "value"):
        module = getattr(layer, name)
        y = jnp.einsum("btd,dnh->btnh", x, module.kernel[...]) + module.bias[...]
        if settings.short_conv == "qkv":
            kernel = getattr(layer, f"{name}_conv_kernel")[...]
            y = convolution(y, kernel, together & past, mask)
        if settings.qkv_activation == "silu":
            y = y / (1 + jnp.exp(-y))
        heads[name] = y if name == "query" else repeat(layer, y, 2)
    visible = together & past if is_causal else together
    pairs = Pairs(layer, x, visible, gate(layer, x, visible, mask), mask)
    # A window rotates by positions of its own.
    if getattr(settings, "positions", None) == "rope" and settings.NAME != "sliding_window":
        for name in ("query", "key"):
            heads[name] = rotate(heads[name], jnp.arange(x.shape[1]), settings.rope_base)
    out = DEFINITIONS[settings.NAME](pairs, **heads)
    if settings.output_norm == "rms":
        out = out / jnp.sqrt((out**2).mean(-1, keepdims=True) + 1e-6) * layer.out_norm_scale[...]
    if settings.output_gate is not None:
        logits = jnp.einsum("btd,dnv->btnv", x, layer.out_gate_kernel[...])
        out = out * (logits if settings.output_gate == "silu" else 1) / (1 + jnp.exp(-logits))
    return jnp.einsum("btnv,nvd->btd", out, layer.out.kernel[...]) + layer.out.bias[...]


def repeat(layer, x, axis):
    """Returns x with each key/value head repeated for the query heads that read it."""
    return jnp.repeat(x, layer.config.num_heads // layer.config.num_kv_heads, axis=axis)


def convolution(x, kernel, seen, mask):
    """Sums kernel[j] x[s], where s is the j-th real token before t among those seen by t."""
    place = jnp.cumsum(mask, axis=1)
    back = place[:, :, None] - place[:, None]
    taps = seen[..., None] & (back[..., None] == jnp.arange(4))
    return jnp.einsum("btsj,bs...,j...->bt...", taps.astype(x.dtype), x, kernel)


def gate(layer, x, visible, mask):
    """Returns exp(G_t - G_s) of the gates "learned" and "data" for the pairs that are visible."""
    if layer.config.forget_gate not in ("learned", "data"):
        shape = *visible.shape, layer.config.num_heads
        return jnp.broadcast_to(visible[..., None], shape).astype(x.dtype)
    logits = jnp.broadcast_to(layer.gate_bias[...], (*x.shape[:2], layer.config.num_kv_heads))
    if layer.config.forget_gate == "data":
        logits = logits + x @ layer.gate_kernel[...]
    return repeat(layer, between(-jnp.log1p(jnp.exp(-logits)), visible, mask), 3)


def between(log_decay, visible, mask):
    """Returns exp(G_t - G_s) (B, T, S, ...) for the pairs that are visible, and zero for others."""
    wide = lambda x: x.reshape(*x.shape, *(1,) * (log_decay.ndim - 2))  # noqa: E731
    total = jnp.cumsum(jnp.where(wide(mask), log_decay, 0.0), axis=1)
    difference = total[:, :, None] - total[:, None]
    return jnp.exp(jnp.where(wide(visible), difference, -jnp.inf))


def weighted_mean(weights, value):
    """Returns the means of the values with weights (B, T, S, N), or zero without weights."""
    mass = weights.sum(axis=2)[..., None]
    return jnp.einsum("btsn,bsnv->btnv", weights, value) / jnp.where(mass > 0, mass, 1.0)


def softmax(pairs, query, key, value):
    """exp(q . k / sqrt(H))."""
    logits = jnp.einsum("btnh,bsnh->btsn", query, key) / query.shape[-1] ** 0.5
    return weighted_mean(jnp.exp(logits) * pairs.decay, value)


def linear(pairs, query, key, value):
    """(elu(q) + 1) . (elu(k) + 1)."""
    phi = lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0.0)))  # noqa: E731
    return weighted_mean(jnp.einsum("btnh,bsnh->btsn", phi(query), phi(key)) * pairs.decay, value)


def performer(pairs, query, key, value):
    """Sums exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2), with q and k over the root of sqrt(H)."""

    def phi(x):
        x = x / x.shape[-1] ** 0.25
        projected = jnp.einsum("btnh,mh->btnm", x, pairs.layer.directions[...])
        return jnp.exp(projected - (x**2).sum(-1, keepdims=True) / 2)

    return weighted_mean(jnp.einsum("btnm,bsnm->btsn", phi(query), phi(key)) * pairs.decay, value)


def sigmoid(pairs, query, key, value):
    """sigmoid(q . k / sqrt(H) + bias), not normalised."""
    logits = jnp.einsum("btnh,bsnh->btsn", query, key) / query.shape[-1] ** 0.5
    if pairs.layer.config.positions == "alibi":
        place = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
        logits += jnp.moveaxis(alibi_bias(query.shape[2], place), 1, 3)
    bias = pairs.layer.config.bias
    if bias is None:
        count = jnp.maximum(pairs.visible.sum(-1), 1)
        bias = -jnp.log(count)[..., None, None]
    return jnp.einsum("btsn,bsnv->btnv", pairs.decay / (1 + jnp.exp(-logits - bias)), value)


def angular(pairs, query, key, value):
    """(1 - theta / pi)^degree."""
    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-12)  # noqa: E731
    theta = jnp.arccos(jnp.einsum("btnh,bsnh->btsn", unit(query), unit(key)))
    return weighted_mean((1 - theta / jnp.pi) ** pairs.layer.config.degree * pairs.decay, value)


def linformer(pairs, query, key, value):
    """Softmax over keys and values that are mixtures of the tokens'."""
    length = key.shape[1]
    mix = functools.partial(jnp.einsum, "bsnh,sm,bs->bmnh")
    key = mix(key, pairs.layer.key_mix_kernel[...][:length], pairs.mask)
    value = mix(value, pairs.layer.value_mix_kernel[...][:length], pairs.mask)
    logits = jnp.einsum("btnh,bmnh->btmn", query, key) / query.shape[-1] ** 0.5
    return weighted_mean(jnp.exp(logits), value)


def gated_linear(pairs, query, key, value):
    """sum_h q_h k_h exp(G_th - G_sh), not normalised."""
    layer = pairs.layer
    decay = pairs.decay[..., None]
    if layer.config.forget_gate == "channel":
        low = pairs.x @ layer.gate_down_kernel[...]
        logits = jnp.einsum("btr,rkh->btkh", low, layer.gate_up_kernel[...]) + layer.gate_bias[...]
        decay = between(-jnp.log1p(jnp.exp(-logits)) / 16, pairs.visible, pairs.mask)
        decay = repeat(layer, decay, 3)
    weights = jnp.einsum("btnh,bsnh,btsnh->btsn", query, key, decay * jnp.ones(query.shape[-1]))
    return jnp.einsum("btsn,bsnv->btnv", weights, value) / query.shape[-1] ** 0.5


def gated_delta(pairs, query, key, value):
    """The delta rule on queries and keys of length 1."""
    unit = lambda x: x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)  # noqa: E731
    return delta_rule(pairs, unit(query), unit(key), value)


def race_delta(pairs, query, key, value):
    """The delta rule on the features of RACE, as a softmax over corners, of length 1."""
    layer, config = pairs.layer, pairs.layer.config
    beta = jnp.exp(layer.log_sharpness[...]) if config.learn_sharpness else config.sharpness
    beta = repeat(layer, jnp.broadcast_to(beta, config.num_kv_heads), 0)[:, None, None]
    corners = jnp.array(list(itertools.product((-1.0, 1.0), repeat=config.num_planes)))

    def phi(x):
        z = jnp.einsum("btnh,lph->btnlp", x, layer.planes[...])
        u = jnp.tanh(z) if config.use_tanh else z
        weights = jnp.exp(beta * jnp.einsum("btnlp,rp->btnlr", u, corners))
        shares = weights / weights.sum(-1, keepdims=True)
        shares = shares.reshape(*x.shape[:3], -1)
        return shares / jnp.sqrt((shares**2).sum(-1, keepdims=True))

    return delta_rule(pairs, phi(query), phi(key), value)


def delta_rule(pairs, query, key, value):
    """Token by token: the matrix decays, and then moves to the new value for the key."""
    layer = pairs.layer
    rate = repeat(layer, jax.nn.sigmoid(pairs.x @ layer.rate_kernel[...]), 2)
    decay = jnp.ones_like(rate)
    if layer.config.forget_gate == "softplus":
        steps = jnp.log1p(jnp.exp(pairs.x @ layer.gate_kernel[...] + layer.gate_bias[...]))
        decay = repeat(layer, jnp.exp(-jnp.exp(layer.gate_log_rate[...]) * steps), 2)
    elif layer.config.forget_gate == "data":
        logits = pairs.x @ layer.gate_kernel[...] + layer.gate_bias[...]
        decay = repeat(layer, jax.nn.sigmoid(logits), 2)
    batch, length, heads, width = key.shape
    matrix, rows = jnp.zeros((batch, heads, width, value.shape[-1])), []
    for t in range(length):
        # What the last token saw is kept if this token sees it as well.
        before = pairs.visible[:, t, :t].any(axis=1) | ~pairs.mask[:, t]
        real = pairs.mask[:, t, None, None, None]
        met = jnp.where(before[:, None, None, None], matrix, 0.0)
        met = jnp.where(real, decay[:, t, :, None, None], 1.0) * met
        held = jnp.einsum("bnh,bnhv->bnv", key[:, t], met)
        added = rate[:, t, :, None] * (value[:, t] - held)
        matrix = met + jnp.where(real, key[:, t, ..., None] * added[..., None, :], 0.0)
        rows.append(jnp.einsum("bnh,bnhv->bnv", query[:, t], matrix))
    return jnp.stack(rows, axis=1)


def sliding_window(pairs, query, key, value):
    """Softmax over the last tokens, counted without padding."""
    config = pairs.layer.config
    count = jnp.cumsum(pairs.mask, axis=1)
    distance = count[:, :, None] - count[:, None, :]
    if config.positions == "rope":
        query, key = (rotate(x, count, config.rope_base) for x in (query, key))
    logits = jnp.einsum("btnh,bsnh->btsn", query, key) / query.shape[-1] ** 0.5
    if config.positions == "alibi":
        logits -= alibi_slopes(query.shape[2]) * distance[..., None]
    near = (distance < config.window)[..., None]
    return weighted_mean(jnp.exp(logits) * pairs.decay * near, value)


DEFINITIONS: dict[str, Callable] = {
    function.__name__: function
    for function in (
        *(softmax, linear, performer, sigmoid, angular, linformer),
        *(gated_linear, gated_delta, race_delta, sliding_window),
    )
}
