#!/usr/bin/env bash
# vqav2 with N visual tokens per tile: bash scripts/v1_6/eval/vqav2.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_6 vqav2 "$@"
