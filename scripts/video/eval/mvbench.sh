#!/usr/bin/env bash
# mvbench with N visual tokens per frame: bash scripts/video/eval/mvbench.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" video mvbench "$@"
