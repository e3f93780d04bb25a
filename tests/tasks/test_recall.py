"""Associative recall: what a row holds, what is counted, and that it is learned and resumed."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from race_jax.tasks.recall import BLANK, Recall, RecallConfig, draw_rows
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config

pytestmark = pytest.mark.once


class Fixed:
    """A stand-in for a model: its hidden states are the logits, from a table by input."""

    def __init__(self, table):
        self.embedding = np.eye(len(table), dtype=np.float32)
        self.table = jnp.asarray(table, jnp.float32)

    def hidden(self, tokens, **_):
        return self.table[tokens]

    def logits(self, hidden):
        return hidden


def recall_config(**options):
    config = small_config()
    config.task, config.data.sequence_length, config.run.batch_size = "recall", 16, 8
    config.recall.num_pairs, config.recall.vocab_size, config.recall.held_out_rows = 2, 16, 20
    config.run.tensorboard = False
    for name, value in options.items():
        setattr(config.recall, name, value)
    return config


@pytest.mark.parametrize("random_filler", [False, True])
def test_each_key_is_asked_for_once_and_its_value_is_the_target(random_filler):
    options = RecallConfig(num_pairs=5, vocab_size=41, random_filler=random_filler)
    rows = draw_rows(np.random.default_rng(0), 50, 37, options)
    for inputs, targets, weights in zip(*(rows[name] for name in rows), strict=True):
        keys, values = inputs[:10:2], inputs[1:10:2]
        assert len(set(keys)) == len(set(values)) == 5
        assert ((keys >= 1) & (keys < 20)).all()
        assert ((values >= 20) & (values < 41)).all()
        asked = np.flatnonzero(weights)
        assert sorted(inputs[asked]) == sorted(keys)
        pairs = dict(zip(keys, values, strict=True))
        assert [pairs[key] for key in inputs[asked]] == targets[asked].tolist()
        assert not targets[weights == 0].any()
        assert (asked >= 10).all()
        assert (asked % 2 == 0).all()
        others = np.delete(inputs[10:], asked - 10)
        assert random_filler or (others == BLANK).all()
    assert rows["inputs"].dtype == rows["targets"].dtype == np.int32


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_gaps_follow_the_power_law(power):
    """With one pair, the gap is drawn from p(g) itself."""
    options = RecallConfig(num_pairs=1, vocab_size=8, power=power)
    weights = draw_rows(np.random.default_rng(0), 20_000, 22, options)["weights"]
    counts = weights.sum(0)[2::2]
    law = np.arange(1, 11) ** (power - 1)
    np.testing.assert_allclose(counts / 20_000, law / law.sum(), atol=0.012)  # 3.5 deviations


def test_loss_and_accuracy_count_the_questions_only():
    """By hand: of three questions one is answered rightly. Blanks would all be wrong."""
    table = np.zeros((4, 4))
    table[1, 2] = np.log(5.0)  # softmax at input 1: (1, 1, 5, 1) / 8
    batch = {
        "inputs": np.array([[1, 0, 1], [1, 0, 0]], np.int32),
        "targets": np.array([[2, 3, 3], [1, 0, 0]], np.int32),
        "weights": np.array([[1, 0, 1], [1, 0, 0]], np.float32),
    }
    sums = {name: float(x) for name, x in Recall.score_sums(Fixed(table), batch).items()}
    assert sums["weight"] == sums["asked"] == 3
    assert sums["right"] == 1
    assert sums["loss"] == pytest.approx(-np.log(5 / 8) - 2 * np.log(1 / 8), rel=1e-6)
    task = Recall(recall_config().validate())
    assert task.metrics("valid", sums)["accuracy"] == pytest.approx(1 / 3)
    assert set(task.metrics("valid", {"loss": 1.0, "weight": 2.0})) == {"loss"}


def test_batches_depend_on_seed_split_and_index_and_held_out_rows_not_on_the_seed():
    def rows(seed):
        config = recall_config()
        config.run.seed = seed
        task = Recall(config.validate())
        held_out = list(task.held_out["valid"])
        assert len(held_out) == 3  # 20 rows in whole batches of 8
        return [x["inputs"] for x in itertools.islice(task.train, 2)], held_out[0]["inputs"]

    (one, two), held_out = rows(0)
    assert not np.array_equal(one, two)
    assert not np.array_equal(one, held_out)
    (again, _), _ = rows(0)
    (other, _), same = rows(1)
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(held_out, same)
    assert not np.array_equal(one, other)


def test_training_batches_resume_to_the_bit():
    task = Recall(recall_config().validate())
    batches = iter(task.train)
    next(batches)
    state = batches.get_state()
    want = next(batches)
    again = iter(task.train)
    again.set_state(state)
    assert {name: x.tolist() for name, x in next(again).items()} == {
        name: x.tolist() for name, x in want.items()
    }


def test_it_trains(tmp_path):
    config = recall_config()
    config.model.attention = "softmax"
    config.run.steps, config.run.directory = 12, str(tmp_path)
    config.optimizer.learning_rate, config.optimizer.schedule = 3e-2, "constant"
    result = train(config)
    records = [x for x in read_records(tmp_path / "metrics.jsonl") if x["kind"] == "train"]
    assert records[-1]["loss"] < records[0]["loss"] - 0.2
    assert {record["answers"] for record in records} == {16}
    assert 0 <= result.evaluation["accuracy"] <= 1


def test_what_cannot_be_asked_is_refused():
    config = recall_config(num_pairs=5)
    with pytest.raises(ValueError, match=r"sequence_length must be >= 20, .*num_pairs=5, got 16"):
        Recall(config.validate())
    for name, value, words in (
        ("num_pairs", 0, "must be >= 1, got 0"),
        ("vocab_size", 5, "must be >= 6, got 5"),
        ("power", 0.0, "must be > 0, got 0.0"),
        ("held_out_rows", 0, "must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=rf"config\.recall\.{name} {words}"):
            recall_config(**{name: value}).validate()
