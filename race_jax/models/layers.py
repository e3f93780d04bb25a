"""The parts of a transformer block that are not RACE: embedding, positions, MLP, softmax attention.

In: token ids and vectors of positions and masks, or hidden states (B, T, D). Out: (B, T, D).
Equations: MLP(x) = W_down gelu(W_up x); rotary and linear-bias positions at their functions.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from race_jax.core import masking
from race_jax.layers.softmax import softmax_attention

INIT_STD = 0.02  # of every table and kernel, as in GPT-2's code
ROPE_BASE = 10_000.0

kernel_init = nnx.initializers.normal(INIT_STD)


def token_positions(
    length: int,
    start: jax.Array,
    *,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    start_segment: jax.Array | None = None,
) -> jax.Array:
    """Each token's place in its own sequence: padding does not count, a new segment starts at 0.

    Args:
        length: number of tokens T.
        start: shape (B,) int32, how many tokens came before the first one.
        key_value_mask: shape (B, T) bool, or None for no padding.
        segment_ids: shape (B, T) integers, or None for one segment.
        start_segment: shape (B,) int32, the segment that ``start`` counts; needed with
            ``segment_ids``.

    Returns:
        Shape (B, T) int32; a padded slot repeats the place of the token before it.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.models.layers import token_positions
        >>> mask = jnp.array([[False, True, True, False, True]])
        >>> token_positions(5, jnp.zeros(1, jnp.int32), key_value_mask=mask).tolist()
        [[0, 0, 1, 1, 2]]
        >>> ids = jnp.array([[3, 3, 3, 4, 4]])
        >>> token_positions(
        ...     5, jnp.array([7]), segment_ids=ids, start_segment=jnp.array([3])
        ... ).tolist()
        [[7, 8, 9, 0, 1]]
    """
    shape = (start.shape[0], length)
    present = jnp.ones(shape, bool) if key_value_mask is None else key_value_mask
    count = jnp.cumsum(present, axis=1, dtype=jnp.int32)
    if segment_ids is None:
        return jnp.maximum(start[:, None] + count - 1, 0)
    ids = masking.fill_segments(segment_ids, key_value_mask, start_segment)
    previous = jnp.concatenate([start_segment[:, None], ids[:, :-1]], axis=1)
    # Tokens before the run that a slot stands in; -1 while the run is the one `start` counts.
    before = jax.lax.cummax(jnp.where(present & (ids != previous), count - 1, -1), axis=1)
    return jnp.maximum(count - 1 + jnp.where(before >= 0, -before, start[:, None]), 0)


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    r"""Rotary positions: turns pair i of a head by the angle :math:`p \cdot 10000^{-2i/H}`.

    Args:
        x: shape (B, T, N, H), H even; pair i is (x[i], x[i + H/2]).
        positions: shape (B, T) int32, p of each token.

    Returns:
        Shape (B, T, N, H), x's dtype; angles and products are float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.models.layers import rotate
        >>> rotate(jnp.ones((1, 1, 1, 2)), jnp.zeros((1, 1), jnp.int32)).tolist()
        [[[[1.0, 1.0]]]]

    Source: Su et al. 2021 (RoFormer), section 3.2.2.
    """
    half = x.shape[-1] // 2
    frequencies = ROPE_BASE ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def alibi_bias(num_heads: int, positions: jax.Array) -> jax.Array:
    r"""Linear biases: :math:`-2^{-8(n+1)/N} \, |p_t - p_s|` added to the logits of head n.

    Args:
        num_heads: number of query heads N.
        positions: shape (B, T) int32.

    Returns:
        Shape (B, N, T, T) float32.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.models.layers import alibi_bias
        >>> alibi_bias(2, jnp.array([[0, 3]]))[0, :, 1, 0].tolist()  # two heads, distance 3
        [-0.1875, -0.01171875]

    Source: Press et al. 2022 (ALiBi), section 3; their slopes for N a power of two.
    """
    slopes = 2.0 ** (-8.0 * jnp.arange(1, num_heads + 1, dtype=jnp.float32) / num_heads)
    distance = jnp.abs(positions[:, :, None] - positions[:, None, :]).astype(jnp.float32)
    return -slopes[None, :, None, None] * distance[:, None]


class TokenEmbedding(nnx.Module):
    """Token vectors, plus learned vectors of absolute positions where they are asked for.

    Args:
        vocab_size: number of tokens.
        width: width D.
        max_length: number of learned positions, or None for none.
        dtype: dtype of the output; the tables are float32.
        rngs: streams "params".

    Source: both tables are drawn N(0, 0.02^2), as GPT-2's (Radford et al. 2019).
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        *,
        max_length: int | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(INIT_STD)
        self.tokens = nnx.Param(init(rngs.params(), (vocab_size, width), jnp.float32))
        self.positions = (
            None
            if max_length is None
            else nnx.Param(init(rngs.params(), (max_length, width), jnp.float32))
        )
        self.dtype = dtype

    def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """Token ids and positions, both (B, T) int32, to (B, T, D).

        An id or a position outside its table gives NaN: loud, where clamping would be silent.
        """
        x = _look_up(self.tokens[...], tokens)
        if self.positions is not None:
            x += _look_up(self.positions[...], positions)
        return x.astype(self.dtype)


def _look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Rows of a table ``(number, D)``, NaN outside it; sharded as the row numbers are."""
    sharding = jax.typeof(rows).sharding
    sharded = None
    if any(sharding.spec):  # on an Explicit mesh JAX asks for the sharding of the result
        sharded = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))
    return table.at[rows].get(mode="fill", fill_value=jnp.nan, out_sharding=sharded)


class MLP(nnx.Module):
    """Two layers with a GELU between: (B, T, D) to (B, T, D).

    Args:
        width: width D.
        hidden_width: width between the layers.
        dtype: dtype of the computation; parameters are float32.
        out_kernel_init: of the second kernel.
        rngs: streams "params".
    """

    def __init__(
        self,
        width: int,
        hidden_width: int,
        *,
        dtype: jnp.dtype,
        out_kernel_init: nnx.Initializer,
        rngs: nnx.Rngs,
    ):
        self.up = nnx.Linear(width, hidden_width, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.down = nnx.Linear(
            hidden_width, width, dtype=dtype, kernel_init=out_kernel_init, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (B, T, D) to (B, T, D)."""
        return self.down(nnx.gelu(self.up(x)))


class SoftmaxAttention(nnx.Module):
    """Self-attention by softmax, with the parameters of `RACEAttention` by name and shape.

    Args:
        num_heads: query heads N.
        in_features: width D of the input and the output.
        num_kv_heads: key/value heads K.
        head_dim: width H of a head.
        positions: "rope" turns queries and keys, "alibi" biases the logits; else neither.
        dtype: dtype of the computation; parameters are float32.
        out_kernel_init: of the kernel of ``out``.
        implementation: as `race_jax.layers.softmax_attention` takes it.
        rngs: streams "params".
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int,
        head_dim: int,
        positions: str,
        dtype: jnp.dtype,
        out_kernel_init: nnx.Initializer,
        implementation: str | None,
        rngs: nnx.Rngs,
    ):
        def projection(heads: int) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                in_features, (heads, head_dim), dtype=dtype, kernel_init=kernel_init, rngs=rngs
            )

        self.query = projection(num_heads)
        self.key = projection(num_kv_heads)
        self.value = projection(num_kv_heads)
        self.out = nnx.LinearGeneral(
            (num_heads, head_dim),
            in_features,
            axis=(-2, -1),
            dtype=dtype,
            kernel_init=out_kernel_init,
            rngs=rngs,
        )
        self.num_heads = num_heads
        self.positions = positions
        self.implementation = implementation

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array,
        is_causal: bool,
        key_value_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, T, D) and positions (B, T) to (B, T, D)."""
        query, key, value = self.query(x), self.key(x), self.value(x)
        bias = None
        if self.positions == "rope":
            query, key = rotate(query, positions), rotate(key, positions)
        elif self.positions == "alibi":
            bias = alibi_bias(self.num_heads, positions)
        attended = softmax_attention(
            query,
            key,
            value,
            bias,
            is_causal=is_causal,
            key_value_mask=key_value_mask,
            segment_ids=segment_ids,
            implementation=self.implementation,
        )
        return self.out(attended)
