"""The twenty scripts: usage, and one of each family end to end on a handful of questions."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.files import read_json
from records import GOLDEN

ROOT = Path(__file__).parents[3]


def bash(script, *arguments, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    command = ["bash", str(script), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("family", ["v1_5", "v1_6"])
def test_every_benchmark_has_its_script(family):
    folder = ROOT / "scripts" / family / "eval"
    assert sorted(path.stem for path in folder.glob("*.sh")) == sorted(BENCHMARKS)
    for script in folder.glob("*.sh"):
        result = bash(script)
        assert result.returncode == 2
        assert f"usage: bash scripts/{family}/eval/{script.name} N|full" in result.stderr


@pytest.mark.parametrize("family, checkpoint", [("v1_5", "llava-v1.5-7b"), ("v1_6", "llava-v1.6-vicuna-7b")])
def test_variables_are_defaults_that_arguments_override(family, checkpoint):
    """`PYTHON=echo` shows what the runner is given; the last of repeated options counts there."""
    variables = dict.fromkeys(("CKPT", "CKPT_DIR", "DATA_DIR", "PRUNER", "CUDA_VISIBLE_DEVICES"), "")
    for script in (ROOT / "scripts" / family / "eval").glob("*.sh"):
        given = bash(script, 16, **variables, PYTHON="echo").stdout.strip()
        assert given == (
            f"-m llava.eval.run --benchmark {script.stem} --model-path checkpoints/{checkpoint} "
            "--data-root playground/data/eval --pruner script --keep-tokens 16 --conv-mode vicuna_v1 --score"
        )
    variables = {"CKPT": "c", "CKPT_DIR": "/k", "DATA_DIR": "/d", "PRUNER": "random", "CUDA_VISIBLE_DEVICES": "0,3,5"}
    given = bash(script, "full", "--pruner", "uniform", "--processes", 1, **variables, PYTHON="echo").stdout.strip()
    assert "--model-path /k/c --data-root /d --pruner random --keep-tokens full" in given
    assert given.endswith("--score --processes 3 --pruner uniform --processes 1")


def test_every_section_that_errors_name_is_in_the_guide():
    headings = {line.lstrip("# ") for line in (ROOT / "EVAL.md").read_text().splitlines() if line.startswith("#")}
    assert {benchmark.section for benchmark in BENCHMARKS.values()} | {"Your own questions"} <= headings


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, checkpoint, tag", [("v1_5", "llava-v1.5-tiny", 4), ("v1_6", "llava-v1.6-vicuna-tiny", 20)]
)
def test_end_to_end(family, checkpoint, tag, tmp_path):
    pope = tmp_path / "pope"
    (pope / "val2014").mkdir(parents=True)
    (pope / "coco").mkdir()
    shutil.copy(GOLDEN / "images" / "small97x61.png", pope / "val2014" / "a.png")
    questions = []
    for number, category in enumerate(("adversarial", "random", "popular")):
        text = "Is there a dog?"
        label = {"question_id": 1, "image": "a.png", "text": text, "label": "yes"}
        (pope / "coco" / f"coco_pope_{category}.json").write_text(json.dumps(label) + "\n")
        question = {"question_id": number, "image": "a.png", "text": f"{text}\nShort.", "category": category}
        questions.append(json.dumps(question) + "\n")
    (pope / "llava_pope_test.jsonl").write_text("".join(questions))
    result = bash(
        *(ROOT / "scripts" / family / "eval" / "pope.sh", 4, "--output-root", tmp_path / "out", "--max-new-tokens", 3),
        CKPT_DIR=str(GOLDEN / "checkpoints"),
        CKPT=checkpoint,
        DATA_DIR=str(tmp_path),
    )
    assert result.returncode == 0, result.stderr
    answers = tmp_path / "out/pope/answers/llava_pope_test" / checkpoint / f"vtn_{tag}.jsonl"
    assert len(answers.read_text().splitlines()) == 3
    assert (
        read_json(answers.with_suffix("").with_name(f"vtn_{tag}.run") / "score.json")["categories"]["random"][
            "samples"
        ]
        == 1
    )
    assert "Average F1" in result.stdout
