"""What a training step changes, as one plain pytree.

In: a configuration and a mesh. Out: parameters, fixed variables (hash planes), optimizer moments
and the step on the devices, or their abstract shapes. Equation: none.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from race_jax.train.mesh import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The values that a step takes and returns.

    Attributes:
        params: the trained variables, as `nnx.split` gives them.
        fixed: every other variable of the model, hash planes above all.
        opt_state: the optimizer's moments.
        step: int32, the steps taken.
    """

    params: nnx.State
    fixed: nnx.State
    opt_state: Any
    step: jax.Array


def fresh_rngs(seed: int) -> nnx.Rngs:
    """The random streams of a fresh model; the hash planes have a stream of their own."""
    # A step brings its own dropout key, so that no stream has to be saved with the parameters.
    return nnx.Rngs(seed, planes=seed + 1)


def init_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[nnx.GraphDef, TrainState]:
    """The state at step 0, on the devices of `mesh`.

    Args:
        make_model: a fresh model from its random streams.
        seed: seed of the parameters.
        optimizer: the transformation whose moments the state holds.
        mesh: where the state lives.

    Returns:
        The graph definition and the state.
    """
    # Not under jit: layer after layer has the same shapes, which compile once this way.
    graph, params, fixed = nnx.split(make_model(fresh_rngs(seed)), nnx.Param, ...)
    state = TrainState(
        params=jax.device_put(params, sharding(mesh, "parameters")),
        fixed=jax.device_put(fixed, sharding(mesh, "parameters")),
        opt_state=jax.device_put(optimizer.init(params), sharding(mesh, "optimizer")),
        step=jax.device_put(jnp.zeros((), jnp.int32), sharding(mesh, "parameters")),
    )
    return graph, state
