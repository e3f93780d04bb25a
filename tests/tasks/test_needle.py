"""Needles: where they are hidden, how answers are counted, and what is refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.tasks.needle import DEPTHS, NOISE, Needle, NeedleConfig, draw_row
from tests.tasks.few_steps import few_steps
from tests.train.small import small_config

pytestmark = pytest.mark.once


def needle_config(**options):
    config = small_config()
    config.task, config.data.sequence_length = "needle", 96
    config.needle.held_out_rows = 8
    for name, value in options.items():
        setattr(config.needle, name, value)
    return config


def as_text(ids) -> str:
    return bytes(np.asarray(ids, np.uint8)).decode()


@pytest.mark.parametrize("filler", [NOISE, b"xyzw", b"One line.\n" * 500], ids=len)
def test_a_row_hides_the_needles_and_asks_for_their_values(filler):
    options = NeedleConfig(num_needles=3, num_questions=2, key_length=2, value_length=4)
    for seed in range(40):
        row = draw_row(np.random.default_rng(seed), 150, np.frombuffer(filler, np.uint8), options)
        text = as_text(row["inputs"]) + as_text(row["targets"][-1:])
        hidden, questions = text[: -2 * 9], text[-2 * 9 :]
        needles = re.findall(r"\n([A-Z]{2})=(\d{4})\n", hidden)
        assert len(dict(needles)) == 3
        found = re.fullmatch(r"\n\?([A-Z]{2})=(\d{4})\n\?([A-Z]{2})=(\d{4})", questions)
        asked = [(found[1], found[2]), (found[3], found[4])]
        assert set(asked) <= set(needles)
        assert asked[0] != asked[1]
        assert as_text(row["targets"][row["weights"] > 0]) == found[2] + found[4]
        np.testing.assert_array_equal(row["inputs"][1:], row["targets"][:-1])
        ends = np.flatnonzero(row["depths"])
        assert len(ends) == 2
        room = 151 - 5 * 9
        for end, (key, value) in zip(ends, asked, strict=True):
            assert as_text(row["targets"][end : end + 1]) == value[-1]
            before = re.sub(r"\n[A-Z]{2}=\d{4}\n", "", hidden[: hidden.index(f"\n{key}=")])
            assert row["depths"][end] == min(1 + len(before) * DEPTHS // room, DEPTHS)


def test_depths_are_spread_over_the_whole_filler():
    options = NeedleConfig(num_needles=1, num_questions=1)
    text = np.frombuffer(NOISE, np.uint8)
    rng = np.random.default_rng(0)
    depths = [draw_row(rng, 600, text, options)["depths"].max() for _ in range(1000)]
    counts = np.bincount(depths, minlength=DEPTHS + 1)[1:]
    assert ((counts > 150) & (counts < 250)).all(), counts


def test_an_answer_is_right_if_all_its_digits_are():
    """By hand: two rows of two answers with two digits each."""
    batch = {
        "weights": jnp.array([[0, 1, 1, 0, 1, 1], [1, 1, 0, 0, 1, 1]], jnp.float32),
        "depths": jnp.array([[0, 0, 1, 0, 0, 5], [0, 1, 0, 0, 0, 2]]),
    }
    hit = jnp.array(
        [[False, True, True, False, True, False], [False, True, True, True, True, True]]
    )
    sums = {name: float(x) for name, x in Needle.right_sums(hit, batch).items()}
    assert (sums["right"], sums["asked"]) == (2, 4)
    task = Needle(needle_config().validate())
    figures = task.metrics("valid", {"loss": 4.0, "weight": 8.0, **sums})
    assert figures == {
        "loss": 0.5,
        "accuracy": 0.5,
        "accuracy_0_to_20": 0.5,
        "accuracy_20_to_40": 1.0,
        "accuracy_80_to_100": 0.0,
    }
    assert task.metrics("valid", {"loss": 4.0, "weight": 8.0}) == {"loss": 0.5}


def text_config(folder):
    """Two needles with values of one digit, hidden in words."""
    (folder / "train.txt").write_text("Some words that are to be read. " * 40)
    (folder / "valid.txt").write_text("Other words. " * 40)
    config = needle_config(filler="text", num_needles=2, num_questions=2, value_length=1)
    config.data.source, config.data.root = "files", str(folder)
    config.data.train_files, config.data.valid_files = ("train.txt",), ("valid.txt",)
    return config


def test_it_learns_on_text(tmp_path):
    config = text_config(tmp_path)
    config.model.attention, config.optimizer.learning_rate = "softmax", 1e-2
    losses, scores = few_steps(config, 8)
    assert losses[-1] < losses[0] - 0.2
    assert {"loss", "accuracy", "accuracy_0_to_20"} <= set(scores)


def test_segments_add_up_to_the_whole_row(tmp_path):
    config = text_config(tmp_path)
    config.model.attention = "linear"
    task = Needle(config.validate())
    assert b"Some words" in bytes(next(iter(task.train))["inputs"][0].astype(np.uint8))
    batch = next(iter(task.held_out["valid"]))
    assert b"Other words" in bytes(batch["inputs"][0].astype(np.uint8))
    model = task.make_model(config, {}, nnx.Rngs(0))

    @nnx.jit
    def both(model, batch):
        state, total = task.init_state(model, batch), 0.0
        for start in (0, 48):
            segment = {name: x[:, start : start + 48] for name, x in batch.items()}
            state, (loss, _) = task.segment_sums(model, segment, state, None)
            total += loss
        return task.loss_sums(model, batch, None)[0], total

    whole, parts = both(model, batch)
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_what_has_no_room_is_refused():
    config = needle_config()
    config.data.sequence_length = 71
    with pytest.raises(ValueError, match=r"sequence_length must be >= 72, the bytes .* got 71"):
        Needle(config.validate())
    config = needle_config()
    config.mesh.seq = 4
    with pytest.raises(ValueError, match=r"mesh\.seq=4 must leave 36 bytes .* got 24"):
        Needle(config.validate())
    config.data.sequence_length = 145  # of which the first three devices have 37 each
    with pytest.raises(ValueError, match=r"must leave 36 bytes to the last device, .* got 34"):
        Needle(config.validate())
    for name, value, words in (
        ("num_needles", 0, "must be >= 1, got 0"),
        ("num_questions", 5, "must be <= num_needles 4, got 5"),
        ("filler", "essay", "must be one of noise, text; got 'essay'"),
    ):
        with pytest.raises(ValueError, match=rf"config\.needle\.{name} {words}"):
            needle_config(**{name: value}).validate()
    with pytest.raises(ValueError, match=r"must be <= 26, the number of keys of 1 letters, got 27"):
        needle_config(num_needles=27, key_length=1).validate()
