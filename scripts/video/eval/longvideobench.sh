#!/usr/bin/env bash
# longvideobench with N visual tokens per frame: bash scripts/video/eval/longvideobench.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" video longvideobench "$@"
