"""Labeled sequences become batches of a few lengths, in which every example counts once."""

import itertools
import pickle

import numpy as np
import pytest

from race_jax.data.examples import Examples, bucket_lengths, held_out_batches, train_batches


def numbered(count: int, longest: int) -> Examples:
    """Examples whose tokens all are their own number, with lengths from 0 to `longest`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, longest + 1, count)
    return Examples(
        [np.full(n, i) for i, n in enumerate(lengths)], np.arange(count, dtype=np.int32)
    )


def test_lengths_are_halved():
    assert bucket_lengths(9, 3) == (3, 5, 9)
    assert bucket_lengths(2, 4) == (1, 2)
    assert bucket_lengths(784, 1) == (784,)


def check_rows(batch, examples):
    """Every row holds its example, padded to the least length that fits the longest of them."""
    assert {name: x.dtype.name for name, x in batch.items()} == {
        "inputs": "int32",
        "mask": "bool",
        "labels": "int32",
        "weights": "float32",
    }
    for row in np.flatnonzero(batch["weights"]):
        tokens = batch["inputs"][row][batch["mask"][row]]
        np.testing.assert_array_equal(tokens, examples.inputs[batch["labels"][row]])
        assert not batch["inputs"][row][~batch["mask"][row]].any()
        assert batch["mask"][row, : len(tokens)].all()
    longest = examples.lengths[batch["labels"][batch["weights"] > 0]].max()
    assert batch["inputs"].shape[1] == min(x for x in (5, 9, 17) if x >= longest)


def test_a_held_out_pass_has_every_example_once():
    examples = numbered(23, 17)
    batches = list(held_out_batches(examples, (5, 9, 17), batch_size=4))
    assert len(batches) == 6
    for batch in batches:
        check_rows(batch, examples)
    labels = np.concatenate([batch["labels"][batch["weights"] > 0] for batch in batches])
    assert sorted(labels) == list(range(23))
    assert sum(batch["weights"].sum() for batch in batches) == 23
    assert batches[-1]["weights"].tolist() == [1, 1, 1, 0]
    again = held_out_batches(examples, (5, 9, 17), batch_size=4)
    assert all((a["labels"] == b["labels"]).all() for a, b in zip(batches, again, strict=True))


def test_epochs_have_new_orders_and_resume_anywhere():
    examples = numbered(23, 17)
    dataset = train_batches(examples, (5, 9, 17), batch_size=4, seed=1)
    iterator = iter(dataset)
    batches = list(itertools.islice(iterator, 10))
    for batch in batches:
        check_rows(batch, examples)
        assert batch["weights"].all()
    epochs = [np.concatenate([x["labels"] for x in batches[i : i + 5]]) for i in (0, 5)]
    assert all(len(set(labels)) == 20 for labels in epochs)
    assert (epochs[0] != epochs[1]).any()
    state = iterator.get_state()
    resumed = iter(dataset)
    resumed.set_state(state)
    np.testing.assert_array_equal(next(iterator)["inputs"], next(resumed)["inputs"])
    other = next(iter(train_batches(examples, (5, 9, 17), batch_size=4, seed=2)))
    assert (other["labels"] != batches[0]["labels"]).any()


def test_most_batches_need_one_length_only():
    """Sequences of one bucket stand together, so that short ones are not padded to the longest."""
    lengths = np.repeat([3, 17], 400)
    examples = Examples([np.zeros(n, int) for n in lengths], np.zeros(800, np.int32))
    widths = [x["inputs"].shape[1] for x in held_out_batches(examples, (5, 9, 17), batch_size=32)]
    assert sorted(widths) == [5] * 12 + [17] * 13
    assert widths != sorted(widths)  # the batches themselves are mixed


def test_a_small_split_is_filled_up_with_rows_of_weight_0():
    examples = numbered(3, 5)
    batch = next(iter(train_batches(examples, (5,), batch_size=8, seed=0)))
    assert batch["inputs"].shape == (8, 5)
    assert batch["weights"].sum() == 3


def test_vectors_of_one_length_need_no_mask_and_may_be_changed_at_random():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 1)).astype(np.uint8)
    examples = Examples(pixels, np.arange(6, dtype=np.int32))

    def augment(x, rng):
        return x[::-1] if rng.random() < 0.5 else x

    def read(count, **options):
        data = train_batches(examples, (7,), batch_size=6, seed=3, masked=False, **options)
        return [dict(x) for x in itertools.islice(iter(data), count)]

    for batch in read(1):
        assert "mask" not in batch
        assert batch["inputs"].dtype == np.float32
        np.testing.assert_array_equal(batch["inputs"], pixels[batch["labels"]])
    flipped = [
        [(row == pixels[label, ::-1]).all() for row, label in zip(*pair, strict=True)]
        for pair in ((x["inputs"], x["labels"]) for x in read(4, augment=augment))
    ]
    assert 0 < np.sum(flipped) < 24
    again = read(4, augment=augment)
    for batch, other in zip(read(4, augment=augment), again, strict=True):
        np.testing.assert_array_equal(batch["inputs"], other["inputs"])


def test_the_reader_can_be_sent_to_a_worker():
    from race_jax.data.examples import _Reader

    options = {"batch_size": 4, "seed": 0, "masked": True, "is_training": True}
    reader = _Reader(numbered(9, 5), (5,), **options)
    sent = pickle.loads(pickle.dumps(reader))
    np.testing.assert_array_equal(sent[5]["inputs"], reader[5]["inputs"])


def test_examples_that_cannot_be_used_are_refused():
    with pytest.raises(ValueError, match=r"at least one; got 0, 0 and 0"):
        Examples([], np.zeros(0, np.int32))
    with pytest.raises(ValueError, match=r"got 1, 2 and 1"):
        Examples([np.zeros(3)], np.zeros(2, np.int32))
    examples = Examples([np.zeros(2, int), np.zeros(6, int)], np.zeros(2, np.int32))
    with pytest.raises(ValueError, match=r"example 1 has 6 tokens, .* allows 5"):
        train_batches(examples, (5,), batch_size=1, seed=0)


def test_the_digest_depends_on_inputs_and_labels():
    def digest(*inputs, labels=(0, 1)):
        return Examples([np.array(x) for x in inputs], np.array(labels, np.int32)).digest()

    same = digest([1, 2], [3])
    assert digest([1, 2], [3]) == same
    assert (
        len({same, digest([1], [2, 3]), digest([1, 2], [4]), digest([1, 2], [3], labels=(1, 1))})
        == 4
    )
