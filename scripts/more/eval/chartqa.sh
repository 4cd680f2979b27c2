#!/usr/bin/env bash
# chartqa with N visual tokens per image: bash scripts/more/eval/chartqa.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" more chartqa "$@"
