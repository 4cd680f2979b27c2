#!/usr/bin/env bash
# lmms-eval in an environment of its own (.venv-lmms-eval, or VENV), and the tests that need it: official tasks on
# invented data, offline. On a machine without a GPU give pip a place with CPU builds of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-lmms-eval}
if [ ! -d "$VENV" ]; then
    python3 -m venv "$VENV"
    # The harness asks for torchvision, whose newest release would bring another torch: name ours again beside it.
    "$VENV/bin/pip" install --quiet torch==2.13.0
    "$VENV/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 -e ".[lmms-eval]" pytest
    "$VENV/bin/pip" uninstall --quiet --yes torchvision # its wheel needs CUDA; the evaluator and the tasks do not need it
fi
HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest -q tests/eval/lmms_eval "$@"
