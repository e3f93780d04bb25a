"""The letters of every shape in this library, and jaxtyping aliases for them.

Comes in: nothing. Goes out: array types that internal signatures are annotated with.

    B  batch                      L  hash tables
    T  query tokens               P  planes of a table
    S  key tokens                 R  corners (buckets) of a table, 2**P
    N  query heads                F  features, L * R
    K  key/value heads            C  tokens of a chunk
    G  query heads a key/value head, N / K
    H  head dim of queries and keys
    V  head dim of values

The annotations are checked in tests only (``pytest --jaxtyping-packages``); at run time they cost
nothing. Public entry points are annotated plainly, because they check their arguments in words.
"""

from __future__ import annotations

import jax
from jaxtyping import Bool, Float, Int

Planes = Float[jax.Array, "*K L P H"]
Projections = Float[jax.Array, "*tokens L P"]
Features = Float[jax.Array, "*tokens F"]
PerHead = Float[jax.Array, "K"]

QueryProjections = Float[jax.Array, "B T N L P"]
KeyProjections = Float[jax.Array, "B S K L P"]
Values = Float[jax.Array, "B S K V"]
Outputs = Float[jax.Array, "B T N V"]
LogDecay = Float[jax.Array, "B S K"]
KeyMask = Bool[jax.Array, "B S"]
SegmentIds = Int[jax.Array, "B S"]

Numerator = Float[jax.Array, "B K F V"]
Mass = Float[jax.Array, "B K F"]
