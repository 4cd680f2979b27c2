#!/usr/bin/env bash
# The same tests as scripts/test_vllm.sh with the Python of vLLM 0.33.0 over the kernels for CPUs of 0.32.0, since no build of
# 0.33 for CPUs is on the index: .venv-vllm-next, or VENV, on top of .venv-vllm (or VENV_VLLM), which is left as it is.
# Arguments are files of tests; without any, all of them.
set -euo pipefail
cd "$(dirname "$0")/.."
VERSION=0.33.0
VENV=${VENV:-.venv-vllm-next}
VENV_VLLM=$(realpath "${VENV_VLLM:-.venv-vllm}")
[ -x "$VENV_VLLM/bin/python" ] || { echo "make $VENV_VLLM first: bash scripts/test_vllm.sh" >&2 && exit 1; }
if [ ! -d "$VENV" ]; then
    base=$("$VENV_VLLM/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    "$VENV_VLLM/bin/python" -m venv --without-pip "$VENV"
    packages=$("$VENV/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    wheel=$(mktemp -d)
    trap 'rm -rf "$wheel"' EXIT
    "$VENV_VLLM/bin/python" -m pip download --quiet --no-deps --dest "$wheel" "vllm==$VERSION" # 340 MB, most of it for GPUs
    "$VENV_VLLM/bin/python" -m zipfile -e "$wheel"/*.whl "$packages"
    find "$packages/vllm" -name '*.so' -delete
    cp "$base"/vllm/*.so "$packages/vllm/"
    # vLLM finds its platform by the version of its distribution
    mv "$packages/vllm-$VERSION.dist-info" "$packages/vllm-$VERSION+cpu.dist-info"
    sed -i "s/^Version: $VERSION$/Version: $VERSION+cpu/" "$packages/vllm-$VERSION+cpu.dist-info/METADATA"
    echo "import site; site.addsitedir('$base')" >"$packages/vllm_next.pth"
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
[ $# -gt 0 ] || set -- tests/integrations/serving/test_*.py
failed=0
for file in "$@"; do
    "$VENV/bin/python" -m pytest -q -p no:logging "$file" || failed=1
done
exit $failed
