#!/usr/bin/env bash
# From a bare machine to a trained model: installs what is missing, builds, prepares a text, trains on it, compares the
# model with an n-gram model on held-out text, and lets it write.
set -euo pipefail

usage() {
  cat << 'END'
usage: bash apps/quickstart.sh [--text FILE]

Builds weft in build/release, trains a small GPT and shows what it has learnt. Everything it makes besides the build
is in out/quickstart, which is replaced.

  --text FILE   learn from this text (UTF-8) instead of the King James Bible, which Debian's bible-kjv brings
  -h, --help    prints this text

The model and its training are set in apps/quickstart.toml.
END
}

fail() {
  echo "quickstart: error: $*" >&2
  exit 2
}

text=""
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help)
      usage
      exit 0
      ;;
    --text)
      [ $# -ge 2 ] || fail "--text needs a value: the path of a file"
      [ -z "$text" ] || fail "--text is given twice"
      text=$2
      shift
      ;;
    --text=*)
      [ -z "$text" ] || fail "--text is given twice"
      text=${1#--text=}
      ;;
    *) fail "unknown argument \"$1\"; see bash apps/quickstart.sh --help" ;;
  esac
  shift
  [ -n "$text" ] || fail "--text \"\": must be the path of a file"
done
root=$(dirname "${BASH_SOURCE[0]}")/..
if [ -n "$text" ]; then
  [ -f "$text" ] && [ -r "$text" ] || fail "--text \"$text\": no file that can be read"
  [ -s "$text" ] || fail "--text \"$text\": the file is empty"
  text=$(realpath -- "$text")
  case $text in
    "$(realpath "$root")"/out/quickstart/*) fail "--text \"$text\": is in out/quickstart, which is replaced" ;;
  esac
fi

cd "$root"
source cmake/install_dependencies.sh
weft=build/release/bin/weft
out=out/quickstart
began=$SECONDS
stage_began=$SECONDS
stage_name=""

# stage NAME: tells how long the stage before took, and announces the next.
stage() {
  [ -z "$stage_name" ] || echo "== $stage_name took $((SECONDS - stage_began)) s"
  stage_name=$1
  stage_began=$SECONDS
  [ -z "$stage_name" ] || echo "== $stage_name"
}

stage "packages"
if [ -n "$text" ]; then install_dependencies; else install_dependencies with-text; fi

stage "build"
mkdir -p build
# Tests need packages that a first look does not: a new build directory goes without, an old one stays as it is.
tests=()
[ -f build/release/CMakeCache.txt ] || tests=(-DWEFT_BUILD_TESTS=OFF)
cmake -S . -B build/release -G Ninja -DCMAKE_BUILD_TYPE=Release "${tests[@]}" > build/quickstart-configure.log 2>&1 || {
  cat build/quickstart-configure.log >&2
  exit 1
}
cmake --build build/release --target weft_cli

stage "text"
rm -rf "$out"
mkdir -p "$out"
if [ -n "$text" ]; then
  cp -- "$text" "$out/text.txt"
else
  command -v bible > /dev/null || {
    echo "quickstart: error: the command bible is missing (Debian package bible-kjv); or give --text FILE" >&2
    exit 1
  }
  bible -f 'gen1:1-rev22:21' > "$out/text.txt" < /dev/null
fi
echo "$out/text.txt: $(wc -c < "$out/text.txt") bytes"

stage "data"
"$weft" data prepare --text "$out/text.txt" --out "$out/data" --vocab 1024

stage "training"
"$weft" train --config apps/quickstart.toml --data "$out/data" --out "$out/run"

stage "comparison with an interpolated Kneser-Ney 5-gram model"
"$weft" eval --checkpoint "$out/run" --data "$out/data" --kneser-ney 5

stage "the model writes"
prompt="In the beginning"
[ -z "$text" ] || prompt=$(head -c 200 -- "$out/text.txt" | iconv -c -f UTF-8 -t UTF-8 | tr -s '[:space:]' ' ' | cut -d ' ' -f 1-3)
[ -n "${prompt// /}" ] || prompt="The"
"$weft" generate --checkpoint "$out/run" --prompt "$prompt" --tokens 200

stage ""
echo "== all of it took $((SECONDS - began)) s. Go on with: $weft generate --checkpoint $out/run --prompt \"...\""
