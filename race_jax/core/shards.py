"""Sharded arguments: how a call runs on a mesh, and inside ``jax.shard_map``.

RACE attention treats every row of the batch and every key/value head independently. If arguments
are sharded over Explicit mesh axes, each device therefore runs the call on its own rows and heads,
and no device needs data of another. If the sequence is sharded too, each device runs the call on
its own stretch of tokens, and the devices exchange states only (``sequence.py``).

Inside ``jax.shard_map``, all arrays of a call are made to vary over the same mesh axes. Loop
carries and buffers that are made from them then vary alike too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

TOKENS = "tokens"  # (B, T, N or K, ...)
SLOTS = "slots"  # (B, T or S)
ROWS = "rows"  # (B, ...)
HEADS = "heads"  # (K, ...)
TABLES = "tables"  # (B, K, ...)
SHARED = "shared"  # one for all rows and heads


def over_shards(
    run: Callable[[Any, Any], Any],
    arrays: Any,
    axes: Any,
    out_axes: Any,
    *,
    kv_heads: int,
    axis_name: Any = None,
    splits_sequence: bool = True,
) -> Any:
    """Returns ``run(arrays, axis_name)``, per device if arrays are sharded over Explicit mesh axes.

    Args:
      run: a function that treats batch rows and key/value heads independently. Its second argument
        names the mesh axis that splits the sequence, or is None.
      arrays: a pytree of arrays. Those of kind TOKENS determine how the axes are sharded.
      axes: TOKENS, SLOTS, ROWS, HEADS, TABLES or SHARED for every array, in a pytree of the same
        structure.
      out_axes: the same for what ``run`` returns.
      kv_heads: K. Heads are split only if the mesh axes that split the query heads divide K.
      axis_name: the axis that the caller gave, inside a ``jax.shard_map`` of its own.
      splits_sequence: whether ``run`` can work on a stretch of the sequence. If not, every device
        gets the whole sequence.

    Returns:
      What ``run`` returns, sharded as the batch and the heads of the arguments are.

    Raises:
      ValueError: if there is no ``jax.shard_map`` with the axis ``axis_name`` around the call.
    """
    _check_inside(axis_name)
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return run(vary_alike(arrays, axes, axis_name), axis_name)
    batch, stretch, heads = _sharded_axes(arrays, axes, mesh, kv_heads)
    if not splits_sequence or not _divides(stretch, mesh, arrays, axes):
        stretch = None
    # The Explicit axes split what each device of the caller's axis has.
    splits = (*_names(axis_name), *_names(stretch)) or None
    specs = {
        TOKENS: PartitionSpec(batch, stretch, heads),
        SLOTS: PartitionSpec(batch, stretch),
        ROWS: PartitionSpec(batch),
        HEADS: PartitionSpec(heads),
        TABLES: PartitionSpec(batch, heads),
        SHARED: PartitionSpec(),
    }
    in_specs, out_specs = (jax.tree.map(specs.get, tree) for tree in (axes, out_axes))
    place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
    local = jax.shard_map(
        lambda arrays: run(vary_alike(arrays, axes, splits), splits),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        axis_names=set(_explicit_axes(mesh)),
    )
    return local(jax.tree.map(place, arrays, in_specs))


def vary_alike(arrays: Any, kinds: Any, axis_name: Any = None) -> Any:
    """Makes arrays vary over all mesh axes that any of them varies over (``jax.shard_map``).

    They also vary over ``axis_name``, because every device has its own stretch of the sequence.
    Masks and segments, which are SLOTS and ROWS, vary only over the mesh axes of one another, so
    that the segment of the returned state varies with the rows of the batch and not with the heads.
    """
    pairs = list(zip(jax.tree.leaves(arrays), jax.tree.leaves(kinds), strict=True))
    every = frozenset(_names(axis_name)).union(*(_varying(x) for x, _ in pairs))
    rows = frozenset().union(*(_varying(x) for x, kind in pairs if kind in (SLOTS, ROWS)))

    def vary(x: jax.Array, kind: str) -> jax.Array:
        axes = rows if kind in (SLOTS, ROWS) else every
        return jax.lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying")

    return jax.tree.map(vary, arrays, kinds)


def on_whole_rows(run: Callable[..., jax.Array], *slots: jax.Array | None) -> jax.Array:
    """Returns ``run(*slots)``, where the arrays are not sharded along the sequence.

    Sums along the sequence, such as counts of tokens, need whole rows. On an Explicit mesh that
    splits the sequence the rows are gathered, and the result is sharded as the first array was.

    Args:
      run: a function of arrays ``(B, T)``.
      *slots: ``(B, T)`` each, or None.
    """
    mesh = _explicit_mesh([x for x in slots if x is not None])
    if mesh is None:
        return run(*slots)
    specs = [None if x is None else jax.typeof(x).sharding.spec for x in slots]
    place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
    pairs = zip(slots, specs, strict=True)
    rows = [x if x is None else place(x, PartitionSpec(spec[0])) for x, spec in pairs]
    return place(run(*rows), next(spec for spec in specs if spec is not None))


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _explicit_mesh(arrays: Any) -> Any:
    """Returns the mesh over whose Explicit axes some array is sharded, or None."""
    for x in jax.tree.leaves(arrays):
        sharding = jax.typeof(x).sharding
        if any(set(_names(entry)) & set(_explicit_axes(sharding.mesh)) for entry in sharding.spec):
            return sharding.mesh
    return None


def _sharded_axes(arrays: Any, axes: Any, mesh: Any, kv_heads: int) -> tuple[Any, Any, Any]:
    """Returns the mesh axes that split the batch, the sequence and the heads."""
    tokens = functools.partial(_first_split, arrays, axes)
    batch = tokens(0)
    stretch = tuple(name for name in tokens(1) if name not in batch)
    heads = tuple(name for name in tokens(2) if name not in batch + stretch)
    if kv_heads % math.prod(mesh.shape[name] for name in heads):
        heads = ()
    return batch or None, stretch or None, heads or None


def _check_inside(axis_name: Any) -> None:
    """Checks that the axes of the caller are those of a ``jax.shard_map`` around the call."""
    bound = jax.sharding.get_abstract_mesh().manual_axes
    if not set(_names(axis_name)) <= set(bound):
        raise ValueError(
            f"axis_name={axis_name!r} must name axes of a jax.shard_map around the call, which has "
            f"{bound or 'none'}; leave axis_name out, or call inside jax.shard_map"
        )


def _divides(stretch: Any, mesh: Any, arrays: Any, axes: Any) -> bool:
    """Returns whether the mesh axes divide the length of every array of tokens."""
    devices = math.prod(mesh.shape[name] for name in _names(stretch))
    pairs = zip(jax.tree.leaves(arrays), jax.tree.leaves(axes), strict=True)
    return all(x.shape[1] % devices == 0 for x, kind in pairs if kind in (TOKENS, SLOTS))


def _first_split(arrays: Any, axes: Any, axis: int) -> tuple[str, ...]:
    """Returns the mesh axes that split ``axis`` of the tokens.

    All arrays of tokens are searched in order; the first that is split along ``axis`` decides.
    """
    for x, kind in zip(jax.tree.leaves(arrays), jax.tree.leaves(axes), strict=True):
        spec = jax.typeof(x).sharding.spec if kind == TOKENS else ()
        if axis < len(spec) and _names(spec[axis]):
            return _names(spec[axis])
    return ()


def _names(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()
