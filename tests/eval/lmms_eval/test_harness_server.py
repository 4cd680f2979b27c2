"""lmms-eval's own OpenAI client against a pruned vLLM server gives the score and answers of our runner.

The server lives in another environment, that of scripts/test_vllm.sh (.venv-vllm, or VENV_VLLM).
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: scripts/test_lmms_eval.sh makes its environment")

from task_files import write_pictures, write_task

from llava.eval.files import read_json
from llava.eval.lmms_eval.results import newest_results
from llava.eval.measure.serving_load import is_ready

ROOT = Path(__file__).parents[3]
TOY = ROOT / "playground/toy"
POPE = TOY / "data/eval/pope"
VLLM = Path(os.environ.get("VENV_VLLM", ROOT / ".venv-vllm"))
KEEP = 64

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (VLLM / "bin/python").exists(), reason="scripts/test_vllm.sh makes vLLM's environment"),
    pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="lmms-eval's client needs openai"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """POPE's official task on the toy's scenes."""
    root = tmp_path_factory.mktemp("server")
    rows = []
    for category in ("random", "popular", "adversarial"):
        for line in (POPE / f"coco/coco_pope_{category}.json").read_text().splitlines()[:8]:
            entry = json.loads(line)
            fields = {"question_id": str(entry["question_id"]), "question": entry["text"], "answer": entry["label"]}
            rows.append((POPE / "val2014" / entry["image"], fields | {"category": category}))
    write_task(root / "tasks", "pope/pope.yaml", "test", write_pictures(root / "pope", "test", rows))
    return root


@pytest.fixture(scope="module")
def environment(root):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "PYTHONPATH": str(ROOT)}


def run(environment, *command):
    result = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def port(root, environment):
    """A server of deploy/'s with the converted toy."""
    model = root / "llava-toy-v1.5"
    python = VLLM / "bin/python"
    convert = [python, ROOT / "scripts/convert_to_transformers.py", TOY / "llava-toy-v1.5", model]
    subprocess.run(convert, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=600)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [ROOT / "deploy/start.sh", "--config", ROOT / "deploy/serve-cpu.yaml", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    own = {"PATH": f"{python.parent}:{os.environ['PATH']}", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = root / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment | own, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 900
        while not is_ready(port):
            assert process.poll() is None, log.read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(1)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_the_score_over_the_api_is_that_of_our_runner(root, environment, port):
    arguments = f"model_version=toy,base_url=http://127.0.0.1:{port}/v1,api_key=none,num_concurrent=8,timeout=300"
    local = ["--tasks", "pope_local", "--include_path", root / "tasks"]
    output = ["--output_path", root / "api", "--log_samples"]
    run(environment, "-m", "lmms_eval", "--model", "openai", "--model_args", arguments, *local, *output)
    own = ["-m", "llava.eval.harness", "--model-path", TOY / "llava-toy-v1.5", "--keep-tokens", KEEP]
    run(environment, *own, "--tasks", "pope_local", "--include-path", root / "tasks", "--output-root", root / "out")
    folder = root / f"out/pope_local/answers/lmms_eval/llava-toy-v1.5/vtn_{KEEP}.run"
    served = read_json(newest_results(root / "api"))["results"]["pope_local"]
    ours = read_json(newest_results(folder))["results"]["pope_local"]
    metrics = {name for name in served if name.startswith("pope_") and isinstance(served[name], float)}
    assert len(metrics) >= 5
    for name in metrics:
        assert served[name] == pytest.approx(ours[name], abs=1e-4), name
    assert said(root / "api") == said(folder)


def said(folder):
    """{document: answer} of the samples that the harness has logged."""
    [path] = folder.rglob("*samples_pope_local.jsonl")
    samples = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    assert len(answers) == 24
    return {
        document: (answer[0] if isinstance(answer, list) else answer).strip().lower()
        for document, answer in answers.items()
    }
