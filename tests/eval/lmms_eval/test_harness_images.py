"""Official image tasks of lmms-eval on invented data, with the toy: end to end through the runner."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")

from task_files import write_pictures, write_task

from llava.eval.files import read_json
from llava.eval.lmms_eval.judge_free import JUDGE_FREE, JUDGE_FREE_METRICS
from llava.eval.lmms_eval.results import TOLERANCE, newest_results, read_scores

ROOT = Path(__file__).parents[3]
TOY = ROOT / "playground/toy"
POPE = TOY / "data/eval/pope"
CATEGORIES = ("random", "popular", "adversarial")


def run(root, tasks, *arguments, checkpoint="llava-toy-v1.5", code=0):
    """A run of the runner in a process of its own; its folder and what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llava.eval.harness", "--model-path", str(TOY / checkpoint), "--tasks", tasks]
    command += ["--include-path", str(root / "tasks"), "--output-root", str(root / "out"), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout + result.stderr


def results_of(root, tasks, tag):
    return newest_results(root / f"out/{tasks.replace(',', '+')}/answers/lmms_eval/llava-toy-v1.5/{tag}.run")


def pope_rows(count):
    rows = []
    for category in CATEGORIES:
        for line in (POPE / f"coco/coco_pope_{category}.json").read_text().splitlines()[:count]:
            entry = json.loads(line)
            fields = {"question_id": str(entry["question_id"]), "question": entry["text"], "answer": entry["label"]}
            rows.append((POPE / "val2014" / entry["image"], fields | {"category": category}))
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Task files and data of all image benchmarks: the toy's scenes, with questions in each benchmark's own fields."""
    root = tmp_path_factory.mktemp("harness")
    tasks, rows = root / "tasks", pope_rows(8)
    write_task(tasks, "pope/pope.yaml", "test", write_pictures(root / "pope", "test", rows))
    pictures = [picture for picture, _ in rows[:4]]
    ai2d = [
        (picture, {"question": fields["question"], "options": ["yes", "no"], "answer": str(number % 2)})
        for number, (picture, fields) in enumerate(rows[:4])
    ]
    write_task(tasks, "ai2d/ai2d.yaml", "test", write_pictures(root / "ai2d", "test", ai2d))
    chart = [
        (picture, {"question": fields["question"], "answer": fields["answer"], "type": f"{kind}_test"})
        for (picture, fields), kind in zip(rows[:4], ("human", "human", "augmented", "augmented"), strict=True)
    ]
    write_task(tasks, "chartqa/chartqa.yaml", "test", write_pictures(root / "chartqa", "test", chart))
    kinds = {"dataset": "IIIT5K", "question_type": "Regular Text Recognition"}
    ocr = [(picture, {**kinds, "question": "Is there a box?", "answer": ["yes", "no"]}) for picture in pictures]
    write_task(tasks, "ocrbench/ocrbench.yaml", "test", write_pictures(root / "ocrbench", "test", ocr))
    hallusion = [
        (
            picture,
            {"category": "VD", "subcategory": "figure", "set_id": "0", "figure_id": "1", "visual_input": "1"}
            | {"question_id": str(number), "question": fields["question"], "gt_answer_details": fields["answer"]}
            | {"gt_answer": str(int(fields["answer"] == "yes"))},
        )
        for number, (picture, fields) in enumerate(rows[:4])
    ]
    data = write_pictures(root / "hallusion", "test", hallusion)
    name = f"{JUDGE_FREE}_local"
    write_task(tasks, "hallusion_bench/hallusion_bench_image.yaml", "test", data, name, JUDGE_FREE_METRICS)
    return root


TASKS = f"pope_local,ai2d_local,chartqa_local,ocrbench_local,{JUDGE_FREE}_local"


@pytest.fixture(scope="module")
def pruned(root):
    return run(root, TASKS, "--keep-tokens", 16, "--batch-size", 4)


def test_official_tasks_are_scored_and_say_what_was_pruned(root, pruned):
    path = results_of(root, TASKS, "vtn_16")
    results = read_json(path)
    assert "pruner=script,keep_tokens=16" in results["config"]["model_args"]
    assert results["throughput"]["avg_visual_tokens"] == 16.0
    assert results["throughput"]["avg_unreadable_questions"] == 0
    scores = {score.benchmark: score for score in read_scores(path)}
    assert set(scores) == {"pope", "ai2d", "chartqa", "ocrbench", "hallusionbench"}
    assert scores["pope"].scores["pope"] > 80  # the toy knows its scenes; prompts and scoring are the harness's
    assert scores["pope"].questions == len(scores["pope"].items) == 24
    assert scores["chartqa"].scores["chartqa"] == 100 * sum(scores["chartqa"].items.values()) / 4
    assert scores["hallusionbench"].scores["hallusionbench"] > 50  # the mean of three metrics, no judge asked
    assert scores["ocrbench"].scores["ocrbench"] <= 4.0
    for name, score in scores.items():  # our own scorers give the same to the answers that were logged
        assert score.own == pytest.approx(score.scores[name], abs=TOLERANCE), score.unchecked


def test_same_answers_as_our_own_runner(root, pruned, tmp_path):
    """POPE's prompt is the same there: every answer must be."""
    questions = []
    for number, (picture, fields) in enumerate(pope_rows(8)):
        text = f"{fields['question']}\nAnswer the question using a single word or phrase."
        questions.append(json.dumps({"question_id": number, "image": picture.name, "text": text}) + "\n")
    (tmp_path / "q.jsonl").write_text("".join(questions))
    command = [sys.executable, "-m", "llava.eval.run", "--model-path", str(TOY / "llava-toy-v1.5")]
    command += ["--question-file", str(tmp_path / "q.jsonl"), "--image-folder", str(POPE / "val2014")]
    command += ["--answers-file", str(tmp_path / "a.jsonl"), "--keep-tokens", "16", "--processes", "1"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=600)
    own = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    folder = results_of(root, TASKS, "vtn_16").parents[1]
    entries = [json.loads(line) for line in (folder / "answers_0.jsonl").read_text().splitlines()]
    pope = {entry["document"]: entry["answer"]["text"] for entry in entries if entry["task"] == "pope_local"}
    assert [pope[number] for number in range(24)] == own


def test_a_second_run_puts_no_question_again_and_two_processes_agree(root, pruned):
    folder = results_of(root, TASKS, "vtn_16").parents[1]
    answers = (folder / "answers_0.jsonl").read_text()
    first = read_json(results_of(root, TASKS, "vtn_16"))["results"]
    (folder / "answers_0.jsonl").write_text("".join(answers.splitlines(keepends=True)[:20]))  # killed there
    run(root, TASKS, "--keep-tokens", 16, "--batch-size", 4, "--processes", 2)
    again = read_json(results_of(root, TASKS, "vtn_16"))
    assert sum(len(path.read_text().splitlines()) for path in folder.glob("answers_*.jsonl")) == len(
        answers.splitlines()
    )
    assert {name: metrics_of(entry) for name, entry in again["results"].items()} == {
        name: metrics_of(entry) for name, entry in first.items()
    }
    assert again["throughput"]["avg_questions"] == len(answers.splitlines())


def metrics_of(entry):
    return {key: value for key, value in entry.items() if "stderr" not in key and isinstance(value, float)}


def test_other_settings_are_refused(root, pruned):
    printed = run(root, TASKS, "--keep-tokens", 8, "--tag", "vtn_16", "--batch-size", 4, code=1)
    assert "answers given under other settings (pruner:" in printed
    printed = run(root, TASKS, "--model-args", "colour=red", "--tag", "x", code=1)
    assert "unknown model argument colour; known ones: pretrained" in printed
