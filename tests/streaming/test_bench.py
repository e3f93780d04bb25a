"""The benchmark of streaming prints what it is asked for."""

import pytest

import bench_streaming

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
