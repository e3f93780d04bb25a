"""Causal outputs do not depend on later tokens, neither in value nor by their derivative."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import race_jax
from tests.problems import call, make_problem, outputs, to_device

LENGTH = 130  # several chunks of the usual sizes
TOKENS = ("query", "key", "value", "log_decay")


@pytest.mark.parametrize("normalization", ["global", "bucket"])
def test_changing_the_future_changes_nothing_before_it(normalization, rng, assert_close):
    problem = make_problem(
        queries=LENGTH,
        is_causal=True,
        gate=0.1,
        state=True,
        segments=2,
        padding=True,
        normalization=normalization,
    )
    want = outputs(problem)["out"]
    for t in (1, 63, 64, 65, 100, LENGTH - 1):
        changed = {}
        for name in TOKENS:
            changed[name] = problem.arrays[name].copy()
            changed[name][:, t:] = -1e3 * np.abs(rng.normal(size=changed[name][:, t:].shape))
        changed["segment_ids"] = problem.masks["segment_ids"].copy()
        changed["segment_ids"][:, t:] += 5
        changed["key_value_mask"] = problem.masks["key_value_mask"].copy()
        changed["key_value_mask"][:, t:] ^= True
        got = outputs(problem.replace(**changed))["out"]
        assert_close(f"out before {t}", got[:, :t], want[:, :t], kind="rerun")
        assert np.any(got[:, t:] != want[:, t:])


def jacobian(problem, names):
    """Returns, by the name of x, the maximum of |d out_t / d x_s| over all other axes: (T, S)."""
    probe = jnp.asarray(np.random.default_rng(0).normal(size=problem.cotangents["out"].shape[2:]))

    @jax.jit
    def rows(problem):
        def probed(arrays):
            arrays = problem.arrays | arrays
            out = call(race_jax.race_attention, dataclasses.replace(problem, arrays=arrays))["out"]
            return jnp.einsum("tnv,nv->t", out[0], probe)

        jacobians = jax.jacrev(probed)({name: problem.arrays[name] for name in names})
        return {
            n: jnp.abs(x[:, 0]).reshape(*x.shape[:1], x.shape[2], -1).max(-1)
            for n, x in jacobians.items()
        }

    return jax.device_get(rows(to_device(problem)))


# jaxlib 0.10.2 crashes in a YNNPACK fusion of this vmapped gradient. It passes without these
# fusions, and on jaxlib 0.11. The test by perturbation covers this form on both.
BUCKET = pytest.param(
    "bucket",
    marks=pytest.mark.skipif(
        jax.__version_info__ < (0, 11), reason="jaxlib 0.10.2 crashes in its own CPU fusion"
    ),
)


@pytest.mark.parametrize("normalization", ["global", BUCKET])
def test_derivative_with_respect_to_the_future_is_exactly_zero(normalization):
    problem = make_problem(
        batch=1, queries=LENGTH, is_causal=True, gate=0.01, normalization=normalization
    )
    past, own = np.tril(np.ones((LENGTH, LENGTH), bool)), np.eye(LENGTH, dtype=bool)
    for name, derivative in jacobian(problem, TOKENS).items():
        assert not np.any(derivative[~past]), f"d out / d {name}"
        share = np.mean(derivative[own if name == "query" else past] > 0)
        assert share > 0.95, f"d out / d {name} where it should be: {share}"


@pytest.mark.parametrize("is_causal", [True, False])
def test_derivative_with_respect_to_other_segments_is_exactly_zero(is_causal):
    problem = make_problem(batch=1, queries=LENGTH, is_causal=is_causal, segments=3)
    ids = problem.masks["segment_ids"][0]
    other = ids[:, None] != ids
    assert other.any()
    for name, derivative in jacobian(problem, ("key", "value")).items():
        assert not np.any(derivative[other]), f"d out / d {name}"
        visible = ~other & (np.tril(np.ones_like(other)) | (not is_causal))
        assert np.mean(derivative[visible] > 0) > 0.95, f"d out / d {name}"
