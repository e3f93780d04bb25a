"""Compares the operation under shard_map on two devices with the operation on one device.

This file runs in a Python of its own, because the number of devices is fixed at first use.
"""

import functools

import jax
from jax.sharding import AxisType, PartitionSpec

import race_jax
from tests.conftest import compare
from tests.problems import STATE_FIELDS, evaluate, make_problem

FIELDS = (*STATE_FIELDS, "segment")
TOKENS = ("query", "key", "value", "log_decay", "out")
MODES = ({"is_causal": True, "gate": 0.2, "segments": 3, "padding": True}, {"padding": True})


def partition(axis: str) -> dict[str, PartitionSpec]:
    """How each argument and result is split when the batch, or the heads, are."""
    rows, whole = PartitionSpec("shards"), PartitionSpec()
    by_head, tables_by_head = PartitionSpec(None, None, "shards"), PartitionSpec(None, "shards")
    of_rows = ("key_value_mask", "segment_ids", "state.segment")
    tables = tuple(f"state.{name}" for name in STATE_FIELDS)
    if axis == "batch":
        split = dict.fromkeys((*TOKENS, *tables, *of_rows), rows)
        return split | dict.fromkeys(("planes", "sharpness"), whole)
    split = dict.fromkeys(TOKENS, by_head) | dict.fromkeys(tables, tables_by_head)
    return split | dict.fromkeys(("planes", "sharpness"), rows) | dict.fromkeys(of_rows, whole)


def flat(state) -> dict[str, jax.Array]:
    """The state's fields by name."""
    return {f"state.{name}": getattr(state, name) for name in FIELDS}


def sharded(axis, query, key, value, planes, *, initial_state, return_state, **options):
    """race_attention with its arguments split over two devices."""
    mesh = jax.make_mesh((2,), ("shards",), axis_types=(AxisType.Auto,))
    spec = partition(axis)
    static = {name: x for name, x in options.items() if name not in spec}
    arrays = {name: x for name, x in options.items() if name in spec}
    arrays |= {"query": query, "key": key, "value": value, "planes": planes} | flat(initial_state)

    def local(arrays):
        state = race_jax.RACEState(**{name: arrays.pop(f"state.{name}") for name in FIELDS})
        out, state = race_jax.race_attention(
            **arrays, **static, initial_state=state, return_state=return_state
        )
        return {"out": out} | flat(state)

    result = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=({name: spec[name] for name in arrays},),
        out_specs={name: spec[name] for name in ("out", *flat(initial_state))},
    )(arrays)
    out = result.pop("out")
    return out, race_jax.RACEState(**{name: result[f"state.{name}"] for name in FIELDS})


def on_explicit_mesh(axis, query, key, value, planes, *, initial_state, return_state, **options):
    """race_attention on arrays that lie over an Explicit mesh, which `jax.make_mesh` makes."""
    spec = partition(axis)
    arrays = {name: x for name, x in options.items() if name in spec}
    arrays |= {"query": query, "key": key, "value": value, "planes": planes} | flat(initial_state)
    arrays = {name: jax.sharding.reshard(x, spec[name]) for name, x in arrays.items()}
    state = race_jax.RACEState(**{name: arrays.pop(f"state.{name}") for name in FIELDS})
    static = {name: x for name, x in options.items() if name not in spec}
    out, state = race_jax.race_attention(
        **arrays, **static, initial_state=state, return_state=return_state
    )
    split = jax.typeof(out).sharding.spec
    assert split[0 if axis == "batch" else 2] == "shards", split
    return jax.sharding.reshard((out, state), PartitionSpec())


def main() -> None:
    """Compares outputs and gradients; prints a line for each comparison that held."""
    for mode in MODES:
        problem = make_problem(
            queries=70, heads=4, kv_heads=2, planes_per_head=True, state=True, **mode
        )
        want, want_gradients = evaluate(problem)
        for axis in ("batch", "heads"):
            got, gradients = evaluate(problem, functools.partial(sharded, axis))
            compare(f"{axis}: ", got, want, kind="resumed")
            compare(f"{axis}: ", gradients, want_gradients, kind="gradients")
            with jax.set_mesh(jax.make_mesh((2,), ("shards",))):
                got, gradients = evaluate(problem, functools.partial(on_explicit_mesh, axis))
            compare(f"{axis}, Explicit: ", got, want, kind="resumed")
            compare(f"{axis}, Explicit: ", gradients, want_gradients, kind="gradients")
            print(f"{axis} over {jax.device_count()} devices: equal")


if __name__ == "__main__":
    main()
