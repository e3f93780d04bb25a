"""Cross-entropy over a large vocabulary, without the logits of a whole batch in memory.

Equation: sum_t w_t (log sum_v exp(h_t · e_v) - h_t · e_target(t)), computed chunk by chunk.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from race_jax.core.shards import TOKENS, vary_alike

# A chunk has about so many logits, 16 MB in float32. A large vocabulary has more, because products
# of few tokens are slow, and each chunk reads and writes the gradient of the whole table.
LOGITS_PER_CHUNK = 2**22
LEAST_CHUNK = 512
# cuBLAS has its fast kernels only where rows start at multiples of 16 bytes.
ALIGNMENT = 8


def chunked_cross_entropy(
    hidden: jax.Array,
    embedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    chunk: int | None = None,
    sparse: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted cross-entropy of tied logits, chunk by chunk.

    Equation: `nats = sum_t w_t (logsumexp_v(h_t · e_v) - h_t · e_target(t))`.

    Only the logits of one chunk of tokens are in memory at a time, also for the gradients. These
    are computed in the forward pass, together with the logits of the chunk, and are only scaled in
    the backward pass. The inputs of the products have the dtype of `hidden`. The products, and
    everything after them, are accumulated in float32.

    Args:
        hidden: shape (B, T, D), floating: the states after the last norm.
        embedding: shape (vocab, D), floating. Its rows are the output vectors.
        targets: shape (B, T), integers in [0, vocab).
        weights: shape (B, T). A token of weight 0 adds nothing to the loss or to its gradients.
        chunk: tokens per chunk; None takes about 2**22 / vocab, and at least 512.
        sparse: whether few tokens have a weight other than 0. They are moved to the front then, and
            no logits are computed for the chunks behind them. The gradient with respect to a weight
            of 0 is then 0.

    Returns:
        The weighted sum of nats and the sum of weights, float32 scalars. The mean over a whole
        batch is their quotient, after both were added over devices and accumulation parts.

    Raises:
        ValueError: the shapes do not fit, or the chunk is below 1.
        TypeError: the targets are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> hidden, embedding = jnp.zeros((1, 3, 8)), jnp.ones((16, 8))
        >>> targets, weights = jnp.zeros((1, 3), int), jnp.ones((1, 3))
        >>> nats, weight = chunked_cross_entropy(hidden, embedding, targets, weights)
        >>> print(f"{nats / weight:.4f} nats a token, {jnp.log(16):.4f} expected")
        2.7726 nats a token, 2.7726 expected

    Source: beyond the paper.
    """
    _check(hidden, embedding, targets, weights, chunk)
    arrays = (hidden, embedding, targets, weights)
    hidden, embedding, targets, weights = vary_alike(arrays, (TOKENS,) * 4)
    tokens, (vocab, width) = targets.size, embedding.shape
    chunk = min(chunk or max(LEAST_CHUNK, LOGITS_PER_CHUNK // vocab), max(1, tokens))
    rows = [hidden.reshape(tokens, width), targets.reshape(tokens), weights.reshape(tokens)]
    used = None
    if sparse:
        order = jnp.argsort(rows[2] == 0, stable=True)
        rows = [jnp.take(x, order, axis=0, unique_indices=True, mode="clip") for x in rows]
        used = -(-jnp.sum(rows[2] != 0, dtype=jnp.int32) // chunk)
    padding = (0, -tokens % chunk)  # of weight 0
    chunks = (
        jnp.pad(x, [padding] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])
        for x in rows
    )
    hidden, targets, weights = chunks
    weights = weights.astype(jnp.float32)
    return _weighted_nats(hidden, embedding, targets, weights, used), jnp.sum(weights)


def _aligned(embedding: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the table in a dtype, with rows of zeros up to a multiple of `ALIGNMENT`."""
    return jnp.pad(embedding.astype(dtype), ((0, -embedding.shape[0] % ALIGNMENT), (0, 0)))


def _logits(hidden: jax.Array, table: jax.Array, vocab: int) -> jax.Array:
    """Computes the logits (C, V) in float32 from (C, D) and (V, D), with -inf from vocab on."""
    logits = jnp.einsum("cd,vd->cv", hidden, table, preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(table.shape[0]) < vocab, logits, -jnp.inf)


def _token_nats(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the nats of each token's target and the log of its partition sum, (C,) each."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    return log_total - jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0], log_total


def _weigh(nats: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.where(weights != 0, nats, 0.0) * weights


def _scan(step: Callable, carry: Any, chunks: Any, outputs: Any, used: jax.Array | None) -> Any:
    """Calls `jax.lax.scan`, or goes over the first chunks only and leaves the other outputs."""
    if used is None:
        return jax.lax.scan(step, carry, chunks)

    def one_chunk(i, state):
        carry, outputs = state
        carry, found = step(carry, jax.tree.map(lambda x: x[i], chunks))
        return carry, jax.tree.map(lambda x, y: x.at[i].set(y), outputs, found)

    return jax.lax.fori_loop(0, used, one_chunk, (carry, outputs))


@jax.custom_vjp
def _weighted_nats(hidden, embedding, targets, weights, used):
    """Adds up weighted nats. hidden is (chunks, C, D), targets and weights are (chunks, C).

    Only the first `used` chunks have weights, if it is not None.
    """
    table = _aligned(embedding, hidden.dtype)

    def one_chunk(carry, chunk):
        hidden, targets = chunk
        return carry, _token_nats(_logits(hidden, table, embedding.shape[0]), targets)[0]

    _, nats = _scan(one_chunk, (), (hidden, targets), jnp.zeros_like(weights), used)
    return jnp.sum(_weigh(nats, weights))


def _weighted_nats_fwd(hidden, embedding, targets, weights, used):
    vocab, table = embedding.shape[0], _aligned(embedding, hidden.dtype)

    def one_chunk(d_table, chunk):
        hidden, targets, weights = chunk
        logits = _logits(hidden, table, vocab)
        nats, log_total = _token_nats(logits, targets)
        hit = targets[:, None] == jnp.arange(table.shape[0])
        d_logits = jnp.exp(logits - log_total[:, None]) - hit
        d_logits = _weigh(d_logits, weights[:, None]).astype(hidden.dtype)
        d_hidden = d_logits @ table
        d_table += jnp.einsum("cv,cd->vd", d_logits, hidden, preferred_element_type=jnp.float32)
        return d_table, (d_hidden, nats)

    # What starts as zeros varies over the mesh axes of what it is made like.
    zeros, outputs = jnp.zeros_like(table, jnp.float32), (hidden, weights)
    d_table, (d_hidden, nats) = _scan(
        one_chunk, zeros, (hidden, targets, weights), jax.tree.map(jnp.zeros_like, outputs), used
    )
    d_embedding = d_table[:vocab].astype(embedding.dtype)
    d_weights = nats if used is None else jnp.where(weights != 0, nats, 0.0)
    return jnp.sum(_weigh(nats, weights)), (d_hidden, d_embedding, d_weights)


def _weighted_nats_bwd(residuals, cotangent):
    d_hidden, d_embedding, d_weights = ((cotangent * x).astype(x.dtype) for x in residuals)
    return d_hidden, d_embedding, None, d_weights, None


_weighted_nats.defvjp(_weighted_nats_fwd, _weighted_nats_bwd)


def _check(hidden, embedding, targets, weights, chunk) -> None:
    if hidden.ndim != 3 or embedding.ndim != 2 or hidden.shape[-1] != embedding.shape[-1]:
        raise ValueError(
            "hidden must be (B, T, D) and embedding (vocab, D) with one D; "
            f"got {hidden.shape} and {embedding.shape}"
        )
    if targets.shape != hidden.shape[:2] or weights.shape != hidden.shape[:2]:
        raise ValueError(
            f"targets and weights must have hidden's (B, T) {hidden.shape[:2]}; "
            f"got {targets.shape} and {weights.shape}"
        )
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"targets must be integers, got {targets.dtype}; pass token ids")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be >= 1, got {chunk}; pass None to let it be chosen")
