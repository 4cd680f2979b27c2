#!/usr/bin/env bash
# ocrbench with N visual tokens per image: bash scripts/more/eval/ocrbench.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" more ocrbench "$@"
