"""The toy in the Transformers library's format through lmms-eval: official POPE, the answers of our own host."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")

from task_files import write_pictures, write_task

from llava.eval.files import read_json
from llava.eval.lmms_eval.results import newest_results, read_scores
from llava.eval.tables.rows import make_rows
from llava.eval.tables.runs import read_runs

ROOT = Path(__file__).parents[3]
TOY = ROOT / "playground/toy"
POPE = TOY / "data/eval/pope"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    rows = []
    for line in (POPE / "coco/coco_pope_random.json").read_text().splitlines()[:12]:
        entry = json.loads(line)
        fields = {"question_id": str(entry["question_id"]), "question": entry["text"], "answer": entry["label"]}
        rows.append((POPE / "val2014" / entry["image"], fields | {"category": "random"}))
    write_task(root / "tasks", "pope/pope.yaml", "test", write_pictures(root / "pope", "test", rows))
    command = [sys.executable, "scripts/convert_to_transformers.py", str(TOY / "llava-toy-v1.5"), str(root / "toy")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    return root


def run(root, checkpoint, tag, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llava.eval.harness", "--model-path", str(checkpoint), "--tasks", "pope_local"]
    command += ["--include-path", str(root / "tasks"), "--output-root", str(root / "out"), "--tag", tag]
    command += ["--batch-size", "4", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return root / f"out/pope_local/answers/lmms_eval/{Path(checkpoint).name}/{tag}.run"


def texts(folder):
    entries = [json.loads(line) for line in (folder / "answers_0.jsonl").read_text().splitlines()]
    return {entry["document"]: entry["answer"]["text"] for entry in entries}


@pytest.mark.parametrize("keep, tokens", [("full", 576), ("16", 16)])
def test_official_pope(root, keep, tokens):
    there = ["--model", "script_transformers", "--keep-tokens", keep]
    there += [] if keep == "full" else ["--model-args", f"clip={TOY / 'clip-toy-336'}"]
    folder = run(root, root / "toy", f"hf_{keep}", *there)
    [score] = read_scores(newest_results(folder))
    assert score.scores["pope"] > 80
    assert read_json(newest_results(folder))["throughput"]["avg_visual_tokens"] == tokens
    [row] = make_rows(read_runs(folder), {})
    assert (row.method, row.tokens) == ("unpruned" if keep == "full" else "script", tokens)
    ours = run(root, TOY / "llava-toy-v1.5", f"own_{keep}", "--keep-tokens", keep)
    assert texts(folder) == texts(ours)
