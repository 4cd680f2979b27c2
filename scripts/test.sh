#!/usr/bin/env bash
# On a bare machine: environment, installation, style, tests. The environment stays in .venv for the next time.
# Arguments go to pytest; without any, two workers share the tests. The long tests: bash scripts/test.sh -m nightly
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ruff format --check .
ruff check .
[ $# -gt 0 ] || set -- -n 2 --dist loadscope
HF_HUB_OFFLINE=1 python -m pytest -q "$@"
