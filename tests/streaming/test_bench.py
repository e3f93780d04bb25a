"""The benchmark of streaming prints what it is asked for."""

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
def test_gradients_are_compared_between_segments_and_with_float64(capsys, tolerance):
    sizes = "--layers 1 --width 16 --heads 2 --dtype float32".split()
    compare_segments.main(["--length", "200", "--segments", "30,100", "--prefix", "90", *sizes])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        "float32, 200 bytes: segments of 30 differ from segments of 100 by",
        "float32, 90 bytes: segments of 30 differ from float64 by",
        "float32, 90 bytes: segments of 100 differ from float64 by",
    ]
    distances = [float(line.rsplit(" ", 1)[1]) for line in lines]
    assert all(0 < distance < tolerance("streamed").rms for distance in distances)
