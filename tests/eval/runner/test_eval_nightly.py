"""Long checks of the evaluation, by ``pytest -m nightly``: fifty kills, full disks, all twenty scripts on the toy."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.eval.benchmarks import BENCHMARKS
from llava.eval.files import read_whole_lines
from records import GOLDEN

pytestmark = pytest.mark.nightly

ROOT = Path(__file__).parents[3]
TOY = ROOT / "playground" / "toy"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
KILLS = 50
QUESTIONS = 300
PICTURES = ("square336.png", "small97x61.png", "land640x480.png")


def command_for(folder, answers, *more):
    lines = [
        {"question_id": i, "image": PICTURES[i % 3], "text": f"What is number {i}? " + "Look. " * (i % 4)}
        for i in range(QUESTIONS)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        *(sys.executable, "-m", "llava.eval.run", "--answers-file", str(answers)),
        *("--question-file", str(folder / "questions.jsonl"), "--image-folder", str(GOLDEN / "images")),
        *("--model-path", str(GOLDEN / "checkpoints" / "llava-v1.5-tiny"), "--keep-tokens", "5"),
        *("--max-new-tokens", "6", "--device", "cpu", *more),
    ]


def run(command, **options):
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, cwd=ROOT, **options)


def victims(process):
    """The launcher, and its workers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [process.pid, *map(int, children)]


def test_fifty_kills(tmp_path):
    """Killed at random moments, launcher or worker: the end is byte for byte that of an undisturbed run."""
    calm = tmp_path / "calm" / "a.jsonl"
    assert run(command_for(tmp_path, calm)).returncode == 0
    answers = tmp_path / "killed" / "a.jsonl"
    command = command_for(tmp_path, answers, "--processes", "2")
    journal = tmp_path / "killed" / "a.run" / "journal"
    generator = random.Random(50)
    completed = []
    for number in range(KILLS):
        if answers.exists():
            assert answers.read_bytes() == calm.read_bytes()
            shutil.rmtree(answers.parent)
        before = sum(path.stat().st_size for path in journal.glob("*.jsonl"))
        log = (tmp_path / "log.txt").open("w")
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log, cwd=ROOT) as process:
            until = time.monotonic() + generator.uniform(0, 10)
            at_work = number % 4 > 0  # every fourth anywhere, also while it starts; the others once answers come
            while process.poll() is None and (time.monotonic() < until if not at_work else True):
                if at_work and sum(path.stat().st_size for path in journal.glob("*.jsonl")) > before:
                    time.sleep(generator.uniform(0, 1.0))
                    break
                time.sleep(0.02)
            if process.poll() is None:
                os.kill(generator.choice(victims(process)), signal.SIGKILL)
            process.wait(60)
        completed.append(sum(len(path.read_bytes().splitlines()) for path in journal.glob("*.jsonl")))
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert answers.read_bytes() == calm.read_bytes()
    assert len(read_whole_lines(answers)) == QUESTIONS
    print(f"journal lines after each kill: {completed}")


@pytest.mark.parametrize("size, written", [("40k", range(1, QUESTIONS)), ("190k", [QUESTIONS])])
def test_full_disk(size, written, tmp_path):
    """On a disk too small for the journal, or for the answers beside it: an error names the file, nothing is lost.

    Needs the right to mount.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk is not permitted here")
    try:
        result = run(command_for(tmp_path, disk / "a.jsonl"))
        assert result.returncode == 2
        assert "No space left" in result.stderr
        assert f"{disk}/a" in result.stderr
        lines = [line for path in (disk / "a.run" / "journal").glob("*.jsonl") for line in read_whole_lines(path)]
        assert len(lines) in written
        assert subprocess.run(["mount", "-o", "remount,size=8m", str(disk)]).returncode == 0
        assert run(command_for(tmp_path, disk / "a.jsonl")).returncode == 0
        assert len(read_whole_lines(disk / "a.jsonl")) == QUESTIONS
    finally:
        subprocess.run(["umount", str(disk)])


@pytest.mark.parametrize("family, checkpoint", [("v1_5", "llava-toy-v1.5"), ("v1_6", "llava-toy-v1.6")])
@pytest.mark.parametrize("benchmark", sorted(BENCHMARKS))
def test_scripts_on_the_toy(family, checkpoint, benchmark, tmp_path):
    """All questions with the toy; where there is no toy of a family, six with random weights in its format."""
    folder, limit = TOY, []
    if not (TOY / checkpoint).is_dir():
        folder, checkpoint, limit = GOLDEN / "checkpoints", "llava-v1.6-vicuna-tiny", ["--limit", "6"]
    variables = {"CKPT_DIR": str(folder), "CKPT": checkpoint, "DATA_DIR": str(TOY / "data" / "eval")}
    script = ROOT / "scripts" / family / "eval" / f"{benchmark}.sh"
    command = ["bash", str(script), "16", "--output-root", str(tmp_path), "--batch-size", "8", *limit]
    command += ["--max-new-tokens", "8"] if limit else []  # random weights never stop by themselves
    result = subprocess.run(
        command, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    if not limit:  # six questions are no whole benchmark, and some scorers refuse them
        assert result.returncode == 0, result.stderr
    name = ("vtn_16" if family == "v1_5" else "vtn_80") + ("-first6" if limit else "")
    found = list(tmp_path.glob(f"{BENCHMARKS[benchmark].folder}/answers/*/{checkpoint}/{name}.run/summary.json"))
    assert found, result.stderr
    assert json.loads(found[0].read_text())["questions"] > 0
