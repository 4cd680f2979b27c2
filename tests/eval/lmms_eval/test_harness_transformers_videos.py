"""Official video tasks of lmms-eval under `script_transformers`: the library's classes, with their real processors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")
pytest.importorskip("torchvision", reason="the library's video processors need torchvision", exc_type=Exception)
pytest.importorskip("av", reason="PyAV is not installed: scripts/test_lmms_eval.sh makes its environment")

from task_files import write_clip, write_lines, write_task

from llava.eval.files import read_json
from llava.eval.lmms_eval.results import newest_results
from llava.eval.tables.rows import make_rows
from llava.eval.tables.runs import read_runs
from video_processors import MARKS, write_checkpoint

ROOT = Path(__file__).parents[3]
FRAMES, KEEP = 4, 3
VIEWS = {"qwen3_vl": FRAMES // 2, "llava_onevision": FRAMES, "onevision_1_5": FRAMES}  # Qwen joins pairs of frames


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Tasks, clips where the harness looks for them, and a tiny random model of each family."""
    root = tmp_path_factory.mktemp("harness")
    for place in ("videomme/data/v1.mp4", "mvbench_video/ssv2_video_mp4/a.mp4"):
        write_clip(root / "hf" / place)
    options = ["A. red", "B. green", "C. blue", "D. white"]
    rows = [
        {"videoID": "v1", "question_id": str(number), "duration": duration, "options": options, "answer": "A"}
        | {
            "question": "What moves?",
            "domain": "Knowledge",
            "sub_category": "Astronomy",
            "task_type": "Counting Problem",
        }
        for number, duration in enumerate(("short", "medium", "long"))
    ]
    write_task(root / "tasks", "videomme/videomme.yaml", "test", write_lines(root / "videomme.jsonl", "test", rows))
    rows = [{"video": "a.mp4", "question": "What?", "candidates": ["red", "blue"], "answer": "red"}]
    data = write_lines(root / "mvbench.jsonl", "train", rows)
    write_task(root / "tasks", "mvbench/mvbench_action_antonym.yaml", "train", data)
    for name in MARKS:
        write_checkpoint(name, root / name)
    return root


def run(root, name, keep):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "llava.eval.harness", "--model", "script_transformers"]
    command += ["--model-path", str(root / name), "--tasks", "videomme_local,mvbench_action_antonym_local"]
    command += ["--include-path", str(root / "tasks"), "--output-root", str(root / "out"), "--tag", f"{name}_{keep}"]
    command += ["--keep-tokens", str(keep), "--batch-size", "2"]
    command += ["--model-args", f"max_frames_num={FRAMES}", "force_sample=true"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    tasks = "videomme_local+mvbench_action_antonym_local"
    return root / "out" / tasks / "answers/lmms_eval" / name / f"{name}_{keep}.run"


def texts(folder):
    entries = [json.loads(line) for line in (folder / "answers_0.jsonl").read_text().splitlines()]
    return {(entry["task"], entry["document"]): entry["answer"]["text"] for entry in entries}


@pytest.mark.parametrize("name", sorted(MARKS))
def test_official_video_tasks(root, name):
    """A budget holds on every frame or pair of frames; keeping all gives the unpruned answers."""
    full, pruned, everything = (run(root, name, keep) for keep in ("full", KEEP, 500))
    assert newest_results(pruned) is not None
    unpruned = read_json(full / "summary.json")
    for task, own in read_json(pruned / "summary.json").items():
        assert own["unreadable"] == []
        assert own["visual_tokens"] == KEEP * VIEWS[name] < unpruned[task]["visual_tokens"]
    assert len(texts(pruned)) == 4
    assert texts(everything) == texts(full)
    assert texts(pruned) != texts(full)
    [row] = make_rows(read_runs(pruned), {})
    assert (row.method, row.tokens) == ("script", KEEP * VIEWS[name])
