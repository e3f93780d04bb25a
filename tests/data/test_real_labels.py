"""The labeled data sets have the numbers of examples and of labels that are published."""

import collections
import importlib.util
import pathlib

import numpy as np
import pytest

from race_jax.data.labeled import read_splits
from race_jax.tasks.masked_lm import MaskedLM

pytestmark = pytest.mark.data

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# By split: the number of examples of each label. A share of the training texts is held out where
# there is no validation file, so the two are counted together.
NUMBERS = {
    "cls_sst2": {
        "train": {"0": 29_780, "1": 37_569},
        "valid": {"0": 428, "1": 444},
        "test": {"0": 912, "1": 909},
    },
    "cls_qnli": {
        "train": {"0": 5_227, "1": 5_248},
        "valid": {"entailment": 2_702, "not_entailment": 2_761},
    },
    "cls_imdb": {"train": {"0": 12_500, "1": 12_500}, "test": {"0": 12_500, "1": 12_500}},
    "cls_agnews": {
        "train": {"World": 2_509, "Sports": 2_458, "Business": 2_496, "Sci/Tech": 2_538},
        "test": dict.fromkeys("1234", 1_900),
    },
}


def config_of(name, data_root):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.data.root = str(data_root)
    return config.validate()


@pytest.mark.parametrize("name", NUMBERS)
def test_labels_have_the_published_numbers(data_root, name):
    config = config_of(name, data_root)
    options = config.task_config()
    splits = read_splits(config.data, options.columns("train"), options.columns("test"))
    counts = {split: collections.Counter(x.label for x in texts) for split, texts in splits.items()}
    if not config.data.valid_files:
        share = counts["valid"].total() / (counts["train"] + counts["valid"]).total()
        assert 0.08 < share < 0.12
        counts["train"] += counts.pop("valid")
    assert counts == NUMBERS[name]
    spellings = {label for group in options.classes for label in group.split("|")}
    assert set().union(*counts.values()) <= spellings


def test_reviews_keep_their_tabs_and_their_lengths(data_root):
    config = config_of("cls_imdb", data_root)
    splits = read_splits(config.data, *[config.task_config().columns("train")] * 2)
    train = [text.parts[0] for name in ("train", "valid") for text in splits[name]]
    test = [text.parts[0] for text in splits["test"]]
    assert sum("\t" in text for text in train + test) == 27
    assert [round(np.mean([len(text.split()) for text in x])) for x in (train, test)] == [234, 229]
    assert len(set(train)) == 24_904
    assert len(set(test)) == 24_801


def test_hidden_words_of_wikitext_are_15_percent_of_every_window(data_root):
    """217,645 words are 850 windows of 256 and one of 45. Of these, 38 and 7 are hidden."""
    task = MaskedLM(config_of("mlm_wikitext2", data_root))
    hidden = sum(batch["weights"].sum() for batch in task.held_out["valid"])
    assert hidden == 850 * 38 + 7
