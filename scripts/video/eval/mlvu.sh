#!/usr/bin/env bash
# mlvu with N visual tokens per frame: bash scripts/video/eval/mlvu.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" video mlvu "$@"
