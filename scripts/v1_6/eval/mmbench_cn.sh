#!/usr/bin/env bash
# mmbench_cn with N visual tokens per tile: bash scripts/v1_6/eval/mmbench_cn.sh N
exec bash "$(dirname "$0")/../../v1_5/run_benchmark.sh" v1_6 mmbench_cn "$@"
