"""Training steps that read sequences segment by segment, on one device."""

import jax
import pytest

from race_jax.tasks.language_model import LanguageModel
from race_jax.train.loop import train
from race_jax.train.optimizer import make_schedule
from race_jax.train.step import Segments, make_eval_step, make_train_step
from tests.train.small import small_config, small_parts


@pytest.fixture(scope="module")
def parts():
    config = small_config()
    config.model.race.short_conv, config.model.race.forget_gate = "before", "data"
    return config, small_parts(config)


def measure(parts, segments, accumulation_steps=1):
    """The metrics of one step, the optimizer's state after it, and the scores before it."""
    config, (mesh, optimizer, graph, state, batch) = parts
    scores = make_eval_step(LanguageModel, graph, mesh, segments)(state.params, state.fixed, batch)
    schedule = make_schedule(config.optimizer, config.run.steps)
    step = make_train_step(
        LanguageModel, graph, optimizer, schedule, mesh,
        accumulation_steps=accumulation_steps, segments=segments,
    )  # fmt: skip
    state, metrics = step(jax.tree.map(jax.numpy.copy, state), batch, jax.random.key(0))
    return jax.device_get((metrics, state.opt_state, scores))


@pytest.fixture(scope="module")
def whole(parts):
    return measure(parts, None)


def test_segments_of_any_length_give_the_step_of_the_whole(parts, whole, assert_close):
    assert_close("7 of 24", measure(parts, Segments(7)), whole, kind="gradients")
    assert_close("two parts", measure(parts, Segments(12), 2), whole, kind="gradients")


def test_a_truncated_gradient_has_the_loss_of_the_whole(parts, whole, assert_close):
    want, _, want_scores = whole
    metrics, _, scores = measure(parts, Segments(6, truncated=True))
    assert_close("loss", metrics["loss"], want["loss"], kind="outputs")
    assert_close("scores", scores, want_scores, kind="outputs")
    # In this small model the state changes the gradient by 1e-4. Rounding would change it by 1e-6.
    assert abs(metrics["grad_norm"] - want["grad_norm"]) > 2e-5 * want["grad_norm"]


def test_every_segment_is_reported(parts):
    calls = []
    measure(parts, Segments(6, truncated=True, report=lambda: calls.append(1)))
    jax.effects_barrier()
    assert len(calls) == 4


def test_the_first_segment_that_is_not_finite_is_named(tmp_path):
    config = small_config()
    config.optimizer.segment_length, config.optimizer.learning_rate = 6, 1e30
    config.optimizer.warmup_steps, config.optimizer.accumulation_steps = 0, 2
    config.run.directory, config.run.tensorboard = str(tmp_path / "run"), False
    with pytest.raises(
        FloatingPointError, match=r"at step 2, from segment 0 \(counted from 0\) on"
    ):
        train(config)


@pytest.mark.parametrize("attention", ["race", "softmax"])
def test_what_reads_whole_sequences_is_refused(tmp_path, attention):
    config = small_config()
    config.task, config.model.attention = "copy", attention
    config.run.directory = str(tmp_path / "run")
    config.optimizer.segment_length = 6
    message = rf"config\.task='copy' with '{attention}' attention reads whole sequences"
    with pytest.raises(ValueError, match=message):
        train(config)
