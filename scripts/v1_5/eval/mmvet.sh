#!/usr/bin/env bash
# mmvet with N visual tokens per image: bash scripts/v1_5/eval/mmvet.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_5 mmvet "$@"
