"""The table of a study: the paper's averages from its own columns, seeds, the 100 % row, paired tests."""

import csv
import io
import json
from pathlib import Path

import pytest

from llava.eval.files import read_json, write_json
from llava.eval.measure.cost import prefill_flops
from llava.eval.tables import report
from llava.eval.tables.paper import PAPER_ROWS
from llava.eval.tables.rows import average, explanations, make_rows
from llava.eval.tables.runs import read_run


def make_run(folder, benchmark, tag, score, keep=None, seed=0, code="c", items=None, seconds=10.0, **more):
    pruner = None if keep is None else {"name": "script", "keep_tokens": keep}
    settings = {
        "benchmark": benchmark,
        "model": "m-7b",
        "checkpoint": "k",
        "pruner": pruner,
        "seed": seed,
        "code": code,
        **more,
    }
    place = folder / benchmark / f"{tag}.run"
    write_json(place / "config.json", {"settings": settings, "record": {}})
    tokens = 576.0 if keep is None else float(keep)
    summary = {"questions": 20, "skipped": 0, "wall_seconds": seconds, "visual_tokens": tokens, "newline_tokens": 0.0}
    summary["prefill_flops"] = prefill_flops([tokens] * 32, 4096, 11008)
    write_json(place / "summary.json", summary)
    if score is not None:
        write_json(place / "score.json", {"score": score, "items": items or {"1": 1.0}})
    return place


def test_average_is_the_papers_rule():
    assert average({"pope": 80.0, "mme": 1500.0, "gqa": 60.0}) == pytest.approx((80 + 75 + 60) / 3)


@pytest.mark.parametrize(
    "tokens, quoted", [(576, 3.81715), (192, 1.25306), (64, 0.41554), (2880, 20.82522), (320, 2.09917)]
)
def test_flops(tokens, quoted):
    assert prefill_flops([tokens] * 32, 4096, 11008) / 1e12 == pytest.approx(quoted, abs=5e-6)


def test_table(tmp_path, capsys):
    paths = [make_run(tmp_path, "gqa", "full", 60.0), make_run(tmp_path, "mme", "full", 1500.0)]
    paths += [make_run(tmp_path, "gqa", "vtn_64", 54.0, 64), make_run(tmp_path, "mme", "vtn_64", 1400.0, 64)]
    files = {name: tmp_path / f"out.{name}" for name in ("csv", "json")}
    assert report.main([*map(str, paths), "--csv", str(files["csv"]), "--json", str(files["json"]), "--paper"]) == 0
    printed = capsys.readouterr().out
    assert "Script (paper) | Table 3" in printed
    assert "99.88 † (99.72)" in printed
    assert "1487.98 † (1423.89)" in printed  # MME is a column here, POPE is none
    assert "Table 6 |" not in printed
    assert "no row closes" in printed
    assert "m-7b: Acc. is the mean over GQA, MME (MME / 20)" in printed
    full, pruned, paper, *_ = csv.DictReader(io.StringIO(files["csv"].read_text()))
    assert (paper["Method"], paper["Acc."], paper["GQA"]) == ("unpruned (paper)", "63.47", "61.94")
    assert (full["Method"], full["Acc."], full["Relative"]) == ("unpruned", "67.50", "100.00")
    assert (pruned["Acc."], pruned["Relative"], pruned["Tokens"]) == ("62.00", "91.85", "64.0")
    assert (pruned["TFLOPs"], pruned["Questions/s"], pruned["Time s"]) == ("0.4155", "2.00", "20.0")
    rows = json.loads(files["json"].read_text())
    assert rows[1]["relative"] == pytest.approx(100 * 62 / 67.5)
    papers = [row for row in rows if "paper" in row]
    assert len(papers) == len(PAPER_ROWS)
    assert papers[-1]["printed"] == {"mme": 1487.98, "deviation": 0.94, "t_test": 1.0, "wilcoxon": 1.0}
    assert report.main([*map(str, paths), "--paper-table", "4"]) == 0
    printed = capsys.readouterr().out
    assert "Table 4" in printed
    assert "Table 3 |" not in printed


def test_relative_is_to_the_unpruned_run_of_the_same_grid(tmp_path):
    paths = [make_run(tmp_path, "gqa", "full", 60.0)]
    paths.append(make_run(tmp_path, "gqa", "vtn_64-grid672x672", 54.0, 64, image_grid=[672, 672]))
    runs = [read_run(path) for path in paths]
    rows = make_rows(runs, {})
    assert rows[1].relative is None
    assert any("another --image-grid" in line for line in explanations(runs, rows))
    runs.append(read_run(make_run(tmp_path, "gqa", "full-grid672x672", 72.0, image_grid=[672, 672])))
    assert next(row for row in make_rows(runs, {}) if row.tag.startswith("vtn")).relative == pytest.approx(75.0)


def test_the_same_run_twice_is_refused(tmp_path):
    paths = [make_run(tmp_path / part, "sqa", "full", 60.0) for part in ("A", "I")]
    with pytest.raises(ValueError, match="same benchmark, tag and seed"):
        make_rows([read_run(path) for path in paths], {})


def test_work_that_was_not_noted_is_a_dash(tmp_path):
    path = make_run(tmp_path, "gqa", "full", 60.0)
    summary = json.loads((path / "summary.json").read_text())
    del summary["prefill_flops"]
    write_json(path / "summary.json", summary)
    rows = make_rows([read_run(path)], {})
    assert report.cells(rows[0], rows)[-3] == "–"


def test_methods_inside_the_decoder_are_shown_by_their_average(tmp_path):
    """FastV at 64: 30 tokens after two layers of 576; the work is that of the layers, not of the average."""
    place = make_run(tmp_path, "gqa", "vtn_64-fastv", 50.0, 64)
    summary = read_json(place / "summary.json")
    counts = [576] * 2 + [30] * 30
    summary |= {"visual_tokens": 30.0, "average_tokens": sum(counts) / 32}
    write_json(place / "summary.json", summary | {"prefill_flops": prefill_flops(counts, 4096, 11008)})
    paths = [make_run(tmp_path, "gqa", "full", 60.0), make_run(tmp_path, "gqa", "vtn_40", 52.0, 40), place]
    rows = make_rows([read_run(path) for path in paths], {})
    assert [row.tokens for row in rows] == [576.0, 30.0, 40.0]  # sorted by the average
    assert rows[1].average == 64.125
    by_layer = sum(prefill_flops([count], 4096, 11008) for count in counts)
    assert rows[1].tera_flops == pytest.approx(by_layer / 1e12)
    assert "| 30.0 | 64.1 |" in report.markdown(rows)


def test_seeds_servers_and_gaps(tmp_path):
    paths = [
        make_run(tmp_path, "gqa", f"vtn_8{suffix}", score, 8, seed)
        for suffix, score, seed in (("", 40.0, 0), ("-seed1", 50.0, 1))
    ]
    paths += [make_run(tmp_path, "gqa", "full", 60.0, code="other"), make_run(tmp_path, "vqav2", "vtn_8", None, 8)]
    runs = [read_run(path) for path in paths]
    full, pruned = make_rows(runs, dict([report.parse_value("vqav2:vtn_8=70.5")]))
    assert (pruned.scores, pruned.seeds) == ({"vqav2": 70.5, "gqa": 45.0}, 2)
    assert pruned.acc == 45.0  # over GQA, which alone both rows have
    assert pruned.relative is None  # the unpruned run is of other code
    assert full.relative == 100.0
    [why, left_out] = explanations(runs, [full, pruned])
    assert why == (
        "Relative of vtn_8 (script) is empty: the unpruned run was answered by other code (of model, prompt or "
        "decoding)."
    )
    assert left_out == "VQAv2 is no part of Acc.: full (unpruned) has no score of it."
    with pytest.raises(ValueError, match="benchmark:tag=score"):
        report.parse_value("nonsense")


def test_incomplete_run_is_named(tmp_path, capsys):
    assert report.main([str(tmp_path / "x.run")]) == 2
    assert "no complete run" in capsys.readouterr().err


def test_comparison(tmp_path):
    scipy = pytest.importorskip("scipy.stats")
    a = {str(i): float(i % 3 > 0) for i in range(30)}
    b = {str(i): float(i % 4 > 1) for i in range(30)}
    paths = [make_run(tmp_path, "gqa", f"vtn_8-seed{s}", 50.0 + s, 8, s, items=a) for s in (1, 2, 3)]
    paths += [make_run(tmp_path, "gqa", f"vtn_4-seed{s}", 40.0 + s * s, 4, s, items=b) for s in (1, 2, 3)]
    text = report.comparison([read_run(path) for path in paths], "vtn_8", "vtn_4")
    expected = scipy.ttest_rel(list(a.values()), list(b.values())).pvalue
    assert f"30 pairs, difference +0.2000, p = {expected:.3g} (t-test)" in text
    assert "GQA, seeds: 3 pairs, difference +7.3333" in text


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    paths = [make_run(tmp_path, "gqa", "full", 60.0), make_run(tmp_path, "gqa", "vtn_64", 54.0, 64)]
    assert report.main([*map(str, paths), "--plot", str(tmp_path / "plot.png")]) == 0
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_missing_extras_say_how_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    path = make_run(tmp_path, "gqa", "full", 60.0)
    assert report.main([str(path), "--plot", str(tmp_path / "plot.png")]) == 2
    assert "script-llava[eval]" in capsys.readouterr().err


# --- why rows cannot be compared -----------------------------------------------------------------------------------


def notes_of(paths):
    runs = [read_run(path) for path in paths]
    return explanations(runs, make_rows(runs, {}))


def test_comparable_runs_need_no_word(tmp_path):
    shared = {"libraries": {"torch": "2"}, "device": "cpu", "dtype": "auto"}
    paths = [make_run(tmp_path, "gqa", "full", 60.0, **shared)]
    paths += [make_run(tmp_path, "gqa", "vtn_8", 50.0, 8, method_code="m", **shared)]
    assert notes_of(paths) == []


def test_a_row_that_falls_apart_says_what_differs(tmp_path):
    paths = [make_run(tmp_path, name, "full", 60.0) for name in ("gqa", "pope")]
    paths += [make_run(tmp_path, "gqa", "vtn_8", 50.0, 8, method_code="old")]
    paths += [make_run(tmp_path, "pope", "vtn_8", 50.0, 8, method_code="new")]
    [split, empty] = notes_of(paths)
    assert split == (
        "vtn_8 (script) has two rows, because its runs (GQA; POPE) differ in method code: answer the older ones again "
        "to join them."
    )
    assert empty.startswith("Acc. is empty: no benchmark has a score in all rows of m-7b")
    full, *pruned = make_rows([read_run(path) for path in paths], {})
    assert [(row.acc, row.relative) for row in pruned] == [(None, pytest.approx(100 * 50 / 60))] * 2
    assert full.relative == 100.0


def test_another_checkpoint_and_no_unpruned_run_are_told_apart(tmp_path):
    pruned = make_run(tmp_path, "gqa", "vtn_8", 50.0, 8)
    assert notes_of([pruned]) == ["Relative of vtn_8 (script) is empty: no unpruned run of m-7b was given."]
    other = make_run(tmp_path, "gqa", "full", 50.0, checkpoint="other")
    assert notes_of([pruned, other]) == [
        "Relative of vtn_8 (script) is empty: the unpruned run has another checkpoint."
    ]


def test_other_libraries_devices_and_decoding_are_said_and_compared_nevertheless(tmp_path, capsys):
    now = {
        "libraries": {"torch": "2.13", "numpy": "2"},
        "device": "cpu (x86_64)",
        "dtype": "auto",
        "conversation": "v1",
    }
    then = {"libraries": {"torch": "2.12", "numpy": "2"}, "device": "H200", "dtype": "float16", "conversation": "v1"}
    paths = [make_run(tmp_path, "gqa", "full", 60.0, **then), make_run(tmp_path, "gqa", "vtn_8", 30.0, 8, **now)]
    assert notes_of(paths) == [
        "gqa full and gqa vtn_8 differ in libraries (torch 2.12 and 2.13): compare them with care.",
        "gqa full and gqa vtn_8 differ in device (H200 and cpu (x86_64)): compare them with care.",
        "gqa full and gqa vtn_8 differ in decoding (float16 and auto): compare them with care.",
    ]
    assert report.main([str(path) for path in paths]) == 0
    printed = capsys.readouterr().out
    assert "| 50.00 |" in printed
    assert "* gqa full and gqa vtn_8 differ in libraries" in printed


# --- what stands in cells and where tables go ----------------------------------------------------------------------


def test_names_do_not_break_tables(tmp_path, capsys):
    path = make_run(tmp_path, "gqa", "=1+1|x", 60.0)
    out = tmp_path / "out.csv"
    assert report.main([str(path), "--csv", str(out)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert r"=1+1\|x" in lines[2]
    assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    [row] = csv.DictReader(io.StringIO(out.read_text()))
    assert row["Run"] == "'=1+1|x"


def test_a_device_is_not_replaced_and_a_run_not_overwritten(tmp_path, capsys):
    path = make_run(tmp_path, "gqa", "full", 60.0)
    before = (path / "summary.json").read_bytes()
    assert report.main([str(path), "--csv", "/dev/full"]) == 2
    assert "/dev/full" in capsys.readouterr().err
    assert Path("/dev/full").is_char_device()
    assert report.main([str(path), "--json", str(path / "summary.json")]) == 2
    assert "lies in a run that the table is made from" in capsys.readouterr().err
    assert (path / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    "file, key", [("summary.json", "questions"), ("config.json", "settings"), ("score.json", "score")]
)
def test_a_run_that_lacks_something_is_named(tmp_path, file, key, capsys):
    path = make_run(tmp_path, "gqa", "full", 60.0)
    values = read_json(path / file)
    del values[key]
    write_json(path / file, values)
    assert report.main([str(path)]) == 2
    assert f"{path}/{file} lacks {key}" in capsys.readouterr().err
