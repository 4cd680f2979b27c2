"""What deploy/ starts: every option of its files is vLLM's or ours, and the toy's server passes its health check."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

pytest.importorskip(
    "vllm", reason="vLLM is not installed: scripts/test_vllm.sh runs these in an environment of its own"
)

from vllm.utils.argparse_utils import FlexibleArgumentParser

try:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
except ImportError:  # vLLM 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args

from llava.eval.measure.serving_load import get, is_ready
from llava.integrations.vllm import ARCHITECTURES
from llava.integrations.vllm.options import read_server_options
from llava.integrations.vllm.registration import installed_version

DEPLOY = ROOT / "deploy"
PORT = 8917
CONFIGS = sorted(DEPLOY.glob("serve*.yaml"))
OPTIONS = ["--answer", "yes", "--most-prompt-tokens", "120"]  # the same as in deploy/compose.yaml


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_option_is_known(path):
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(["--config", str(path)])
    validate_parsed_serve_args(parsed)
    given = yaml.safe_load(path.read_text())
    for name, value in given.items():
        found = getattr(parsed, name.replace("-", "_"))
        if name not in ("served-model-name", "limit-mm-per-prompt"):
            assert found == value, name
    [architecture] = given["hf-overrides"]["architectures"]
    assert architecture in ARCHITECTURES
    server, options = read_server_options(given["hf-overrides"]["script_pruning"], None)
    assert options.keep_tokens == 64
    assert server.feature_cache_mib > 0


@pytest.fixture(scope="module")
def log(toy, tmp_path_factory):
    """The log of a server that deploy/start.sh started."""
    folder = tmp_path_factory.mktemp("deployed")
    left = folder / "metrics" / "counter_1.db"  # of a server that was here before
    left.parent.mkdir()
    left.write_bytes(b"nonsense")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PROMETHEUS_MULTIPROC_DIR": str(left.parent),
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [DEPLOY / "start.sh", "--config", DEPLOY / "serve-cpu.yaml", "--model", toy("v1.5")]
    command += ["--host", "127.0.0.1", "--port", str(PORT)]
    with (folder / "log").open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 900
        while not is_ready(PORT):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < deadline
            time.sleep(1)
        assert not left.exists()
        yield folder / "log"
    finally:
        process.terminate()
        process.wait(timeout=60)


def health(*options):
    command = [sys.executable, "-I", DEPLOY / "ask_picture.py", "--url", f"http://127.0.0.1:{PORT}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_the_health_check_asks_about_a_picture(log):
    result = health(*OPTIONS)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["prompt_tokens"] > 64
    assert "expected at most 64" in health("--most-prompt-tokens", "64").stderr
    assert health("--answer", "^no").returncode == 1
    refused = health("--question", "?!")
    assert refused.returncode == 1
    assert "answers 400" in refused.stderr
    assert "selects by the question" in refused.stderr


def test_the_selections_of_the_worker_are_on_metrics(log):
    assert health(*OPTIONS).returncode == 0
    status, text = get(PORT, "/metrics")
    assert status == 200
    assert "script_selection_seconds_count" in text
    assert "script_visual_tokens_after_total" in text


def test_one_line_of_the_log_says_what_is_served(log):
    lines = [line for line in log.read_text().splitlines() if "Script: pruner" in line]
    assert len(lines) == 1
    assert "'script' keeps 64 visual tokens of each view and reads the question with relevance=clip" in lines[0]
    assert "caches: up to 512 MiB of unpruned features in each worker and 4 GiB of preprocessed" in lines[0]
    assert f"versions: vLLM {installed_version()}, Script " in lines[0]
    assert "Transformers" in lines[0]
    assert "PyTorch" in lines[0]
