"""The letters of every shape in this library, and jaxtyping aliases for them.

    B  batch                      L  hash tables
    T  query tokens               P  planes of a table
    S  key tokens                 R  corners (buckets) of a table, 2**P
    N  query heads                F  features, L * R
    K  key/value heads            C  tokens of a chunk
    G  query heads per key/value head, N / K
    H  head dim of queries and keys
    V  head dim of values

Inside ``race_jax/core/xla`` the head axes come first and the tokens of a chunk come after them, so
that matrix products batch over heads. The annotations are checked in tests only
(``pytest --jaxtyping-packages``) and cost nothing at run time. Public functions are annotated with
plain ``jax.Array``, because they check their arguments themselves and raise clearer errors.
"""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Float

QueryFeatures = Float[jax.Array, "B K G F C"]
KeyFeatures = Float[jax.Array, "B K F C"]
HeadValues = Float[jax.Array, "B K C V"]
HeadOutputs = Float[jax.Array, "B K G C V"]
HeadMass = Float[jax.Array, "B K G C"]
Weights = Float[jax.Array, "B K G C C"]

Numerator = Float[jax.Array, "B K F V"]
Mass = Float[jax.Array, "B K F"]
Sharpness = Float[jax.Array, "K"]

Axis = str | tuple[str, ...]  # the mesh axis, or axes, that split a sequence
Size = Any  # the size of an axis: an int, or a symbolic size of jax.export


def check_heads(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raises ValueError unless these are (B, T, N, H), (B, T, K, H) and (B, T, K, V)."""
    shapes = f"got query {query.shape}, key {key.shape}, value {value.shape}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must have 4 axes (B, T, heads, size); {shapes}")
    if key.shape[:3] != value.shape[:3] or query.shape[:2] != key.shape[:2]:
        raise ValueError(f"query, key and value must agree in (B, T), key and value in K; {shapes}")
    if query.shape[3] != key.shape[3] or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            f"query and key must have one width, and N must be a multiple of K; {shapes}"
        )
