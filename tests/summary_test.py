"""Tests of many_tests.py and summary.py: whatever ends a program, every one of its tests is counted once, and a test
without a result has failed. The program is a script that speaks as GoogleTest does, and ctest runs it."""

import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = """#!/usr/bin/env python3
import os, sys, time
if "--gtest_list_tests" in sys.argv:
    print("Running main() from a file\\nSuite.\\n  A\\n  B  # GetParam() = 4\\n  DISABLED_C\\nAll/Cases.\\n  D/x\\n  D/y")
    sys.exit(0)
names = sys.argv[1].removeprefix("--gtest_filter=").split(":")
for name in names:
    print(f"[ RUN      ] {{name}}", flush=True)
    result = "OK"
    {act}
    print(f"[{{result:^10}}] {{name}}, where GetParam() = 4 (0 ms)" if result == "FAILED" else f"[{{result:>9}} ] {{name}} (0 ms)", flush=True)
{end}
"""


class Summary(unittest.TestCase):
    def run_many(self, act: str = "pass", end: str = "", shares: int = 1, program: str = PROGRAM, limit: int = 60) -> tuple[int, str]:
        """The exit status of summary.py, and what it says."""
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            made = directory / "made_test"
            made.write_text(program.format(act=act, end=end))
            made.chmod(0o755)
            (directory / "CTestTestfile.cmake").write_text("".join(
                f'add_test(made_test.{share} "{sys.executable}" "{HERE}/many_tests.py" "{made}" {share} {shares} "{directory}/many_tests")\n'
                f"set_tests_properties(made_test.{share} PROPERTIES TIMEOUT {limit})\n" for share in range(shares)))
            subprocess.run(["ctest", "--test-dir", scratch, "--output-junit", str(directory / "tests.xml")], capture_output=True)
            done = subprocess.run([sys.executable, str(HERE / "summary.py"), "made", scratch], capture_output=True, text=True)
            return done.returncode, done.stdout

    def expect(self, got: tuple[int, str], status: int, counts: str, *parts: str) -> None:
        self.assertEqual(got[0], status, got[1])
        for part in (f"== made: {counts}", *parts):
            self.assertIn(part, got[1])

    def test_each_test_of_all_shares_is_counted_once(self):
        self.expect(self.run_many(), 0, "4 passed, 0 failed, 0 skipped")
        self.expect(self.run_many(shares=3), 0, "4 passed, 0 failed, 0 skipped")

    def test_a_share_without_tests_has_failed(self):
        self.expect(self.run_many(shares=5), 1, "4 passed, 1 failed, 0 skipped", "-- FAILED made_test.4")

    def test_a_failure_is_named_with_its_output_alone(self):
        got = self.run_many('if name == "Suite.B": result = "FAILED"; print("one is not two", end="")\n'
                            '    else: print("a word of another")', "sys.exit(1)")
        self.expect(got, 1, "3 passed, 1 failed, 0 skipped", "-- FAILED Suite.B (of made_test.0)", "one is not two")
        self.assertNotIn("a word of another", got[1])

    def test_a_skip_gives_its_reason(self):
        got = self.run_many('if name == "Suite.A": result = "SKIPPED"; print("a.cpp:3: Skipped\\nno device")')
        self.expect(got, 0, "3 passed, 0 failed, 1 skipped", "-- skipped Suite.A: no device")

    def test_after_a_crash_the_test_and_those_behind_it_have_failed(self):
        got = self.run_many('if name == "Suite.B": print("about to die", flush=True); os.kill(os.getpid(), 11)')
        self.expect(got, 1, "1 passed, 3 failed, 0 skipped", "-- FAILED Suite.B", "about to die", "The program ended in it.",
                    "-- FAILED All/Cases.D/x", "-- FAILED All/Cases.D/y", "It was not run")

    def test_a_program_that_leaves_early_with_status_0_has_failed(self):
        got = self.run_many('if name == "All/Cases.D/x": os._exit(0)')
        self.expect(got, 1, "2 passed, 2 failed, 0 skipped", "-- FAILED All/Cases.D/x", "-- FAILED All/Cases.D/y")

    def test_a_program_that_fails_after_its_last_test_has_failed(self):
        got = self.run_many(end='print("leaked"); sys.exit(1)')
        self.expect(got, 1, "4 passed, 1 failed, 0 skipped", "-- FAILED made_test.0", "leaked")

    def test_a_test_that_outlasts_the_time_has_failed_with_those_behind_it(self):
        got = self.run_many('if name == "Suite.B": time.sleep(600)', limit=5)
        self.expect(got, 1, "1 passed, 3 failed, 0 skipped", "-- FAILED Suite.B", "-- FAILED All/Cases.D/y")

    def test_a_program_that_cannot_list_its_tests_has_failed(self):
        got = self.run_many(program="#!/usr/bin/env python3\nimport sys\nsys.exit('no such library')\n")
        self.assertEqual(got[0], 1)
        self.assertIn("-- FAILED made_test.0", got[1])
        self.assertIn("0 passed, 1 failed, 0 skipped", got[1])


if __name__ == "__main__":
    unittest.main()
