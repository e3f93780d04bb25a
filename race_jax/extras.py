"""The optional packages that a part of the library needs, and what to install for them."""

import importlib.util


def require(part: str, extra: str, modules: dict[str, str]) -> None:
    """Raises ModuleNotFoundError if a package is missing. The message says what to install.

    Args:
        part: the part of the library that is imported.
        extra: the extra of this project that installs the packages.
        modules: the name of each module that is needed, with the name of its distribution.

    Example:
        >>> require("race_jax.core", "train", {"json": "json"})
    """
    missing = [name for module, name in modules.items() if not importlib.util.find_spec(module)]
    if missing:
        raise ModuleNotFoundError(
            f"{part} needs {', '.join(missing)}, which the extra '{extra}' installs: "
            f"pip install 'race-jax[{extra}]', or pip install -e '.[{extra}]' in a copy of the "
            "project"
        )
