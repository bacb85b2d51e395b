"""Keeps the code in the documentation true.

usage: docs_code.py REPOSITORY OUTPUT_DIRECTORY DOCUMENT...
A block fenced as ```cpp whose first line is `// file: NAME.cpp` is a program: it is written to OUTPUT_DIRECTORY, so that
the build compiles it and the tests run it; the names are printed, separated by semicolons. A block whose first line is
`// in: PATH` quotes a file of the repository: the rest of it must stand there to the letter. Other blocks are left alone.
"""

import re
import sys
from pathlib import Path

PROGRAM = re.compile(r"^```cpp\n(// file: (\w+)\.cpp\n.*?)^```$", re.M | re.S)
QUOTE = re.compile(r"^```cpp\n// in: (\S+)\n(.*?)^```$", re.M | re.S)


def main() -> int:
    repository, output = Path(sys.argv[1]), Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    names = []
    for document in sys.argv[3:]:
        content = Path(document).read_text()
        for path, text in QUOTE.findall(content):
            if text not in (repository / path).read_text():
                print(f"{document}: this is said to stand in {path}, and does not:\n{text}", file=sys.stderr)
                return 1
        for text, name in PROGRAM.findall(content):
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
