"""Writes the programs that stand in the documentation to files, so that the build compiles and the tests run them.

usage: docs_code.py OUTPUT_DIRECTORY DOCUMENT...
A block fenced as ```cpp whose first line is `// file: NAME.cpp` is a program; other blocks are left alone.
Prints the names, separated by semicolons. A file is rewritten only if it changed.
"""

import re
import sys
from pathlib import Path

PROGRAM = re.compile(r"^```cpp\n(// file: (\w+)\.cpp\n.*?)^```$", re.M | re.S)


def main() -> int:
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for document in sys.argv[2:]:
        for text, name in PROGRAM.findall(Path(document).read_text()):
            if name in names:
                print(f"{document}: program {name} stands in the documentation twice", file=sys.stderr)
                return 1
            names.append(name)
            path = output / f"{name}.cpp"
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
    print(";".join(names), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
