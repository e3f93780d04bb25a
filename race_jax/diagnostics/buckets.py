"""How the buckets of the tables are filled, and how far back a forgetting gate looks."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import hashing


class Buckets(NamedTuple):
    """How tokens are spread over the buckets of L tables.

    Attributes:
      share: the share of all tokens that falls into a bucket, ``(L, R)``. A row sums to one.
      entropy: the entropy of these shares in bits, ``(L,)``. It is P if all buckets are equally
        full, and 0 if one bucket holds everything.
      softness: the mean entropy of one token's phi in bits, ``(L,)``. It is 0 for a hard hash, and
        P for a hash that does not tell tokens apart.
      information: what a table tells about a token in bits, ``(L,)``: entropy - softness.
    """

    share: jax.Array
    entropy: jax.Array
    softness: jax.Array
    information: jax.Array


def buckets(
    x: jax.Array,
    planes: jax.Array,
    sharpness: jax.typing.ArrayLike = 1.0,
    *,
    use_tanh: bool = True,
) -> Buckets:
    """Measures how queries or keys are spread over the buckets.

    Args:
      x: queries or keys ``(..., H)``. All leading axes count as tokens.
      planes: ``(L, P, H)``.
      sharpness: beta > 0, which broadcasts to the leading axes of x, such as ``(K,)`` for keys
        ``(B, S, K, H)``.
      use_tanh: whether projections go through tanh, as in the paper.

    Returns:
      The shares of the buckets and three entropies of each table.

    Example:
      >>> found = buckets(jnp.array([[9.0], [-9.0]]), jnp.ones((1, 1, 1)), 20.0)  # hard signs
      >>> found.share.tolist(), found.entropy.item(), round(found.softness.item(), 6)
      ([[0.5, 0.5]], 1.0, 0.0)
    """
    phi = hashing.soft_hash(hashing.hash_projections(x, planes), sharpness, use_tanh=use_tanh)
    phi = phi.reshape(-1, planes.shape[0], phi.shape[-1] // planes.shape[0])
    share = phi.mean(axis=0)
    entropy, softness = _entropy(share), _entropy(phi).mean(axis=0)
    return Buckets(share, entropy, softness, entropy - softness)


def effective_context(log_decay: jax.Array) -> jax.Array:
    """Computes how many tokens a forgetting gate keeps: n_t = 1 + exp(g_t) n_{t-1}.

    It is the sum of the weights exp(G_t - G_s) of the tokens s up to t. A constant decay d tends to
    1 / (1 - d), and no decay gives t.

    Args:
      log_decay: ``(B, T, K)``, <= 0.

    Returns:
      ``(B, T, K)``, in tokens.

    Example:
      >>> import math
      >>> effective_context(jnp.full((1, 3, 1), math.log(0.5)))[0, :, 0].tolist()
      [1.0, 1.5, 1.75]

    Source: beyond the paper.
    """
    decay = jnp.exp(log_decay).at[:, :1].set(0.0)  # nothing comes before the first token

    def combine(
        earlier: tuple[jax.Array, jax.Array], later: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(combine, (decay, jnp.ones_like(decay)), axis=1)[1]


def _entropy(share: jax.Array) -> jax.Array:
    """Returns the entropy of the last axis in bits. An empty bucket adds nothing."""
    logs = jnp.log2(jnp.where(share > 0, share, 1.0))
    return -(share * logs).sum(axis=-1)
