#!/usr/bin/env bash
# Measures the CUDA backend on this machine's GPU against its goals, and prints one table (tests/gpu/speed.py).
#   bash tests/gpu_speed.sh [BUNDLE [LOG_DIR [PART,...]]]   BUNDLE as in tests/gpu.sh; "": builds in build/gpu
# Parts: steps, kernels, torch-124m, torch-350m, torch-1558m. A call takes less than ten minutes and does as many as fit;
# the next one goes on with the parts it is given, and prints the lines of all so far.
# Exit status: 0 every goal is reached, 1 something failed, 2 there is no GPU, 3 a goal was missed or a line skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
source tests/gpu_programs.sh
exec python3 tests/gpu/speed.py --logs "$logs" ${3:+--parts "$3"} -- "${run[@]}"
