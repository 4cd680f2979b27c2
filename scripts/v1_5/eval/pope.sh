#!/usr/bin/env bash
# pope with N visual tokens per image: bash scripts/v1_5/eval/pope.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_5 pope "$@"
