"""A run that compiles in seconds, with its configuration, a batch, a state and the step."""

import numpy as np

from race_jax.models import TransformerLM
from race_jax.train.config import Config
from race_jax.train.mesh import make_mesh, put_batch
from race_jax.train.optimizer import make_optimizer
from race_jax.train.state import init_state

VOCAB = 32


def small_config() -> Config:
    """Returns a configuration of one layer, two heads and windows of 24 tokens, on one device."""
    config = Config()
    config.model.num_layers = 1
    config.model.width = 16
    config.model.num_heads = 2
    config.model.race.num_tables = 2
    config.model.race.num_planes = 2
    config.data.sequence_length = 24
    config.optimizer.warmup_steps = 2
    config.run.steps = 40
    config.run.batch_size = 4
    config.mesh.data = 1
    return config


def small_batch(rows: int = 4) -> dict[str, np.ndarray]:
    """Random tokens with uneven weights, so that a mean over devices of means would show."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (rows, 25), np.int32)
    weights = np.ones((rows, 24), np.float32)
    weights[0, 5:] = 0.0
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights}


def small_parts(config: Config):
    """Returns the mesh, the optimizer, the graph, the state, and a batch on the mesh."""
    config = config.validate()
    mesh = make_mesh(config)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    graph, state = init_state(
        lambda rngs: TransformerLM(config.model, VOCAB, keep_rngs=False, rngs=rngs),
        config.run.seed,
        optimizer,
        mesh,
    )
    return mesh, optimizer, graph, state, put_batch(mesh, small_batch(config.run.batch_size))
