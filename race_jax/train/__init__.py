"""Training: data, loss, optimizer, mesh, step, checkpoints and the loop that joins them."""

import importlib.util

_NEEDED = {  # module -> distribution
    "absl": "absl-py",
    "grain": "grain",
    "ml_collections": "ml_collections",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "tqdm": "tqdm",
}
_missing = [name for module, name in _NEEDED.items() if importlib.util.find_spec(module) is None]
if _missing:
    raise ModuleNotFoundError(
        f"race_jax.train needs {', '.join(_missing)}, which the extra 'train' installs: "
        "pip install 'race-jax[train]', or pip install -e '.[train]' in a copy of the project"
    )
