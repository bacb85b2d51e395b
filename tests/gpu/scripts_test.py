#!/usr/bin/env python3
"""The scripts that prove and measure the CUDA backend, with programs that print what is known: tables, verdicts, skips,
time budget and exit codes.

usage: scripts_test.py SOURCE_DIRECTORY CUDA_PROGRAM...      the programs with the ctest label cuda
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

SOURCE, PROGRAMS = pathlib.Path(sys.argv[1]), sys.argv[2:]
sys.dont_write_bytecode = True
sys.path.insert(0, str(SOURCE / "tests/gpu"))
import proof  # noqa: E402
import session  # noqa: E402
import speed  # noqa: E402

DOCTOR = """system            Linux
cuda              device cuda:0
  cuda:0          NVIDIA H200
                  compute capability 9.0
                  memory 139.8 GiB, 139.3 GiB free
"""
NO_DRIVER = """system            Linux
cuda              none: this machine has no CUDA driver
"""
# Programs of a bundle, and compute-sanitizer and nvidia-smi beside them: answers.json says what each prints, its exit
# status and the files it writes, the first entry of which all patterns are in the call; {file} is the last argument.
FAKE = """#!/usr/bin/env python3
import json, os, pathlib, sys, time
here = pathlib.Path(sys.argv[0]).parent
name = os.path.basename(sys.argv[0])
call = " ".join(([] if name == "run" else [name]) + sys.argv[1:])
(here / "calls").open("a").write(call + "\\n")
for answer in json.loads((here / "answers.json").read_text()):
    if all(word in call.split() for word in answer["words"].split()):
        time.sleep(answer.get("sleep", 0))
        print(answer.get("text", ""), flush=True)
        for option, content in answer.get("files", {}).items():
            pathlib.Path(sys.argv[sys.argv.index(option) + 1]).write_text(json.dumps(content))
        sys.exit(answer.get("status", 0))
sys.exit("no answer to " + call)
"""


MARKS = {"OK": "[       OK ]", "FAILED": "[  FAILED  ]", "SKIPPED": "[  SKIPPED ]"}


def gtest(*tests):
    """What a GoogleTest program prints of tests given as (verdict, name)."""
    return "\n".join(f"[ RUN      ] {name}\n{MARKS[verdict]} {name} (1 ms)" for verdict, name in tests)


def tests_of(program, failing=""):
    """The same of a program whose promised tests pass, but for one."""
    names = [name + ("x" if name.endswith("/") else "") for _, _, of, name in proof.PROMISES if of == program]
    return gtest(*(("FAILED" if name == failing else "OK", name) for name in [*names, "Other.Test"]))


def step(tokens):
    return f"shape x: 1 ms\ncuda graph: on\n{tokens:,} tokens/s; speed of light 1 ms\npeak memory 1 GiB"


class Scripts(unittest.TestCase):
    def setUp(self):
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.bundle, self.logs = pathlib.Path(holder.name) / "bundle", pathlib.Path(holder.name) / "logs"
        self.bundle.mkdir()
        for name in ("run", "compute-sanitizer", "nvidia-smi"):
            (self.bundle / name).write_text(FAKE)
            (self.bundle / name).chmod(0o755)
        self.answers = [{"words": "weft doctor", "text": DOCTOR}]

    def answer(self, words, text="", first=False, **more):
        self.answers.insert(0 if first else len(self.answers), {"words": words, "text": text, **more})

    def run_script(self, script, *arguments, status):
        """Runs it in the fake bundle; its table by line, and what it printed."""
        (self.bundle / "answers.json").write_text(json.dumps(self.answers))
        environment = os.environ | {"PATH": f"{self.bundle}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(["bash", str(SOURCE / "tests" / script), str(self.bundle), str(self.logs), *arguments],
                              capture_output=True, text=True, env=environment, check=False)
        self.assertEqual(done.returncode, status, done.stdout + done.stderr)
        table = self.logs / "table.json"
        rows = json.loads(table.read_text()) if table.exists() else []
        return {row["what"]: row for row in rows}, done.stdout

    def prove(self, status, sanitizers=True):
        if sanitizers:
            self.answer("compute-sanitizer memcheck", gtest(("OK", "A.B")) + "\n========= ERROR SUMMARY: 0 errors")
            self.answer("compute-sanitizer racecheck", gtest(("OK", "A.B")) +
                        "\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
        for program in proof.PROGRAMS:
            self.answer(program, tests_of(program))
        return self.run_script("gpu.sh", status=status)

    # ---- proof ----

    def test_the_programs_are_those_with_the_label_cuda(self):
        self.assertEqual(sorted(proof.PROGRAMS), sorted(PROGRAMS))

    def test_every_promise_names_a_test_that_exists(self):
        for what, _, program, name in proof.PROMISES:
            text = (SOURCE / "tests" / f"{program}.cpp").read_text()
            parts = name.split("/")
            suite, test = (parts[0] if len(parts) == 1 else parts[1]).split(".")
            self.assertRegex(text, rf"TEST(_F|_P)?\({suite}, {test}\)", what)

    def test_a_machine_without_a_gpu_is_said_and_is_an_error(self):
        self.answers = [{"words": "weft doctor", "text": NO_DRIVER}]
        for script in ("gpu.sh", "gpu_speed.sh"):
            rows, text = self.run_script(script, status=session.NO_GPU)
            self.assertEqual(rows, {})
            self.assertIn("no GPU here, nothing was proven or measured (none: this machine has no CUDA driver)", text)
        _, text = self.run_script("gpu_held_out.sh", status=session.NO_GPU)
        self.assertIn("no GPU here, nothing was trained", text)
        self.assertEqual((self.bundle / "calls").read_text().splitlines(), ["weft doctor"] * 3)

    def test_all_that_passes_is_proven(self):
        rows, _ = self.prove(session.OK)
        self.assertEqual(len(rows), len(proof.PROGRAMS) + len(proof.PROMISES) + 2)
        self.assertEqual({row["verdict"] for row in rows.values()}, {"ok"})

    def test_a_test_that_fails_breaks_its_promise(self):
        text = tests_of("models_cuda_test", "CudaGpt.TwoRunsHaveTheSameBitsInF32AndBf16")
        self.answer("models_cuda_test", text, status=1, first=True)
        rows, _ = self.prove(session.FAILED)
        self.assertEqual(rows["models_cuda_test"]["verdict"], "FAILED")
        self.assertEqual(rows["two runs"]["verdict"], "FAILED")
        self.assertEqual(rows["a resumed run"]["verdict"], "ok")

    def test_a_promise_whose_test_does_not_run_is_broken(self):
        self.answer("optim_cuda_test", gtest(("OK", "Other.Test")), first=True)
        rows, _ = self.prove(session.FAILED)
        self.assertIn("ran no CudaOptimizer", rows["AdamW's steps against the CPU"]["measured"])

    def test_tests_that_are_skipped_or_do_not_run_prove_nothing(self):
        for text in (gtest(("SKIPPED", "A.B")), ""):
            self.answers = [{"words": "weft doctor", "text": DOCTOR}]
            self.answer("gemm_cuda_test", text)
            rows, _ = self.prove(session.FAILED)
            self.assertEqual(rows["gemm_cuda_test"]["verdict"], "FAILED")

    def test_fp8_on_an_older_gpu_is_skipped_with_the_reason(self):
        self.answers = [{"words": "weft doctor", "text": DOCTOR.replace("capability 9.0", "capability 8.0")}]
        rows, _ = self.prove(session.INCOMPLETE)
        self.assertEqual(rows["fp8_cuda_test"]["verdict"], "skipped")
        self.assertIn("compute capability 8.0", rows["fp8_cuda_test"]["measured"])

    def test_what_the_sanitizer_finds_fails(self):
        self.answer("compute-sanitizer memcheck", "========= ERROR SUMMARY: 3 errors", status=9)
        self.answer("compute-sanitizer racecheck", "no summary")
        rows, _ = self.prove(session.FAILED, sanitizers=False)
        for tool in ("memcheck", "racecheck"):
            self.assertEqual(rows[f"compute-sanitizer {tool}"]["verdict"], "FAILED")

    # ---- speed ----

    def canned_speed(self, scale=1.0):
        self.answer("bench step --serve", '{"loss": 11.0, "seconds": [0.1]}')
        self.answer("bench step 1558m fp8", step(int(80_000 * scale)))
        self.answer("bench step 124m --deterministic", step(int(640_000)))
        for shape, size in speed.SHAPES.items():
            self.answer(f"bench step {shape}", step(int(1.02 * scale * size["tokens"])))
        self.answer("nvidia-smi", "0\n" + "100\n" * 40)
        op = {"case": "gelu [4, 4]", "pass": "forward", "flops": 0, "percent_of_peak": 95 * scale, "seconds": 1}
        product = {"case": "matmul [4, 4]", "pass": "forward", "flops": 9, "percent_of_peak": 10, "seconds": 1}
        self.answer("bench ops", files={"--json": {"rows": [op, product]}})
        self.answer("bench attention", files={"--json": {"rows": [
            product | {"case": "B 1, H 1, T 8, D 8"},
            product | {"case": "B 1, H 1, T 8, D 8 (cuDNN)", "seconds": 1.1 * scale}]}})
        products = [{"microseconds": 98 * scale, "first_choice_microseconds": 100}]
        self.answer("bench gemm", files={"--tune": {"products": products}})

    def test_goals_that_are_reached_and_missed(self):
        for scale, verdict in ((1.0, "ok"), (0.5, "missed")):
            self.answers = [{"words": "weft doctor", "text": DOCTOR}]
            self.canned_speed(scale)
            rows, text = self.run_script("gpu_speed.sh", "steps,kernels", status=session.INCOMPLETE)
            for shape, size in speed.SHAPES.items():
                row = rows[f"step {shape}, bf16, tokens/s"]
                self.assertEqual((row["goal"], row["verdict"]), (f">= {size['tokens']:,}", verdict), text)
                self.assertEqual(rows[f"products of {shape}: share of the best algorithm's rate"]["verdict"], verdict)
            self.assertEqual(rows["gelu [4, 4] forward, share of copy"]["verdict"], verdict)
            library = rows["attention B 1, H 1, T 8, D 8 forward: times the speed of --attention cudnn"]
            self.assertEqual(library["verdict"], verdict)
            self.assertNotIn("matmul [4, 4] forward, share of copy", rows)
            start = rows["124m: start of the program to the end of its first step"]
            self.assertRegex(start["measured"], r"^[\d.]+ s$")  # the time of the fake program
            for shape in speed.SHAPES:
                self.assertIn(f"--parts torch-{shape}", rows[f"torch-{shape}"]["measured"])

    def test_the_ratio_of_fp8_and_the_cost_of_determinism(self):
        self.canned_speed()
        rows, _ = self.run_script("gpu_speed.sh", "steps", status=session.INCOMPLETE)
        self.assertEqual(rows["fp8 of bf16's tokens/s, 1558m"]["measured"], "1.40")
        cost = rows["--deterministic, 124m: time more than without"]
        self.assertEqual((cost["measured"], cost["verdict"]), ("-0.55%", "ok"))

    def test_later_calls_add_their_lines_to_the_table(self):
        self.canned_speed()
        first, _ = self.run_script("gpu_speed.sh", "kernels", status=session.INCOMPLETE)
        both, _ = self.run_script("gpu_speed.sh", "steps", status=session.INCOMPLETE)
        self.assertIn("gelu [4, 4] forward, share of copy", first)
        self.assertLess(len(first), len(both))
        self.assertIn("gelu [4, 4] forward, share of copy", both)

    def test_a_program_that_fails_fails_its_line(self):
        self.answer("bench step 350m", "weft: error", status=1)
        self.canned_speed()
        rows, _ = self.run_script("gpu_speed.sh", "steps", status=session.FAILED)
        self.assertEqual(rows["step 350m"]["verdict"], "FAILED")

    def test_held_out_losses_are_compared_and_a_run_that_fails_is_shown(self):
        self.answer("weft data prepare")
        self.answer("weft train fp8", "weft: error: no such option", status=0)
        self.answer("weft train")
        self.answer("weft eval", "model\nGPT after step 2000     3.1250     1.5    145,888")
        _, text = self.run_script("gpu_held_out.sh", status=0)
        self.assertIn("bf16 3.1250, fp8 3.1250; ratio 1.0000, goal <= 1.01: ok", text)
        self.answers[2]["status"] = 1
        _, text = self.run_script("gpu_held_out.sh", status=1)
        self.assertIn("weft: error: no such option", text)

    def test_what_no_longer_fits_into_the_time_is_skipped_and_listed(self):
        (self.bundle / "answers.json").write_text(json.dumps(self.answers))
        self.logs.mkdir()
        done = subprocess.run([sys.executable, str(SOURCE / "tests/gpu/speed.py"), "--logs", str(self.logs), "--minutes",
                               "0.1", "--parts", "steps", "--", str(self.bundle / "run")], capture_output=True, text=True,
                              check=False)
        self.assertEqual(done.returncode, session.INCOMPLETE, done.stdout + done.stderr)
        self.assertIn("step 1558m, bf16, tokens/s", done.stdout)
        self.assertIn("needs 90 s", done.stdout)
        self.assertEqual((self.bundle / "calls").read_text().splitlines(), ["weft doctor"])

    def test_a_program_that_hangs_is_ended_when_its_time_is_over(self):
        self.answer("weft x", sleep=60)
        (self.bundle / "answers.json").write_text(json.dumps(self.answers))
        self.logs.mkdir()
        run = session.Session("test", [str(self.bundle / "run")], self.logs, 1)
        result = run.program("weft", "x", limit=0.5)
        self.assertEqual(result.status, -1)
        self.assertLess(result.seconds, 30)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
