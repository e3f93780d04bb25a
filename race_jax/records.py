"""Checks for dataclass records of settings.

A record may be filled by hand, on the command line, or from JSON. The checks bring its values into
one normal form, or raise a ValueError that names the field by its dotted path.
"""

import dataclasses
import difflib
import math
import typing
from typing import Any


def fill(record: Any, values: dict[str, Any], path: str) -> None:
    """Sets the fields of the dataclass `record` and of its sections from nested dicts."""
    for name, value in values.items():
        current = getattr(record, name, None)
        if dataclasses.is_dataclass(current) and isinstance(value, dict):
            fill(current, value, f"{path}.{name}")
        else:
            setattr(record, name, value)


def check_fields(record: Any, path: str) -> None:
    """Raises ValueError for unknown fields and wrong types, and brings values into normal form."""
    names = [field.name for field in dataclasses.fields(record)]
    for name in vars(record):
        if name not in names:
            raise unknown_field(path, name, names)
    for name, kind in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ValueError(f"{path}.{name} must be a {kind.__name__}, got {value!r}")
            check_fields(value, f"{path}.{name}")
        else:
            setattr(record, name, _as_kind(value, kind, f"{path}.{name}"))


def unknown_field(path: str, name: str, names: list[str]) -> ValueError:
    """Returns the error for an unknown field of `path`. It suggests the nearest known name."""
    close = difflib.get_close_matches(name, names, n=1)
    fields = f"its fields are {', '.join(names)}" if names else f"{path} has no fields"
    return ValueError(
        f"{path}.{name} does not exist; " + (f"did you mean {close[0]}?" if close else fields)
    )


def _as_kind(value: Any, kind: Any, path: str) -> Any:
    """Returns `value` in the form of the annotation `kind`. Raises ValueError naming `path`."""
    kinds = typing.get_args(kind) if type(None) in typing.get_args(kind) else (kind,)
    if type(None) in kinds and (value is None or value in ("none", "None")):
        return None
    if typing.get_origin(kinds[0]) is tuple:
        return as_names(value, path)
    wanted = kinds[0]
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise ValueError(f"{path} must be {wanted.__name__}, got {value!r}")
    if wanted is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{path} must fit in 64 bits, got {value}")
    if wanted is float and not math.isfinite(value):
        raise ValueError(f"{path} must be finite, got {value}")
    return value


def as_names(value: Any, path: str) -> tuple[str, ...]:
    """Returns a tuple of names, from comma-separated text or from a tuple or list of names."""
    if isinstance(value, str):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    if not isinstance(value, (tuple, list)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path} must be a tuple of names or comma-separated text, got {value!r}")
    return tuple(name for name in value if name.strip())


def one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{path} must be one of {', '.join(allowed)}; got {value!r}")


def at_least(path: str, value: float, least: float) -> None:
    """Raises ValueError unless `value >= least`."""
    if value < least:
        raise ValueError(f"{path} must be >= {least}, got {value}")


def above_zero(path: str, value: float) -> None:
    """Raises ValueError unless `value > 0`."""
    if value <= 0:
        raise ValueError(f"{path} must be > 0, got {value}")
