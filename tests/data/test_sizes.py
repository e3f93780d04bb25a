"""Extreme sizes either train, or are refused by an error that names the field."""

import itertools

import numpy as np
import pytest

from race_jax.data.config import DataConfig
from race_jax.data.text import build_data
from race_jax.train.config import Config

HUGE = 2**62


@pytest.fixture
def folder(tmp_path):
    """A folder with a text of 700 words, 10 of which are different."""
    words = np.random.default_rng(0).choice([f"w{i}" for i in range(10)], 700)
    (tmp_path / "t.txt").write_text(" ".join(words))
    return tmp_path


def build(folder, *, batch_size=2, seed=0, **fields):
    """Builds the data of a run, after the checks that a run makes."""
    config = Config()
    config.data = DataConfig(
        source="files",
        root=str(folder),
        train_files=("t.txt",),
        **{"sequence_length": 8} | fields,
    )
    config.run.batch_size, config.run.seed = batch_size, seed
    config = config.validate()
    return build_data(config.data, batch_size=config.run.batch_size, seed=config.run.seed)


def first_batches(data, count=3):
    return [batch["inputs"] for batch in itertools.islice(data.train, count)]


@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 1},
        {"batch_size": 1, "packing": "packed"},
        {"batch_size": 500},  # more rows than there are windows
        {"batch_size": 500, "packing": "packed"},
        {"sequence_length": 1},
        {"sequence_length": 1, "packing": "packed"},
        {"sequence_length": 1500},  # the text fills one window
        {"sequence_length": 2**20, "packing": "packed"},
        {"batch_size": 1, "sequence_length": 1},
        {"tokenizer": "words", "vocab_limit": 2},
        {"tokenizer": "words", "vocab_limit": HUGE},
        {"valid_tail": 2},
        {"valid_fraction": 1e-3},
        {"valid_fraction": 0.9},
        {"seed": 2**32 - 1},
    ],
    ids=str,
)
def test_extremes_that_train(folder, fields):
    data = build(folder, **fields)
    shape = (fields.get("batch_size", 2), fields.get("sequence_length", 8))
    assert [batch.shape for batch in first_batches(data)] == [shape] * 3
    batches = list(itertools.islice(data.valid.batches, 3))
    assert all(batch["inputs"].shape == shape for batch in batches)
    assert sum(batch["weights"].sum() for batch in batches) > 0


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"batch_size": 0}, r"config\.run\.batch_size must be >= 1, got 0"),
        ({"batch_size": -1}, r"config\.run\.batch_size must be >= 1"),
        ({"batch_size": HUGE}, r"batch_size times .*sequence_length must be < 2\*\*31"),
        ({"batch_size": 2**64}, r"config\.run\.batch_size must fit in 64 bits"),
        ({"sequence_length": 0}, r"config\.data\.sequence_length must be >= 1"),
        ({"sequence_length": 10**6}, r"tokens are fewer than the 1000001 of one window"),
        ({"sequence_length": HUGE}, r"sequence_length must be < 2\*\*31"),
        ({"vocab_limit": 1, "tokenizer": "words"}, r"config\.data\.vocab_limit must be >= 2"),
        ({"vocab_limit": 2**70, "tokenizer": "words"}, r"config\.data\.vocab_limit must fit"),
        ({"valid_tail": -1}, r"config\.data\.valid_tail must be >= 0"),
        ({"valid_tail": HUGE}, r"t\.txt: has no more than the \d+ characters"),
        ({"valid_tail": 1}, r"t\.txt .*nothing to score"),
        ({"valid_fraction": 0.0}, r"config\.data\.valid_fraction must lie in"),
        ({"valid_fraction": 1.0}, r"config\.data\.valid_fraction must lie in"),
        ({"valid_fraction": 1 - 1e-9}, r"t\.txt.*too short to hold out"),
        ({"num_workers": -1}, r"config\.data\.num_workers must be >= 0"),
        ({"num_workers": 257}, r"config\.data\.num_workers must be <= 256"),
        ({"num_workers": 1, "packing": "packed"}, r"num_workers must be 0 with packing="),
        ({"seed": -1}, r"config\.run\.seed must be >= 0"),
        ({"seed": 2**32}, r"config\.run\.seed must be < 2\*\*32"),
    ],
    ids=str,
)
def test_extremes_that_are_refused(folder, fields, words):
    with pytest.raises(ValueError, match=words):
        build(folder, **fields)


def test_every_integer_of_the_record_must_fit_in_64_bits():
    for section in ("data", "optimizer", "run"):
        for name, value in vars(getattr(Config(), section)).items():
            if type(value) is int:
                for extreme in (2**63, -(2**63) - 1, 10**400):
                    config = Config()
                    setattr(getattr(config, section), name, extreme)
                    with pytest.raises(ValueError, match=rf"config\.{section}\.{name} must fit"):
                        config.validate()


def test_seeds_have_orders_of_their_own_or_are_refused(folder):
    fields = {"source": "files", "root": str(folder), "train_files": ("t.txt",)}
    config = DataConfig(**fields, sequence_length=8)

    def order(seed):
        return np.concatenate(first_batches(build_data(config, batch_size=2, seed=seed), 9))

    orders = [order(seed).tobytes() for seed in (0, 1, 5, 2**31, 2**31 + 5, 2**32 - 1)]
    assert len(set(orders)) == len(orders)
    for seed in (-1, 2**32, 2**32 + 5, 2**63, 2**64 + 5):
        with pytest.raises(ValueError, match=r"seed must lie in \[0, 2\*\*32\), got "):
            order(seed)
