#!/usr/bin/env bash
# Proves the library right on this machine: installs what is missing, builds, runs every test that can run here, prints
# passed, failed and skipped (with reasons), and exits non-zero on a failure.
#   bash tests/run.sh                 release build, all tests
#   WEFT_SANITIZE=1 bash tests/run.sh the same under AddressSanitizer and UndefinedBehaviorSanitizer as well
set -euo pipefail
cd "$(dirname "$0")/.."
source cmake/install_dependencies.sh
install_dependencies with-tests

jobs=$(nproc)
failures=0

# suite DIRECTORY TITLE CMAKE-OPTIONS...: configures, builds and runs one build of everything.
suite() {
  local directory=$1 title=$2
  shift 2
  echo "== $title: configure and build in $directory"
  cmake -S . -B "$directory" -G Ninja -DWEFT_BUILD_TESTS=ON "$@" > "$directory.configure.log" 2>&1 || { cat "$directory.configure.log"; exit 1; }
  cmake --build "$directory" -j "$jobs"
  echo "== $title: test"
  local log=$directory/tests.log status=0
  (cd "$directory" && ctest --output-on-failure --no-tests=error -j "$jobs" --output-junit tests.xml) > "$log" 2>&1 || status=$?
  python3 tests/summary.py "$title" "$directory" || status=1
  [ "$status" -eq 0 ] || failures=1
}

mkdir -p build
command -v nvcc > /dev/null || echo "== there is no nvcc here: the CUDA backend is not compiled for a GPU, only as C++ for the emulated device"
suite build/release "release" -DCMAKE_BUILD_TYPE=Release
if [ "${WEFT_SANITIZE:-0}" != 0 ]; then
  suite build/sanitize "address and undefined-behaviour sanitizers" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG=-g1 \
    -DWEFT_SANITIZE=ON -DWEFT_CUDA=OFF
fi
exit "$failures"
