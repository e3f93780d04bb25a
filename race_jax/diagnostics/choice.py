"""A proposal for the number of planes, the number of tables, and the sharpness."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from race_jax.core import hashing
from race_jax.diagnostics import kernels

SHARPNESSES = (0.5, 1.0, 2.0, 4.0, 8.0)


class Trial(NamedTuple):
    """One choice, and how far its attention is from the target.

    Attributes:
      num_planes: P.
      num_tables: L.
      sharpness: beta.
      error: `distance` between its weights and those of the target, as a mean over draws of the
        planes.
    """

    num_planes: int
    num_tables: int
    sharpness: float
    error: float


class Suggestion(NamedTuple):
    """The best choice, and all that were tried.

    Attributes:
      best: the trial with the smallest error.
      trials: all trials, the best one first.
    """

    best: Trial
    trials: tuple[Trial, ...]

    def text(self, most: int = 5) -> str:
        """Returns the best choices in words, a line each.

        Args:
          most: the number of lines.
        """
        return "\n".join(
            f"P = {trial.num_planes}, L = {trial.num_tables}, beta {trial.sharpness:g}: "
            f"{trial.error:.3f} of the attention on wrong keys"
            for trial in self.trials[:most]
        )


def suggest(
    rng_key: jax.Array,
    query: jax.Array,
    key: jax.Array,
    *,
    features: int = 64,
    target: jax.Array | None = None,
    sharpnesses: Sequence[float] = SHARPNESSES,
    scale: float | None = None,
    use_tanh: bool = True,
    is_causal: bool = False,
    draws: int = 4,
) -> Suggestion:
    """Proposes P, L and beta for queries and keys of a calibration batch.

    Every P with 2^P <= features is tried, with as many tables as the budget allows,
    L = features // 2^P. The best choice has weights that are nearest to those of the target.

    All pairs of queries and keys are compared, so that time and memory grow with the square of the
    length. A few hundred tokens are enough.

    The proposal takes queries and keys as they are. A model that is trained with RACE from the
    start adapts them to the hash, so that the proposal is a place to start from.

    Args:
      rng_key: a ``jax.random`` key, from which planes are drawn.
      query: ``(B, T, N, H)``, for example of a trained softmax layer.
      key: ``(B, S, K, H)``.
      features: the budget F of L * 2^P features. State, memory and time grow with it.
      target: the kernel to come near to, ``(B, N, T, S)``. It is `softmax_kernel` if None.
      sharpnesses: the values of beta to try.
      scale: the standard deviation of the planes' entries, which is ``H**-0.5`` if None, as in
        `race_jax.RACEAttention`.
      use_tanh: whether projections go through tanh, as in the paper.
      is_causal: whether query t sees keys 0 to t only.
      draws: the number of draws of the planes that an error is the mean of.

    Returns:
      The best choice and all trials.

    Raises:
      ValueError: if the budget is below 2 features.

    Example:
      >>> x = jax.random.normal(jax.random.key(0), (1, 16, 1, 8))
      >>> found = suggest(jax.random.key(1), x, x, features=8, sharpnesses=(1.0, 4.0))
      >>> found.best.num_tables * 2**found.best.num_planes
      8
      >>> print(found.text(most=1))
      P = ..., L = ..., beta ...: 0... of the attention on wrong keys

    Source: beyond the paper.
    """
    if features < 2:
        raise ValueError(f"features must be at least 2, the buckets of one plane; got {features}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    want = kernels.softmax_kernel(query, key) if target is None else target
    want = kernels.attention_weights(want, is_causal=is_causal)
    betas = jnp.asarray(sharpnesses, jnp.float32)
    split = jax.random.split(rng_key, draws)

    def errors(num_planes: int, num_tables: int) -> jax.Array:
        """Returns the mean error over draws of the planes for each beta."""

        def of_one_draw(rng_key: jax.Array) -> jax.Array:
            planes = hashing.init_planes(
                rng_key,
                num_tables=num_tables,
                num_planes=num_planes,
                head_dim=query.shape[-1],
                scale=scale,
            )

            def error(beta: jax.Array) -> jax.Array:
                kernel = kernels.hash_kernel(query, key, planes, beta, use_tanh=use_tanh)
                got = kernels.attention_weights(kernel, is_causal=is_causal)
                return kernels.distance(got, want)

            return jax.lax.map(error, betas)

        return jax.jit(functools.partial(jax.lax.map, of_one_draw))(split).mean(axis=0)

    trials = []
    for num_planes in range(1, min(features.bit_length() - 1, hashing.MAX_PLANES) + 1):
        num_tables = features // 2**num_planes
        found = zip(sharpnesses, errors(num_planes, num_tables), strict=True)
        trials += [Trial(num_planes, num_tables, beta, float(error)) for beta, error in found]
    trials.sort(key=lambda trial: trial.error)
    return Suggestion(trials[0], tuple(trials))
