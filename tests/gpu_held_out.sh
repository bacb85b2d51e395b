#!/usr/bin/env bash
# fp8 against bf16 in held-out loss: trains a GPT on the sources of this repository for 2,000 steps in each, from the same
# weights and batches, and compares nats per token of text that neither has seen. Longer than gpu_speed.sh.
#   bash tests/gpu_held_out.sh [BUNDLE [LOG_DIR [OPTION...]]]   BUNDLE as in tests/gpu.sh; options go to weft train
# HELD_OUT_DEVICE=cpu tries the script without a GPU.
# Exit status: 0 the losses differ by less than 1%, 1 they do not or something failed, 2 there is no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source tests/gpu_programs.sh
device=${HELD_OUT_DEVICE:-cuda}
if [ "$device" = cuda ] && ! "${run[@]}" weft doctor | grep '^ *cuda:0 ' > /dev/null; then
  echo "== no GPU here, nothing was trained"
  exit 2
fi
work=$(mktemp -d "$logs/held-out.XXXXXX")
find apps core cuda dist docs models ops optim tests \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.md' \) -print0 |
  LC_ALL=C sort -z | xargs -0 cat > "$work/text"
"${run[@]}" weft data prepare --text "$work/text" --vocab 4096 --out "$work/data" > "$work/data.log"
cat > "$work/train.toml" << 'END'
[data]
batch = 32
[model]
layers = 8
heads = 8
width = 512
context = 256
[optimizer]
lr = 6e-4
warmup = 100
[run]
steps = 2000
END
# logged LOG COMMAND...: shows the end of its log if it fails.
logged() {
  "${@:2}" > "$1" 2>&1 || { tail -n 5 "$1"; echo "== failed, see $1"; exit 1; }
}
for precision in bf16 fp8; do
  logged "$work/train-$precision.log" "${run[@]}" weft train --config "$work/train.toml" --device "$device" \
    --data "$work/data" --out "$work/$precision" --precision "$precision" "${@:3}"
  logged "$work/eval-$precision.log" "${run[@]}" weft eval --kneser-ney 0 --device "$device" \
    --checkpoint "$work/$precision" --data "$work/data"
done
python3 - "$work/eval-bf16.log" "$work/eval-fp8.log" << 'END'
import re
import sys

bf16, fp8 = (float(re.search(r"^GPT after step \d+ +([\d.]+)", open(path).read(), re.M)[1]) for path in sys.argv[1:])
verdict = "ok" if fp8 / bf16 <= 1.01 else "missed"
print(f"held-out nats per token: bf16 {bf16:.4f}, fp8 {fp8:.4f}; ratio {fp8 / bf16:.4f}, goal <= 1.01: {verdict}")
sys.exit(verdict != "ok")
END
