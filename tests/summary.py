"""Prints what a ctest run did: counts of passed, failed and skipped tests, the failures' output, the reasons of skips.

usage: summary.py TITLE BUILD_DIRECTORY (which holds tests.xml, written by ctest --output-junit, and many_tests, the
reports of the entries that are many tests in one process)
Exit code 1 if a test failed, was not run, or there are none.
"""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

# What GoogleTest prints before and after a test, which may follow what the test printed without an end of line.
MARK = re.compile(r"\[ *(RUN|OK|FAILED|SKIPPED) *\] ([^\s,]+)")


def results_of(names: list[str], log: str) -> dict[str, tuple[str, str]]:
    """What became of each of the tests, and what it printed: OK, FAILED or SKIPPED; RUN, which it did not end; NONE."""
    results = {name: ("NONE", "") for name in names}
    marks = [mark for mark in MARK.finditer(log) if mark.group(2) in results]
    for index, mark in enumerate(marks):
        word, name = mark.groups()
        if word == "RUN":
            after = marks[index + 1] if index + 1 < len(marks) else None
            ended = after is not None and after.group(1) != "RUN" and after.group(2) == name
            results[name] = (after.group(1) if ended else "RUN", log[mark.end() : after.start() if after else len(log)])
    return results


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
        names = directory / "many_tests" / f"{name}.tests"
        if names.exists():
            before = len(failed)
            log = names.with_suffix(".log").read_text(errors="replace")
            for test, (result, text) in results_of(names.read_text().split(), log).items():
                if result == "OK":
                    passed.append(test)
                elif result == "SKIPPED":
                    skipped.append((test, text))
                elif result == "NONE":
                    failed.append((f"{test} (of {name})", "It was not run: the program had ended before."))
                else:
                    failed.append((f"{test} (of {name})", text + ("" if result == "FAILED" else "\nThe program ended in it.")))
            if status != "run" and len(failed) == before:
                failed.append((name, output))  # it ended badly, but in none of its tests
        elif status == "run":
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
