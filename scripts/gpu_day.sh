#!/usr/bin/env bash
# For whoever has a GPU and the weights: checks the installation, runs the kernels' tests, the efficiency presets and the
# ten benchmarks at all budgets for a list of methods, and writes one report to send back. Says first how long each part
# will take; the same command goes on where it was. Everything else: bash scripts/gpu_day.sh --help
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" scripts/gpu_day.py "$@"
