#!/usr/bin/env bash
# hallusionbench with N visual tokens per image: bash scripts/more/eval/hallusionbench.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" more hallusionbench "$@"
