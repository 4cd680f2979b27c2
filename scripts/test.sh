#!/usr/bin/env bash
# On a bare machine: environment, installation, style, tests. The environment is kept in .venv for the next time.
# Arguments go to pytest; without any, two workers share the tests. "-m nightly" runs the long tests, which are left out
# otherwise, "-m 'not slow'" leaves out more.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
ruff format --check .
ruff check .
[ $# -gt 0 ] || set -- -n 2 --dist loadscope
HF_HUB_OFFLINE=1 python -m pytest -q "$@"
