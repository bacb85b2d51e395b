"""Programs that are run on a GPU within a time budget, and the table of what they showed.

A line has a goal, what was measured, their ratio where both are numbers, and a verdict:
    ok       proven, or a goal that was reached
    missed   a figure short of its goal
    FAILED   a program that failed or a promise that was broken
    skipped  not run, with the reason
Exit status: 0 every line is ok, 1 a line failed, 2 there is no GPU, 3 no line failed but some were missed or skipped.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import time

OK, FAILED, NO_GPU, INCOMPLETE = 0, 1, 2, 3


@dataclasses.dataclass
class Row:
    what: str
    goal: str
    measured: str
    ratio: str
    verdict: str


@dataclasses.dataclass
class Result:
    status: int  # of the program; -1: it ran out of its time
    seconds: float
    text: str  # what it printed


def at_least(what, goal, measured, unit="", digits=2):
    """A line whose figure must reach `goal`."""
    return figure(what, ">=", goal, measured, unit, digits, measured >= goal)


def at_most(what, goal, measured, unit="", digits=2):
    return figure(what, "<=", goal, measured, unit, digits, measured <= goal)


def figure(what, sign, goal, measured, unit, digits, reached):
    ratio = f"{measured / goal:.2f}" if goal else "-"
    return Row(what, f"{sign} {goal:,g}{unit}", f"{measured:,.{digits}f}{unit}", ratio, "ok" if reached else "missed")


class Session:
    def __init__(self, title, run, logs, minutes):
        """`run` is the command that starts a program of the build by its name; logs are kept in `logs`."""
        self.title, self.run, self.logs = title, list(run), pathlib.Path(logs)
        self.begin, self.budget = time.monotonic(), 60 * minutes
        self.rows = []

    def left(self):
        return self.budget - (time.monotonic() - self.begin)

    def add(self, row):
        self.rows.append(row)
        print(f"-- {row.what}: {row.measured} ({row.verdict})", flush=True)

    def skip(self, what, goal, reason):
        self.add(Row(what, goal, reason, "-", "skipped"))

    def fail(self, what, goal, measured):
        self.add(Row(what, goal, measured, "-", "FAILED"))

    def has_time(self, what, goal, seconds):
        """Whether `seconds` are left; a line says so if they are not."""
        if self.left() >= seconds:
            return True
        self.skip(what, goal, f"needs {seconds:,.0f} s, {max(0, self.left()):,.0f} s are left")
        return False

    def command(self, name, command, limit):
        """Runs a command for at most `limit` seconds of what is left; its output goes to NAME.log as well."""
        begin = time.monotonic()
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, errors="replace", timeout=max(1.0, min(limit, self.left())), check=False)
            status, text = done.returncode, done.stdout
        except subprocess.TimeoutExpired as late:
            output = late.stdout or b""
            status, text = -1, output if isinstance(output, str) else output.decode(errors="replace")
        except OSError as error:
            status, text = 127, f"{command[0]}: {error}"
        (self.logs / f"{name}.log").write_text(text)
        return Result(status, time.monotonic() - begin, text)

    def program(self, name, *arguments, limit=600.0, log=None):
        return self.command(log or name, [*self.run, name, *arguments], limit)

    def device(self):
        """The first GPU's compute capability as 89 or 90, or None where there is no GPU, which is then said."""
        report = self.program("weft", "doctor", limit=60, log="doctor")
        print(report.text.rstrip())
        device = re.search(r"^ *cuda:0 .*?compute capability (\d+)\.(\d+)", report.text, re.MULTILINE | re.DOTALL)
        if report.status == 0 and device:
            return 10 * int(device[1]) + int(device[2])
        reason = re.search(r"^cuda +(none.*)$", report.text, re.MULTILINE)
        print(f"== {self.title}: no GPU here, nothing was proven or measured "
              f"({reason[1] if reason else f'weft doctor ended with status {report.status}'})")
        return None

    def finish(self):
        """Prints the table and returns the exit status."""
        heading = Row("line", "goal", "measured", "ratio", "verdict")
        fields = [field.name for field in dataclasses.fields(Row)]
        widths = [max(len(getattr(row, field)) for row in [heading, *self.rows]) for field in fields]
        print(f"\n== {self.title}; logs in {self.logs}; {time.monotonic() - self.begin:,.0f} s")
        for row in [heading, *self.rows]:
            print("  ".join(getattr(row, field).ljust(width) for field, width in zip(fields, widths)).rstrip())
        counts = {verdict: sum(row.verdict == verdict for row in self.rows)
                  for verdict in ("ok", "missed", "FAILED", "skipped")}
        print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
        table = [dataclasses.asdict(row) for row in self.rows]
        (self.logs / "table.json").write_text(json.dumps(table, indent=1) + "\n")
        if counts["FAILED"]:
            return FAILED
        return OK if counts["ok"] == len(self.rows) and self.rows else INCOMPLETE


def gtest_results(text):
    """Verdicts of a GoogleTest program's tests by name: OK, FAILED or SKIPPED."""
    return {name: verdict.strip() for verdict, name in
            re.findall(r"^\[ +(OK|FAILED|SKIPPED) +\] (\S+?)(?:,.*)? \(\d+ ms\)$", text, re.MULTILINE)}
