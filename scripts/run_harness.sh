#!/usr/bin/env bash
# What the scripts in scripts/video/eval and scripts/more/eval share: FAMILY BENCHMARK [N] [options of
# llava.eval.harness ...]. Without N, or with "full", nothing is pruned. EVAL.md explains the variables; arguments
# after N win over them.
set -euo pipefail
family=$1 benchmark=$2
shift 2
keep=full
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    keep=$1
    shift
fi
if [ "$family" = video ]; then
    default=LLaVA-Video-7B-Qwen2
    # As the paper's table was made: 64 frames of 13 x 13 tokens, also of clips shorter than 64 seconds.
    model=(--conv-mode qwen_1_5 --model-args max_frames_num=64 mm_spatial_pool_mode=average force_sample=true)
else
    default=llava-v1.5-7b
    model=()
fi
source "$(dirname "${BASH_SOURCE[0]}")/checkpoint.sh"
processes=()
if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then # one process per device that the list names
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    processes=(--processes "${#devices[@]}")
fi

exec "${PYTHON:-python}" -m llava.eval.harness \
    --benchmark "$benchmark" \
    --model-path "$checkpoint" \
    --pruner "${PRUNER:-script}" \
    --keep-tokens "$keep" \
    ${model[@]+"${model[@]}"} \
    ${processes[@]+"${processes[@]}"} \
    "$@"
