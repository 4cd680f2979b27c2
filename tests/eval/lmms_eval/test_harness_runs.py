"""lmms-eval's runs: the eight scripts, what the runner names, and result files in our tables."""

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from llava.eval.benchmarks import COLUMNS, HARNESS_TASKS
from llava.eval.files import write_json
from llava.eval.lmms_eval import launcher as harness
from llava.eval.lmms_eval.results import item_score, metric, read_scores
from llava.eval.tables import report
from llava.eval.tables.rows import average, make_rows
from llava.eval.tables.runs import read_runs
from records import GOLDEN

ROOT = Path(__file__).parents[3]
FAMILIES = {"video": ("mlvu", "mvbench", "longvideobench", "videomme")}
FAMILIES["more"] = ("ai2d", "chartqa", "ocrbench", "hallusionbench")


def script(family, name, *arguments, **variables):
    environment = {**os.environ, "PYTHON": "echo", **variables}
    command = ["bash", str(ROOT / "scripts" / family / "eval" / f"{name}.sh"), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_scripts(family):
    """`PYTHON=echo` shows what the runner is given; the last of repeated options counts there."""
    folder = ROOT / "scripts" / family / "eval"
    assert sorted(path.stem for path in folder.glob("*.sh")) == sorted(FAMILIES[family])
    variables = dict.fromkeys(("CKPT", "CKPT_DIR", "PRUNER", "CUDA_VISIBLE_DEVICES"), "")
    for name in FAMILIES[family]:
        given = script(family, name, 16, "--limit", 3, **variables)
        assert given.startswith(f"-m llava.eval.harness --benchmark {name} --model-path checkpoints/")
        assert "--pruner script --keep-tokens 16" in given
        assert given.endswith("--limit 3")
        assert "--keep-tokens full" in script(family, name, **variables)
        for arguments in ((), (16,), ("full", "--seed", 1)):
            options = harness.parse_arguments(shlex.split(script(family, name, *arguments, **variables))[2:])
            assert options.benchmark == name
    variables = {"CKPT": "c", "CKPT_DIR": "/k", "PRUNER": "random", "CUDA_VISIBLE_DEVICES": "0,3"}
    given = script(family, name, 8, **variables)
    assert "--model-path /k/c --pruner random --keep-tokens 8" in given
    assert given.endswith("--processes 2")


def options(tmp_path, *arguments):
    checkpoint = str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")
    given = ["--benchmark", "ai2d", "--model-path", checkpoint, "--output-root", str(tmp_path), *arguments]
    return harness.parse_arguments(given)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(harness, "require_harness", lambda: None)


def test_command(tmp_path, installed):
    given = options(tmp_path, "--keep-tokens", "16", "--pruner", "random", "--seed", "2", "--processes", "2")
    command = harness.HarnessRun(given).command()
    assert command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = dict(pair.split("=", 1) for pair in command[command.index("--model_args") + 1].split(","))
    folder = tmp_path / "ai2d/answers/lmms_eval/llava-v1.5-tiny/vtn_16-random-seed2.run"
    assert arguments == {
        "pretrained": str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"),
        "pruner": "random",
        "keep_tokens": "16",
        "pruner_args": "seed=2",
        "dtype": "auto",
        "on_error": "stop",
        "answers": str(folder),
    }
    assert command[command.index("--output_path") + 1] == str(folder)
    further = options(
        tmp_path, "--limit", "2", "--model-args", "batch=1", "--model-args", "c=d", "--", "--verbosity", "X"
    )
    command = harness.HarnessRun(further).command()
    assert command[command.index("--model_args") + 1].endswith(",batch=1,c=d")
    assert command[-4:] == ["--limit", "2", "--verbosity", "X"]
    assert harness.HarnessRun(further).folder.name == "full-first2.run"


def test_a_fixed_grid_is_an_argument_and_part_of_the_name(tmp_path, installed):
    given = options(tmp_path, "--keep-tokens", "16", "--image-grid", "672x672")
    given.model_path = str(GOLDEN / "checkpoints" / "llava-v1.6-vicuna-tiny")
    run = harness.HarnessRun(given)
    assert run.folder.name == "vtn_80-grid672x672.run"
    assert "image_grid=672x672" in run.model_arguments().split(",")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pruner", "nonsense"], "unknown pruner 'nonsense'"),
        (["--keep-tokens", "0"], "keep_tokens must be a count"),
        (["--pruner-args", "tau=x"], "tau must be a finite number"),
        (["--include-path", "/nowhere"], "there is no folder /nowhere"),
        (["--model-path", "/nowhere"], "nowhere"),
        (["--model-args", "a=b,c"], "separates model arguments by commas"),
        (["--batch-size", "0"], "start at 1"),
        (["--model", "script_transformers", "--conv-mode", "plain"], "--conv-mode goes with script_llava"),
        (["--model", "script_transformers", "--image-grid", "672x672"], "takes --model-args picture_size"),
        (["--image-grid", "672x672"], "cut pictures into tiles"),
    ],
)
def test_refused_before_anything_starts(tmp_path, installed, capsys, arguments, message):
    base = ["--benchmark", "ai2d", "--model-path", str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")]
    assert harness.main([*base, "--output-root", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_missing_harness_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    base = ["--benchmark", "ai2d", "--model-path", str(GOLDEN / "checkpoints" / "llava-v1.5-tiny")]
    assert harness.main([*base, "--output-root", str(tmp_path)]) == 2
    assert 'pip install "script-llava[lmms-eval]"' in capsys.readouterr().err


def test_a_failed_evaluation_is_an_error_although_the_harness_ends_with_0(tmp_path, installed, capsys, monkeypatch):
    run = harness.HarnessRun(options(tmp_path))
    monkeypatch.setattr(run, "command", lambda: ["true"])
    assert harness.execute(run) == 1
    assert "has written no result file" in capsys.readouterr().err


# --- result files --------------------------------------------------------------------------------------------------


def write_results(folder, results, samples=(), stamp="20260101_000000", arguments="", **more):
    place = folder / "m-7b"
    place.mkdir(parents=True, exist_ok=True)
    counts = {name: {"original": 9, "effective": 4} for name in results}
    config = {"model": "script_llava", "model_args": arguments}
    path = place / f"{stamp}_results.json"
    write_json(path, {"results": results, "config": config, "n-samples": counts, "lmms_eval_version": "0.7", **more})
    for task, rows in dict(samples).items():
        lines = [json.dumps({"doc_id": number, **row}) + "\n" for number, row in enumerate(rows)]
        (place / f"{stamp}_samples_{task}.jsonl").write_text("".join(lines))
    return path


def write_run(root, benchmark, tag, results, samples=(), keep=None, tokens=11648.0, unreadable=()):
    folder = root / benchmark / f"{tag}.run"
    pruner = None if keep is None else {"name": "script", "keep_tokens": keep}
    write_results(folder, results, samples)
    write_json(folder / "settings.json", {"model": "m-7b", "checkpoint": "k", "pruner": pruner, "code": "c"})
    task = {"questions": 4, "visual_tokens": tokens, "newline_tokens": 0.0, "new_tokens": 8, "model_seconds": 2.0}
    task |= {"average_tokens": tokens, "prefill_flops": 1e12, "unreadable": list(unreadable)}
    write_json(folder / "summary.json", dict.fromkeys(results, task))
    return folder


VIDEOMME = [
    {"videomme_perception_score": {"duration": d, "pred_answer": p, "answer": "A", "score": float(p == "A")}}
    for d, p in (("short", "A"), ("short", "B"), ("medium", "A"), ("long", "B"))
]
LONG = [
    {"lvb_acc": {"question_category": c, "parsed_pred": p, "answer": "A"}}
    for c, p in (("S2E", "A"), ("T2A", "B"), ("SSS", "A"), ("TAA", "A"))
]


def test_columns_of_the_papers_video_table(tmp_path, capsys):
    """Its Acc. is the mean of nine columns, so LongVideoBench and Video-MME weigh more."""
    for tag, keep, tokens, mlvu in (("full", None, 11648.0, 60.0), ("vtn_32", 32, 2048.0, 54.0)):
        write_run(tmp_path, "mlvu", tag, {"mlvu_dev": {"mlvu_percetion_score,none": mlvu}}, (), keep, tokens)
        parts = {f"mvbench_{name}": {"mvbench_accuracy,none": value} for name, value in (("a", 40.0), ("b", 60.0))}
        write_run(tmp_path, "mvbench", tag, {"mvbench": {"alias": "mvbench"}, **parts}, (), keep, tokens)
        own = {"longvideobench_val_v": {"lvb_acc,none": 0.75}}
        write_run(tmp_path, "longvideobench", tag, own, {"longvideobench_val_v": LONG}, keep, tokens)
        own = {"videomme": {"videomme_perception_score,none": 50.0}}
        write_run(
            tmp_path, "videomme", tag, own, {"videomme": VIDEOMME}, keep, tokens, [{"document": 3, "reason": "x"}]
        )
    runs = [run for path in sorted(tmp_path.glob("*/*.run")) for run in read_runs(path)]
    full, pruned = make_rows(runs, {})
    assert full.scores == {
        "mlvu": 60.0,
        "mvbench": 50.0,
        "longvideobench": 75.0,
        "longvideobench_perception": 50.0,
        "longvideobench_relation": 100.0,
        "videomme": 50.0,
        "videomme_short": 50.0,
        "videomme_medium": 100.0,
        "videomme_long": 0.0,
    }
    assert full.acc == pytest.approx(sum(full.scores.values()) / 9)
    assert pruned.relative == pytest.approx(100 * (full.acc - 6 / 9) / full.acc)
    assert (pruned.method, pruned.tokens, pruned.unreadable) == ("script", 2048.0, 1)
    assert report.main([str(path) for path in tmp_path.glob("*/*.run")]) == 0
    printed = capsys.readouterr().out
    assert "| script (1 unreadable, scored as empty answers) | vtn_32 | 54.00 | 50.00 | 75.00 |" in printed


def test_image_benchmarks_come_in_the_tables_units(tmp_path):
    results = {
        "ai2d": {"exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.1},
        "chartqa_local": {"relaxed_overall,none": 0.25},
        "ocrbench": {"ocrbench_accuracy,none": 0.512},
        "hallusion_bench_image_judge_free": {"aAcc,none": 0.6, "qAcc,none": 0.3, "fAcc,none": 0.3},
        "hallusion_bench_image": {"aAcc,none": 99.0, "qAcc,none": 99.0, "fAcc,none": 99.0},  # with a judge
    }
    scores = {
        score.benchmark: score.scores[score.benchmark] for score in read_scores(write_results(tmp_path, results))
    }
    assert scores == pytest.approx({"ai2d": 50.0, "chartqa": 25.0, "ocrbench": 512.0, "hallusionbench": 40.0})
    assert average(scores) == pytest.approx((50 + 25 + 51.2 + 40) / 4)


def test_a_result_file_alone_tells_method_and_budget(tmp_path):
    given = "pretrained=/k/llava-v1.5-7b,pruner=divprune,keep_tokens=64"
    measured = {"avg_visual_tokens": 64.0, "avg_newline_tokens": 0.0, "avg_unreadable_questions": 0.0}
    path = write_results(
        tmp_path,
        {"ai2d": {"exact_match,none": 0.5}},
        arguments=given,
        throughput=measured | {"total_elapsed_time": 3.0},
    )
    [row] = make_rows(read_runs(path), {})
    assert (row.model, row.method, row.tag, row.tokens) == ("llava-v1.5-7b", "divprune", "divprune_64", 64.0)
    [run] = read_runs(path)
    assert run.settings["pruner"] == {"name": "divprune", "keep_tokens": "64"}


def test_the_latest_result_file_counts(tmp_path):
    folder = write_run(tmp_path, "ai2d", "full", {"ai2d": {"exact_match,none": 0.5}})
    write_results(folder, {"ai2d": {"exact_match,none": 0.75}}, stamp="20260202_000000")
    [run] = read_runs(folder)
    assert run.score["score"] == 75.0


def test_unknown_tasks_are_named(tmp_path):
    path = write_results(tmp_path, {"mmmu_val": {"mmmu_acc,none": 0.5}})
    with pytest.raises(ValueError, match="no benchmark of our tables; its tasks: mmmu_val"):
        read_runs(path)


def test_every_column_is_known_to_the_report():
    columns = {name for benchmark, task in HARNESS_TASKS.items() for name in (benchmark, *dict(task.parts))}
    assert columns <= COLUMNS.keys()


def test_records_of_samples():
    assert metric({"acc,none": 0.5, "acc_stderr,none": "N/A"}, "acc") == 0.5
    assert metric({"acc,none": []}, "acc") is None
    assert item_score(1.0) == 1.0
    assert item_score({"score": 1}) == 1.0
    assert item_score({"pred_answer": "B", "answer": "B"}) == 1.0
    assert item_score({"parsed_pred": "", "answer": "B"}) == 0.0
    assert item_score({"question_type": "x"}) is None


# --- the harness's scores by our own scorers -----------------------------------------------------------------------


def logged(records, answers, targets=None, filtered=None):
    """Samples as the harness logs them: the raw answer apart where a filter has changed it."""
    rows = []
    for number, (record, answer) in enumerate(zip(records, answers, strict=True)):
        row = {"target": "" if targets is None else targets[number], "filtered_resps": answer, **record}
        if filtered is not None and filtered[number] != answer:
            row |= {"resps": [answer], "filtered_resps": filtered[number]}
        rows.append(row)
    return rows


YES_NO = ("yes", "no", "yes", "no")
CHECKED = {
    "pope": (
        {"pope": {"pope_f1_score,none": 0.8}},
        logged([{"pope_f1_score": {"ground_truth": truth}} for truth in YES_NO], ["Yes", "yes", "Yes", "x"]),
    ),
    "mme": (
        {"mme": {"mme_perception_score,none": 125.0}},
        logged(
            [{"mme_perception_score": {"question_id": q, "category": "count"}} for q in "aabb"],
            *(["Yes.", "n", "yes", "Yes"], ["Yes", "No", "Yes", "No"]),
        ),
    ),
    "gqa": (
        {"gqa": {"exact_match,none": 0.5}},
        logged([{"exact_match": 1.0}, {"exact_match": 0.0}], ["Red.", "blue"], ["red", "red"]),
    ),
    "mlvu": (
        {"mlvu_dev": {"mlvu_percetion_score,none": 100 / 7}},
        logged([{"mlvu_percetion_score": {"task_type": "ego", "answer": a}} for a in "A"], ["A. so"]),
    ),
    "videomme": (
        {"videomme": {"videomme_perception_score,none": 50.0}},
        logged(
            [{"videomme_perception_score": {"duration": "short", "answer": "A", "score": s}} for s in (1, 0)],
            ["A", "B"],
        ),
    ),
    "mvbench": (
        {"mvbench_a": {"mvbench_accuracy,none": 50.0}},
        logged([{"mvbench_accuracy": {"gt_answer": "A", "score": s}} for s in (1, 0)], ["A. x", "(b)"]),
    ),
    "longvideobench": (
        {"longvideobench_val_v": {"lvb_acc,none": 0.66667}},
        logged(
            [
                {"lvb_acc": {"question_category": "S2E", "answer": "A", "parsed_pred": drawn}}
                for drawn in ("A", "B", "A")  # the last answer has no letter: the harness drew one
            ],
            ["A", "B", "?"],
        ),
    ),
    "ai2d": (
        {"ai2d": {"exact_match,flexible-extract": 0.5}},
        logged([{"exact_match": 1.0}, {"exact_match": 0.0}], ["B. two", "B two"], ["B", "B"], ["B", "B two"]),
    ),
    "chartqa": (
        {"chartqa": {"relaxed_overall,none": 0.5}},
        logged([{"relaxed_overall": 1.0}, {"relaxed_overall": 0.0}], ["104", "106"], ["100", "100"]),
    ),
    "ocrbench": (
        {"ocrbench": {"ocrbench_accuracy,none": 0.002}},
        logged(
            [
                {"ocrbench_accuracy": {"question_type": kind, "ground_truth": truth, "score": score}}
                for kind, truth, score in (
                    ("Regular Text Recognition", ["Exit"], 1),
                    ("Handwritten Mathematical Expression Recognition", "x+Y", 1),
                    ("Handwritten Mathematical Expression Recognition", "x+y", 0),
                )
            ],
            ["the EXIT sign", "x + Y", "x + Y"],
        ),
    ),
    "hallusionbench": (
        {"hallusion_bench_image_judge_free": {"aAcc,none": 0.5, "qAcc,none": 0.5, "fAcc,none": 0.0}},
        logged(
            [
                {
                    "aAcc": {"category": "VD", "subcategory": "f", "set_id": "0", "figure_id": "1", "gt_answer": truth}
                    | {"question_id": question}
                }
                for question, truth in (("0", "1"), ("1", "0"))
            ],
            ["Yes, it is", "Yes"],
        ),
    ),
}


@pytest.mark.parametrize("benchmark", CHECKED)
def test_our_scorer_agrees_with_a_score_worked_out_by_hand(benchmark, tmp_path):
    results, samples = CHECKED[benchmark]
    name = next(iter(results))
    [score] = read_scores(write_results(tmp_path, results, {name: samples}))
    assert score.benchmark == benchmark
    assert score.unchecked == ""
    assert score.own == pytest.approx(score.scores[benchmark], abs=0.001)


def test_every_task_is_checked_or_says_why_not():
    unchecked = {name for name, task in HARNESS_TASKS.items() if task.rescore is None}
    assert HARNESS_TASKS.keys() - CHECKED.keys() == unchecked == {"textvqa"}


def test_the_report_says_where_scores_differ(tmp_path, capsys):
    samples = CHECKED["gqa"][1]
    paths = [
        write_run(tmp_path, "gqa", "full", {"gqa": {"exact_match,none": 0.5}}, {"gqa": samples}),
        write_run(tmp_path, "gqa", "vtn_8", {"gqa": {"exact_match,none": 0.75}}, {"gqa": samples}, 8),
        write_run(tmp_path, "textvqa", "full", {"textvqa_val": {"exact_match,none": 0.5}}, {"textvqa_val": samples}),
        write_run(tmp_path, "chartqa", "full", {"chartqa": {"relaxed_overall,none": 0.5}}),
        write_run(
            tmp_path,
            "mlvu",
            "full",
            {"mlvu_dev": {"mlvu_percetion_score,none": 0.5}},
            {"mlvu_dev": [{"mlvu_percetion_score": {}}]},
        ),
    ]
    assert report.main(list(map(str, paths))) == 0
    printed = capsys.readouterr().out
    assert "lmms-eval's scores are also those of our own scorers on its samples: GQA of full." in printed
    assert "GQA of vtn_8: lmms-eval's score is 75.000, ours of the answers it logged is 50.000" in printed
    assert "TextVQA of full: lmms-eval's score is not checked, the harness's samples do not hold" in printed
    assert "ChartQA of full: lmms-eval's score is not checked, no samples were logged" in printed
    assert "MLVU of full: lmms-eval's score is not checked, its samples are of another form" in printed
