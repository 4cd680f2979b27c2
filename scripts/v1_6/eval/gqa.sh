#!/usr/bin/env bash
# gqa with N visual tokens per tile: bash scripts/v1_6/eval/gqa.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_6 gqa "$@"
