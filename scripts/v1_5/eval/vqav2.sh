#!/usr/bin/env bash
# vqav2 with N visual tokens per image: bash scripts/v1_5/eval/vqav2.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_5 vqav2 "$@"
