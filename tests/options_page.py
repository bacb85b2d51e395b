"""Keeps docs/options.md what the program says of itself.

usage: options_page.py WEFT_BINARY PAGE [--write]
Asks every command for --help=markdown and compares the page; --write makes the page instead.
Exit code 1 if they differ.
"""

import re
import subprocess
import sys
from pathlib import Path

INTRODUCTION = """# Options

Every option of every command. One declaration serves the command line, a TOML file given with `--config`, the
environment, and this page, which `python3 tests/options_page.py build/release/bin/weft docs/options.md --write` makes.
Precedence: default < file < environment < command line. A section in brackets is the file's `[section]`.
"""


def sections(binary: str, path: list[str]) -> list[str]:
    """The Markdown sections of the command at `path`, or of the commands below it."""
    text = subprocess.run([binary, *path, "--help"], capture_output=True, text=True, check=True).stdout
    if "\nCommands:\n" not in text:
        return [subprocess.run([binary, *path, "--help=markdown"], capture_output=True, text=True, check=True).stdout]
    below = re.findall(r"^  (\w+)  ", text[text.index("\nCommands:\n"):], re.M)
    return [section for name in below for section in sections(binary, [*path, name])]


def main() -> int:
    binary, page = sys.argv[1], Path(sys.argv[2])
    text = INTRODUCTION + "\n" + "\n".join(sections(binary, []))
    if "--write" in sys.argv[3:]:
        page.write_text(text)
        return 0
    if page.exists() and page.read_text() == text:
        return 0
    print(f"{page} is not what the program says; python3 tests/options_page.py {binary} {page} --write makes it")
    return 1


if __name__ == "__main__":
    sys.exit(main())
