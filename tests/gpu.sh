#!/usr/bin/env bash
# Proves the CUDA backend on this machine's GPU and measures it: every test labelled cuda, compute-sanitizer over the op
# cases, and the benchmarks, with one table at the end.
#   bash tests/gpu.sh                    builds in build/gpu first
#   bash tests/gpu.sh BUNDLE [LOG_DIR]   takes programs gathered on another machine: BUNDLE/run PROGRAM ARG... starts one,
#                                        with the libraries that stand beside it
# Environment: WEFT_GPU_MINUTES (default 9) bounds the whole; what no longer fits is listed as skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
bundle=${1:-}
logs=${2:-build/gpu-logs}
mkdir -p "$logs"
deadline=$((SECONDS + 60 * ${WEFT_GPU_MINUTES:-9}))
unset WEFT_GPU_MINUTES  # weft itself refuses variables that it does not know
rows=()
failures=0

note() { rows+=("$(printf '%-44s %s' "$1" "$2")"); }

if [ -z "$bundle" ]; then
  source cmake/install_dependencies.sh
  install_dependencies with-tests
  mkdir -p build
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DWEFT_CUDA=ON > build/gpu.configure.log 2>&1 || { cat build/gpu.configure.log; exit 1; }
  cmake --build build/gpu -j "$(nproc)" || exit 1
fi
run() {
  if [ -n "$bundle" ]; then "$bundle/run" "$@"; else local program=$1; shift; "build/gpu/bin/$program" "$@"; fi
}
left() { echo $((deadline - SECONDS)); }

nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit --format=csv 2>&1 | tee "$logs/device.log"
run weft doctor 2>&1 | tee -a "$logs/device.log"

# Products of 8-bit floats begin with compute capability 8.9.
capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -1 | tr -d '. ')
if [ "${capability:-0}" -ge 89 ]; then fp8=(fp8_cuda_test); else fp8=(); note "fp8" "skipped: compute capability below 8.9"; fi

# ---- tests ----
for program in gemm_cuda_test op_drivers_cuda_test optim_cuda_test models_cuda_test "${fp8[@]}"; do
  run "$program" --gtest_brief=1 > "$logs/$program.log" 2>&1
  status=$?
  passed=$(grep -oE '\[  PASSED  \] [0-9]+' "$logs/$program.log" | grep -oE '[0-9]+$' | tail -1)
  failed=$(grep -oE '^ *[0-9]+ FAILED TESTS?' "$logs/$program.log" | grep -oE '[0-9]+' | tail -1)
  skipped=$(grep -oE '\[  SKIPPED \] [0-9]+' "$logs/$program.log" | grep -oE '[0-9]+$' | tail -1)
  note "$program" "${passed:-0} passed, ${failed:-0} failed, ${skipped:-0} skipped (exit $status)"
  if [ "$status" -ne 0 ] || [ "${skipped:-0}" != 0 ]; then failures=1; fi
  [ "$status" -eq 0 ] || grep -E "FAILED|Failure|error" -A4 "$logs/$program.log" | head -60
done

# ---- compute-sanitizer, over one case of each family: every kernel, small sizes ----
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    if [ "$(left)" -lt 120 ]; then note "compute-sanitizer $tool" "skipped: out of time"; continue; fi
    start=$SECONDS
    if [ -n "$bundle" ]; then target=("$bundle/run"); else target=(); fi
    program=op_drivers_cuda_test
    [ -n "$bundle" ] || program=build/gpu/bin/$program
    timeout 150 compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 9 "${target[@]}" "$program" \
      --gtest_brief=1 --gtest_filter='*gelu*:*layer_norm*:*softmax*:*attention*:*cross_entropy*:*embedding*:*sum*:*matmul*' > "$logs/$tool.log" 2>&1
    status=$?
    note "compute-sanitizer $tool" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$logs/$tool.log" | tail -1) (exit $status, $((SECONDS - start)) s)"
    [ "$status" -eq 0 ] || failures=1
  done
else
  note "compute-sanitizer" "skipped: not on this machine"
fi

# ---- benchmarks ----
bench() {
  local title=$1
  shift
  if [ "$(left)" -lt 40 ]; then note "$title" "skipped: out of time"; return; fi
  run "$@" > "$logs/$title.log" 2>&1 || failures=1
  note "$title" "$(grep -E 'tokens/s|GFLOP/s|GB/s' "$logs/$title.log" | tr '\n' ' ' | cut -c1-160)"
}
bench machine-bf16 weft bench machine --device cuda --precision bf16
bench step-124m weft bench step --device cuda --precision bf16 --shape 124m --batch 32 --steps 10
bench tune-124m weft bench gemm --device cuda --precision bf16 --shape 124m --batch 32 --tune "$logs/algorithms-124m.json"
[ ! -f "$logs/algorithms-124m.json" ] || bench step-124m-tuned weft bench step --device cuda --precision bf16 --shape 124m --batch 32 --steps 10 --gemm-algorithms "$logs/algorithms-124m.json"
bench attention-bf16 weft bench attention --device cuda --precision bf16 --json "$logs/attention-bf16.json"
bench gemm-bf16 weft bench gemm --device cuda --precision bf16 --shape 124m --json "$logs/gemm-bf16.json"
bench ops-bf16 weft bench ops --device cuda --precision bf16 --seconds 0.1 --json "$logs/ops-bf16.json"
bench step-350m weft bench step --device cuda --precision bf16 --shape 350m --batch 16 --steps 6
bench step-1558m weft bench step --device cuda --precision bf16 --shape 1558m --batch 8 --steps 4
if [ ${#fp8[@]} -gt 0 ]; then
  bench step-124m-fp8 weft bench step --device cuda --precision fp8 --shape 124m --batch 32 --steps 10
  bench step-1558m-fp8 weft bench step --device cuda --precision fp8 --shape 1558m --batch 8 --steps 4
fi
if python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null && [ "$(left)" -gt 150 ]; then
  starter=$logs/weft
  printf '#!/usr/bin/env bash\nexec %s "$@"\n' "$([ -n "$bundle" ] && echo "$bundle/run weft" || echo build/gpu/bin/weft)" > "$starter"
  chmod +x "$starter"
  python3 tests/bench/compare.py --weft "$starter" --device cuda --precision bf16 --shapes 124m --threads 4 --batch 32 --accumulate 1 \
    --modes compile --pairs 8 --out "$logs/compare-124m.json" > "$logs/compare-124m.log" 2>&1 || failures=1
  note "compare-124m (against PyTorch)" "$(grep '^| 124m' "$logs/compare-124m.log" | cut -c1-140)"
else
  note "compare-124m (against PyTorch)" "skipped: no PyTorch with CUDA here, or out of time"
fi

echo
echo "== CUDA on this machine; logs in $logs"
printf '%s\n' "${rows[@]}"
exit "$failures"
