#!/usr/bin/env bash
# Proves the library right on this machine: installs what is missing, builds, runs every test that can run here, prints
# passed, failed and skipped (with reasons), and exits non-zero on a failure.
#   bash tests/run.sh                 release build, all tests
#   WEFT_SANITIZE=1 bash tests/run.sh the same under AddressSanitizer and UndefinedBehaviorSanitizer as well
#   WEFT_SLOW=1 bash tests/run.sh     tests with the label slow as well
#   WEFT_ALL_GPUS=1 bash tests/run.sh device code is compiled for compute capabilities 8.0 and 10.0 beside 9.0 as well
# The last lines say how long each part took, and how much of the processor.
set -euo pipefail
cd "$(dirname "$0")/.."
source cmake/install_dependencies.sh
install_dependencies with-tests
install_cudnn_frontend

sanitize=${WEFT_SANITIZE:-0} all_gpus=${WEFT_ALL_GPUS:-0}
which=(-LE '^slow$')
[ "${WEFT_SLOW:-0}" = 0 ] || which=()
unset WEFT_SANITIZE WEFT_ALL_GPUS WEFT_SLOW  # weft itself refuses variables that it does not know
jobs=$(nproc)
failures=0
parts=()

# timed PART COMMAND...: runs it and notes its minutes: on the clock, and of processor time over all cores.
timed() {
  local part=$1 TIMEFORMAT='%R %U %S' status=0
  shift
  { time "$@" >&3 2>&4 3>&- 4>&- || status=$?; } 3>&1 4>&2 2> build/time
  parts+=("$(awk -v part="$part" '{ printf "%-24s %7.1f %7.1f", part, $1 / 60, ($2 + $3) / 60 }' build/time)")
  return "$status"
}

report() {
  [ ${#parts[@]} -gt 0 ] || return 0
  printf '== minutes %-13s %7s %7s\n' "on $jobs cores" clock cores
  printf '   %s\n' "${parts[@]}"
}
trap report EXIT

# configured PRESET [OPTION...]: configures build/PRESET as CMakePresets.json and the options say, with tests.
configured() {
  local preset=$1
  shift
  echo "== $preset: configure and build in build/$preset"
  timed "$preset: configure" cmake --preset "$preset" -DWEFT_BUILD_TESTS=ON "$@" > "build/$preset.configure.log" 2>&1 ||
    { cat "build/$preset.configure.log"; exit 1; }
}

# suite PRESET TITLE: configures, builds and runs one build of everything.
suite() {
  local directory=build/$1 title=$2
  configured "$1"
  timed "$1: build" cmake --build "$directory" -j "$jobs"
  echo "== $title: test"
  rm -rf "$directory/tests.xml" "$directory/many_tests"
  local log=$directory/tests.log status=0
  timed "$1: tests" ctest --test-dir "$directory" --output-on-failure --no-tests=error "${which[@]}" -j "$jobs" \
    --output-junit "$PWD/$directory/tests.xml" > "$log" 2>&1 || status=$?
  python3 tests/summary.py "$title" "$directory" || status=1
  [ "$status" -eq 0 ] || failures=1
}

mkdir -p build
command -v nvcc > /dev/null || echo "== there is no nvcc here: the CUDA backend is not compiled for a GPU, only as C++ for the emulated device"
suite release "release"
if [ "$all_gpus" != 0 ] && command -v nvcc > /dev/null; then
  configured all-gpus "-DCMAKE_CUDA_ARCHITECTURES=80;100"  # 9.0 was just compiled
  timed "all-gpus: build" cmake --build build/all-gpus -j "$jobs" --target weft_cuda
fi
if [ "$sanitize" != 0 ]; then
  suite sanitize "address and undefined-behaviour sanitizers"
fi
exit "$failures"
