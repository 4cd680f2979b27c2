"""What the paper prints: every row is there, and what is marked as a misprint is what its own columns give."""

from collections import Counter
from statistics import fmean

import pytest

from llava.eval.tables.paper import PAPER_EFFICIENCY, PAPER_ROWS, RIGHT

SCALES = {"mme": 20.0, "ocrbench": 10.0, "mme_both": 28.0}
MEASURES = ("acc", "relative")
AVERAGED = (2, 3, 4, 5, 8, 9)
ROUNDED = 0.0075  # of a number with two decimals, from columns with two decimals
SLACK = 0.0195  # by which rows are off that nobody marked


def columns(row):
    return {name: value / SCALES.get(name, 1.0) for name, value in row.printed.items() if name not in MEASURES}


def key(row):
    return row.table, row.method, row.tokens


def unpruned(row):
    return next(other for other in PAPER_ROWS if (other.table, other.method) == (row.table, "unpruned"))


def test_every_row_is_there():
    counts = Counter(row.table for row in PAPER_ROWS)
    assert counts == {1: 3, 2: 31, 3: 19, 4: 13, 5: 7, 6: 8, 8: 19, 9: 19, 10: 7, 11: 6}
    assert len(set(map(key, PAPER_ROWS))) == len(PAPER_ROWS)
    for row in PAPER_ROWS:
        if row.table in (*AVERAGED, 10):
            assert set(MEASURES) < row.printed.keys()
            assert row.printed.keys() == unpruned(row).printed.keys()
    assert set(RIGHT) <= set(map(key, PAPER_ROWS))


@pytest.mark.parametrize("row", [row for row in PAPER_ROWS if row.table in AVERAGED], ids=str)
def test_averages_are_those_of_the_columns_or_marked(row):
    acc, printed = fmean(columns(row).values()), row.printed["acc"]
    if "acc" in row.right:
        assert row.right["acc"] == pytest.approx(acc, abs=ROUNDED)
        assert abs(printed - acc) > 0.003
    else:
        assert printed == pytest.approx(acc, abs=SLACK)


@pytest.mark.parametrize("row", [row for row in PAPER_ROWS if row.table in AVERAGED], ids=str)
def test_relative_is_a_ratio_of_averages_or_marked(row):
    """Of unrounded averages, of the unrounded one over the printed one, or of the printed ones: tables differ."""
    whole = unpruned(row)
    acc, every = fmean(columns(row).values()), fmean(columns(whole).values())
    ways = [100 * acc / every, 100 * acc / whole.printed["acc"], 100 * row.printed["acc"] / whole.printed["acc"]]
    of_columns = ways[:2] if "acc" in row.right else ways
    printed, right = row.printed["relative"], row.right.get("relative")
    if right is not None:
        assert min(abs(right - way) for way in ways) <= 2 * ROUNDED
        assert min(abs(printed - way) for way in of_columns) > 0.004
    elif "acc" not in row.right:
        assert min(abs(printed - way) for way in ways) <= SLACK


def test_table_10_mixes_two_kinds_of_relative():
    rows = {(row.method, row.tokens): row for row in PAPER_ROWS if row.table == 10}
    whole = rows["unpruned", 1280]
    for name, tokens in (("Script", 256), ("Script", 128), ("FastV", 256)):
        row = rows[name, tokens]
        assert row.printed["relative"] == pytest.approx(100 * row.printed["acc"] / whole.printed["acc"], abs=0.02)
    for name, tokens in (("DivPrune", 256), ("FastV", 128)):
        ratios = [value / columns(whole)[column] for column, value in columns(rows[name, tokens]).items()]
        assert rows[name, tokens].printed["relative"] == pytest.approx(100 * fmean(ratios), abs=0.1)
    row = rows["DivPrune", 128]
    assert row.right["relative"] == pytest.approx(100 * row.printed["acc"] / whole.printed["acc"], abs=0.01)


def test_tables_6_and_11_do_not_print_what_table_3_does():
    for row in PAPER_ROWS:
        if row.table in (6, 11) and row.right:
            (column,) = row.right
            assert row.right[column] != row.printed[column]
    marked = Counter(row.table for row in PAPER_ROWS if row.right and row.table in (6, 11))
    assert marked == {6: 6, 11: 6}  # Table 3 has no PyramidDrop and no row without the DPP


def test_times_of_table_6():
    rows = {row.method: row for row in PAPER_EFFICIENCY}
    assert rows["unpruned"].prefill_milliseconds / rows["Script"].prefill_milliseconds == pytest.approx(7.03, abs=0.01)
    assert rows["Script"].prefill_milliseconds < rows["Script without DPP"].prefill_milliseconds
    table_1 = {row.method: row.printed for row in PAPER_ROWS if row.table == 1}
    assert [round(100 / table_1[name]["time"], 2) for name in ("bipartite", "random")] == [2.86, 2.94]
