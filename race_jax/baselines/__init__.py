"""Other attentions behind the call signature of `race_attention`, for side-by-side tables.

In: query, key, value and what the method draws or learns (``aux``). Out: (B, T, N, V).
A method is a name in a config; what it cannot do raises NotImplementedError in one sentence.
"""

from race_jax.baselines.softmax import softmax_attention

__all__ = ["softmax_attention"]
