#!/usr/bin/env bash
# textvqa with N visual tokens per tile: bash scripts/v1_6/eval/textvqa.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_6 textvqa "$@"
