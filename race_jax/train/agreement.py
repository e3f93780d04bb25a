"""What all processes of a run must have alike: its folder, its configuration and its data.

A run of one process has nothing to compare.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any

import jax

from race_jax.train import processes
from race_jax.train.config import Config
from race_jax.train.files import differences, look_up

# Fields that each process may have for itself.
OWN_FIELDS = frozenset(
    f"config.{name}"
    for name in "mesh.process mesh.coordinator data.root data.num_workers run.directory "
    "run.max_seconds run.tensorboard run.compilation_cache".split()
)
LATEST = 10.0  # seconds until a new file is seen on another machine


def check_folder(path: Path) -> None:
    """Checks that the folder of a run is one folder for all of its processes.

    Without this, the processes would wait for each other in the first checkpoint for ever.

    Args:
        path: the folder, as this process names it.

    Raises:
        ValueError: a process does not see what the first one writes.
    """
    if not processes.are_several():
        return
    file = path / processes.text_of_first(f".seen-{secrets.token_hex(8)}")
    if processes.is_first():
        file.touch()
    processes.wait("the first process has written to the run directory")
    sees = _appears(file)
    all_see = not processes.any_of(not sees)
    if processes.is_first():
        file.unlink()
    if all_see:
        return
    where = f"config.run.directory {path}"
    way_out = "give a folder that all processes of the run share"
    if sees:
        raise ValueError(f"another process does not share {where}; {way_out}")
    raise ValueError(
        f"process {jax.process_index()} does not find what the first one has written to {where}; "
        f"{way_out}"
    )


def _appears(file: Path) -> bool:
    end = time.monotonic() + LATEST
    while not file.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def check_same(config: Config, digests: dict[str, str]) -> None:
    """Checks that all processes of a run train with the same values on the same data.

    Args:
        config: the checked configuration of this process.
        digests: for all content that affects what is learned, its digest, as `files.claim` takes
            them.

    Raises:
        ValueError: a process has another value or another file than the first one. It names both.
    """
    if not processes.are_several():
        return
    text = json.dumps({"config": config.to_dict(), "digests": digests})
    here, there = json.loads(text), json.loads(processes.text_of_first(text))
    found = [name for name in differences(there, here) if name not in OWN_FIELDS]
    someone_differs = processes.any_of(bool(found))
    if found:
        raise ValueError(
            f"process {jax.process_index()} differs from the first one: "
            f"{'; '.join(_both(name, there, here) for name in found)}. Give all processes of a run "
            "the same values and files"
        )
    if someone_differs:
        raise ValueError(
            "another process of this run has other values or files than the first one, and says "
            "which; give all of them the same"
        )


def _both(name: str, there: dict[str, Any], here: dict[str, Any]) -> str:
    section, _, content = name.partition(".")
    first, own = look_up(there, name), look_up(here, name)
    if section == "digests":
        return f"{content} has the sha256 {first} there and {own} here"
    return f"{name} is {first!r} there and {own!r} here"
