"""Regions of texts: windows of different splits share nothing, and headers are not in them."""

import itertools
import re

import numpy as np
import pytest

from race_jax.data.documents import Document
from race_jax.data.regions import Windows, author_of, letters_only, regions, without_header


@pytest.mark.parametrize(("size", "length", "share"), [(1000, 50, 0.1), (997, 64, 0.15)])
def test_windows_of_different_splits_share_no_byte(size, length, share):
    text = np.arange(size)
    spans = regions(size, length=length, share=share)
    places = {}
    for name, span in spans.items():
        windows = Windows([text], [span], length=length, stride=7 if name == "train" else length)
        assert {len(window) for window in windows} == {length}
        places[name] = {int(place) for window in windows for place in window}
    for one, other in itertools.combinations(places.values(), 2):
        assert min(abs(max(one) - min(other)), abs(max(other) - min(one))) > length
        assert not one & other
    held_out = [span for name, span in spans.items() if name != "train"]
    assert all(stop - start == round(share * size) for start, stop in held_out)
    with pytest.raises(ValueError, match=r"1,000 bytes give no three regions of at least 101"):
        regions(1000, length=101, share=0.1)


def test_windows_of_several_texts_know_their_owner():
    texts = [np.full(size, number) for number, size in enumerate((10, 3, 9))]
    windows = Windows(texts, [(0, 10), (0, 3), (2, 9)], length=4, stride=3)
    assert windows.owner.tolist() == [0, 0, 0, 2, 2]
    for window, owner in zip(windows, windows.owner, strict=True):
        assert window.tolist() == [owner] * 4


def test_the_header_is_read_and_left_out():
    book = Document("b.md", "# Title: É\n\n## Author: Emily Brontë\n\n## Year: 1847\n\nI".encode())
    assert author_of(book) == "Emily Brontë"
    assert bytes(without_header(book)) == b"I"
    plain = Document("plain.txt", b"\n# Chapter 1\n## Author: X\n")
    assert bytes(without_header(plain)) == b"# Chapter 1\n## Author: X\n"
    with pytest.raises(ValueError, match=r'none\.md: none of .* "Author: NAME"; add one'):
        author_of(Document("none.md", b"One line.\n" * 20 + b"Author: late\n"))


@pytest.mark.parametrize(
    "text", [b"It's 5 o'clock -- \xe2\x80\x9cREADY?\xe2\x80\x9d\n\nNo.", b"  a", b""]
)
def test_all_but_letters_becomes_one_space(text):
    want = re.sub(rb"[^a-z]+", b" ", text.lower())
    assert bytes(letters_only(np.frombuffer(text, np.uint8))) == want
