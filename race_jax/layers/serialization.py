"""``flax.serialization`` of a `RACEState`; imported by the modules that import Flax themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import serialization

from race_jax.core.state import RACEState


def _to_state_dict(state: RACEState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _from_state_dict(state: RACEState, stored: dict[str, Any]) -> RACEState:
    """The stored state; `state` gives the form, as Flax's targets do."""
    return dataclasses.replace(state, **stored)


serialization.register_serialization_state(
    RACEState, _to_state_dict, _from_state_dict, override=True
)
