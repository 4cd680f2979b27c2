#!/usr/bin/env bash
# On a bare machine: environment, installation, style, tests. The environment stays in .venv for the next time.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ruff format --check .
ruff check .
HF_HUB_OFFLINE=1 python -m pytest -q "$@"
