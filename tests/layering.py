"""Enforces the dependency rule: which folder's files may include headers of which other folder, directly or through
other headers. Prints the offending path of includes.

usage: layering.py REPOSITORY [--self-test]
"""

import re
import sys
import tempfile
from pathlib import Path

MAY_INCLUDE = {
    "core": {"core"},
    "ops": {"core", "ops"},
    "optim": {"core", "ops", "optim"},
    "cuda": {"core", "ops", "optim", "cuda"},
    "dist": {"core", "ops", "optim", "dist"},
    "models": {"core", "ops", "optim", "dist", "models"},
    "apps": {"core", "ops", "optim", "dist", "models", "apps"},
}
SOURCES = {".h", ".cpp", ".cu", ".cuh", ".inc", ".def"}
# Public headers must not pull third-party headers into users' programs, nor into device code.
THIRD_PARTY = re.compile(r"<(hwy|fmt|spdlog|nlohmann|toml\+\+|CLI|pcre2|xxhash|gtest|dnnl|cblas|gloo|nccl|zmq)")
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|(<[^>]+>))', re.M)


def files_of(root: Path):
    for folder in MAY_INCLUDE:
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in SOURCES:
                yield path.relative_to(root).as_posix()


def violations(root: Path):
    includes, external = {}, {}
    for name in files_of(root):
        found = INCLUDE.findall((root / name).read_text())
        # Highway includes its own headers with quotes: what does not begin with one of our folders is a library's.
        ours = [quoted for quoted, _ in found if quoted.split("/")[0] in MAY_INCLUDE]
        includes[name] = ours
        external[name] = [angled or f"<{quoted}>" for quoted, angled in found if quoted not in ours]
    for name in includes:
        allowed = MAY_INCLUDE[name.split("/")[0]]
        stack, seen = [(name, [name])], set()
        while stack:
            current, path = stack.pop()
            for target in includes.get(current, []):
                step = path + [target]
                if not (root / target).exists():
                    yield f"{' -> '.join(step)}: no such file; includes are written from the repository's root"
                elif target.split("/")[0] not in allowed:
                    yield f"{' -> '.join(step)}: {name.split('/')[0]} must not know {target.split('/')[0]}"
                elif target not in seen:
                    seen.add(target)
                    stack.append((target, step))
        if name.endswith(".h") and not name.endswith("-inl.h"):
            for target in external[name]:
                if THIRD_PARTY.match(target):
                    yield f"{name} -> {target}: no third-party header in a public header"


def self_test() -> int:
    """The checker must find what is planted."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        for folder in MAY_INCLUDE:
            (root / folder).mkdir()
        (root / "models/a.h").write_text("#pragma once\n")
        (root / "ops/b.h").write_text('#include "models/a.h"\n#include <fmt/core.h>\n')
        (root / "optim/c.cpp").write_text('#include "ops/b.h"\n')
        found = sorted(violations(root))
    expected = ["ops/b.h -> <fmt/core.h>", "ops/b.h -> models/a.h", "optim/c.cpp -> ops/b.h -> models/a.h"]
    missing = [each for each in expected if not any(line.startswith(each) for line in found)]
    if missing or len(found) != len(expected):
        print(f"the checker missed {missing}; it found {found}")
        return 1
    return 0


def main() -> int:
    if self_test():
        return 1
    root = Path(sys.argv[1])
    names = list(files_of(root))
    if len(names) < 10:
        print(f"{root} holds only {len(names)} source files: is it the repository?")
        return 1
    found = sorted(set(violations(root)))
    print("\n".join(found) or f"{len(names)} files keep the dependency rule")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
