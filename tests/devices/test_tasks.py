"""Steps of tasks whose models see all tokens are the same on a mesh and on one device."""

import functools

import jax
import numpy as np
import pytest

from race_jax.models import Classifier, TransformerLM
from race_jax.tasks.classification import Classification
from race_jax.tasks.masked_lm import MaskedLM, hide_tokens
from race_jax.train import mesh
from race_jax.train.mesh import make_mesh, put_batch
from race_jax.train.optimizer import make_optimizer, make_schedule
from race_jax.train.state import init_state
from race_jax.train.step import make_eval_step, make_train_step
from tests.train.small import small_batch, small_config

pytestmark = pytest.mark.once

VOCAB = 31
# The task, the sizes of the axes data, seq and fsdp, and whether the batch has a mask. Seven
# devices do not divide 24 tokens, so the batch is given a mask there.
MESHES = {
    "masked_lm": ("masked_lm", (2, 2, 2), True),
    "masked_lm, uneven": ("masked_lm", (1, 7, 1), False),
    "text_classification": ("text_classification", (4, 1, 2), True),
}


def classified() -> dict[str, np.ndarray]:
    """Padded rows of ids with a label each. The last row only fills up the batch."""
    batch = small_batch(16)
    return {
        "inputs": batch["inputs"] % VOCAB,
        "mask": np.arange(24) < np.arange(9, 25)[:, None],
        "labels": (np.arange(16) % 3).astype(np.int32),
        "weights": np.array([1] * 15 + [0], np.float32),
    }


def masked(padded: bool) -> dict[str, np.ndarray]:
    """Windows with hidden tokens, of which some end early if they are padded."""
    rng = np.random.default_rng(0)
    return hide_tokens(small_batch(16), rng, rate=0.3, vocab_size=VOCAB, padded=padded)


def parts(name, padded):
    if name == "masked_lm":
        make = functools.partial(TransformerLM, vocab_size=VOCAB + 1, is_causal=False)
        return MaskedLM, make, masked(padded)
    make = functools.partial(Classifier, vocab_size=VOCAB, num_classes=3, pooling="cls")
    return Classification, make, classified()


def run_steps(name, sizes, padded):
    """The metrics of two steps, the sums of an evaluation, and the optimizer's state."""
    task, make, batch = parts(name, padded)
    config = small_config()
    config.model.positions, config.model.max_length = "learned", 28
    config.task, config.model.race.forget_gate, config.run.batch_size = name, None, 16
    config.mesh.data, config.mesh.seq, config.mesh.fsdp = sizes
    config = config.validate()
    devices = make_mesh(config)
    optimizer = make_optimizer(config.optimizer, config.run.steps)
    graph, state = init_state(
        lambda rngs: make(config.model, keep_rngs=False, rngs=rngs), 0, optimizer, devices
    )
    schedule = make_schedule(config.optimizer, config.run.steps)
    step = make_train_step(task, graph, optimizer, schedule, devices)
    batch = put_batch(devices, batch)
    metrics = []
    for _ in range(2):
        state, measured = step(state, batch, jax.random.key(0))
        metrics.append(jax.device_get(measured))
    scores = make_eval_step(task, graph, devices)(state.params, state.fixed, batch)
    return metrics, jax.device_get(scores), jax.device_get(state.opt_state)


@pytest.mark.parametrize(("name", "sizes", "padded"), MESHES.values(), ids=MESHES)
def test_steps_are_those_of_one_device(name, sizes, padded, monkeypatch, assert_close):
    monkeypatch.setattr(mesh, "LEAST_SHARDED", 64)
    metrics, scores, optimizer = run_steps(name, sizes, padded)
    wanted, wanted_scores, wanted_optimizer = run_steps(name, (1, 1, 1), padded)
    assert_close("metrics", metrics, wanted, kind="gradients")
    assert_close("scores", scores, wanted_scores, kind="outputs")
    assert_close("optimizer", optimizer, wanted_optimizer, kind="gradients")
    if name == "text_classification":
        assert scores["weight"] == 15
