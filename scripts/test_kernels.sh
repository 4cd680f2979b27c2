#!/usr/bin/env bash
# The Triton kernels on a machine without a GPU: interpreted. Adds Triton (1 GB on disk) to the environment of test.sh;
# PyTorch for CUDA brings it along, and there test.sh runs these tests on the GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
pip install --quiet -c constraints.txt -e ".[triton]"
HF_HUB_OFFLINE=1 python -m pytest -q tests/test_kernels.py "$@"
