"""A sequence that is split over devices equals the float64 oracle on the whole sequence.

Outputs, the returned state and every gradient are compared, under ``jax.shard_map`` with its
defaults and on an Explicit mesh.
"""

import contextlib
import functools

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import race_jax
from race_jax.core.xla import causal
from tests.problems import evaluate, make_problem, oracle

EVERYTHING = {
    "batch": 4, "heads": 4, "kv_heads": 2, "padding": True, "state": True, "gate": 0.2,
}  # fmt: skip
PROBLEMS = {
    "one token a device": {"is_causal": True, "queries": 4},
    "causal, all": {"is_causal": True, "queries": 148, "segments": 5} | EVERYTHING,
    "causal, one segment": {"is_causal": True, "queries": 148} | EVERYTHING,
    "bidirectional": {"queries": 20, "keys": 140, "padding": True, "state": True, "batch": 4},
}
STATE = race_jax.RACEState(P("data"), P("data"), P("data"), P("data"))


def mesh(kind, data=1, seq=4):
    devices = jax.devices()[: data * seq]
    return jax.make_mesh((data, seq), ("data", "seq"), axis_types=(kind, kind), devices=devices)


def specs(arrays):
    """Tokens and masks are split along the sequence, the rest is not."""
    tokens = P("data", "seq")
    split = ("query", "key", "value", "log_decay", "key_value_mask", "segment_ids")
    found = {name: tokens if name in split else P() for name in arrays}
    return found | ({"initial_state": STATE} if "initial_state" in arrays else {})


def separate(arguments):
    """The arrays among the arguments, and the others."""
    names = ("is_causal", "normalization", "implementation", "return_state", "axis_name")
    static = {name: arguments.pop(name) for name in names if name in arguments}
    return arguments, static


def by_shard_map(check_vma, data, seq, **arguments):
    """race_attention with the sequence split by hand."""
    arrays, static = separate(arguments)
    whole = mesh(AxisType.Auto, data, seq)
    out = P("data", "seq"), STATE
    run = jax.shard_map(
        lambda arrays: race_jax.race_attention(**arrays, **static, axis_name="seq"),
        mesh=whole,
        in_specs=(specs(arrays),),
        out_specs=out if static.get("return_state") else out[0],
        check_vma=check_vma,
    )
    return run(arrays)


def on_explicit_mesh(data, seq, **arguments):
    """race_attention with arguments that are sharded along the sequence, and nothing else."""
    arrays, static = separate(arguments)
    whole = mesh(AxisType.Explicit, data, seq)
    place = lambda x, spec: jax.sharding.reshard(x, NamedSharding(whole, spec))  # noqa: E731
    arrays = {name: jax.tree.map(place, arrays[name], spec) for name, spec in specs(arrays).items()}
    result = race_jax.race_attention(**arrays, **static)
    out = result[0] if static.get("return_state") else result
    assert jax.typeof(out).sharding.spec[:2] == ("data", "seq")
    return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(whole, P())), result)


SPLITS = {
    "shard_map": functools.partial(by_shard_map, True, 1, 4),
    "shard_map, 2 x 2": functools.partial(by_shard_map, True, 2, 2),
    "shard_map, check_vma=False": functools.partial(by_shard_map, False, 1, 4),
    "explicit, 2 x 4": functools.partial(on_explicit_mesh, 2, 4),
}


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("causal, all", "shard_map"),
        pytest.param("causal, all", "shard_map, 2 x 2", marks=pytest.mark.once),
        ("causal, all", "shard_map, check_vma=False"),
        ("causal, all", "explicit, 2 x 4"),
        pytest.param("one token a device", "shard_map, 2 x 2", marks=pytest.mark.once),
        pytest.param("causal, one segment", "shard_map, 2 x 2", marks=pytest.mark.once),
        ("bidirectional", "shard_map, 2 x 2"),
        ("bidirectional", "explicit, 2 x 4"),
    ],
)
def test_outputs_and_gradients_match_the_oracle(name, split, monkeypatch, assert_close):
    monkeypatch.setattr(causal, "BLOCK", 16)  # several spans a device
    problem = make_problem(**{"batch": 2} | PROBLEMS[name])
    want, want_gradients = oracle(problem)
    with contextlib.ExitStack() as stack:
        if split.startswith("explicit"):
            stack.enter_context(jax.set_mesh(mesh(AxisType.Explicit, 2, 4)))
        got, gradients = evaluate(problem, SPLITS[split])
    assert_close("", got, want, kind="outputs")
    assert_close("", gradients, want_gradients, kind="gradients")
