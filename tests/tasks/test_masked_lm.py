"""Hidden tokens are chosen as BERT chooses them, and only they are scored."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from race_jax.tasks.masked_lm import MaskedLM, hide_tokens
from race_jax.train.loop import train
from race_jax.train.metrics import read_records
from tests.train.small import small_config

pytestmark = pytest.mark.once

VOCAB = 50


def masked_config(folder, **run):
    """A run on a text in which the words around a gap tell which few words may stand there."""
    rng = np.random.default_rng(0)
    letters = np.repeat(rng.choice(list("abcdef"), 100), 40)
    words = [
        f"{letter}{number}"
        for letter, number in zip(letters, rng.integers(0, 5, 4000), strict=True)
    ]
    (folder / "t.txt").write_text(" ".join(words))
    config = small_config()
    config.task, config.model.race.forget_gate = "masked_lm", None
    config.data.source, config.data.train_files = "files", (str(folder / "t.txt"),)
    config.data.tokenizer, config.data.sequence_length = "words", 20
    config.optimizer.learning_rate, config.run.batch_size = 1e-2, 8
    config.run.tensorboard = False
    for field, value in run.items():
        setattr(config.run, field, value)
    return config


def hidden(rows=400, length=40, rate=0.15, **options):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, VOCAB, (rows, length), np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[0, 7:], weights[1] = 0, 0
    batch = {"inputs": tokens, "weights": weights}
    options = {"rate": rate, "vocab_size": VOCAB, "padded": True} | options
    return batch, hide_tokens(batch, np.random.default_rng(2), **options)


def test_the_share_of_chosen_tokens_is_that_of_every_row():
    batch, out = hidden()
    np.testing.assert_array_equal(out["targets"], batch["inputs"])
    np.testing.assert_array_equal(out["mask"], batch["weights"] > 0)
    assert out["weights"].sum(axis=1).tolist() == [1, 0, *[6] * 398]  # 15 % of 7, 0 and 40
    assert not (out["weights"] * ~out["mask"]).any()
    untouched = out["weights"] == 0
    np.testing.assert_array_equal(out["inputs"][untouched], batch["inputs"][untouched])
    places = np.flatnonzero(out["weights"][2:].sum(axis=0))
    assert len(places) == 40  # every place is chosen in some row


def test_80_percent_become_gaps_and_half_of_the_rest_random_tokens():
    batch, out = hidden(rows=4000)
    chosen = out["weights"] > 0
    now, then = out["inputs"][chosen], batch["inputs"][chosen]
    count = len(now)
    for share, seen in (
        (0.8, now == VOCAB),
        (0.1 * (1 - 1 / VOCAB), (now != VOCAB) & (now != then)),
        (0.1 * (1 + 1 / VOCAB), now == then),
    ):
        deviation = math.sqrt(share * (1 - share) / count)
        assert abs(seen.mean() - share) < 4 * deviation
    random = now[(now != VOCAB) & (now != then)]
    assert set(random) == set(range(VOCAB))


def test_the_loss_and_the_perplexity_are_those_of_the_chosen_tokens(assert_close):
    """By hand: nats = logsumexp(h e) - h e_target at the chosen tokens, perplexity exp(mean)."""
    _, batch = hidden(rows=3, length=9)
    config = small_config()
    config.model.race.forget_gate = None
    record = {"tokenizer": {"name": "words", "vocabulary": [str(i) for i in range(VOCAB)]}}
    model = MaskedLM.make_model(config, record, nnx.Rngs(0))
    nats, weight = MaskedLM.loss_sums(model, jax.tree.map(jnp.asarray, batch), None)
    states = model.hidden(jnp.asarray(batch["inputs"]), key_value_mask=jnp.asarray(batch["mask"]))
    logits = np.asarray(states, np.float64) @ np.asarray(model.embedding[...], np.float64).T
    assert logits.shape[-1] == VOCAB + 1
    by_token = (
        np.log(np.exp(logits).sum(-1))
        - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    )
    want = (by_token * batch["weights"]).sum()
    assert_close("nats", nats, want, kind="outputs")
    assert weight == batch["weights"].sum() == 1 + 0 + 1
    scores = MaskedLM.metrics(None, "valid", {"loss": 2 * math.log(5), "weight": 2.0})
    assert scores == {"loss": math.log(5), "perplexity": pytest.approx(5)}


def test_held_out_tokens_are_the_same_for_every_seed_and_on_every_pass(tmp_path):
    def read(seed):
        task = MaskedLM(masked_config(tmp_path, seed=seed).validate())
        return task, list(task.held_out["valid"]), next(iter(task.train))

    (task, first, train), (_, other, other_train) = read(0), read(1)
    assert "mask" in first[0]
    assert "mask" not in train
    assert {name: x.shape for name, x in train.items()} == {
        name: x.shape for name, x in task.batch.items()
    }
    for batches in (other, list(task.held_out["valid"])):
        for a, b in zip(first, batches, strict=True):
            jax.tree.map(np.testing.assert_array_equal, a, b)
    assert (train["inputs"] != other_train["inputs"]).any()
    real = np.concatenate([x["mask"].reshape(-1) for x in first])
    assert not real.all()  # the last window is padded
    assert task.train.__iter__().get_state()


def test_a_run_learns_and_resumes_to_the_bit(tmp_path, capsys):
    def run(name, **changes):
        config = masked_config(tmp_path, directory=str(tmp_path / name), steps=40, **changes)
        result = train(config)
        records = read_records(tmp_path / name / "metrics.jsonl")
        return result, [record for record in records if record["kind"] != "speed"]

    result, whole = run("whole")
    losses = [record["loss"] for record in whole if record["kind"] == "train"]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    scores = result.evaluation
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert "held out   loss" in capsys.readouterr().out
    assert {record["hidden_tokens"] for record in whole if record["kind"] == "train"} == {8 * 3}
    assert run("stopped", max_seconds=1e-9)[0].step == 1
    assert run("stopped")[1] == whole


def test_a_causal_setting_is_refused_in_one_sentence(tmp_path):
    config = masked_config(tmp_path)
    config.model.race.forget_gate = "data"
    with pytest.raises(
        ValueError, match=r"config\.model\.race .* both directions: forget_gate='data' needs"
    ):
        config.validate()
    config.model.race.forget_gate, config.masked_lm.mask_rate = None, 1.0
    with pytest.raises(ValueError, match=r"config\.masked_lm\.mask_rate must lie in \(0, 1\)"):
        config.validate()
