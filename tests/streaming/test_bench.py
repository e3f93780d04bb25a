"""The benchmark of streaming prints what it is asked for."""

import numpy as np
import pytest

import bench_streaming
import compare_segments

SMALL = "--segment_length 64 --layers 1 --width 16 --repeats 1".split()


@pytest.mark.once
def test_it_compares_the_ways_to_a_gradient(capsys):
    bench_streaming.main(["--lengths", "128", *SMALL])
    lines = capsys.readouterr().out.splitlines()
    ways = [line.split("|")[2].strip() for line in lines[2:]]
    assert ways == ["whole", "streamed", "streamed, every state kept", "streamed, truncated"]
    assert all(float(line.split("|")[3]) > 0 for line in lines[2:])


@pytest.mark.once
def test_it_reads_a_file(capsys):
    bench_streaming.main(["--file", "130", *SMALL])
    assert capsys.readouterr().out.startswith("130 tokens from a file: ")


@pytest.mark.once
def test_a_gradient_in_segments_is_near_that_of_float64(capsys, tolerance):
    sizes = "--layers 1 --width 16 --heads 2 --dtype float32".split()
    compare_segments.main(["--length", "90", "--segments", "30", "--prefix", "90", *sizes])
    (line,) = capsys.readouterr().out.splitlines()
    about, distance = line.rsplit(" ", 1)
    assert about == "float32, 90 bytes: segments of 30 differ from float64 by"
    assert 0 < float(distance) < tolerance("streamed").rms


def test_gradients_are_compared_with_the_longest_segments_and_with_float64(capsys, monkeypatch):
    seen = []

    def in_segments(options, tokens, segment):
        seen.append((tokens.shape[1] - 1, segment))
        return np.array([3.0, 4.0 + segment])

    monkeypatch.setattr(compare_segments, "in_segments", in_segments)
    monkeypatch.setattr(compare_segments, "exact", lambda options, tokens: np.array([3.0, 4.0]))
    compare_segments.main("--length 200 --segments 4,2 --prefix 90".split())
    assert seen == [(200, 4), (200, 2), (90, 2), (90, 4)]
    assert capsys.readouterr().out.splitlines() == [
        f"bfloat16, 200 bytes: segments of 2 differ from segments of 4 by {2 / 73**0.5:.2e}",
        "bfloat16, 90 bytes: segments of 2 differ from float64 by 4.00e-01",
        "bfloat16, 90 bytes: segments of 4 differ from float64 by 8.00e-01",
    ]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--length 200", "--prefix 4096 is longer than --length 200"),
        ("--width 33 --heads 2", "--heads 2 does not divide --width 33"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, sentence, capsys):
    with pytest.raises(SystemExit):
        compare_segments.main(words.split())
    assert sentence in capsys.readouterr().err
