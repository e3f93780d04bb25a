"""Layer normalization that reads its input once forward, and twice backward.

    y = (x - mean x) / sqrt(var x + epsilon) * scale + bias

Mean and variance are those of a token's features. They are computed in float32 or wider.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from race_jax.core.shards import TOKENS, vary_alike


class LayerNorm(nnx.LayerNorm):
    """``nnx.LayerNorm`` over the last axis, with its parameters and its results within rounding.

    The variance is the mean of squared differences from the mean, which XLA computes on a GPU with
    the values of a token in registers. The backward pass keeps x and computes mean and variance
    again, in the same pass over x as its own sums. It supports reverse mode, and forward mode over
    it, which ``jax.hessian`` takes.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from race_jax.models.norm import LayerNorm
        >>> LayerNorm(2, rngs=nnx.Rngs(0))(jnp.array([[1.0, 3.0]])).round(3).tolist()
        [[-1.0, 1.0]]

    Source: Ba, Kiros and Hinton 2016.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes x (..., D), in the dtype of the computation."""
        arrays = x, self.scale[...], self.bias[...]
        y = _normalize(*vary_alike(arrays, (TOKENS,) * 3), self.epsilon)
        return y.astype(self.dtype or y.dtype)


def _plain(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Returns y in float32 or wider."""
    wide = x.astype(jnp.result_type(x, scale, jnp.float32))
    centered = wide - wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(centered).mean(axis=-1, keepdims=True)
    normal = centered * jax.lax.rsqrt(variance + epsilon)
    return normal * _beside(x, scale) + _beside(x, bias)


_normalize = jax.custom_vjp(_plain, nondiff_argnums=(3,))


def _forward(x, scale, bias, epsilon) -> tuple[jax.Array, tuple]:
    return _plain(x, scale, bias, epsilon), (x, scale, bias)


def _backward(epsilon, residuals, d_y) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale, bias = residuals
    wide, d_normal = x.astype(d_y.dtype), d_y * _beside(x, scale)
    # Four means of one pass, none of which waits for another one. Differences are taken from the
    # first feature. It is at most sqrt(D - 1) standard deviations from the mean, so that digits are
    # kept however large the mean is.
    shifted = wide - wide[..., :1]
    mean = functools.partial(jnp.mean, axis=-1, keepdims=True)
    mean_x, mean_square = mean(shifted), mean(jnp.square(shifted))
    mean_d, mean_product = mean(d_normal), mean(d_normal * shifted)
    variance = jnp.maximum(mean_square - jnp.square(mean_x), 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    normal = (shifted - mean_x) * inverse
    along = (mean_product - mean_x * mean_d) * inverse  # the mean of d_normal * normal
    d_x = inverse * (d_normal - mean_d - normal * along)
    tokens = tuple(range(x.ndim - 1))
    d_scale, d_bias = (d_y * normal).sum(axis=tokens), d_y.sum(axis=tokens)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _beside(x: jax.Array, features: jax.Array) -> jax.Array:
    return jnp.expand_dims(features, tuple(range(x.ndim - 1)))


_normalize.defvjp(_forward, _backward)
