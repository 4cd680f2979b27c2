#!/usr/bin/env bash
# videomme with N visual tokens per frame: bash scripts/video/eval/videomme.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" video videomme "$@"
