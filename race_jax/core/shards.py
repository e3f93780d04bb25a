"""How a call follows the sharding of its arguments, inside ``jax.shard_map`` and on a mesh.

RACE attention works on every row of the batch and every key/value head by itself. So where
arguments are sharded over Explicit mesh axes, each device runs the call on its own rows and heads,
and no device needs what another one holds. Inside ``jax.shard_map`` all arrays of a call are made
to vary over the same mesh axes, so that carries and buffers that are made from them do too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

TOKENS = "tokens"  # (B, T, N or K, ...)
ROWS = "rows"  # (B, ...)
HEADS = "heads"  # (K, ...)
TABLES = "tables"  # (B, K, ...)


def over_shards(
    run: Callable[[Any], Any], arrays: Any, axes: Any, out_axes: Any, *, kv_heads: int
) -> Any:
    """``run(arrays)``, on each device's part where arrays are sharded over Explicit mesh axes.

    Args:
      run: a function of the arrays that treats batch rows and key/value heads independently.
      arrays: a pytree of arrays; its tokens say how batch and heads are sharded.
      axes: TOKENS, ROWS, HEADS or TABLES for every array: a pytree of the same structure.
      out_axes: the same for what ``run`` returns.
      kv_heads: K. Heads are split only where K splits as evenly as the query heads do.

    Returns:
      What ``run`` returns, sharded as the batch and the heads of the arguments are.
    """
    mesh = _explicit_mesh(arrays)
    if mesh is None:
        return run(vary_alike(arrays, axes))
    batch, heads = _sharded_axes(arrays, axes, mesh, kv_heads)
    specs = {
        TOKENS: PartitionSpec(batch, None, heads),
        ROWS: PartitionSpec(batch),
        HEADS: PartitionSpec(heads),
        TABLES: PartitionSpec(batch, heads),
    }
    in_specs, out_specs = (jax.tree.map(specs.get, tree) for tree in (axes, out_axes))
    place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec))  # noqa: E731
    local = jax.shard_map(
        lambda arrays: run(vary_alike(arrays, axes)),
        mesh=mesh,
        in_specs=(in_specs,),
        out_specs=out_specs,
        axis_names=set(_explicit_axes(mesh)),
    )
    return local(jax.tree.map(place, arrays, in_specs))


def vary_alike(arrays: Any, kinds: Any) -> Any:
    """The arrays, varying alike over the mesh axes that any of them varies over (``shard_map``).

    Masks and segments, which are ROWS, stay as they are: they are in no carry, and the segment of
    the returned state should vary with the rows only.
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(arrays)))

    def vary(x: jax.Array, kind: str) -> jax.Array:
        if kind == ROWS:
            return x
        return jax.lax.pcast(x, tuple(sorted(axes - _varying(x))), to="varying")

    return jax.tree.map(vary, arrays, kinds)


def _varying(x: jax.Array) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def _explicit_axes(mesh: Any) -> tuple[str, ...]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def _explicit_mesh(arrays: Any) -> Any:
    """The mesh over whose Explicit axes an array is sharded, None if there is no such array."""
    for x in jax.tree.leaves(arrays):
        sharding = jax.typeof(x).sharding
        if any(set(_names(entry)) & set(_explicit_axes(sharding.mesh)) for entry in sharding.spec):
            return sharding.mesh
    return None


def _sharded_axes(arrays: Any, axes: Any, mesh: Any, kv_heads: int) -> tuple[Any, Any]:
    """The mesh axes that split the batch and those that split the heads."""
    tokens = functools.partial(_first_split, arrays, axes)
    batch = tokens(0)
    heads = tuple(name for name in tokens(2) if name not in batch)
    if kv_heads % math.prod(mesh.shape[name] for name in heads):
        heads = ()
    return batch or None, heads or None


def _first_split(arrays: Any, axes: Any, axis: int) -> tuple[str, ...]:
    """The mesh axes over which the first array of tokens that is split along ``axis`` is split."""
    for x, kind in zip(jax.tree.leaves(arrays), jax.tree.leaves(axes), strict=True):
        spec = jax.typeof(x).sharding.spec if kind == TOKENS else ()
        if axis < len(spec) and _names(spec[axis]):
            return _names(spec[axis])
    return ()


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    if isinstance(entry, str):
        return (entry,)
    return tuple(entry) if isinstance(entry, tuple) else ()
