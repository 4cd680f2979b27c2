"""The comparison of all methods on the toy: what is asked, what the cells say, and one small run of it all."""

import json
from concurrent.futures import ThreadPoolExecutor

import compare
import numpy as np
import pytest
import torch
from compare_report import Measured, Task, differences, document, found_table, make_cells, plot, ranked

from llava.eval.files import read_whole_lines
from llava.eval.tables.runs import UNPRUNED
from llava.model.builder import TOY_FOLDER
from llava.pruning import list_pruners


@pytest.fixture(autouse=True)
def _threads():
    """The command times on one thread; other tests need not."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


MEASURED = {
    Task(UNPRUNED, None, "gqa"): Measured(80.0, 576, 576, 4e6),
    Task(UNPRUNED, None, "pope"): Measured(60.0, 576, 576, 4e6),
    Task("script", 64, "gqa"): Measured(70.0, 64, 64, 1e6),
    Task("script", 64, "pope"): Measured(70.0, 64, 64, 1e6),
    Task("fastv", 64, "gqa"): Measured(50.0, 64, 192, 2e6),
    Task("fastv", 64, "pope"): Measured(50.0, 60, 190, 1e6),
    **{
        Task("random", 64, name, seed): Measured(value, 64, 64, 1e6)
        for seed, values in enumerate([(40.0, 60.0), (50.0, 64.0)])
        for name, value in zip(("gqa", "pope"), values, strict=True)
    },
}
TIMES = {UNPRUNED: {"prefill": 9.0}, "script": {"selection": 2.0, "prefill": 5.0}, "fastv": {"prefill": 7.0}}
TIMES["random"] = TIMES["script"]
CONFIGURATION = {
    "command": "compare",
    "commit": "abc",
    "machine": "a machine",
    "versions": {"torch": "2"},
    "model": "toy",
    "questions": {"gqa": 10, "pope": 10},
    "timed": {"budget": 64, "pictures": 3},
}


def test_every_method_is_asked_at_every_budget_and_only_random_with_several_seeds():
    tasks = compare.list_tasks(list_pruners(), [64, 16], ["gqa", "pope"], seeds=3)
    assert len(set(tasks)) == len(tasks) == 2 + 2 * 2 * (len(list_pruners()) + 2)
    assert {task.method for task in tasks} == {UNPRUNED, *list_pruners()}
    assert {task.seed for task in tasks if task.method != "random"} == {0}
    assert {task.seed for task in tasks if task.method == "random"} == {0, 1, 2}


def test_cells_are_means_over_benchmarks_and_seeds():
    cells = {(cell.method, cell.budget): cell for cell in make_cells(MEASURED)}
    assert cells[UNPRUNED, None].relative == 100
    assert (cells["script", 64].mean, cells["script", 64].relative) == (70, 100)
    assert cells["script", 64].spread is None
    assert (cells["fastv", 64].left, cells["fastv", 64].average, cells["fastv", 64].macs) == (62, 191, 1.5e6)
    chance = cells["random", 64]
    assert chance.accuracy == {"gqa": 45, "pope": 62}
    assert chance.relative == pytest.approx(100 * 53.5 / 70)
    assert chance.spread == pytest.approx(100 * 3.5 * 2**0.5 / 70)  # of two seeds, 50 and 57


def test_document_ranks_and_tells_true_counts_and_times():
    cells = make_cells(MEASURED)
    assert ranked(cells) == ["script", "random", "fastv"]
    text = document(CONFIGURATION, cells, TIMES, {})
    assert "| `script` | before | 100.0 | 2.0 | 5.0 |" in text
    assert "| `fastv` | decoder | 71.4 (191) | - | 7.0 |" in text  # chosen inside the prefill, and not 64 on average
    assert "| `random` | control | 76.4 ± 7.1 | 2.0 | 5.0 |" in text
    assert "| `fastv` | decoder | 62.0 / 191.0 |" in text
    assert text.index("compare`") < text.index("## Mean")
    widths = {line.count("|") for line in text.split("## Mean")[1].split("##")[0].splitlines() if line[:1] == "|"}
    assert len(widths) == 1
    assert plot(cells) == plot(cells)


def test_rules_are_for_methods_that_can_and_stand_beside_their_fixed_budgets():
    tasks = compare.list_tasks(["script", "trim"], [64], ["gqa"], seeds=1, rules=["auto"])
    assert [(task.method, task.budget) for task in tasks] == [
        (UNPRUNED, None), ("script", 64), ("script", "auto"), ("trim", 64)
    ]  # fmt: skip
    found = {Task("script", "auto", name): Measured(75.0, 80, 80, 1e6) for name in ("gqa", "pope")}
    cells = make_cells(MEASURED | found)
    assert found_table(cells)[2:] == ["| `script` | `auto` | 80.0 | 107.1 | 64: 100.0 |"]
    assert ranked(cells) == ranked(make_cells(MEASURED))
    text = document(CONFIGURATION, cells, TIMES, {})
    assert text.index("## Budgets that find themselves") < text.index("## GQA, accuracy")
    assert plot(cells) == plot(make_cells(MEASURED))


def test_differences_to_script_are_paired_over_questions():
    rng = np.random.default_rng(0)
    runs = {}
    for name, rate in (("gqa", 0.7), ("pope", 0.5)):
        right = (rng.random(200) < rate).astype(float)
        worse = right.copy()
        worse[np.flatnonzero(right)[:10]] = 0  # ten questions less, all others alike
        for method, items in (("script", right), ("trim", worse), ("first", np.roll(right, 1))):
            runs[Task(method, 64, name)] = Measured(100 * items.mean(), 64, 64, 1e6, tuple(items))
    found = differences(runs)
    assert set(found) == {("trim", 64), ("first", 64)}
    assert found["trim", 64].mean == pytest.approx(-5)
    assert found["trim", 64].sign == -1
    assert found["trim", 64].half < 2.5 < found["first", 64].half  # pairing takes out what both find hard
    assert found["first", 64].sign == 0


def test_questions_are_drawn_from_all_categories(tmp_path):
    options = compare.parse_arguments(["--limit", "60", "--output-root", str(tmp_path)])
    drawn = read_whole_lines(compare.draw_questions("pope", options))
    everything = read_whole_lines(TOY_FOLDER / "data/eval/pope/llava_pope_test.jsonl")
    assert len(drawn) == 60
    assert drawn == [line for line in everything if line in drawn]
    assert {line["category"] for line in drawn} == {"adversarial", "random", "popular"}
    options.limit = None
    assert compare.draw_questions("pope", options).parent == TOY_FOLDER / "data/eval/pope"


def test_small_comparison_goes_on_where_it_was(tmp_path, monkeypatch):
    arguments = ["--methods", "first", "fastv", "--budgets", "32", "--limit", "6", "--benchmarks", "gqa", "pope"]
    arguments += ["--output-root", str(tmp_path / "runs"), "--out", str(tmp_path / "COMPARISON.md"), "--pictures", "2"]
    assert compare.main([*arguments, "--workers", "1"]) == 0
    figures = json.loads((tmp_path / "comparison.json").read_text())
    cells = {cell["method"]: cell for cell in figures["cells"]}
    assert set(cells) == {UNPRUNED, "first", "fastv"}
    assert (cells["first"]["left"], cells["first"]["average"]) == (32, 32)
    assert cells["fastv"]["average"] > 32  # the toy's first layer is a quarter of it
    assert cells["fastv"]["macs"] > cells["first"]["macs"]
    assert set(figures["milliseconds"]["first"]) == {"selection", "prefill"}
    assert set(figures["milliseconds"]["fastv"]) == {"prefill"}
    assert (tmp_path / "comparison.svg").read_text().startswith("<?xml")
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")}
    assert len(answers) == 6
    # What is done already needs no process of its own, which takes seconds to start.
    monkeypatch.setattr(
        compare, "ProcessPoolExecutor", lambda workers, mp_context, **options: ThreadPoolExecutor(workers, **options)
    )
    assert compare.main([*arguments, "--workers", "1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("summary.json")} == answers
    assert json.loads((tmp_path / "comparison.json").read_text())["cells"] == figures["cells"]


def test_wrong_run_is_named(tmp_path, capsys):
    arguments = ["--methods", "first", "--budgets", "32", "--benchmarks", "gqa", "--model-path", str(tmp_path)]
    assert compare.main([*arguments, "--limit", "2", "--output-root", str(tmp_path), "--workers", "1"]) == 2
    assert "gqa" in capsys.readouterr().err
