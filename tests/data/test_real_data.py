"""The real data sets have the counts that the literature publishes (marker `data`)."""

import numpy as np
import pytest

from race_jax.data.config import DataConfig
from race_jax.data.text import build_data

pytestmark = pytest.mark.data


def build(data_root, **fields):
    config = DataConfig(source="files", root=str(data_root), **fields)
    return build_data(config, batch_size=32, seed=0)


@pytest.mark.parametrize(
    ("name", "tokens", "vocabulary"),
    [
        ("ptb/ptb.{}.txt.xz", (929_589, 73_760, 82_430), 10_000),
        ("wikitext/wikitext-2.{}.txt.xz", (2_088_628, 217_646, 245_569), 33_278),
    ],
)
def test_words_have_the_published_counts(data_root, name, tokens, vocabulary):
    data = build(
        data_root,
        train_files=(name.format("train"),),
        valid_files=(name.format("valid"),),
        test_files=(name.format("test"),),
        tokenizer="words",
        end_of_line=True,
    )
    counts = (data.num_train_tokens, data.valid.num_tokens + 1, data.test.num_tokens + 1)
    assert counts == tokens
    assert data.vocab_size == vocabulary
    assert sum(batch["weights"].sum() for batch in data.valid.batches) == tokens[1] - 1


def test_text8_has_27_characters(data_root):
    data = build(
        data_root,
        train_files=("text8/text8.first-6877825-bytes.txt.xz",),
        valid_tail=300_000,
        tokenizer="characters",
        sequence_length=512,
    )
    assert data.vocab_size == 27
    assert data.num_train_tokens == 6_877_825 - 300_000
    assert data.valid.num_bytes == data.valid.num_tokens == 299_999


def test_stories_pack_by_their_separator(data_root):
    data = build(
        data_root,
        train_files=("tinystories/test.txt.xz",),
        valid_files=("tinystories/valid.txt.xz",),
        packing="packed",
        document_separator="<|endoftext|>\n",
        sequence_length=4096,
    )
    scored = sum(batch["weights"].sum() for batch in data.valid.batches)
    assert scored == data.valid.num_tokens
    assert np.mean(next(iter(data.train))["weights"]) > 0.85
