"""The optimizer of a run: AdamW with a schedule, clipping and selective decay.

In: an `OptimizerConfig` and the number of steps. Out: an optax transformation and its schedule.
Equation: p <- p - rate(step) (m / (sqrt(v) + eps) + decay p), after clipping by the global norm.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from race_jax.train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate by step: a linear warm-up, then cosine, linear or constant.

    Equation: `peak (step + 1) / (warmup + 1)` up to the warm-up's end, then `end + (peak - end) d`
    with d falling from 1 to 0 at the last step, as `(1 + cos(pi x)) / 2` or `1 - x`.

    Args:
        config: rates, schedule and warm-up.
        steps: length of the whole run, so that resuming does not move the schedule.

    Returns:
        A function of the step (0 for the first) that gives a float32 rate.

    Example:
        >>> from race_jax.train.config import OptimizerConfig
        >>> rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=1), steps=3)
        >>> [round(float(rate(step)), 4) for step in range(3)]
        [0.5, 1.0, 0.0]
    """
    peak, end, warmup = config.learning_rate, config.end_learning_rate, config.warmup_steps

    def rate(step: jax.Array) -> jax.Array:
        rising = peak * (step + 1) / (warmup + 1)
        x = jnp.clip((step - warmup) / max(1, steps - 1 - warmup), 0.0, 1.0)
        fall = {
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * x)),
            "linear": 1.0 - x,
            "constant": 1.0,
        }[config.schedule]
        return jnp.where(step < warmup, rising, end + (peak - end) * fall)

    return rate


def decay_mask(params: Any) -> Any:
    """True where weight decay applies: the kernels of linear maps.

    Biases and norm scales hold a level rather than a map, sharpness and gate biases a time scale,
    planes a scale that the hash depends on; the short convolution starts as the identity, and would
    be pulled from it; the rows of an embedding get gradients only when their token occurs, but
    would decay on every step.

    Args:
        params: a tree of parameters, named as Flax names them.

    Returns:
        A tree of bools like `params`.
    """

    def is_linear_map(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return any(name.endswith("kernel") and name != "conv_kernel" for name in names)

    return jax.tree_util.tree_map_with_path(is_linear_map, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then AdamW on float32 master parameters.

    Args:
        config: the checked settings.
        steps: length of the whole run, for the schedule.

    Returns:
        An optax transformation; its updates already hold the learning rate.
    """
    adamw = optax.adamw(
        make_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
