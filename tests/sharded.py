"""Compares the operation under shard_map on four devices with the operation on one device.

Two devices hold the rows of the batch, and two the heads.

This file runs in a Python of its own, because the number of devices is fixed at first use.
"""

import jax
from jax.sharding import AxisType, PartitionSpec

import race_jax
from tests.conftest import compare
from tests.problems import STATE_FIELDS, evaluate, make_problem

AXES = ("rows", "heads")
FIELDS = (*STATE_FIELDS, "segment")
TOKENS = ("query", "key", "value", "log_decay", "out")
MODES = ({"is_causal": True, "gate": 0.2, "segments": 3, "padding": True}, {"padding": True})


def partition() -> dict[str, PartitionSpec]:
    """How each argument and result is split."""
    rows, heads = PartitionSpec("rows"), PartitionSpec("heads")
    by_head = PartitionSpec("rows", None, "heads")
    tables = PartitionSpec("rows", "heads")
    return (
        dict.fromkeys(TOKENS, by_head)
        | dict.fromkeys((f"state.{name}" for name in STATE_FIELDS), tables)
        | dict.fromkeys(("planes", "sharpness"), heads)
        | dict.fromkeys(("key_value_mask", "segment_ids", "state.segment"), rows)
    )


def flat(state) -> dict[str, jax.Array]:
    """The state's fields by name."""
    return {f"state.{name}": getattr(state, name) for name in FIELDS}


def sharded(query, key, value, planes, *, initial_state, return_state, **options):
    """race_attention with its arguments split by hand."""
    mesh = jax.make_mesh((2, 2), AXES, axis_types=(AxisType.Auto, AxisType.Auto))
    spec = partition()
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


def on_explicit_mesh(query, key, value, planes, *, initial_state, return_state, **options):
    """race_attention on arrays that lie over an Explicit mesh, which `jax.make_mesh` makes."""
    spec = partition()
    arrays = {name: x for name, x in options.items() if name in spec}
    arrays |= {"query": query, "key": key, "value": value, "planes": planes} | flat(initial_state)
    arrays = {name: jax.sharding.reshard(x, spec[name]) for name, x in arrays.items()}
    state = race_jax.RACEState(**{name: arrays.pop(f"state.{name}") for name in FIELDS})
    static = {name: x for name, x in options.items() if name not in spec}
    out, state = race_jax.race_attention(
        **arrays, **static, initial_state=state, return_state=return_state
    )
    split = jax.typeof(out).sharding.spec
    assert split[:3] == ("rows", None, "heads"), split
    return jax.sharding.reshard((out, state), PartitionSpec())


def main() -> None:
    """Compares outputs and gradients; prints a line for each comparison that held."""
    for mode in MODES:
        problem = make_problem(
            queries=70, heads=4, kv_heads=2, planes_per_head=True, state=True, **mode
        )
        want, want_gradients = evaluate(problem)
        got, gradients = evaluate(problem, sharded)
        compare("shard_map: ", got, want, kind="resumed")
        compare("shard_map: ", gradients, want_gradients, kind="gradients")
        with jax.set_mesh(jax.make_mesh((2, 2), AXES)):
            got, gradients = evaluate(problem, on_explicit_mesh)
        compare("Explicit: ", got, want, kind="resumed")
        compare("Explicit: ", gradients, want_gradients, kind="gradients")
        print("batch and heads over 2 x 2 devices: equal")


if __name__ == "__main__":
    main()
