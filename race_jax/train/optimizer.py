"""The optimizer of a run: AdamW with a schedule, clipping and selective weight decay.

Equation: p <- p - rate(step) (m / (sqrt(v) + eps) + decay p), where m and v are Adam's moments of
the gradient, which is clipped by its global norm before.
"""

from typing import Any

import jax
import optax

from race_jax.train.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Makes the learning rate by step: a linear warm-up, then cosine, linear or constant.

    Equation: `peak (step + 1) / (warmup + 1)` for `step < warmup`, and then `end + (peak - end) d`.
    With `x = (step - warmup) / (steps - 1 - warmup)`, d is `(1 + cos(pi x)) / 2` for cosine and
    `1 - x` for linear. After the last step the rate stays `end`. A constant schedule stays `peak`.

    Args:
        config: learning rates, schedule and warm-up.
        steps: length of the whole run, so that a run that is resumed has the same schedule.

    Returns:
        A function of the step, which is 0 for the first one. Its results are float32.

    Example:
        >>> from race_jax.train.config import OptimizerConfig
        >>> rate = make_schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=1), steps=3)
        >>> [round(float(rate(step)), 4) for step in range(3)]
        [0.5, 1.0, 0.0]

    Source: `optax.schedules`.
    """
    peak, end, warmup = config.learning_rate, config.end_learning_rate, config.warmup_steps
    falling = max(1, steps - 1 - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, falling, alpha=end / peak),
        "linear": optax.linear_schedule(peak, end, falling),
        "constant": optax.constant_schedule(peak),
    }
    # The first step trains too, so its rate is above zero.
    rising = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rising, after[config.schedule]], [warmup])


def decay_mask(params: Any) -> Any:
    """Marks the parameters that weight decay applies to: the kernels of linear maps.

    All others do not decay:

    * biases and the scales of norms, which hold a level and not a map;
    * the biases of gates, which hold a time scale;
    * the sharpness and the planes, whose scale the hash depends on;
    * short convolutions, which start as the identity and would be pulled away from it;
    * the embedding, whose rows get gradients only when their token occurs, but would decay at
      every step.

    Args:
        params: a tree of parameters, named as Flax names them.

    Returns:
        A tree of bools with the structure of `params`.
    """

    def is_linear_map(path: tuple[Any, ...], _: Any) -> bool:
        names = [str(getattr(key, "key", getattr(key, "name", key))) for key in path]
        return any(name.endswith("kernel") and not name.endswith("conv_kernel") for name in names)

    return jax.tree_util.tree_map_with_path(is_linear_map, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Makes the optimizer: clipping by the global norm, then AdamW on float32 parameters.

    Args:
        config: the checked settings.
        steps: length of the whole run, for the schedule.

    Returns:
        An optax transformation. Its updates already contain the learning rate.

    Source: `optax.adamw`.
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
