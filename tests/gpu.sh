#!/usr/bin/env bash
# Proves the CUDA backend on this machine's GPU in less than ten minutes, and prints one table (tests/gpu/proof.py).
#   bash tests/gpu.sh                    builds in build/gpu first
#   bash tests/gpu.sh BUNDLE [LOG_DIR]   takes programs that were built elsewhere (tests/gpu_programs.sh)
# Exit status: 0 all is proven, 1 something failed, 2 there is no GPU, 3 nothing failed but a line was skipped.
# Speed is measured by tests/gpu_speed.sh.
set -uo pipefail
cd "$(dirname "$0")/.."
source tests/gpu_programs.sh
exec python3 tests/gpu/proof.py --logs "$logs" -- "${run[@]}"
