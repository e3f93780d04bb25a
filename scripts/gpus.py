"""The GPUs of this machine, without starting JAX."""

import subprocess
from collections.abc import Mapping


def visible_gpus(environment: Mapping[str, str]) -> list[str]:
    """Returns the names of the GPUs that JAX would use."""
    if (environment.get("JAX_PLATFORMS") or "cuda").split(",")[0] not in ("cuda", "gpu"):
        return []
    if (names := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in names.split(",") if name.strip()]
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return found.split()
