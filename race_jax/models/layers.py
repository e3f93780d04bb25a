"""The parts of a transformer other than attention: the embedding, positions and the MLP.

They map token ids, with vectors of positions and masks, or hidden states (B, T, D) to (B, T, D).

    MLP(x) = W_down gelu(W_up x)
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from race_jax.core import masking, shards

INIT_STD = 0.02  # of every table and kernel, as in GPT-2's code

kernel_init = nnx.initializers.normal(INIT_STD)

# The positions that every model can have, made by `TokenEmbedding`. Those that are part of an
# attention are named by its record, for instance `SoftmaxConfig.POSITIONS`.
POSITIONS = ("none", "learned")


def token_positions(
    length: int,
    start: jax.Array,
    *,
    key_value_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    start_segment: jax.Array | None = None,
) -> jax.Array:
    """Returns the position of each token in its own segment, where padding is not counted.

    Args:
        length: the number of tokens T.
        start: shape (B,) int32, the number of tokens before the first one.
        key_value_mask: shape (B, T) bool, or None for no padding.
        segment_ids: shape (B, T) integers, or None for one segment.
        start_segment: shape (B,) int32, the segment that ``start`` counts. It is needed with
            ``segment_ids``.

    Returns:
        Shape (B, T) int32. The first token of a new segment has position 0, and a padded slot has
        the position of the token before it.

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
    if key_value_mask is None and segment_ids is None:
        return start[:, None] + jnp.arange(length, dtype=jnp.int32)
    rows = functools.partial(_counted, start, start_segment)
    return shards.on_whole_rows(rows, key_value_mask, segment_ids)


def _counted(
    start: jax.Array,
    start_segment: jax.Array | None,
    key_value_mask: jax.Array | None,
    segment_ids: jax.Array | None,
) -> jax.Array:
    """``token_positions`` of rows with padding or several segments."""
    present = jnp.ones(segment_ids.shape, bool) if key_value_mask is None else key_value_mask
    count = jnp.cumsum(present, axis=1, dtype=jnp.int32)
    if segment_ids is None:
        return jnp.maximum(start[:, None] + count - 1, 0)
    ids = masking.fill_segments(segment_ids, key_value_mask, start_segment)
    first = jnp.arange(ids.shape[1]) == 0
    previous = jnp.where(first, start_segment[:, None], jnp.roll(ids, 1, axis=1))
    # The number of tokens before the run of each slot, or -1 in the run that `start` counts.
    before = jax.lax.cummax(jnp.where(present & (ids != previous), count - 1, -1), axis=1)
    return jnp.maximum(count - 1 + jnp.where(before >= 0, -before, start[:, None]), 0)


def per_row(numbers: jax.typing.ArrayLike, tokens: jax.Array) -> jax.Array:
    """Returns one number for each row of the batch, sharded as the rows of the tokens are.

    On a mesh with Explicit axes, and inside ``jax.shard_map``, arrays that are combined must be
    sharded alike. A sum over the tokens of a row is sharded as the rows are.

    Args:
        numbers: shape (B,) int32, or a single number.
        tokens: shape (B, T) integers.

    Returns:
        Shape (B,) int32, equal to `numbers`.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.models.layers import per_row
        >>> per_row(-1, jnp.ones((2, 3), jnp.int32)).tolist()
        [-1, -1]
    """
    zeros = jnp.zeros_like(tokens, jnp.int32).sum(axis=1, dtype=jnp.int32)
    return zeros + numbers


class TokenEmbedding(nnx.Module):
    """Token vectors and, if they are wanted, learned vectors of absolute positions.

    Both tables are drawn from N(0, 0.02^2).

    Args:
        vocab_size: the number of tokens.
        width: the width D.
        max_length: the number of learned positions, or None for none.
        dtype: the dtype of the output. The tables are float32.
        rngs: random streams; "params" is needed.

    Source: the initial values are those of GPT-2 (Radford et al. 2019).
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
        """Maps token ids and positions, both (B, T) int32, to (B, T, D).

        An id or a position outside its table gives NaN, because a clamped index would go unnoticed.
        """
        x = _look_up(self.tokens[...], tokens)
        if self.positions is not None:
            x += _look_up(self.positions[...], positions)
        return x.astype(self.dtype)


class ValueEmbedding(nnx.Module):
    """A projection of vectors, such as pixels, and learned positions if they are wanted.

    Args:
        channels: the width C of the vectors.
        width: the width D.
        max_length: the number of learned positions, or None for none.
        dtype: the dtype of the output. The parameters are float32.
        rngs: random streams; "params" is needed.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        max_length: int | None,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.project = nnx.Linear(channels, width, dtype=dtype, kernel_init=kernel_init, rngs=rngs)
        self.positions = (
            None
            if max_length is None
            else nnx.Param(kernel_init(rngs.params(), (max_length, width), jnp.float32))
        )

    def __call__(self, values: jax.Array, positions: jax.Array) -> jax.Array:
        """Maps vectors (B, T, C) and positions (B, T) int32 to (B, T, D)."""
        x = self.project(values)
        if self.positions is not None:
            x += _look_up(self.positions[...], positions).astype(x.dtype)
        return x


def _look_up(table: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows of a table ``(number, D)``, or NaN outside it, sharded as the numbers are."""
    sharding = jax.typeof(rows).sharding
    sharded = None
    if any(sharding.spec):  # JAX needs the sharding of the result on an Explicit mesh
        sharded = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))
    return table.at[rows].get(mode="fill", fill_value=jnp.nan, out_sharding=sharded)


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Applies the GELU in its form with tanh, as ``nnx.gelu`` does.

        gelu(x) = x s,   s = (1 + tanh u) / 2 = sigmoid(2 u),   u = sqrt(2 / pi) (x + 0.044715 x^3)
        gelu'(x) = s + 2 x s (1 - s) u',   u' = sqrt(2 / pi) (1 + 3 * 0.044715 x^2)

    The derivative is written out, so that the backward pass reads x and nothing else. Automatic
    differentiation would also keep the tanh, which is as large as x. The derivative is computed in
    float32 or wider.

    Args:
        x: any shape, floating.

    Returns:
        The same shape and dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> from race_jax.models.layers import gelu
        >>> [round(float(y), 4) for y in gelu(jnp.array([-1.0, 0.0, 1.0]))]
        [-0.1588, 0.0, 0.8412]

    Source: Hendrycks and Gimpel 2016.
    """
    return nnx.gelu(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x,), (d_x,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale, cubic, square = math.sqrt(2 / math.pi), 0.044715, wide * wide
    # A sigmoid and not a tanh: XLA would find the tanh of the forward pass again, and keep it.
    gate = jax.nn.sigmoid(2 * scale * wide * (1 + cubic * square))
    slope = gate + 2 * scale * wide * gate * (1 - gate) * (1 + 3 * cubic * square)
    return gelu(x), (slope * d_x).astype(x.dtype)


class MLP(nnx.Module):
    """Two linear layers with a GELU between them.

    Args:
        width: the width D of inputs and outputs.
        hidden_width: the width between the layers.
        dtype: the dtype of the computation. Parameters are float32.
        out_kernel_init: the initializer of the second kernel.
        rngs: random streams; "params" is needed.
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
        """Maps x (B, T, D) to (B, T, D)."""
        return self.down(gelu(self.up(x)))
