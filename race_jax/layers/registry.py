"""The attentions that a model can be built with, by name.

An attention is one file of this folder and one line of `ATTENTIONS`. The line names a Flax NNX
module that follows this protocol:

config_class   A frozen dataclass that is checked when it is made. It has those fields of `SHARED`
               that it needs, and the model fills them in. Its other fields are the method's own
               options, `config.model.NAME.*` on the command line. LAYER_ONLY names the fields that
               a model does not set. MODEL_DEFAULTS holds the defaults that differ in a model.
               POSITIONS names the positions that are part of the method, besides those that every
               model can have. ``describe(batch, length, is_packed, is_causal)`` returns two texts:
               what would run, and why. ``check_direction(is_causal)`` raises ValueError if the
               record does not go with a causal model, or with one that sees later tokens.
from_config    ``(config, *, is_causal, kernel_init, out_kernel_init, rngs)`` makes the layer. It
               calls ``check_direction``.
__call__       ``(x, *, positions, mask, segment_ids, is_causal, state, deterministic, rngs)``
               returns ``(B, T, D)``, or that and the next state if a state is given.
needs_rngs     only of a method that draws random numbers in a training step, whose calls then get
               a key as ``rngs``: whether this layer does.
set_view       only of a method that can work on a stretch of a sequence that is split over
               devices. It has an argument ``axis_name``, which ``nnx.view`` gives it.
init_state     ``(batch)`` returns the state before any token, a pytree whose leaves keep their
               shapes, or None if the method carries no state of fixed size.
init_cache     only of a method whose state grows with the length. ``(batch, capacity)`` returns the
               state before any token, with room for so many tokens a row.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import typing
from typing import Any

ATTENTIONS = {
    "race": "race_jax.layers.race.RACEAttention",
    "softmax": "race_jax.layers.softmax.SoftmaxAttention",
    "linear": "race_jax.layers.linear.LinearAttention",
    "performer": "race_jax.layers.performer.PerformerAttention",
    "sigmoid": "race_jax.layers.sigmoid.SigmoidAttention",
    "angular": "race_jax.layers.angular.AngularAttention",
    "linformer": "race_jax.layers.linformer.LinformerAttention",
    "gated_linear": "race_jax.layers.gated_linear.GatedLinearAttention",
    "gated_delta": "race_jax.layers.gated_delta.GatedDeltaAttention",
    "race_delta": "race_jax.layers.race_delta.RACEDeltaAttention",
    "sliding_window": "race_jax.layers.sliding_window.SlidingWindowAttention",
}
SHARED = (
    *("num_heads", "in_features", "num_kv_heads", "head_dim"),
    *("dtype", "positions", "rope_base", "max_length", "implementation"),
)


@functools.cache
def find(name: str) -> Any:
    """Returns the module class of an attention.

    Raises:
      ValueError: if there is no attention of this name.

    Example:
      >>> from race_jax.layers import registry
      >>> registry.find("softmax").__name__
      'SoftmaxAttention'
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention={name!r} is unknown; choose one of {list(ATTENTIONS)}.")
    module, _, kind = ATTENTIONS[name].rpartition(".")
    return getattr(importlib.import_module(module), kind)


def splits_sequences(name: str) -> bool:
    """Whether an attention can work on a stretch of a sequence that is split over devices.

    Such a method has ``axis_name`` among the arguments of its ``set_view``, which serves
    ``nnx.view``.

    Example:
      >>> from race_jax.layers import registry
      >>> registry.splits_sequences("race"), registry.splits_sequences("softmax")
      (True, False)
    """
    view = getattr(find(name), "set_view", None)
    return view is not None and "axis_name" in inspect.signature(view).parameters


@functools.cache
def options_class(name: str) -> type:
    """Returns a mutable dataclass of an attention's own options, which a command line can fill.

    `make_config` turns it into the frozen record, which is checked.
    """
    record = find(name).config_class
    kinds = typing.get_type_hints(record)
    hidden = {*SHARED, *record.LAYER_ONLY}
    fields = [
        (
            field.name,
            kinds[field.name],
            dataclasses.field(default=record.MODEL_DEFAULTS.get(field.name, field.default)),
        )
        for field in dataclasses.fields(record)
        if field.name not in hidden
    ]
    draft = dataclasses.make_dataclass(
        f"{record.__name__}Options", fields, namespace={"__module__": __name__}
    )
    draft.__doc__ = _documentation(record)
    globals()[draft.__name__] = draft  # pickle looks it up by this name
    return draft


def _documentation(record: type) -> str:
    """Returns a record's docstring, with the attributes of the records that it extends as well."""
    parts = [
        re.sub(r"\nRaises:.*", "", inspect.cleandoc(kind.__doc__), flags=re.DOTALL)
        .rstrip()
        .partition("Attributes:\n")
        for kind in record.__mro__
        if dataclasses.is_dataclass(kind)
    ]
    # A record comes after those that it extends, so that its words on a field are the last.
    texts = (text for _, _, text in reversed(parts))
    return "\n".join([parts[0][0].rstrip(), "", "Attributes:", *texts])


def add_options(model_config: type) -> type:
    """Adds a field of options for every attention to a class that becomes a dataclass."""
    for name in ATTENTIONS:
        kind = options_class(name)
        model_config.__annotations__[name] = kind
        setattr(model_config, name, dataclasses.field(default_factory=kind))
    return model_config


def make_config(name: str, options: Any, shared: dict[str, Any]) -> Any:
    """Returns the checked record of an attention.

    Args:
      name: the name of the attention.
      options: an instance of `options_class`. "none" counts as None if a field may be None.
      shared: a value for each name of `SHARED`.

    Raises:
      ValueError: if the method does not allow an option, which the message names.
    """
    record = find(name).config_class
    kinds = typing.get_type_hints(type(options))
    own = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    for field, value in own.items():
        if value == "none" and type(None) in typing.get_args(kinds[field]):
            own[field] = None
    names = {field.name for field in dataclasses.fields(record)}
    given = {field: value for field, value in shared.items() if field in names}
    return record(**given, **own)
