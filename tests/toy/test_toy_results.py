"""The tables of the toy: paired intervals, what they mark, and one small run of each command."""

import numpy as np
import pytest
import results
import sweeps
from results_report import Measured, Resampling, Table, cell_text, difference
from world import SKILLS

ASKED = [(scene, skill) for scene in range(40) for skill in ("existence", "attribute", "text")]


def measured(label, budget, rate, seed=0):
    right = np.random.default_rng(seed).random(len(ASKED)) < rate
    return Measured("crowded", label, budget, right)


def test_an_interval_holds_what_it_says():
    """Of repeated draws with a known mean, about 95 % of the intervals hold it; whole scenes are drawn."""
    scenes, held = np.repeat(np.arange(50), 4), 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        values = np.repeat(rng.random(50) < 0.7, 4).astype(float)  # all four questions of a scene fare alike
        found = Resampling(scenes, resamples=400, seed=seed).interval(values)
        held += found.low <= 70 <= found.high
    assert 88 <= held <= 100
    assert found.half > 10  # of 50 scenes, not of 200 questions


def test_a_paired_difference_is_told_where_two_intervals_overlap():
    base = np.random.default_rng(1).random(len(ASKED)) < 0.7
    better = base.copy()
    better[np.flatnonzero(~base)[::4]] = True  # never worse
    table = Table.of(ASKED, [Measured("crowded", "script", "8", base), Measured("crowded", "trim", "8", better)])
    own, other = (table.cell(label, "8", None) for label in ("script", "trim"))
    assert own.high > other.low
    assert table.cell("trim", "8", None, "script").low > 0
    assert cell_text(table, "trim", "8", None).endswith(" ▲")
    assert not cell_text(table, "script", "8", None).endswith(("▲", "▼"))
    assert difference(table, "script", "trim", "8", None).sign == -1


def test_rows_without_a_budget_are_compared_on_the_questions_of_the_column():
    cells = [measured("script", "16", 0.9), Measured("crowded", "unpruned", "None", np.ones(len(ASKED), dtype=bool))]
    cells += [Measured("crowded", "script", "64", measured("script", "16", 0.9).right[:60])]
    table = Table.of(ASKED, cells)
    assert table.budgets == ["64", "16"]
    assert (table.questions("64"), table.questions("16")) == (60, 120)
    lost = difference(table, "script", "unpruned", "64", None)
    assert lost.mean == pytest.approx(100 * (cells[2].right.mean() - 1))
    assert lost.sign == -1


def test_seeds_of_random_are_one_row_and_a_skill_is_its_own():
    cells = [measured("script", "8", 0.9), *(measured(f"random, seed {seed}", "8", 0.5, seed) for seed in (1, 2))]
    table = Table.of(ASKED, cells)
    assert {label for label, _ in table.values} == {"script", "random"}
    text = np.array([skill == "text" for _, skill in ASKED])
    mean = np.mean([cell.right[text].mean() for cell in cells[1:]])
    assert table.cell("random", "8", "text").mean == pytest.approx(100 * mean)


def test_the_six_rows_of_the_papers_ablation_come_from_one_command(tmp_path, capsys):
    """Cells already measured are not measured again; rows that look at nothing are below the rest."""
    rows = ["--rows", "graph", "relevance", "relevance + DPP", "script", "blind", "unpruned"]
    small = [
        "--worlds",
        "crowded",
        "--crowded-scenes",
        "4",
        "--few-scenes",
        "4",
        "--per-skill",
        "2",
        "--budgets",
        "16",
    ]
    arguments = [*small, *rows, "--workers", "1", "--out", str(tmp_path / "RESULTS.md")]
    results.main(arguments)
    text = (tmp_path / "RESULTS.md").read_text()
    store = (tmp_path / "RESULTS.json").stat().st_mtime_ns
    results.main(arguments)
    assert (tmp_path / "RESULTS.json").stat().st_mtime_ns == store
    assert [line.split(" | ")[0] for line in text.split("### All questions")[1].splitlines()[2:10]] == [
        "| tokens", "|---|---|", "| graph", "| relevance", "| relevance + DPP", "| script", "| unpruned (576 tokens)",
        "| blind (no picture)",
    ]  # fmt: skip
    assert "| relevance + DPP - relevance | " in text
    labels = [row.label for row in results.make_rows(1, results.argparse.Namespace(seeds=1))]
    assert labels[:6] == ["none of the three", "graph", "relevance", "graph + relevance", "relevance + DPP", "script"]
    capsys.readouterr()


def test_sweeps_tell_differences_to_the_defaults(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweeps, "VALUES", {"kernel_exponent": (0.5,)})
    model = [*("--models", sweeps.TOYS[0], "--crowded-scenes", "3", "--per-skill", "1", "--budgets", "8")]
    sweeps.main([*model, "--workers", "1", "--out", str(tmp_path / "SWEEPS.md")])
    text = (tmp_path / "SWEEPS.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert text.count("| `kernel_exponent=0.5` | ") == 1 + len(SKILLS)
    assert f"llava-toy-v1.5, crowded scenes, {3 * len(SKILLS)} questions" in text
