# Sourced by the other scripts: makes .venv where there is none (or VENV, if set), installs the package, activates it.
VENV=${VENV:-.venv}
[ -d "$VENV" ] || python3 -m venv "$VENV"
source "$VENV/bin/activate"
pip install --quiet -c constraints.txt -e ".[dev]"
