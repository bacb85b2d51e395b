"""Keeps the prediction in docs/benchmarks/cuda.md what the program counts.

usage: prediction_page.py WEFT_BINARY PAGE [--write]
Compares what `weft bench step --predict` prints with what stands between the page's two marks; --write puts it there.
Exit code 1 if they differ.
"""

import subprocess
import sys
from pathlib import Path

BEGIN, END = "<!-- weft bench step --predict -->\n", "<!-- end of the prediction -->"


def main() -> int:
    binary, page = sys.argv[1], Path(sys.argv[2])
    told = subprocess.run([binary, "bench", "step", "--predict"], capture_output=True, text=True, check=True).stdout
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"{page} has no lines {BEGIN.strip()} and {END}")
        return 1
    text = before + begin + told + end + after
    if "--write" in sys.argv[3:]:
        page.write_text(text)
        return 0
    if page.read_text() == text:
        return 0
    print(f"{page} is not what the program counts; python3 tests/prediction_page.py {binary} {page} --write puts it there")
    return 1


if __name__ == "__main__":
    sys.exit(main())
