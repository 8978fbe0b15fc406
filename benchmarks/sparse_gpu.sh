#!/usr/bin/env bash
# Sparse decode on a machine with a GPU: its tests, then its benchmark. Less than four minutes together.
#   PYTHON=python3 OUT=/tmp/sparse bash benchmarks/sparse_gpu.sh
set -u -o pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-.}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
failed=0
timeout 100 "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/gpu/test_sparse_gpu.py tests/kernels/test_page_kernels.py || failed=1
timeout 120 "$PYTHON" -m benchmarks.sparse --json "$OUT/sparse_h200.json" | tee "$OUT/sparse_h200.txt" || failed=1
exit $failed
