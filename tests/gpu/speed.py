#!/usr/bin/env python3
"""Measures the CUDA backend on this machine's GPU against its goals. tests/gpu_speed.sh builds, or takes a bundle, and
starts this.

    speed.py --logs DIR [--minutes 9.5] [--parts steps,kernels,...] -- COMMAND...

COMMAND PROGRAM ARG... starts a program of the build. The parts do not fit into one call: each call runs those that it
is told to (all by default) as far as its minutes go, keeps their lines in DIR/figures.json, and prints the table of all
lines so far, with parts that are still to be measured as skipped.
"""

import argparse
import json
import math
import os
import pathlib
import re
import statistics
import subprocess
import sys

from session import NO_GPU, Row, Session, at_least, at_most

BENCH = pathlib.Path(__file__).resolve().parent.parent / "bench"
FP8_CAPABILITY = 89

# Steps of 524,288 tokens of GPT-2's sizes in bf16, T = 1,024, V = 50,304. For each: rows of a micro-batch, their number,
# micro-batches that PyTorch is tried with, steps that are timed; seconds that such a run takes, and a comparison with
# PyTorch, which compiles; and the goals, tokens/s and times PyTorch's.
SHAPES = {
    "124m": dict(batch=64, accumulate=8, torch="32,64,128", steps=8, seconds=25, torch_seconds=260, tokens=624_000,
                 ratio=1.3),
    "350m": dict(batch=32, accumulate=16, torch="32,64", steps=4, seconds=40, torch_seconds=400, tokens=227_000,
                 ratio=1.25),
    "1558m": dict(batch=16, accumulate=32, torch="16", steps=2, seconds=90, torch_seconds=540, tokens=56_000,
                  ratio=1.15),
}
MEMORY, START_SECONDS, CURVE = 0.75, 2.0, 0.1
FP8_RATIO, COPY_SHARE, GEMM_SHARE, IDLE, DETERMINISTIC = 1.3, 90, 97, 1.0, 3.0

# What `weft bench attention` adds to the name of a case that cuDNN computes.
CUDNN = " (cuDNN)"
# What a step of a GPT queues beside products and attention, by the names of `weft bench ops`.
STEP_OPS = ("gelu", "residual_layer_norm", "layer_norm", "embedding", "cross_entropy", "dropout", "add", "sum")


def number(text, pattern):
    """The first number that the pattern finds, without its commas; None if there is none."""
    found = re.search(pattern, text)
    return float(found[1].replace(",", "")) if found else None


class Speed:
    def __init__(self, session, capability):
        self.session, self.capability, self.tokens = session, capability, {}

    # ---- steps ----

    def step(self, name, shape, *options, precision="bf16"):
        """Tokens/s of `weft bench step`, or None after a line that says why not."""
        size = SHAPES[shape]
        result = self.session.program("weft", "bench", "step", "--device", "cuda", "--shape", shape,
                                      "--precision", precision, "--batch", str(size["batch"]), "--accumulate", str(size["accumulate"]),
                                      "--steps", str(size["steps"]), *options, log=f"step-{name}")
        tokens = number(result.text, r"([\d,]+) tokens/s")
        if result.status != 0 or tokens is None:
            self.session.fail(f"step {name}", "tokens/s", f"weft bench step ended with status {result.status}")
            return None
        return tokens

    def steps(self):
        session = self.session
        self.first_step()
        for shape, size in SHAPES.items():
            what, goal = f"step {shape}, bf16, tokens/s", f">= {size['tokens']:,}"
            if session.has_time(what, goal, size["seconds"]) and (tokens := self.step(shape, shape)):
                self.tokens[shape] = tokens
                session.add(at_least(what, size["tokens"], tokens, digits=0))
        self.fp8()
        self.deterministic()
        self.idle()

    def first_step(self):
        what = "124m: start of the program to the end of its first step"
        if not self.session.has_time(what, f"<= {START_SECONDS:g} s", 20):
            return
        times = []
        for _ in range(3):  # the first measures the machine, for the percentages, and reads the program from the disk
            result = self.session.command("first-step", ["bash", "-c", 'printf "step 1\\nquit\\n" | "$@"', "bash",
                                                         *self.session.run, "weft", "bench", "step", "--device", "cuda",
                                                         "--shape", "124m", "--precision", "bf16", "--serve"], 60)
            if result.status != 0 or '"loss"' not in result.text:
                self.session.fail(what, f"<= {START_SECONDS:g} s", f"status {result.status}")
                return
            times.append(result.seconds)
        self.session.add(at_most(what, START_SECONDS, min(times), " s"))

    def fp8(self):
        what, goal, size = "fp8 of bf16's tokens/s, 1558m", f">= {FP8_RATIO}", SHAPES["1558m"]
        if self.capability < FP8_CAPABILITY:
            self.session.skip(what, goal, f"compute capability {self.capability / 10:.1f}, 8-bit products need 8.9")
        elif "1558m" not in self.tokens:
            self.session.skip(what, goal, "there is no figure of bf16")
        elif self.session.has_time(what, goal, size["seconds"]):
            if tokens := self.step("1558m-fp8", "1558m", precision="fp8"):
                self.session.add(at_least(what, FP8_RATIO, tokens / self.tokens["1558m"]))

    def deterministic(self):
        what, goal = "--deterministic, 124m: time more than without", f"<= {DETERMINISTIC:g}%"
        if "124m" not in self.tokens:
            self.session.skip(what, goal, "there is no figure without")
        elif self.session.has_time(what, goal, SHAPES["124m"]["seconds"]):
            if tokens := self.step("124m-deterministic", "124m", "--deterministic"):
                self.session.add(at_most(what, DETERMINISTIC, 100 * (self.tokens["124m"] / tokens - 1), "%"))

    def idle(self):
        """By the driver's utilization: the share of its samples' time in which a kernel ran."""
        what, goal, size = "124m: share of a step in which the GPU idles", f"<= {IDLE:g}%", SHAPES["124m"]
        if not self.session.has_time(what, goal, size["seconds"]):
            return
        try:
            sampler = subprocess.Popen(["nvidia-smi", "--id=0", "--query-gpu=utilization.gpu", "--loop-ms=200",
                                        "--format=csv,noheader,nounits"], stdout=subprocess.PIPE, text=True)
        except OSError as error:
            self.session.skip(what, goal, f"nvidia-smi: {error}")
            return
        try:
            tokens = self.step("124m-idle", "124m")
        finally:
            sampler.terminate()
        samples = [int(word) for word in sampler.communicate()[0].split() if word.isdecimal()]
        busy = [i for i, sample in enumerate(samples) if sample >= 50]
        # The last half of the busy time: steps that are launched as a whole.
        window = samples[(busy[0] + busy[-1]) // 2:busy[-1] - 1] if busy else []
        if tokens and len(window) >= 5:
            self.session.add(at_most(what, IDLE, 100 - statistics.mean(window), "%"))
        elif tokens:
            self.session.skip(what, goal, f"nvidia-smi gave {len(window)} samples of a busy GPU, 5 are needed")

    # ---- kernels ----

    def bench(self, name, *arguments, seconds):
        """The rows of a `weft bench` command's JSON file, or None after a line that says why not."""
        if not self.session.has_time(f"weft bench {name}", "-", seconds):
            return None
        path = self.session.logs / f"{name}.json"
        path.unlink(missing_ok=True)
        result = self.session.program("weft", "bench", name, "--device", "cuda", "--precision", "bf16", *arguments,
                                      "--json", str(path), log=f"bench-{name}")
        if result.status == 0 and path.exists():
            return json.loads(path.read_text())["rows"]
        self.session.fail(f"weft bench {name}", "-", f"ended with status {result.status}")
        return None

    def kernels(self):
        for row in self.bench("ops", "--seconds", "0.1", seconds=90) or []:
            op = row["case"].split(" ", 1)[0]
            if row["flops"] == 0 and op in STEP_OPS:
                self.session.add(at_least(f"{row['case']} {row['pass']}, share of copy", COPY_SHARE,
                                          row["percent_of_peak"], "%", 1))
        for shape, size in SHAPES.items():
            self.gemm(shape, size)
        self.attention()

    def gemm(self, shape, size):
        what, goal = f"products of {shape}: share of the best algorithm's rate", f">= {GEMM_SHARE}%"
        if not self.session.has_time(what, goal, 60):
            return
        path = self.session.logs / f"algorithms-{shape}.json"
        path.unlink(missing_ok=True)
        result = self.session.program("weft", "bench", "gemm", "--device", "cuda", "--precision", "bf16",
                                      "--shape", shape, "--batch", str(size["batch"]), "--tune", str(path), log=f"tune-{shape}")
        if result.status != 0 or not path.exists():
            self.session.fail(what, goal, f"weft bench gemm --tune ended with status {result.status}")
            return
        products = json.loads(path.read_text())["products"]
        best = sum(product["microseconds"] for product in products)
        first = sum(product["first_choice_microseconds"] for product in products)
        self.session.add(at_least(what, GEMM_SHARE, 100 * best / first, "%", 1))
        what = f"step {shape} with tuned algorithms, tokens/s"
        if self.session.has_time(what, f">= {size['tokens']:,}", size["seconds"]):
            if tokens := self.step(f"{shape}-tuned", shape, "--gemm-algorithms", str(path)):
                self.session.add(at_least(what, size["tokens"], tokens, digits=0))

    def attention(self):
        rows = [row for row in self.bench("attention", seconds=40) or [] if row["flops"] > 0]
        if not rows:
            return
        # With cuDNN in the program, its own row stands beside that of our kernels.
        library = {(row["case"].removesuffix(CUDNN), row["pass"]): row["seconds"] for row in rows
                   if row["case"].endswith(CUDNN)}
        rows = [row for row in rows if not row["case"].endswith(CUDNN)]
        for row in rows:
            if seconds := library.get((row["case"], row["pass"])):
                self.session.add(at_least(f"attention {row['case']} {row['pass']}: times the speed of --attention cudnn",
                                          1, seconds / row["seconds"]))
        what, goal = "attention: times cuDNN's speed", ">= 1"
        if not self.session.has_time(what, goal, 60):
            return
        result = self.session.command("torch-attention", [sys.executable, str(pathlib.Path(__file__).with_name(
            "torch_attention.py")), *dict.fromkeys(row["case"] for row in rows)], 120)
        if result.status != 0:
            self.session.skip(what, goal, f"PyTorch with cuDNN: status {result.status}, see torch-attention.log")
            return
        theirs = json.loads(result.text.strip().splitlines()[-1])
        for row in rows:
            self.session.add(at_least(f"attention {row['case']} {row['pass']}: times cuDNN's speed", 1,
                                      theirs[row["case"]][row["pass"]] / row["seconds"]))

    # ---- PyTorch ----

    def torch(self, shape):
        session, size = self.session, SHAPES[shape]
        what, goal = f"{shape}: times PyTorch's tokens/s", f">= {size['ratio']}"
        if not session.has_time(what, goal, size["torch_seconds"]):
            return
        path = session.logs / f"compare-{shape}.json"
        path.unlink(missing_ok=True)
        result = session.command(f"compare-{shape}", [
            sys.executable, str(BENCH / "compare.py"), "--weft", " ".join([*session.run, "weft"]), "--device", "cuda",
            "--precision", "bf16", "--shapes", shape, "--threads", str(min(8, os.cpu_count() or 1)),
            "--batch", str(size["batch"]), "--accumulate", str(size["accumulate"]), "--modes", "compile",
            "--torch-batches", size["torch"], "--torch-attention", "flash,cudnn", "--pairs", "4",
            "--out", str(path)], 1e9)
        if result.status == 3:
            session.skip(what, goal, "there is no PyTorch with CUDA on this machine")
            return
        if result.status != 0 or not path.exists():
            session.fail(what, goal, f"compare.py ended with status {result.status}, see compare-{shape}.log")
            return
        record = json.loads(path.read_text())["runs"][0]
        derived, programs = record["derived"], record["programs"]
        peer = programs[derived["peer"]]
        words = dict(zip(peer["command"], peer["command"][1:]))
        session.add(at_least(f"{what} (batch {words.get('--batch')}, {words.get('--attention')})", size["ratio"],
                             derived["ratio"]))
        session.add(at_most(f"{shape}: peak memory of PyTorch's", MEMORY, derived["memory_ratio"]))
        curve = record["curve_difference"]
        session.add(at_most(f"{shape}: loss after equal steps, nats from PyTorch's", CURVE,
                            math.inf if curve is None else curve, digits=3))


PARTS = {"steps": Speed.steps, "kernels": Speed.kernels} | {
    f"torch-{shape}": lambda speed, shape=shape: speed.torch(shape) for shape in SHAPES}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("run", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    parts = arguments.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts: known parts are {', '.join(PARTS)}")
    session = Session("speed of the CUDA backend", arguments.run, arguments.logs, arguments.minutes)
    capability = session.device()
    if capability is None:
        return NO_GPU
    kept = arguments.logs / "figures.json"
    figures = json.loads(kept.read_text()) if kept.exists() else {}
    speed = Speed(session, capability)
    for part in parts:
        before = len(session.rows)
        PARTS[part](speed)
        figures[part] = [vars(row) for row in session.rows[before:]]
        kept.write_text(json.dumps(figures, indent=1) + "\n")
    session.rows = [Row(**row) for part in PARTS for row in figures.get(part) or
                    [vars(Row(part, "-", f"to be measured: --parts {part}", "-", "skipped"))]]
    return session.finish()


if __name__ == "__main__":
    sys.exit(main())
