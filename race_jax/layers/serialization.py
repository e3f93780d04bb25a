"""Registers `RACEState` with ``flax.serialization``, for modules that import Flax themselves."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import serialization

from race_jax.core.state import RACEState


def _to_state_dict(state: RACEState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _from_state_dict(state: RACEState, stored: dict[str, Any]) -> RACEState:
    """Returns the stored state. `state` is the target, in the sense of Flax."""
    return dataclasses.replace(state, **stored)


serialization.register_serialization_state(
    RACEState, _to_state_dict, _from_state_dict, override=True
)
