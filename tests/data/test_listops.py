"""ListOps: the evaluator on hand cases, the drawn expressions by the evaluator, and bad files."""

import numpy as np
import pytest

from race_jax.data.listops import (
    CLOSE,
    TOKENS,
    Trees,
    draw_block,
    draw_examples,
    evaluate,
    parse,
    read_examples,
)

SMALL = Trees(max_depth=4, operator_share=0.4, max_arguments=4, longer_than=5, shorter_than=40)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("[MIN 4 2 9 ]", 2),
        ("[MAX 4 2 9 ]", 9),
        ("[MED 4 2 9 ]", 4),
        ("[MED 4 2 9 7 ]", 5),  # 5.5, rounded down
        ("[SM 4 2 9 ]", 5),
        ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
        ("( ( [SM [MED 1 8 ] ) [SM 9 9 9 X X )", 1),  # 4 + 7
    ],
)
def test_expressions_come_to_what_was_found_by_hand(expression, value):
    assert evaluate(parse(expression)) == value


@pytest.mark.parametrize("expression", ["", "[MIN 4", "4 ]", "4 5", "[MIN ]", "[MIN 4 ] 3"])
def test_what_is_no_expression_is_refused(expression):
    with pytest.raises(ValueError, match="list"):
        evaluate(parse(expression))
    with pytest.raises(ValueError, match=r"'\[AVG' is none of the tokens 0 1"):
        parse("[AVG 2 3 ]")


def test_drawn_expressions_are_whole_and_have_the_evaluator_s_values():
    """Values and tokens are drawn depth by depth, and the evaluator reads token by token."""
    inputs, values = draw_block(np.random.default_rng(0), SMALL)
    assert len(inputs) > 300
    kinds = set()
    for ids, value in zip(inputs, values, strict=True):
        assert evaluate(ids) == value
        assert 5 < len(ids) < 40
        kinds |= set(ids.tolist())
        opened = np.where(ids == CLOSE, -1, (ids > 9).astype(int))
        assert np.cumsum(opened).max() <= 3
    assert kinds == set(range(len(TOKENS)))


def test_examples_depend_on_seed_and_split_only():
    def rows(count, **where):
        return [ids.tolist() for ids in draw_examples(count, trees=SMALL, **where).inputs]

    assert rows(30, seed=0, split=0) == rows(50, seed=0, split=0)[:30]
    assert rows(30, seed=0, split=0) != rows(30, seed=0, split=1)
    assert rows(30, seed=0, split=0) != rows(30, seed=1, split=0)
    trees = Trees(max_depth=2, longer_than=90, shorter_than=91)
    with pytest.raises(ValueError, match=r"of 20,480 .*, 0 have more than 90 and fewer than 91"):
        draw_examples(1, seed=0, split=0, trees=trees)


def test_the_rules_of_the_arena_give_its_figures():
    """Shares of a simulation that was written apart from this one (3 deviations of 700 trees)."""
    inputs, values = draw_block(np.random.default_rng(1), Trees())
    lengths = np.array([len(ids) for ids in inputs])
    assert len(inputs) / 2048 == pytest.approx(4 * 0.083, abs=0.031)  # 1 root in 4 is an operator
    assert lengths.min() > 500
    assert lengths.max() < 2000
    assert lengths.mean() == pytest.approx(1039, abs=45)
    assert np.mean(values == 0) == pytest.approx(0.170, abs=0.043)
    assert np.mean(values == 9) == pytest.approx(0.167, abs=0.043)
    assert all(evaluate(ids) == value for ids, value in zip(inputs[:50], values, strict=False))


def test_both_forms_of_files_are_read_and_bad_lines_are_named(tmp_path):
    short = tmp_path / "short.tsv"
    short.write_text("5\t( ( [SM 7 ) 8 ) ]\n2\t[MIN 2 3 ]\n")
    arena = tmp_path / "arena.tsv"
    arena.write_text("Source\tTarget\n( ( ( [SM 7 ) 8 ) ] )\t5\n[MIN 2 3 ]\t2\n")
    as_csv_writes = tmp_path / "windows.tsv"
    as_csv_writes.write_bytes(arena.read_bytes().replace(b"\n", b"\r\n"))
    for path in (short, arena, as_csv_writes):
        examples = read_examples(path)
        assert examples.labels.tolist() == [5, 2]
        assert [ids.tolist() for ids in examples.inputs] == [[13, 7, 8, 14], [10, 2, 3, 14]]
    for text, words in (
        ("5\t[SM 7 8 ]\n3\t[MIN 2 3 ]\n", r"line 2: the expression comes to 2, .* '3'"),
        ("5\t[SM 7 8 ]\n\n", r"line 2: no labeled expression"),
        ("12\t[SM 7 8 ]\n", r"line 1: the expression comes to 5, .* '12'"),
        ("5\t[SM 7 x ]\n", r"line 1: no labeled expression: 'x' is none of the tokens"),
        ("5\t[SM 7 8\n", r"line 1: no labeled expression: 1 lists stay open"),
        ("Source\tTarget\n", r"line 1: the file has a header only"),
        ("Source\tTarget\r\n", r"line 1: the file has a header only"),
    ):
        short.write_text(text)
        with pytest.raises(ValueError, match=rf"short\.tsv, {words}"):
            read_examples(short)


def test_a_long_expression_is_named_by_its_line(tmp_path):
    lines = ["5\t[SM 7 8 ]", "2\t[MIN 2 3 4 5 ]", "3\t[MIN 3 4 5 ]"]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    assert len(read_examples(tmp_path / "t.tsv", 6)) == 3
    with pytest.raises(ValueError, match=r"t\.tsv, line 2: the longest .* 6 tokens, .*length=4 "):
        read_examples(tmp_path / "t.tsv", 4)
    swapped = ["\t".join(line.split("\t")[::-1]) for line in lines]
    (tmp_path / "t.tsv").write_text("\n".join(["Source\tTarget", *swapped]))
    with pytest.raises(ValueError, match=r"t\.tsv, line 3: the longest .* raise it to 6"):
        read_examples(tmp_path / "t.tsv", 5)


@pytest.mark.data
def test_the_published_labels_are_those_of_the_evaluator(data_root):
    """`read_examples` compares each label with the evaluator's."""
    examples = read_examples(data_root / "listops-nyu" / "test_d20s.tsv.xz")
    counts = np.bincount(examples.labels)
    assert len(examples) == 10_000
    assert (counts[0], counts[9], counts[1:9].min(), counts[1:9].max()) == (1127, 1141, 895, 1038)
    assert examples.lengths.max() == 939
    assert np.median(examples.lengths) == 16
