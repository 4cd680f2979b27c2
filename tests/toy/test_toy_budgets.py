"""Automatic against fixed budgets on the toy: the table, and scenes with few objects."""

import budgets
from scenes import make_scene


def test_a_scene_with_few_objects_is_a_part_of_the_whole_one():
    whole = {(thing.shape, thing.color, thing.text) for thing in make_scene("test", 7).layout.objects}
    few = [(thing.shape, thing.color, thing.text) for thing in make_scene("test", 7, most=3).layout.objects]
    assert len(few) == 3 < len(whole)
    assert set(few) <= whole


def test_fixed_and_automatic_budgets_stand_beside_each_other(capsys, monkeypatch):
    arguments = "--scenes 2 --other-scenes 4 --per-skill 1 --means 12 --methods script"
    monkeypatch.setattr("sys.argv", ["budgets.py", *arguments.split()])
    budgets.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    tokens = {row[1]: [float(value) for value in row[2:5]] for row in rows}
    assert list(tokens) == ["", "12", "A", "B"]
    assert tokens[""] == [576.0] * 3
    assert tokens["12"] == [12.0] * 3
    for rule in ("A", "B"):
        assert tokens[rule][0] < tokens[rule][1]
        assert 6 < tokens[rule][2] < 24
