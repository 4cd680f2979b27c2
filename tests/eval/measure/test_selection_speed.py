"""The commands that measure the selection: what they print can be read, and exponents are exponents."""

import json

import pytest

from llava.eval.measure import selection_scaling, selection_speed


def test_an_exponent_is_the_power():
    points = [{"n": n, "time": 3 * n**1.5} for n in (10, 100, 1000)]
    assert selection_scaling.exponent(points, "n", "time") == 1.5


def test_scaling_prints_a_table_and_json_and_draws(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(selection_scaling, "MIDDLE", {"n": 36, "m": 4, "B": 1})
    monkeypatch.setattr(selection_scaling, "AXES", {"n": (25, 36), "m": (3, 5), "B": (1, 2)})
    pytest.importorskip("matplotlib")
    drawing = tmp_path / "scaling.svg"
    arguments = ["--width", "8", "--repeats", "1", "--device", "cpu", "--plot", str(drawing)]
    assert selection_scaling.main(arguments) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [point["n"] for point in figures["axes"]["n"]["points"]] == [25, 36]
    assert set(figures["axes"]["B"]["exponents"]) == {"similarity", "loop", "selection", "memory_mib"}
    assert "tokens of a view" in drawing.read_text()


def test_speed_prints_both_loops(capsys):
    arguments = ["--views", "2", "--tokens", "36", "--keep-tokens", "4", "--width", "8", "--repeats", "1"]
    selection_speed.main([*arguments, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert {"product", "half_product", "loop", "plain_loop"} <= set(figures["milliseconds"])
    assert set(figures["over_product"]) == {"half_product", "selection"}
    assert any(line.startswith("greedy loop against plain") for line in lines)
