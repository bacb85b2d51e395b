# Sourced by gpu.sh and gpu_speed.sh: builds in build/gpu, or takes the bundle $1; sets `run`, the command that starts a
# program by its name, and `logs`. A bundle holds programs that were built on another machine: BUNDLE/run PROGRAM ARG...
# starts one, with the libraries that stand beside it.
bundle=${1:-}
logs=${2:-build/gpu-logs}
mkdir -p build "$logs"
if [ -n "$bundle" ]; then
  run=("$bundle/run")
elif ! nvidia-smi -L > /dev/null 2>&1; then
  echo "== no GPU here, nothing was built, proven or measured: nvidia-smi finds none"
  exit 2
else
  source cmake/install_dependencies.sh
  install_dependencies with-tests
  install_cudnn_frontend
  cmake -S . -B build/gpu -G Ninja -DCMAKE_BUILD_TYPE=Release -DWEFT_CUDA=ON > build/gpu.configure.log 2>&1 || { cat build/gpu.configure.log; exit 1; }
  cmake --build build/gpu -j "$(nproc)" || exit 1
  run=(bash -c 'exec "build/gpu/bin/$0" "$@"')
fi
