"""The state of a training run, which every step changes, as one plain pytree."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from race_jax.train.mesh import put_parameters, put_whole


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The values that a training step takes and returns.

    Attributes:
        params: the trained variables, as `nnx.split` returns them.
        fixed: all other variables of the model, such as the hash planes.
        opt_state: the state of the optimizer.
        step: number of steps taken, int32.
    """

    params: nnx.State
    fixed: nnx.State
    opt_state: Any
    step: jax.Array


def fresh_rngs(seed: int) -> nnx.Rngs:
    """Makes the random streams of a fresh model. The hash planes have a stream of their own."""
    # There is no stream for dropout: a training step makes its key, so no stream has to be saved.
    return nnx.Rngs(seed, planes=seed + 1)


def init_state(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    seed: int,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
) -> tuple[nnx.GraphDef, TrainState]:
    """Makes the state at step 0, on the devices of a mesh.

    Args:
        make_model: a function that makes a fresh model from its random streams.
        seed: seed of the parameters.
        optimizer: the optax transformation.
        mesh: the mesh on which the state is placed.

    Returns:
        The graph definition and the state.
    """
    # This is not under jit, so that layers of the same shapes are compiled only once.
    model = make_model(fresh_rngs(seed))
    graph, params, fixed = nnx.split(model, nnx.Param, ...)
    state = TrainState(
        params=put_parameters(mesh, params),
        fixed=put_whole(mesh, fixed),
        opt_state=put_parameters(mesh, optimizer.init(params)),
        step=put_whole(mesh, np.int32(0)),
    )
    return graph, state
