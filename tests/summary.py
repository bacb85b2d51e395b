"""Prints what a ctest run did: counts of passed, failed and skipped tests, the failures' output, the reasons of skips.

usage: summary.py TITLE BUILD_DIRECTORY (which holds tests.xml, written by ctest --output-junit)
Exit code 1 if a test failed, was not run, or there are none.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path


def main() -> int:
    title, directory = sys.argv[1], Path(sys.argv[2])
    report = directory / "tests.xml"
    if not report.exists():
        print((directory / "tests.log").read_text(errors="replace"))
        print(f"== {title}: no tests were run")
        return 1
    passed, failed, skipped = [], [], []
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        name, status = case.get("name"), case.get("status")
        output = case.findtext("system-out") or ""
        if status == "run":
            passed.append(name)
        elif status in ("disabled", "notrun") and case.find("skipped") is not None:
            skipped.append((name, output))
        else:
            failed.append((name, output))
    for name, output in failed:
        print(f"-- FAILED {name}\n{output.rstrip()}")
    for name, output in skipped:
        reason = re.search(r"Skipped\s*\n(.*)", output)
        print(f"-- skipped {name}: {reason.group(1).strip() if reason else 'no reason given'}")
    print(f"== {title}: {len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
