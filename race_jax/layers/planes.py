"""The hash planes of an NNX layer, which are fixed, or a parameter if they are learned."""

from __future__ import annotations

from flax import nnx

from race_jax.layers.hash_options import HashOptions, warn_of_shared_planes


class HashPlanes(nnx.Variable):
    """Fixed hash planes, which are saved and restored with a model but not trained.

    ``nnx.state(model, HashPlanes)`` selects them, and ``nnx.state(model, nnx.Param)`` leaves them
    out.

    Example:
      >>> import race_jax
      >>> from flax import nnx
      >>> layer = race_jax.RACEAttention(2, 16, rngs=nnx.Rngs(0))
      >>> list(nnx.state(layer, race_jax.HashPlanes))
      ['planes']
    """


def planes_stream(rngs: nnx.Rngs) -> nnx.RngStream:
    """Returns the stream "planes" if there is one, else the default, else "params"."""
    return rngs.planes if "planes" in rngs or "default" in rngs else rngs.params


def make_planes(config: HashOptions, rngs: nnx.Rngs) -> nnx.Variable:
    """Draws the planes of a layer.

    Args:
      config: the options of the hash.
      rngs: random streams. Planes are drawn from `planes_stream`, and differ from layer to layer.

    Returns:
      `HashPlanes` ``(L, P, H)``, or a parameter of this shape if the planes are learned.
    """
    key = planes_stream(rngs)()
    warn_of_shared_planes(rngs.params.key[...], key)
    planes = config.draw_planes(key)
    return nnx.Param(planes) if config.learn_planes else HashPlanes(planes)
