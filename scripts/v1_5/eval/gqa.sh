#!/usr/bin/env bash
# gqa with N visual tokens per image: bash scripts/v1_5/eval/gqa.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_5 gqa "$@"
