#!/usr/bin/env bash
# The tests that need a GPU, then the measurements for docs/cost.md, in at most 8 minutes on one card:
#   bash tests/benchmarks/gpu.sh [OUTPUT.md]
# PYTHON names the interpreter (default: python3). torchcam and grad-cam are measured where they are installed.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
"$python" -c 'import torch; assert torch.cuda.is_available(), "no GPU"'
timeout 150 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py \
    || echo "the tests failed or took too long"
timeout 320 "$python" -m tests.benchmarks.gpu --output "${1:-gpu.md}"
