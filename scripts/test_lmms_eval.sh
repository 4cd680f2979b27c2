#!/usr/bin/env bash
# lmms-eval in an environment of its own (.venv-lmms-eval, or VENV), and the tests that need it: official tasks on
# invented data, offline. On a machine without a GPU give pip a place with CPU builds of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-lmms-eval}
if [ ! -d "$VENV" ]; then
    python3 -m venv "$VENV"
    # Torch and torchvision of one release: the library's processors of videos need both. openai is the harness's client.
    "$VENV/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 transformers==5.23.0 -e ".[lmms-eval]" openai pytest
fi
HF_HUB_OFFLINE=1 "$VENV/bin/python" -m pytest -q tests/eval/lmms_eval "$@"
