#!/usr/bin/env python3
"""Compares the speed and memory of Weft's training step with PyTorch's, in one interleaved run.

For every shape and thread count it starts torch_gpt.py twice (eager and torch.compile) and `weft bench step --serve`,
warms all of them up, then runs rounds in which each program takes one turn of a few steps while the others sleep, so
that a slow minute of the machine hits all alike. On a GPU, which nobody else uses and whose memory does not hold two
large models, each takes its turns alone. The better of the two PyTorch medians is the peer; the ratio is taken round by
round and reported as median [quartiles]. Peak memory of PyTorch is the smaller of its two programs. Losses after equally
many steps must agree: all draw random tokens, at the same rates. PyTorch is first tried with each kernel of
--torch-attention and each micro-batch of --torch-batches, and runs with the fastest, at Weft's tokens a step. With
--precision bf16, PyTorch runs bf16 autocast, and on a CPU Weft's f32 takes its turn too: the last column says how many
times as fast bf16 is.

    compare.py --weft build/weft --shapes a,b,c --threads 1,2 --pairs 20 --out step.json
    compare.py --weft build/weft --shapes c --threads 1 --precision bf16 --pairs 20 --out bf16.json
    compare.py --python-only --shapes a --threads 2
    compare.py --weft build/weft --device cuda --precision bf16 --shapes 124m --threads 4 --batch 64 --accumulate 8 \\
        --modes compile --torch-batches 32,64,128 --torch-attention flash,cudnn --pairs 6

A Weft server is started as `PATH bench step --shape a --threads 2 --serve` and answers one JSON line per command line:
    step N -> {"seconds": [N times], "loss": x}    rss -> {"rss": peak bytes}
    sol    -> {"sol": seconds per step at the speed of light of this machine}    quit -> ends

Exit status: 0 done, 1 a program failed, 2 bad options, 3 PyTorch is not installed.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import platform
import selectors
import statistics
import subprocess
import sys
import time

from torch_gpt import SHAPES

TORCH_SERVER = pathlib.Path(__file__).with_name("torch_gpt.py")
WARM_UP_SECONDS, WARM_UP_STEPS = 2.0, 4  # at least; the first step also compiles
TURN_SECONDS = 0.4  # a turn has as many steps as fill this, at least one
SETTLE_BELOW_SECONDS = 0.1  # steps shorter than this find the other program's data in the caches: drop a turn's first
REST_SECONDS = 0.03  # after a turn: OpenMP threads spin for some milliseconds before they sleep
IDLE_LIMIT = 0.02  # share of one core that a waiting program may use before the report says so
STRANGER_LIMIT = 0.1  # cores that programs outside this comparison may use before the report says so
TRIAL_STEPS = 3  # of a micro-batch or attention kernel of PyTorch, after two that are not counted
CURVE_LIMIT = 0.1  # nats between two programs after the same number of steps: other weights and tokens, the same model
FIRST_LOSS_LIMIT = 0.5  # nats from ln(V): further off, a program does not train the same model
MIB = 2**20


class PeerError(Exception):
    """A server ended, hung, or answered something that is not its protocol."""


class Server:
    """A program that reads command lines and answers JSON lines; see the module's docstring."""

    def __init__(self, name, command, timeout):
        self.name, self.command, self.timeout = name, command, timeout
        self.turns, self.losses, self.curve = [], [], {}  # the curve: loss by number of steps done
        self.steps, self.started = 0, time.monotonic()
        self.idle_cpu = self.idle_wall = 0.0
        self.buffer = b""
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise PeerError(f"{name}: cannot start {command[0]}: {error}") from error
        os.set_blocking(self.process.stdout.fileno(), False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.process.stdout, selectors.EVENT_READ)

    def ask(self, command, optional=False):
        """Returns the reply as a dictionary; None if `optional` and the server answers with an error."""
        try:
            self.process.stdin.write(command.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(self.ended(command)) from None
        line = self.read_line(command)
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise PeerError(f"{self.name}: the answer to {command!r} is not a JSON object: {line[:200]!r}")
        if "error" in reply:
            if optional:
                return None
            raise PeerError(f"{self.name}: {command!r} failed: {reply['error']}")
        return reply

    def read_line(self, command):
        deadline = time.monotonic() + self.timeout
        while b"\n" not in self.buffer:
            if not self.selector.select(max(0.0, deadline - time.monotonic())):
                raise PeerError(f"{self.name}: no answer to {command!r} within {self.timeout:g} s (--timeout)")
            chunk = self.process.stdout.read()
            if not chunk:
                raise PeerError(self.ended(command))
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\n", 1)
        return line.decode(errors="replace")

    def ended(self, command):
        status = self.process.wait(timeout=self.timeout)
        return f"{self.name}: ended with status {status} at {command!r}; its command was {' '.join(self.command)}"

    def step(self, count):
        reply = self.ask(f"step {count}")
        seconds, loss = reply.get("seconds"), reply.get("loss")
        numbers = isinstance(seconds, list) and all(isinstance(s, (int, float)) and s > 0 for s in seconds)
        if not numbers or len(seconds) != count or not isinstance(loss, (int, float)) or not math.isfinite(loss):
            raise PeerError(f"{self.name}: 'step {count}' must give {count} positive times and a finite loss: {reply}")
        self.losses.append(loss)
        self.steps += count
        self.curve[self.steps] = loss
        return seconds

    def warm_up(self):
        """Runs until the clock and the step count say warm; fixes how many steps a turn has."""
        self.first_seconds = self.step(1)[0]
        self.start_seconds = time.monotonic() - self.started
        start, times = time.monotonic(), []
        while len(times) < WARM_UP_STEPS or time.monotonic() - start < WARM_UP_SECONDS:
            times += self.step(1)
        typical = statistics.median(times)
        self.steps_per_turn = max(1, math.ceil(TURN_SECONDS / typical))
        self.settle = 1 if typical < SETTLE_BELOW_SECONDS else 0

    def turn(self, others):
        """Takes one turn: appends the median step time to `turns`, notes what the others burn meanwhile."""
        before, start = [other.cpu_seconds() for other in others], time.monotonic()
        self.turns.append(self.step(self.settle + self.steps_per_turn)[self.settle:])
        wall = time.monotonic() - start
        for other, cpu in zip(others, before):
            other.idle_cpu += other.cpu_seconds() - cpu
            other.idle_wall += wall
        time.sleep(REST_SECONDS)

    def cpu_seconds(self):
        """User and system time of all threads so far."""
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def turn_seconds(self):
        return [statistics.median(turn) for turn in self.turns]

    def rss(self):
        reply = self.ask("rss")
        if not isinstance(reply.get("rss"), (int, float)) or reply["rss"] <= 0:
            raise PeerError(f"{self.name}: 'rss' must give a positive number of bytes: {reply}")
        return reply

    def close(self):
        """Ends the program, by force if it does not go by itself; a second call does nothing."""
        if self.process.stdout.closed:
            return
        self.selector.close()
        try:
            self.process.stdin.write(b"quit\n")
            self.process.stdin.close()
        except OSError:
            pass  # it has gone already
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def busy_cpu_seconds():
    """Time the whole machine has spent working so far (user, nice, system, interrupts; not idle or waiting)."""
    fields = pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return sum(int(fields[i]) for i in (1, 2, 3, 6, 7)) / os.sysconf("SC_CLK_TCK")


def rows_of_step(arguments, shape):
    return (arguments.batch or SHAPES[shape]["batch"]) * arguments.accumulate


def torch_command(arguments, shape, threads, mode, batch, attention, rows):
    """PyTorch in steps of `rows` rows, with micro-batches of `batch` of them."""
    return [sys.executable, str(TORCH_SERVER), "--shape", shape, "--threads", str(threads), "--mode", mode,
            "--precision", arguments.precision, "--device", arguments.device, "--batch", str(batch), "--accumulate",
            str(rows // batch), "--attention", attention] + (["--pad-vocab"] if arguments.pad_vocab else [])


def best_torch(arguments, shape, threads, mode, trials):
    """The fastest micro-batch and attention kernel: kernels with the first micro-batch, then the others with the best.
    Trials have steps of few rows, as many for every micro-batch."""
    batches = arguments.torch_batches or [arguments.batch or SHAPES[shape]["batch"]]
    kernels, rows = arguments.torch_attention, math.lcm(*batches)
    if len(batches) * len(kernels) == 1:
        return batches[0], kernels[0]

    def seconds(batch, attention):
        trial = {"mode": mode, "batch": batch, "attention": attention, "seconds": math.inf}
        trials.append(trial)
        server = None
        try:
            server = Server(f"torch {mode}", torch_command(arguments, shape, threads, mode, batch, attention, rows),
                            arguments.timeout)
            for _ in range(2):
                server.step(1)
            trial["seconds"] = statistics.median(server.step(TRIAL_STEPS))
        except PeerError as error:  # out of memory, or a kernel that this machine does not have
            trial["error"] = str(error)
        finally:
            if server:
                server.close()
        print(f"{shape}: PyTorch {mode}, batch {batch}, attention {attention}: {trial['seconds']:.3f} s a step "
              f"{trial.get('error', '')}", file=sys.stderr)
        return trial["seconds"]

    by_kernel = {kernel: seconds(batches[0], kernel) for kernel in kernels}
    kernel = min(by_kernel, key=by_kernel.get)
    by_batch = {batches[0]: by_kernel[kernel]} | {batch: seconds(batch, kernel) for batch in batches[1:]}
    batch = min(by_batch, key=by_batch.get)
    if math.isinf(by_batch[batch]):
        raise PeerError(f"torch {mode}: no micro-batch and attention kernel ran: {trials[-1].get('error')}")
    return batch, kernel


def commands(arguments, shape, threads, trials):
    """Names and commands of the programs; PyTorch's as `trials`, which it fills, found them fastest."""
    found = {}
    for mode in arguments.modes:
        batch, attention = best_torch(arguments, shape, threads, mode, trials)
        found[f"torch {mode}"] = torch_command(arguments, shape, threads, mode, batch, attention,
                                               rows_of_step(arguments, shape))
    if not arguments.python_only:
        ours = [("weft", arguments.precision)]
        if arguments.precision == "bf16" and arguments.device == "cpu":
            ours.append(("weft f32", "f32"))
        for name, precision in ours:
            found[name] = [*arguments.weft.split(), "bench", "step", "--shape", shape, "--threads", str(threads), "--serve",
                           "--device", arguments.device, "--batch", str(arguments.batch), "--accumulate",
                           str(arguments.accumulate), "--precision", precision]
    return found


def measure_together(arguments, shape, threads, found, servers):
    """Rounds in which each program takes one turn; the records of the programs by name."""
    for name, command in found.items():
        servers.append(Server(name, command, arguments.timeout))
    for server in servers:
        print(f"{shape}, {threads} threads: warming up {server.name}", file=sys.stderr)
        server.warm_up()
        time.sleep(REST_SECONDS)
    for pair in range(arguments.pairs):
        order = servers[pair % len(servers):] + servers[:pair % len(servers)]  # nobody always follows the same one
        for server in order:
            server.turn([other for other in servers if other is not server])
    return {server.name: record_of(server, shape) for server in servers}


def measure_alone(arguments, shape, found, servers):
    """All turns of one program, then those of the next: a GPU's memory does not hold two."""
    records = {}
    for name, command in found.items():
        print(f"{shape}: {name}", file=sys.stderr)
        servers.append(Server(name, command, arguments.timeout))
        servers[-1].warm_up()
        for _ in range(arguments.pairs):
            servers[-1].turn([])
        records[name] = record_of(servers[-1], shape)
        servers[-1].close()
    return records


def measure(arguments, shape, threads):
    """One shape at one thread count; returns the record that goes into the log."""
    servers, trials = [], []
    try:
        found = commands(arguments, shape, threads, trials)
        start, busy = time.monotonic(), busy_cpu_seconds()
        if arguments.device == "cuda":
            programs, stranger_cores = measure_alone(arguments, shape, found, servers), 0.0
        else:
            programs = measure_together(arguments, shape, threads, found, servers)
            busy = busy_cpu_seconds() - busy - sum(server.cpu_seconds() for server in servers)
            stranger_cores = max(0.0, busy / (time.monotonic() - start))
        if stranger_cores > STRANGER_LIMIT:
            print(f"warning: {shape}, {threads} threads: other programs used {stranger_cores:.2f} cores meanwhile; "
                  "these figures are not to be published", file=sys.stderr)
    finally:
        for server in servers:
            server.close()
    return {"shape": shape, "threads": threads, "precision": arguments.precision, "stranger_cores": stranger_cores,
            "tokens_per_step": rows_of_step(arguments, shape) * SHAPES[shape]["context"], "device": arguments.device,
            "trials": trials, "programs": programs, "curve_difference": curve_difference(servers)}


def curve_difference(servers):
    """Largest difference of two programs' losses after the same number of steps; None if they share no number."""
    common = set.intersection(*(set(server.curve) for server in servers))
    differences = [max(server.curve[step] for server in servers) - min(server.curve[step] for server in servers)
                   for step in common]
    if differences and max(differences) > CURVE_LIMIT:
        print(f"warning: losses after the same number of steps differ by {max(differences):.3f} nats: the programs do not "
              "train the same model", file=sys.stderr)
    return max(differences, default=None)


def record_of(server, shape):
    record = {"command": server.command, "turns": server.turns, "first_loss": server.losses[0],
              "last_loss": server.losses[-1], "first_step_seconds": server.first_seconds, "start_seconds": server.start_seconds,
              "idle_cpu_share": server.idle_cpu / server.idle_wall if server.idle_wall else 0.0,
              "step_seconds": statistics.median(server.turn_seconds())} | server.rss()
    if server.name.startswith("weft"):
        reply = server.ask("sol", optional=True)
        record["sol"] = reply.get("sol") if reply else None
    else:
        record["info"] = server.ask("info")
    expected = math.log(SHAPES[shape]["vocab"])
    if abs(record["first_loss"] - expected) > FIRST_LOSS_LIMIT:
        print(f"warning: {server.name}: first loss {record['first_loss']:.3f} is far from ln(V) = {expected:.3f}; "
              "does it train the same model from a usual start?", file=sys.stderr)
    if record["idle_cpu_share"] > IDLE_LIMIT:
        print(f"warning: {server.name} used {record['idle_cpu_share']:.0%} of a core while it should have slept",
              file=sys.stderr)
    return record


def quartiles(values):
    """(first quartile, median, third quartile)"""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")) if len(values) > 1 else (values[0],) * 3


def ratios(record, slower, faster):
    """How many times as fast `faster` is: (first quartile, median, third quartile) of the rounds."""
    turns = zip(record["programs"][slower]["turns"], record["programs"][faster]["turns"])
    return quartiles([statistics.median(theirs) / statistics.median(ours) for theirs, ours in turns])


def row(record):
    """The line of the table for one record; also puts the derived figures into it."""
    programs, tokens = record["programs"], record["tokens_per_step"]
    speed = {name: tokens / program["step_seconds"] for name, program in programs.items()}
    peers = [name for name in programs if name.startswith("torch")]
    peer = max(peers, key=speed.get)
    peak = min(programs[name]["rss"] for name in peers)
    cells = [record["shape"], record["threads"]]
    cells += ["/".join(f"{speed[name]:,.0f}" for name in peers), peer.removeprefix("torch ")]
    derived = {"peer": peer, "tokens_per_second": speed, "peer_rss": peak}
    if "weft" in programs:
        weft = programs["weft"]
        low, middle, high = ratios(record, peer, "weft")
        sol = f"{100 * weft['sol'] / weft['step_seconds']:.1f}" if weft["sol"] else "-"
        derived |= {"ratio": middle, "ratio_quartiles": [low, high], "memory_ratio": weft["rss"] / peak}
        cells += [f"{speed['weft']:,.0f}", f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{peak / MIB:,.0f}",
                  f"{weft['rss'] / MIB:,.0f}", f"{weft['rss'] / peak:.2f}", sol]
        if "weft f32" in programs:
            low, middle, high = ratios(record, "weft f32", "weft")
            derived |= {"bf16_over_f32": middle, "bf16_over_f32_quartiles": [low, high]}
            cells.append(f"{middle:.2f} [{low:.2f}, {high:.2f}]")
    else:
        low, middle, high = quartiles([tokens / statistics.median(turn) for turn in programs[peer]["turns"]])
        import_rss = min(programs[name]["rss_import"] for name in peers)
        cells += [f"[{low:,.0f}, {high:,.0f}]", "/".join(f"{programs[n]['rss'] / MIB:,.0f}" for n in peers),
                  f"{import_rss / MIB:,.0f}"]
    record["derived"] = derived
    return [str(cell) for cell in cells]


def print_table(records, modes):
    speeds = f"torch {'/'.join(modes)} tok/s"
    if "weft" in records[0]["programs"]:
        header = ["shape", "threads", speeds, "peer", "weft tok/s", "weft/peer", "peer MiB", "weft MiB", "memory ratio",
                  "weft % of speed of light"] + (["weft bf16/f32"] if "weft f32" in records[0]["programs"] else [])
    else:
        header = ["shape", "threads", speeds, "better", "its quartiles", f"peak MiB {'/'.join(modes)}", "import MiB"]
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for record in records:
        print("| " + " | ".join(row(record)) + " |")


def machine():
    model = ""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        pass  # a description for the log, not a measurement
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
            "load_before": os.getloadavg(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")}


def write_log(path, log):
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(log, indent=1) + "\n")
    temporary.replace(path)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="a,b,c", help="of a, b, c, 124m, 350m, 1558m (default: a,b,c)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=0, help="rows of a micro-batch; 0: the shape's")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of one step (default: 1)")
    parser.add_argument("--threads", default="1,2", help="thread counts (default: 1,2)")
    parser.add_argument("--pairs", type=int, default=20, help="interleaved rounds (default: 20)")
    parser.add_argument("--modes", default="eager,compile", help="PyTorch programs to run (default: eager,compile)")
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="bf16: PyTorch runs autocast")
    parser.add_argument("--pad-vocab", action="store_true", help="PyTorch pads 50257 rows of the head to 50304")
    parser.add_argument("--torch-batches", default="", help="micro-batches to try PyTorch with (default: Weft's)")
    parser.add_argument("--torch-attention", default="auto", help="attention kernels to try PyTorch with: flash, cudnn")
    parser.add_argument("--weft", metavar="COMMAND", help="the weft program, or words that start it")
    parser.add_argument("--python-only", action="store_true", help="run PyTorch alone")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for an answer (default: 600)")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write every measured time as JSON")
    arguments = parser.parse_args()
    arguments.shapes, arguments.modes = arguments.shapes.split(","), arguments.modes.split(",")
    if not set(arguments.shapes) <= set(SHAPES):
        parser.error(f"--shapes: known shapes are {', '.join(SHAPES)}")
    if not set(arguments.modes) <= {"eager", "compile"}:
        parser.error("--modes: known modes are eager, compile")
    try:
        arguments.threads = [int(word) for word in arguments.threads.split(",")]
    except ValueError:
        parser.error("--threads: expected numbers separated by commas")
    try:
        arguments.torch_batches = [int(word) for word in arguments.torch_batches.split(",") if word]
    except ValueError:
        parser.error("--torch-batches: expected numbers separated by commas")
    for shape, batch in ((shape, batch) for shape in arguments.shapes for batch in arguments.torch_batches):
        if batch < 1 or rows_of_step(arguments, shape) % batch:
            parser.error(f"--torch-batches: {batch} does not divide the rows of a step of shape {shape}")
    arguments.torch_attention = arguments.torch_attention.split(",")
    if not set(arguments.torch_attention) <= {"auto", "flash", "cudnn"}:
        parser.error("--torch-attention: known kernels are auto, flash, cudnn")
    if min(arguments.threads) < 1 or arguments.pairs < 1 or arguments.timeout <= 0:
        parser.error("--threads, --pairs and --timeout must be positive")
    if bool(arguments.weft) == arguments.python_only:
        parser.error("give either --weft PATH or --python-only")
    if arguments.out and not arguments.out.parent.is_dir():
        parser.error(f"--out: there is no directory {arguments.out.parent}")
    return arguments


def main():
    arguments = parse_arguments()
    if importlib.util.find_spec("torch") is None:
        print(f"compare.py: PyTorch is not installed in {sys.executable}. Install it (pip install torch numpy) or run "
              "this script with a Python that has it.", file=sys.stderr)
        return 3
    log = {"machine": machine(), "pairs": arguments.pairs, "runs": []}
    try:
        for shape in arguments.shapes:
            for threads in arguments.threads:
                log["runs"].append(measure(arguments, shape, threads))
                row(log["runs"][-1])
                if arguments.out:
                    write_log(arguments.out, log)
    except PeerError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    finally:
        if log["runs"]:
            print_table(log["runs"], arguments.modes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
