"""Bad arguments raise before any work is done, and the error shows the values and the way out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from race_jax import RACEState

B, T, N, K, H, V, L, P = 2, 5, 4, 2, 8, 3, 2, 3
F = L * 2**P


def arguments(**changed):
    """Returns good arguments of `race_attention`, with the given changes."""
    good = {
        "query": jnp.ones((B, T, N, H)),
        "key": jnp.ones((B, T, K, H)),
        "value": jnp.ones((B, T, K, V)),
        "planes": jnp.ones((L, P, H)),
    }
    return good | changed


def state(batch=B, kv_heads=K, features=F, value_dim=V):
    return RACEState.init(batch, kv_heads, features, value_dim)


def gate(value=-0.1, shape=(B, T, K)):
    return jnp.full(shape, value)


CAUSAL = {"is_causal": True}
RUNS = jnp.array([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]])

# By name: changed arguments, the error, and words of its message.
WRONG = {
    "query of rank 3": ({"query": jnp.ones((B, T, H))}, ValueError, ["query", "(2, 5, 8)"]),
    "key of rank 3": ({"key": jnp.ones((B, T, H))}, ValueError, ["key", "(2, 5, 8)"]),
    "value of rank 5": ({"value": jnp.ones((B, T, K, V, 1))}, ValueError, ["value", "3, 1)"]),
    "planes of rank 2": ({"planes": jnp.ones((P, H))}, ValueError, ["planes", "(3, 8)"]),
    "batches differ": ({"key": jnp.ones((3, T, K, H))}, ValueError, ["(3, 5, 2"]),
    "lengths of key, value": ({"value": jnp.ones((B, 6, K, V))}, ValueError, ["(2, 6, 2, 3)"]),
    "heads of key, value": ({"value": jnp.ones((B, T, 4, V))}, ValueError, ["(2, 5, 4, 3)"]),
    "heads do not divide": ({"query": jnp.ones((B, T, 3, H))}, ValueError, ["heads", "3", "2"]),
    "head dims differ": ({"query": jnp.ones((B, T, N, 6))}, ValueError, ["6", "8"]),
    "planes' head dim": ({"planes": jnp.ones((L, P, 6))}, ValueError, ["planes", "6", "8"]),
    "planes' heads": ({"planes": jnp.ones((3, L, P, H))}, ValueError, ["planes", "(3, 2, 3, 8)"]),
    "no planes": ({"planes": jnp.ones((L, 0, H))}, ValueError, ["planes", "0"]),
    "too many planes": ({"planes": jnp.ones((1, 11, H))}, ValueError, ["11", "10"]),
    "no tables": ({"planes": jnp.ones((0, P, H))}, ValueError, ["0"]),
    "sharpness 0": ({"sharpness": 0.0}, ValueError, ["sharpness", "0"]),
    "sharpness below 0": ({"sharpness": jnp.array([1, -2.5])}, ValueError, ["sharpness", "-2.5"]),
    "sharpness NaN": ({"sharpness": np.nan}, ValueError, ["sharpness", "nan"]),
    "sharpness a query head": (
        {"sharpness": jnp.ones(N)},
        ValueError,
        ["sharpness", "(4,)", "(2,)", "query head"],
    ),
    "sharpness of a list": ({"sharpness": [1.0, 2.0]}, TypeError, ["sharpness", "list", "asarray"]),
    "mask of a list": ({"key_value_mask": [[True] * T] * B}, TypeError, ["key_value_mask", "list"]),
    "segments of a list": ({"segment_ids": [[0] * T] * B}, TypeError, ["segment_ids", "list"]),
    "gate of a list": (CAUSAL | {"log_decay": [[[0.0] * K] * T] * B}, TypeError, ["log_decay"]),
    "state's segment": (
        CAUSAL | {"initial_state": dataclasses.replace(state(), segment=jnp.zeros(1, int))},
        ValueError,
        ["segment (1,)", "(2,)"],
    ),
    "state's segment of floats": (
        CAUSAL | {"initial_state": dataclasses.replace(state(), segment=jnp.zeros(B))},
        TypeError,
        ["segment", "float32"],
    ),
    "state's decay": (
        CAUSAL | {"initial_state": dataclasses.replace(state(), log_decay=jnp.zeros((3, K)))},
        ValueError,
        ["log_decay (3, 2)", "(2, 2)"],
    ),
    "sharpness of rank 2": ({"sharpness": jnp.ones((B, K))}, ValueError, ["sharpness", "(2, 2)"]),
    "gate above 0": (CAUSAL | {"log_decay": gate(0.25)}, ValueError, ["log_decay", "0.25"]),
    "gate of NaN": (CAUSAL | {"log_decay": gate(np.nan)}, ValueError, ["log_decay", "nan"]),
    "gate of -inf": (CAUSAL | {"log_decay": gate(-np.inf)}, ValueError, ["log_decay", "-inf"]),
    "gate's shape": (
        CAUSAL | {"log_decay": gate(shape=(B, T, N))},
        ValueError,
        ["log_decay", "(2, 5, 4)", "(2, 5, 2)"],
    ),
    "gate without causality": ({"log_decay": gate()}, ValueError, ["log_decay", "is_causal=True"]),
    "segments come back": (
        {"segment_ids": jnp.array([[5, 5, 5, 5, 5], [7, 4, 7, 7, 7]])},
        ValueError,
        ["segment_ids", "7", "row 1"],
    ),
    "negative segments": ({"segment_ids": RUNS - 1}, ValueError, ["segment_ids", "-1"]),
    "segments of floats": ({"segment_ids": RUNS * 1.0}, TypeError, ["segment_ids", "float32"]),
    "segments' shape": ({"segment_ids": RUNS[:, :3]}, ValueError, ["segment_ids", "(2, 3)"]),
    "segments with T != S": (
        {"segment_ids": RUNS, "query": jnp.ones((B, 3, N, H))},
        ValueError,
        ["segment_ids", "3", "5"],
    ),
    "causal with T != S": (
        CAUSAL | {"query": jnp.ones((B, 3, N, H))},
        ValueError,
        ["is_causal", "3", "5"],
    ),
    "dense mask": (
        {"key_value_mask": jnp.ones((B, T, T), bool)},
        ValueError,
        ["key_value_mask", "(2, 5, 5)", "is_causal=True", "segment_ids"],
    ),
    "dense mask with heads": (
        {"key_value_mask": jnp.ones((B, 1, T, T), bool)},
        ValueError,
        ["key_value_mask", "(2, 1, 5, 5)", "is_causal=True", "segment_ids"],
    ),
    "mask's shape": (
        {"key_value_mask": jnp.ones((B, 4), bool)},
        ValueError,
        ["key_value_mask", "(2, 4)", "(2, 5)"],
    ),
    "mask of integers": (
        {"key_value_mask": jnp.ones((B, T), jnp.int32)},
        TypeError,
        ["key_value_mask", "int32", "bool"],
    ),
    "integer query": ({"query": jnp.ones((B, T, N, H), int)}, TypeError, ["query", "int32"]),
    "integer value": ({"value": jnp.ones((B, T, K, V), int)}, TypeError, ["value", "int32"]),
    "a list for a query": ({"query": [[1.0]]}, TypeError, ["query", "list"]),
    "normalization": ({"normalization": "row"}, ValueError, ["row", "global", "bucket"]),
    "implementation": ({"implementation": "cuda"}, ValueError, ["cuda", "xla", "pallas"]),
    "state's value dim": ({"initial_state": state(value_dim=4)}, ValueError, ["(2, 2, 16, 4)"]),
    "state's features": ({"initial_state": state(features=8)}, ValueError, ["(2, 2, 8, 3)"]),
    "state's batch": ({"initial_state": state(batch=1)}, ValueError, ["(1, 2, 16, 3)"]),
    "state's heads": ({"initial_state": state(kv_heads=4)}, ValueError, ["(2, 4, 16, 3)"]),
    "a tuple for a state": ({"initial_state": (1, 2)}, TypeError, ["initial_state", "tuple"]),
    "bidirectional segments with a state": (
        {"segment_ids": RUNS, "initial_state": state()},
        ValueError,
        ["segment_ids", "initial_state", "is_causal=True"],
    ),
}


def refused(error, words, function, *args, **kwargs):
    """Asserts that a call raises this error, and that the message has these words."""
    with pytest.raises(error) as raised:
        function(*args, **kwargs)
    missing = [word for word in words if word not in str(raised.value)]
    assert not missing, f"{raised.value!s} does not say {missing}"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused(name):
    changed, error, words = WRONG[name]
    refused(error, words, race_jax.race_attention, **arguments(**changed))


def test_good_arguments_are_not():
    out = race_jax.race_attention(**arguments(segment_ids=RUNS, log_decay=gate(), **CAUSAL))
    assert out.shape == (B, T, N, V)


def test_junk_in_padded_slots_is_not_an_error():
    """Values that are checked, if they are concrete, are checked at tokens only."""
    mask = jnp.arange(T) < jnp.array([[3], [5]])
    junk = arguments(
        key_value_mask=mask,
        log_decay=gate().at[0, 3:].set(jnp.nan),
        segment_ids=RUNS.at[0, 3:].set(jnp.array([0, -7])),
        is_causal=True,
    )
    assert bool(jnp.all(jnp.isfinite(race_jax.race_attention(**junk))))


def test_values_are_not_looked_at_while_tracing():
    attend = jax.jit(
        lambda g, b: race_jax.race_attention(**arguments(log_decay=g, sharpness=b, is_causal=True))
    )
    assert attend(gate(), jnp.float32(2)).shape == (B, T, N, V)


@pytest.mark.parametrize(
    ("of_query", "of_key", "words"),
    [
        ((L + 1, P), (L, P), ["3", "2"]),
        ((L, P), (L, P - 1), ["3", "2"]),
        ((1, 11), (1, 11), ["11", "10"]),
        ((1, 0), (1, 0), ["0"]),
    ],
)
def test_wrong_projections_are_refused(of_query, of_key, words):
    z_q, z_k = jnp.ones((B, T, N, *of_query)), jnp.ones((B, T, K, *of_key))
    value = jnp.ones((B, T, K, V))
    refused(ValueError, words, race_jax.race_attention_from_projections, z_q, z_k, value)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"num_planes": 0}, ValueError, ["num_planes", "0"]),
        ({"num_planes": 11}, ValueError, ["num_planes", "11", "10"]),
        ({"num_tables": 0}, ValueError, ["num_tables", "0"]),
        ({"head_dim": 0}, ValueError, ["head_dim", "0"]),
        ({"num_kv_heads": 0}, ValueError, ["num_kv_heads", "0"]),
        ({"scale": 0.0}, ValueError, ["scale", "0"]),
        ({"orthogonal": True, "num_planes": 9}, ValueError, ["9", "8", "orthogonal"]),
        ({"dtype": jnp.int32}, TypeError, ["dtype", "int32"]),
    ],
    ids=str,
)
def test_init_planes_refuses(changed, error, words):
    good = {"num_tables": 2, "num_planes": 3, "head_dim": 8}
    refused(error, words, race_jax.init_planes, jax.random.key(0), **(good | changed))


def test_hash_functions_refuse():
    hash_projections, soft_hash = race_jax.hash_projections, race_jax.soft_hash
    planes, per_head = jnp.ones((L, P, H)), jnp.ones((K, L, P, H))
    refused(ValueError, ["6", "8"], hash_projections, jnp.ones((2, 6)), planes)
    refused(ValueError, ["3", "2"], hash_projections, jnp.ones((2, 5, 3, H)), per_head)
    z = jnp.ones((2, 3, L, P))
    refused(ValueError, ["sharpness", "(5,)", "(2, 3)"], soft_hash, z, jnp.ones(5))
    refused(ValueError, ["sharpness", "-1"], soft_hash, z, -1.0)
    refused(ValueError, ["11", "10"], soft_hash, jnp.ones((2, 3, 1, 11)), 1.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"phi_k": jnp.ones((B, T, K, 5))}, ["phi_k", "(2, 5, 2, 5)"]),
        ({"value": jnp.ones((B, T, K, 5))}, ["value", "(2, 5, 2, 5)"]),
        ({"log_decay": gate(shape=(B, T))}, ["log_decay", "(2, 5)"]),
        ({"key_value_mask": jnp.ones((B, T, T), bool)}, ["key_value_mask", "(2, 5, 5)"]),
        ({"segment_ids": jnp.ones((B, 2), int)}, ["segment_ids", "(2, 2)"]),
    ],
    ids=lambda x: next(iter(x)),
)
def test_state_update_refuses(changed, words):
    good = {"phi_k": jnp.ones((B, T, K, F)), "value": jnp.ones((B, T, K, V))}
    refused(ValueError, words, state().update, **(good | changed))


def test_state_read_and_merge_refuse():
    refused(ValueError, ["3", "2"], state().read, jnp.ones((B, T, 3, F)))
    refused(ValueError, ["phi_q", "(2, 5, 4, 5)"], state().read, jnp.ones((B, T, N, 5)))
    phi_q = jnp.ones((B, T, N, F))
    refused(ValueError, ["row", "global", "bucket"], state().read, phi_q, normalization="row")
    refused(ValueError, ["(2, 2, 8, 3)"], race_jax.merge, state(), state(features=8))
