"""What the soft hash of given queries and keys does: how exact it is, and how it uses its buckets.

kernels    the exact kernels that the hash estimates, and its error by the number of tables
buckets    how full the buckets are, and how far back a forgetting gate looks
choice     a proposal for P, L and beta
figure     what was found, as SVG
layer      the queries, keys and gate of a layer, and a report of them

The functions take queries ``(B, T, N, H)`` and keys ``(B, S, K, H)``, as `race_jax.race_attention`
does. They compare all pairs of tokens, so that a few hundred tokens are enough and many thousands
are too many. docs/choosing.md is the guide.
"""

from race_jax.diagnostics.buckets import Buckets, buckets, effective_context
from race_jax.diagnostics.choice import Suggestion, Trial, suggest
from race_jax.diagnostics.figure import draw
from race_jax.diagnostics.kernels import (
    Errors,
    angular_kernel,
    attention_weights,
    distance,
    errors_by_tables,
    hash_kernel,
    soft_kernel,
    softmax_kernel,
)
from race_jax.diagnostics.layer import Heads, Report, heads_of, layers_of, report

__all__ = [
    "Buckets",
    "Errors",
    "Heads",
    "Report",
    "Suggestion",
    "Trial",
    "angular_kernel",
    "attention_weights",
    "buckets",
    "distance",
    "draw",
    "effective_context",
    "errors_by_tables",
    "hash_kernel",
    "heads_of",
    "layers_of",
    "report",
    "soft_kernel",
    "softmax_kernel",
    "suggest",
]
