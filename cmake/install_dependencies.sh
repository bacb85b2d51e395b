# Sourced by tests/run.sh and apps/quickstart.sh: installs the Debian packages that are missing, asks nothing, says what
# it does. Where there is no apt, prints what to install.

weft_packages=(g++ cmake ninja-build pkg-config libhwy-dev libtomlplusplus-dev nlohmann-json3-dev
               libpcre2-dev libxxhash-dev libgloo-dev libzmq3-dev cppzmq-dev)

# install_dependencies [with-tests] [with-text]
install_dependencies() {
  local packages=("${weft_packages[@]}") missing=() package extra
  for extra in "$@"; do
    case $extra in
      with-tests) packages+=(libgtest-dev libgmock-dev lld python3) ;;
      with-text) packages+=(bible-kjv) ;;
    esac
  done
  if ! command -v apt-get > /dev/null || ! command -v dpkg-query > /dev/null; then
    echo "This machine has no apt. Install the equivalents of these Debian packages, then go on: ${packages[*]}" >&2
    return 0
  fi
  for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2> /dev/null | grep -q 'install ok installed' || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo > /dev/null; then
      echo "Missing packages: ${missing[*]}. Run as root, or install sudo, or: apt-get install ${missing[*]}" >&2
      return 1
    fi
    sudo=(sudo)
  fi
  echo "== installing ${missing[*]}"
  "${sudo[@]}" apt-get update -qq
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" > /dev/null
}

# install_cudnn_frontend: where there are an nvcc and cuDNN's headers, fetches the headers of cuDNN's frontend (Apache 2.0
# and MIT, see the licences beside them) from PyPI into build/cudnn-frontend, once. Without them attention is our own.
install_cudnn_frontend() {
  local version=1.32.0 target=build/cudnn-frontend nvcc scratch
  nvcc=$(command -v nvcc) || return 0
  [ -f "$(dirname "$(readlink -f "$nvcc")")/../include/cudnn_version.h" ] || [ -f /usr/include/cudnn_version.h ] || return 0
  [ ! -f "$target/include/cudnn_frontend.h" ] || return 0
  echo "== fetching nvidia-cudnn-frontend $version from PyPI into $target"
  scratch=$(mktemp -d)
  if python3 -m pip download --quiet --disable-pip-version-check --retries 1 --timeout 20 --no-deps --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 \
      --platform "manylinux_2_28_$(uname -m)" --dest "$scratch" "nvidia-cudnn-frontend==$version"; then
    python3 - "$scratch"/*.whl "$target" << 'PYTHON'
import sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as wheel:
    wheel.extractall(sys.argv[2], [name for name in wheel.namelist() if name.startswith("include/") or "/licenses/" in name])
PYTHON
  else
    echo "nvidia-cudnn-frontend could not be fetched: the build goes on without attention of cuDNN" >&2
  fi
  rm -r "$scratch"
}
