"""Official video tasks of lmms-eval on invented clips, with a tiny LLaVA-Video of random weights."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")
pytest.importorskip("av", reason="PyAV is not installed: scripts/test_lmms_eval.sh makes its environment")

from task_files import write_clip, write_lines, write_task

from llava.eval.files import read_json
from llava.eval.lmms_eval.results import TOLERANCE, newest_results, read_scores
from llava.eval.tables.rows import make_rows
from llava.eval.tables.runs import read_runs

ROOT = Path(__file__).parents[3]
OPTIONS = ["A. red", "B. green", "C. blue", "D. white"]


@pytest.fixture(scope="module")
def root(tmp_path_factory, video):
    """Task files, annotations and clips where the harness looks for them."""
    root = tmp_path_factory.mktemp("harness")
    tasks, home = root / "tasks", root / "hf"
    for place in (
        *("videomme/data/v1.mp4", "mlvu/1_count/a.mp4", "mlvu/1_count/b.mp4", "mvbench_video/ssv2_video_mp4/a.mp4"),
        "datasets/longvideobench/videos/a.mp4",
    ):
        write_clip(home / place)
    shutil.copytree(video / "frames/clipB", home / "mvbench_video/tvqa/video_fps3_hq_segment/clip")
    question = {"question": "What moves?", "answer": "A"}
    rows = [
        {"videoID": "v1", "question_id": str(number), "duration": duration, "options": OPTIONS, **question}
        | {"domain": "Knowledge", "sub_category": "Astronomy", "task_type": "Counting Problem"}
        for number, duration in enumerate(("short", "medium", "long"))
    ]
    write_task(tasks, "videomme/videomme.yaml", "test", write_lines(root / "videomme.jsonl", "test", rows))
    rows = [
        {"video_name": f"1_count/{name}.mp4", "task_type": kind, "question": "\n".join(["What?", *OPTIONS])}
        | {"answer": "A"}
        for name, kind in (("a", "count"), ("b", "order"))
    ]
    write_task(tasks, "mlvu/mlvu_dev.yaml", "test", write_lines(root / "mlvu.jsonl", "test", rows))
    for kind, file in (("action_antonym", "a.mp4"), ("episodic_reasoning", "clip")):
        rows = [{"video": file, "question": "What?", "candidates": ["red", "blue"], "answer": "red"}]
        data = write_lines(root / f"{kind}.jsonl", "train", rows)
        write_task(tasks, f"mvbench/mvbench_{kind}.yaml", "train", data)
    rows = [
        {"id": str(number), "video_path": "a.mp4", "duration": 3, "duration_group": 15, "question_category": category}
        | {"question": "What?", "correct_choice": 0, "subtitle_path": "", "starting_timestamp_for_subtitles": 0.0}
        | {f"option{letter}": text for letter, text in enumerate(("red", "blue", "N/A", "N/A", "N/A"))}
        for number, category in enumerate(("S2E", "SSS"))
    ]
    data = write_lines(root / "longvideobench.jsonl", "validation", rows)
    write_task(tasks, "longvideobench/longvideobench_val_v.yaml", "validation", data)
    return root


@pytest.fixture(scope="module")
def run(root, video):
    def run(tasks, tag, *arguments, code=0):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": str(ROOT)}
        checkpoint = video / "checkpoints/llava-video-tiny-qwen2"
        command = [sys.executable, "-m", "llava.eval.harness", "--model-path", str(checkpoint), "--tasks", tasks]
        command += ["--include-path", str(root / "tasks"), "--output-root", str(root / "out"), "--tag", tag]
        result = subprocess.run(
            [*command, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
        )
        assert result.returncode == code, result.stdout + result.stderr
        place = root / "out" / tasks.replace(",", "+") / "answers/lmms_eval" / checkpoint.name / f"{tag}.run"
        return place, result.stdout + result.stderr

    return run


TASKS = "videomme_local,mlvu_dev_local,mvbench_action_antonym_local,mvbench_episodic_reasoning_local"
TASKS += ",longvideobench_val_v_local"
FRAMES = ["--model-args", "max_frames_num=4", "mm_spatial_pool_mode=average", "force_sample=true"]


def test_official_tasks_per_frame(run):
    folder, _ = run(TASKS, "vtn_32", "--keep-tokens", 32, *FRAMES)
    path = newest_results(folder)
    scores = {score.benchmark: score for score in read_scores(path)}
    assert scores.keys() == {"videomme", "mlvu", "mvbench", "longvideobench"}
    for name, score in scores.items():  # our own scorers give the same to the answers that were logged
        assert score.own == pytest.approx(score.scores[name], abs=TOLERANCE), score.unchecked
    assert "keep_tokens=32" in read_json(path)["config"]["model_args"]
    for task in read_json(folder / "summary.json").values():
        assert (task["visual_tokens"], task["newline_tokens"]) == (4 * 32, 0)
        assert task["unreadable"] == []
    rows = make_rows(read_runs(folder), {})
    assert rows[0].tokens == 4 * 32
    assert {"videomme_short", "longvideobench_relation", "mvbench"} <= rows[0].scores.keys()


def test_unpruned_frames_newlines_and_times(run):
    """Twelve frames at four a second: three where sampling is not forced; grid newlines as the checkpoint has them."""
    arguments = ["max_frames_num=8", "mm_spatial_pool_mode=average", "mm_newline_position=grid"]
    folder, _ = run("videomme_local", "full", "--model-args", *arguments, "add_time_instruction=true")
    [task] = read_json(folder / "summary.json").values()
    assert (task["visual_tokens"], task["newline_tokens"]) == (3 * 169, 3 * 13)
    short = read_json(folder / "settings.json")
    assert short["add_time_instruction"] is True
    assert short["conversation"] == "qwen_1_5"


def test_what_cannot_be_read_is_never_scored_silently(run, root):
    clip = root / "hf/videomme/data/v1.mp4"
    whole = clip.read_bytes()
    clip.write_bytes(b"no video at all")
    try:
        folder, printed = run("videomme_local", "broken", *FRAMES, code=1)
        assert "task videomme_local, document 0:" in printed
        assert "is not a video that can be read" in printed
        assert newest_results(folder) is None
        folder, printed = run("videomme_local", "broken", *FRAMES, "--on-error", "skip")
        assert "3 of 3 questions were not put because a visual cannot be read" in printed
        assert read_json(newest_results(folder))["throughput"]["avg_unreadable_questions"] == 3
        [task] = read_json(folder / "summary.json").values()
        assert [item["document"] for item in task["unreadable"]] == [0, 1, 2]
        clip.unlink()
        _, printed = run("videomme_local,mlvu_dev_local", "gone", *FRAMES, code=1)
        assert "v1.mp4 does not exist" in printed
    finally:
        clip.write_bytes(whole)
    folder, _ = run("videomme_local", "broken", *FRAMES, "--on-error", "skip")  # what was missing is asked now
    [task] = read_json(folder / "summary.json").values()
    assert (task["questions"], task["unreadable"]) == (3, [])
    answers = [json.loads(line) for line in (folder / "answers_0.jsonl").read_text().splitlines()]
    assert len(answers) == 6


def test_an_error_in_one_process_ends_all(run, root):
    clip = root / "hf/mlvu/1_count/b.mp4"
    whole = clip.read_bytes()
    clip.write_bytes(b"no video at all")
    try:
        _, printed = run("mlvu_dev_local", "torn", *FRAMES, "--processes", 2, code=1)
        assert "process 1: task mlvu_dev_local, document 1:" in printed
    finally:
        clip.write_bytes(whole)
    folder, _ = run("mlvu_dev_local", "torn", *FRAMES, "--processes", 2)
    assert read_json(folder / "summary.json")["mlvu_dev_local"]["questions"] == 2
