#!/usr/bin/env bash
# What the twenty scripts in scripts/v1_*/eval share: FAMILY BENCHMARK N [options of llava.eval.run ...].
# EVAL.md explains the variables; arguments after N win over them.
set -euo pipefail
family=$1 benchmark=$2
shift 2
if [ $# -eq 0 ]; then
    echo "usage: bash scripts/$family/eval/$benchmark.sh N|full [options of python -m llava.eval.run]" >&2
    echo "N: visual tokens kept per $([ "$family" = v1_6 ] && echo tile || echo image); EVAL.md explains the rest" >&2
    exit 2
fi
keep=$1
shift
[ "$family" = v1_6 ] && default=llava-v1.6-vicuna-7b || default=llava-v1.5-7b
source "$(dirname "${BASH_SOURCE[0]}")/../checkpoint.sh"
processes=()
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # one process per device that the list names
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    processes=(--processes "${#devices[@]}")
fi

exec "${PYTHON:-python}" -m llava.eval.run \
    --benchmark "$benchmark" \
    --model-path "$checkpoint" \
    --data-root "${DATA_DIR:-playground/data/eval}" \
    --pruner "${PRUNER:-script}" \
    --keep-tokens "$keep" \
    --conv-mode vicuna_v1 \
    --score \
    ${processes[@]+"${processes[@]}"} \
    "$@"
