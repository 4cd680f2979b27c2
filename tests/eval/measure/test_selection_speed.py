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


def test_scaling_prints_the_clip_of_both_loops(capsys):
    arguments = ["--axes", "--clip-tokens", "340", "--clip-keep", "20", "40", "--clip-width", "64", "--device", "cpu"]
    assert selection_scaling.main([*arguments, "--clip-repeats", "1"]) == 0
    clip = json.loads(capsys.readouterr().out.splitlines()[-1])["clip"]
    assert len(clip["cases"]) == 3
    for case in clip["cases"].values():
        assert [point["k"] for point in case["points"]] == [20, 40]
        assert all(point["same_place"] == 1 for point in case["points"])
        assert set(case["exponents"]) == {"plain_loop", "loop"}


@pytest.mark.parametrize("keep", [["20"], ["40", "20"], ["20", "341"]])
def test_scaling_refuses_counts_that_give_no_exponent(keep, capsys):
    assert selection_scaling.main(["--axes", "--clip-tokens", "340", "--clip-keep", *keep]) == 2
    assert "rising counts from 1 to 340" in capsys.readouterr().err


def test_speed_prints_both_loops(capsys):
    arguments = ["--views", "2", "--tokens", "36", "--keep-tokens", "4", "--width", "8", "--repeats", "1"]
    selection_speed.main([*arguments, "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert {"product", "half_product", "loop", "plain_loop"} <= set(figures["milliseconds"])
    assert set(figures["over_product"]) == {"half_product", "selection"}
    assert any(line.startswith("greedy loop against plain") for line in lines)
