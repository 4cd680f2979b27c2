#!/usr/bin/env bash
# The page in a real browser, in an environment of its own: .venv-page, or VENV. Needs Chromium (Debian: apt-get install
# chromium). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-page}
[ -d "$VENV" ] || python3 -m venv "$VENV"
source "$VENV/bin/activate"
# Gradio asks for Pillow below 13; the recorded pixels are those of the pinned one (docs/install.md).
pip install --quiet -c <(grep -v ^pillow constraints.txt) -e ".[dev,page,browser]"
pip install --quiet --no-deps "$(sed -n 's/^\(pillow==[0-9.]*\).*/\1/p' constraints.txt)"
HF_HUB_OFFLINE=1 python -m pytest -q tests/page "$@"
