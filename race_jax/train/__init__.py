"""Training: mesh, optimizer, step, checkpoints, and the loop that connects them, for any task."""

from race_jax.extras import require

require(
    "race_jax.train",
    "train",
    {
        "absl": "absl-py",
        "grain": "grain",
        "ml_collections": "ml_collections",
        "optax": "optax",
        "orbax": "orbax-checkpoint",
        "tqdm": "tqdm",
    },
)
