#!/usr/bin/env python3
"""Writes tiny_gpt2.safetensors: ten training steps of a tiny GPT-2, as PyTorch computes them.

The whole trajectory runs in f64 from f32-representable parameters and is rounded to f32 at the end, so the file is
closer to the exact answer than any f32 program. The same trajectory is then run in f32; how far it lands from the f64
one, tensor by tensor, goes into the metadata as the scale from which a test may derive its tolerances.

    python make_golden.py                writes the file beside this script
    python make_golden.py --check        makes it again and fails if the committed file differs
    python make_golden.py --cross-check  compares step 0 with Hugging Face transformers and with finite differences

Needs torch and safetensors; --cross-check also needs transformers. The content is described in README.md.
"""

import argparse
import json
import math
import pathlib
import sys

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save

LAYERS, HEADS, WIDTH, CONTEXT, VOCAB, BATCH = 2, 2, 16, 12, 29, 3
LN_EPS = 1e-5
IGNORE_INDEX = -1
STEPS, WARMUP, LR_PEAK, LR_MIN = 10, 2, 1e-3, 1e-4
BETAS, ADAM_EPS, WEIGHT_DECAY, CLIP_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
SEED = 20250117

# A fresh evaluation on another processor may move the last bits of the f64 run; after rounding to f32 that is at most
# one unit in the last place, except for gradients that are zero in exact arithmetic (see README.md).
CHECK_RTOL, CHECK_ATOL = 2.4e-7, 1e-12


def initial_parameters():
    """Parameters in GPT-2's names and torch.nn.Linear's [out, in] layout; f64 tensors holding f32-exact values.

    Every tensor is random, biases and LayerNorm weights too, so that no gradient is constant by symmetry. The matrices
    are far larger than GPT-2's 0.02, so that attention is not uniform; the embeddings and ln_f are set so that the
    gradient norm crosses CLIP_NORM within the ten steps, and both branches of clipping are taken.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape, mean=0.0, std):
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) * std + mean
        return values.float().double()

    c = WIDTH
    params = {"wte.weight": normal(VOCAB, c, std=0.15), "wpe.weight": normal(CONTEXT, c, std=0.4)}
    for i in range(LAYERS):
        for name, rows, cols in [("attn.qkv", 3 * c, c), ("attn.proj", c, c), ("mlp.fc", 4 * c, c),
                                 ("mlp.proj", c, 4 * c)]:
            if name in ("attn.qkv", "mlp.fc"):
                norm = "ln_1" if name == "attn.qkv" else "ln_2"
                params[f"h.{i}.{norm}.weight"] = normal(c, mean=1.0, std=0.2)
                params[f"h.{i}.{norm}.bias"] = normal(c, std=0.1)
            params[f"h.{i}.{name}.weight"] = normal(rows, cols, std=1.0 / math.sqrt(cols))
            params[f"h.{i}.{name}.bias"] = normal(rows, std=0.1)
    params["ln_f.weight"] = normal(c, mean=0.7, std=0.2)
    params["ln_f.bias"] = normal(c, std=0.1)
    return params


def tokens():
    """inputs, targets: i64 [B, T]. Targets are the next tokens; five of them are IGNORE_INDEX.

    Inputs come from the lower two thirds of the vocabulary: some tokens repeat, so their embedding gradients add up,
    and some never occur, so their rows get a gradient from the tied head alone.
    """
    generator = torch.Generator().manual_seed(SEED + 1)
    stream = torch.randint(0, 2 * VOCAB // 3, (BATCH, CONTEXT + 1), generator=generator)
    inputs, targets = stream[:, :-1].clone(), stream[:, 1:].clone()
    for row, column in [(0, 0), (0, 11), (1, 5), (1, 6), (2, 11)]:
        targets[row, column] = IGNORE_INDEX
    targets[2, 3] = VOCAB - 1  # a target that is never an input, and the last row of the head
    return inputs, targets


def logits_of(p, inputs):
    """GPT-2's forward pass: inputs [B, T] -> logits [B, T, V], in the dtype of the parameters."""
    b, t = inputs.shape
    causal = torch.ones(t, t, dtype=torch.bool).tril()
    x = p["wte.weight"][inputs] + p["wpe.weight"][:t]
    for i in range(LAYERS):
        h = f"h.{i}."

        def linear(v, name):
            return F.linear(v, p[h + name + ".weight"], p[h + name + ".bias"])

        def norm(v, name):
            return F.layer_norm(v, (WIDTH,), p[h + name + ".weight"], p[h + name + ".bias"], LN_EPS)

        q, k, v = (z.view(b, t, HEADS, -1).transpose(1, 2)
                   for z in linear(norm(x, "ln_1"), "attn.qkv").split(WIDTH, dim=-1))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(WIDTH // HEADS)
        attention = scores.masked_fill(~causal, -math.inf).softmax(dim=-1)
        x = x + linear((attention @ v).transpose(1, 2).reshape(b, t, WIDTH), "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, "ln_2"), "mlp.fc"), approximate="tanh"), "mlp.proj")
    x = F.layer_norm(x, (WIDTH,), p["ln_f.weight"], p["ln_f.bias"], LN_EPS)
    return F.linear(x, p["wte.weight"])


def loss_of(logits, targets):
    """Mean cross-entropy (nats) over the targets that are not IGNORE_INDEX."""
    return F.cross_entropy(logits.reshape(-1, VOCAB), targets.reshape(-1), ignore_index=IGNORE_INDEX)


def is_decayed(name, tensor):
    """Matrices are decayed; norms, biases and embeddings are spared."""
    return tensor.dim() >= 2 and name not in ("wte.weight", "wpe.weight")


def learning_rates():
    """Linear warm-up, then cosine from LR_PEAK to LR_MIN; rounded to f32 so that the stored rates are those used."""
    rates = []
    for step in range(STEPS):
        if step < WARMUP:
            rate = LR_PEAK * (step + 1) / WARMUP
        else:
            progress = (step - WARMUP) / (STEPS - 1 - WARMUP)
            rate = LR_MIN + 0.5 * (LR_PEAK - LR_MIN) * (1 + math.cos(math.pi * progress))
        rates.append(rate)
    return torch.tensor(rates, dtype=torch.float64).float()


def trajectory(dtype):
    """Runs STEPS training steps in `dtype` and returns every recorded tensor by its name in the file."""
    params = {name: value.to(dtype).requires_grad_() for name, value in initial_parameters().items()}
    inputs, targets = tokens()
    rates = learning_rates()
    groups = [{"params": [p for n, p in params.items() if is_decayed(n, p)], "weight_decay": WEIGHT_DECAY},
              {"params": [p for n, p in params.items() if not is_decayed(n, p)], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR_PEAK, betas=BETAS, eps=ADAM_EPS, foreach=False)

    record = {f"init.{name}": p.detach().clone() for name, p in params.items()}
    record |= {"inputs": inputs, "targets": targets, "lr": rates}
    losses, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        logits = logits_of(params, inputs)
        loss = loss_of(logits, targets)
        loss.backward()
        if step == 0:
            record["logits"] = logits.detach().clone()
            record |= {f"grad.{name}": p.grad.clone() for name, p in params.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), CLIP_NORM, foreach=False).detach())
        losses.append(loss.detach())
        for group in optimizer.param_groups:
            group["lr"] = float(rates[step])
        optimizer.step()
    with torch.no_grad():
        losses.append(loss_of(logits_of(params, inputs), targets))
    record |= {f"final.{name}": p.detach().clone() for name, p in params.items()}
    return record | {"loss": torch.stack(losses), "grad_norm": torch.stack(norms)}


def rounded_max(values):
    """Largest value to two significant digits."""
    return float(f"{values.max().item():.1e}")


def make():
    """Returns (tensors, metadata) as they go into the file."""
    exact, single = trajectory(torch.float64), trajectory(torch.float32)
    deviation = {}
    for name, value in exact.items():
        if value.is_floating_point() and not name.startswith("init.") and name != "lr":
            difference = (single[name].double() - value).abs()
            if name.endswith("attn.qkv.bias"):
                deviation[name + ".key"] = rounded_max(difference[WIDTH:2 * WIDTH])
                difference[WIDTH:2 * WIDTH] = 0
            deviation[name] = rounded_max(difference)
    tensors = {n: (v.float() if v.is_floating_point() else v).contiguous() for n, v in exact.items()}
    metadata = {
        "about": "ten AdamW steps of a tiny GPT-2: initial parameters, step 0 in full, losses, final parameters",
        "made_by": f"tests/golden/make_golden.py, PyTorch {torch.__version__}, CPU",
        "precision": "computed in f64 from f32-exact initial parameters, rounded to f32 for storage",
        "model": json.dumps({"layers": LAYERS, "heads": HEADS, "width": WIDTH, "context": CONTEXT, "vocab": VOCAB,
                             "norm": "LayerNorm, before each block", "norm_eps": LN_EPS, "gelu": "tanh",
                             "bias": True, "tied_head": True, "dropout": 0}),
        "loss": f"mean cross-entropy in nats over targets that are not {IGNORE_INDEX}",
        "optimizer": json.dumps({"name": "AdamW (decoupled decay: p *= 1 - lr * decay before the update)",
                                 "betas": BETAS, "eps": ADAM_EPS, "weight_decay": WEIGHT_DECAY,
                                 "decayed": "rank >= 2 except wte.weight and wpe.weight", "steps": STEPS,
                                 "lr": f"warm-up {WARMUP} steps (step + 1) / {WARMUP}, cosine {LR_PEAK} to {LR_MIN} "
                                       f"over the rest; the rate of every step is in tensor lr"}),
        "clipping": f"global L2 norm to {CLIP_NORM}: gradients * min(1, {CLIP_NORM} / (norm + 1e-6)); grad_norm is "
                    "the norm before clipping, grad.* are the gradients before clipping",
        "key_bias": f"rows {WIDTH}..{2 * WIDTH - 1} of *.attn.qkv.bias have gradient zero in exact arithmetic (softmax "
                    "is invariant to them), which AdamW scales up from whatever rounding leaves: compare them loosely",
        "f32_max_abs_deviation": json.dumps(deviation),
    }
    return tensors, metadata


def with_sorted_header(data):
    """The same safetensors file with its header in a fixed order: the library writes metadata in a random one."""
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:8 + length]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)  # the first tensor stays aligned to 8 bytes
    return len(header).to_bytes(8, "little") + header + data[8 + length:]


def report(tensors, metadata):
    deviation = json.loads(metadata["f32_max_abs_deviation"])
    print(f"{sum(t.numel() for n, t in tensors.items() if n.startswith('init.'))} parameters")
    print("loss     ", " ".join(f"{v:.6f}" for v in tensors["loss"]))
    print("grad_norm", " ".join(f"{v:.6f}" for v in tensors["grad_norm"]))
    key_bias = {n for n in deviation if n.endswith(".key")}
    for kind in ("logits", "loss", "grad_norm", "grad.", "final."):
        name = max((n for n in deviation if n.startswith(kind) and n not in key_bias), key=deviation.get)
        print(f"f32 against f64, {kind:9} largest |difference| {deviation[name]:.1e} ({name})")
    name = max(key_bias, key=deviation.get)
    print(f"f32 against f64, key biases: largest |difference| {deviation[name]:.1e} ({name})")


def check(path, tensors):
    """Returns the names of the stored tensors that a fresh evaluation does not reproduce."""
    with safe_open(path, framework="pt") as stored:
        names = set(stored.keys())
        wrong = sorted(names ^ set(tensors))
        for name in sorted(names & set(tensors)):
            value = stored.get_tensor(name)
            if value.shape != tensors[name].shape or value.dtype != tensors[name].dtype:
                wrong.append(name)
            elif not torch.allclose(value.double(), tensors[name].double(), rtol=CHECK_RTOL, atol=CHECK_ATOL):
                wrong.append(name)
    return wrong


def cross_check(tensors):
    """Compares step 0 with two oracles that share no code with this file; returns whether both agree."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
                        activation_function="gelu_new", layer_norm_epsilon=LN_EPS, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None)
    model = GPT2LMHeadModel(config).double()
    renamed = {"attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj", "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
    theirs = dict(model.transformer.named_parameters())
    pairs = {}
    for name, value in initial_parameters().items():
        other = name
        for ours, hf in renamed.items():
            other = other.replace(ours, hf)
        # Hugging Face keeps GPT-2's Conv1D layout, [in, out].
        transposed = other != name and value.dim() == 2
        with torch.no_grad():
            theirs[other].copy_(value.T if transposed else value)
        pairs[name] = (theirs[other], transposed)
    inputs, targets = tokens()
    logits = model(inputs).logits
    loss_of(logits, targets).backward()
    worst = (logits - tensors["logits"]).abs().max().item()
    for name, (p, transposed) in pairs.items():
        worst = max(worst, ((p.grad.T if transposed else p.grad) - tensors[f"grad.{name}"]).abs().max().item())
    print(f"transformers in f64: largest |difference| of logits and gradients {worst:.1e}")

    # Central differences along a random direction per parameter tensor: every element takes part.
    params, generator, step, slope = initial_parameters(), torch.Generator().manual_seed(SEED + 2), 1e-5, 0.0
    for name, value in params.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        ends = [loss_of(logits_of(params | {name: value + s * direction}, inputs), targets) for s in (step, -step)]
        numeric = (ends[0] - ends[1]).item() / (2 * step)
        slope = max(slope, abs(numeric - (tensors[f"grad.{name}"].double() * direction).sum().item()))
    print(f"finite differences in f64: largest |difference| of directional derivatives {slope:.1e}")
    # 1e-6: the stored values are f32 (6e-8 relative, magnitudes up to 10). The differences carry O(step^2) beside it.
    return worst < 1e-6 and slope < 1e-6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).with_name("tiny_gpt2.safetensors"))
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare with the file at --out instead of writing it")
    mode.add_argument("--cross-check", action="store_true", help="compare step 0 with independent oracles")
    arguments = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # fixes the order of every sum
    tensors, metadata = make()
    report(tensors, metadata)
    if arguments.cross_check:
        return 0 if cross_check(tensors) else 1
    if arguments.check:
        wrong = check(arguments.out, tensors)
        print(f"{arguments.out}: " + (f"differs in {', '.join(wrong)}" if wrong else "reproduced"))
        return 1 if wrong else 0
    arguments.out.write_bytes(with_sorted_header(save(tensors, metadata)))
    print(f"wrote {arguments.out} ({arguments.out.stat().st_size} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
