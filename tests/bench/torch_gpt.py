#!/usr/bin/env python3
"""A GPT-2 training step in PyTorch: the peer against which Weft's training step is measured.

The architecture is GPT-2's as nanoGPT writes it (pre-LN, tied head, learned positions, biases, tanh-GELU, fused causal
attention, no dropout), in f32 or with bf16 autocast. A step is everything a trainer does per batch: zero_grad
(set_to_none), forward, backward, clip_grad_norm_ to 1, fused AdamW at the rates of Weft's benchmark. Drawing the batch
and reading the loss back are outside the clock.

The program is a server, so that a driver can alternate its steps with those of another program. It reads one command
per line on standard input and answers each with one JSON line on standard output:

    step N   runs N steps                 {"seconds": [N wall-clock times], "loss": mean nats per token, last step}
    rss      peak memory: of the process on a CPU, reserved on a GPU {"rss": bytes, "rss_import": bytes once torch was loaded}
    info     what runs here               {"torch": ..., "threads": ..., ...}
    quit     ends the program             (no answer; the end of input does the same)

A command that cannot be carried out is answered with {"error": message}. While it waits the program sleeps.
"""

import argparse
import json
import math
import os
import resource
import sys
import time

SHAPES = {
    "a": dict(layers=4, heads=4, width=128, context=64, vocab=65, batch=12),
    "b": dict(layers=6, heads=6, width=384, context=256, vocab=65, batch=16),
    "c": dict(layers=12, heads=12, width=768, context=64, vocab=50257, batch=4),
    "124m": dict(layers=12, heads=12, width=768, context=1024, vocab=50304, batch=64),
    "350m": dict(layers=24, heads=16, width=1024, context=1024, vocab=50304, batch=32),
    "1558m": dict(layers=48, heads=25, width=1600, context=1024, vocab=50304, batch=8),
}
PADDED_VOCAB = {50257: 50304}  # the next multiple of 128: kinder to GEMM tiles, more work
BATCHES = 16  # distinct random batches, drawn before the first step
SEED = 1337
PEAK_RATE, WARM_UP = 3e-4, 10  # of the learning rate, as in apps/bench_step.cpp, whose decay over a million steps is not seen


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mode", choices=("eager", "compile"), default="eager")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("f32", "bf16"), default="f32", help="bf16: autocast, parameters stay f32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch", type=int, default=0, help="rows of a micro-batch; 0: the shape's")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of one step")
    parser.add_argument("--pad-vocab", action="store_true", help="shape c: 50304 rows in the head instead of 50257")
    parser.add_argument("--attention", choices=("auto", "flash", "cudnn"), default="auto",
                        help="kernels of attention on a GPU: PyTorch's choice, or these and no other")
    arguments = parser.parse_args()
    if arguments.threads < 1 or arguments.batch < 0 or arguments.accumulate < 1:
        parser.error("--threads and --accumulate must be at least 1, --batch at least 0")
    return arguments


def build_model(torch, shape, vocab):
    """Returns a module that maps (inputs, targets), i64 [B, T], to the mean loss."""
    nn, F = torch.nn, torch.nn.functional
    width, heads = shape["width"], shape["heads"]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.attn_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.fc, self.mlp_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            b, t, c = x.shape
            q, k, v = (z.view(b, t, heads, c // heads).transpose(1, 2) for z in self.qkv(self.ln_1(x)).split(c, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.attn_proj(y.transpose(1, 2).reshape(b, t, c))
            return x + self.mlp_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocab, width), nn.Embedding(shape["context"], width)
            self.blocks = nn.ModuleList(Block() for _ in range(shape["layers"]))
            self.ln_f = nn.LayerNorm(width)
            self.register_buffer("positions", torch.arange(shape["context"]), persistent=False)
            for name, p in self.named_parameters():
                if name.endswith("proj.weight"):  # GPT-2: residual projections shrink with depth
                    nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape["layers"]))
                elif p.dim() == 2:
                    nn.init.normal_(p, std=0.02)
                elif name.endswith("bias"):
                    nn.init.zeros_(p)

        def forward(self, inputs, targets):
            x = self.wte(inputs) + self.wpe(self.positions)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.ln_f(x), self.wte.weight)
            return F.cross_entropy(logits.view(-1, vocab), targets.view(-1), ignore_index=-1)

    return Gpt()


def force_attention(torch, kernels):
    """Leaves PyTorch no other kernels of attention than these."""
    cuda = torch.backends.cuda
    for switch, wanted in ((cuda.enable_flash_sdp, kernels == "flash"), (cuda.enable_cudnn_sdp, kernels == "cudnn"),
                           (cuda.enable_mem_efficient_sdp, False), (cuda.enable_math_sdp, False)):
        switch(wanted)


class Trainer:
    """Holds the model, its optimizer and the batches; `step()` is what is timed."""

    def __init__(self, torch, arguments):
        self.torch = torch
        shape = SHAPES[arguments.shape]
        vocab = PADDED_VOCAB.get(shape["vocab"], shape["vocab"]) if arguments.pad_vocab else shape["vocab"]
        torch.manual_seed(SEED)
        self.device, self.accumulate = arguments.device, arguments.accumulate
        model = build_model(torch, shape, vocab).to(self.device)
        self.parameters = list(model.parameters())
        spared = {id(model.wte.weight), id(model.wpe.weight)}
        decayed = [p for p in self.parameters if p.dim() >= 2 and id(p) not in spared]
        rest = [p for p in self.parameters if p.dim() < 2 or id(p) in spared]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
            lr=PEAK_RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
        self.loss_fn = torch.compile(model) if arguments.mode == "compile" else model
        self.autocast = arguments.precision == "bf16"
        size = (BATCHES, arguments.batch or shape["batch"], shape["context"] + 1)
        self.batches = torch.randint(0, shape["vocab"], size).to(self.device)
        self.count = self.steps = 0

    def step(self, micro_batches):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, self.steps / WARM_UP)
        self.optimizer.zero_grad(set_to_none=True)
        for inputs, targets in micro_batches:
            with self.torch.autocast(self.device, dtype=self.torch.bfloat16, enabled=self.autocast):
                loss = self.loss_fn(inputs, targets) / self.accumulate
            loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return loss * self.accumulate

    def synchronize(self):
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def peak_bytes(self):
        return self.torch.cuda.max_memory_reserved() if self.device == "cuda" else peak_rss()

    def run(self, steps):
        seconds = []
        for _ in range(steps):
            micro_batches = []
            for _ in range(self.accumulate):
                tokens = self.batches[self.count % BATCHES]
                micro_batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
                self.count += 1
            self.synchronize()
            start = time.perf_counter()
            loss = self.step(micro_batches)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": loss.item()}


def peak_rss():
    """Bytes; Linux reports ru_maxrss in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def serve(trainer, info, rss_import):
    for line in sys.stdin:
        words = line.split()
        if words == ["quit"]:
            return
        if words == ["rss"]:
            reply = {"rss": trainer.peak_bytes(), "rss_import": rss_import}
        elif words == ["info"]:
            reply = info
        elif len(words) == 2 and words[0] == "step" and words[1].isdecimal() and int(words[1]) > 0:
            reply = trainer.run(int(words[1]))
        else:
            reply = {"error": f"unknown command {line.strip()!r}; known: step N (N > 0), rss, info, quit"}
        print(json.dumps(reply), flush=True)


def main():
    arguments = parse_arguments()
    # OpenMP and MKL read these once, when torch is loaded. OMP_WAIT_POLICY stays as it is: GNU OpenMP's default lets
    # idle threads spin for some milliseconds, which PyTorch's small kernels need, and sleep afterwards.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(arguments.threads)
    try:
        import torch
    except ImportError as error:
        print(f"torch_gpt.py: PyTorch is not installed in {sys.executable}: {error}", file=sys.stderr)
        return 3
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("torch_gpt.py: PyTorch sees no CUDA device", file=sys.stderr)
        return 3
    rss_import = peak_rss()
    torch.set_float32_matmul_precision("high" if arguments.precision == "bf16" else "highest")
    if arguments.attention != "auto":
        force_attention(torch, arguments.attention)
    trainer = Trainer(torch, arguments)
    info = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "mode": arguments.mode, "precision": arguments.precision,
            "attention": arguments.attention,
            "parameters": sum(p.numel() for p in trainer.parameters)}
    serve(trainer, info, rss_import)
    return 0


if __name__ == "__main__":
    sys.exit(main())
