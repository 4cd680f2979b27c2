#!/usr/bin/env bash
# ai2d with N visual tokens per image: bash scripts/more/eval/ai2d.sh N
exec bash "$(dirname "$0")/../../run_harness.sh" more ai2d "$@"
