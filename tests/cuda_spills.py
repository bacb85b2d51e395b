"""Shows that the kernels of a GPT's training step keep their values in registers.

usage: cuda_spills.py SOURCE_DIRECTORY NVCC [FILE.cu...]
Compiles the device code of these families for sm_90 as the build does, reads what ptxas tells of every kernel, and fails
if one of those in KERNELS spills or is not there. Kernels of f64 are not on that path, and may.
"""

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Of each file the kernels that a step queues, by name; in every dtype but f64.
KERNELS = {
    "attention_forward.cu": ("forward_mma",),
    "attention_backward.cu": ("sum_delta", "backward_keys_mma", "backward_queries_mma"),
    "norm.cu": ("forward_held", "backward_held"),
    "loss.cu": ("losses_in_place", "row_losses", "logits_gradient", "slice_parts", "slice_in_place", "total_loss"),
    "optimizer.cu": ("square_chunks", "adam_chunks"),
    "dropout.cu": ("drop",),
}


def resources(source: Path, nvcc: str, name: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of spills of every kernel, by its name with its template arguments."""
    done = subprocess.run([nvcc, "-std=c++20", "-arch=sm_90", "-O3", "--expt-relaxed-constexpr", f"-I{source}",
                           "-Xptxas=-v", "-cubin", "-o", "/dev/null", str(source / "cuda" / name)],
                          capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return parse(subprocess.run(["c++filt"], input=done.stderr, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> dict[str, tuple[int, int]]:
    found = re.findall(r"Compiling entry function '(.*?)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
                       r"Used (\d+) registers", text, re.DOTALL)
    return {name: (int(registers), int(stores) + int(loads)) for name, stores, loads, registers in found}


def main() -> int:
    source, nvcc, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:] or list(KERNELS)
    with ThreadPoolExecutor(2) as pool:
        files = dict(zip(names, pool.map(lambda name: resources(source, nvcc, name), names)))
    failures = 0
    for name in names:
        for kernel in KERNELS[name]:
            mine = {full: used for full, used in files[name].items()
                    if re.search(rf"\b{kernel}\b", full) and not re.search(rf"\b{kernel}<double\b", full)}
            registers, spills = sorted({used[0] for used in mine.values()}), {f: u for f, u in mine.items() if u[1]}
            print(f"{name} {kernel}: {len(mine)} kernels, {registers[0]} to {registers[-1]} registers" if mine else
                  f"{name} {kernel}: no such kernel")
            failures += not mine
            for full, (_, spilled) in spills.items():
                print(f"  spills {spilled} bytes: {full}")
                failures += 1
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
