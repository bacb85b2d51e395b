"""Runs a share of a GoogleTest program's tests in one process, where a process of each would mostly be starting.

usage: many_tests.py PROGRAM SHARE SHARES REPORTS (SHARE counts from 0)
Leaves REPORTS/NAME.SHARE.tests, the tests of the share, before it starts them, and REPORTS/NAME.SHARE.log, what the
program says as it goes: whatever ends the program, and this one with it, summary.py finds there what became of each test.
"""

import subprocess
import sys
from pathlib import Path

from summary import results_of


def tests_of(program: str) -> list[str]:
    """The names that --gtest_list_tests gives, but for disabled ones. A suite stands at the margin and ends in a dot."""
    listing = subprocess.run([program, "--gtest_list_tests"], check=True, capture_output=True, text=True).stdout
    names, suite = [], ""
    for line in listing.splitlines():
        word = line.split("#")[0].strip()
        if not line.startswith(" "):
            suite = word if word.endswith(".") else ""
        elif suite and "DISABLED_" not in suite + word:
            names.append(suite + word)
    return names


def main() -> int:
    program, share, shares, reports = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    reports.mkdir(parents=True, exist_ok=True)
    name = f"{Path(program).name}.{share}"
    names = tests_of(program)[share::shares]
    if not names:
        print(f"{program} has no tests for share {share} of {shares}")
        return 1
    with open(reports / f"{name}.log", "wb") as log:
        (reports / f"{name}.tests").write_text("".join(test + "\n" for test in names))
        status = subprocess.run([program, "--gtest_filter=" + ":".join(names)], stdout=log, stderr=subprocess.STDOUT).returncode
    log = (reports / f"{name}.log").read_text(errors="replace")
    lost = [test for test, (result, _) in results_of(names, log).items() if result in ("NONE", "RUN")]
    if status != 0 or lost:
        print(f"{log}\n{program} ended with status {status}, {len(lost)} of {len(names)} tests without a result: {' '.join(lost)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
