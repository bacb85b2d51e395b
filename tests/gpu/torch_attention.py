#!/usr/bin/env python3
"""Times causal attention of PyTorch with cuDNN's kernels and no other, forward and backward, at the shapes of
`weft bench attention`, for a comparison with it: seconds per call, between events on the device.

    torch_attention.py "B 64, H 12, T 1024, D 64" ... -> {"B 64, ...": {"forward": seconds, "backward": seconds}, ...}

Exit status: 0 done, 3 PyTorch, a GPU or cuDNN's attention is missing.
"""

import json
import re
import statistics
import sys

ROUNDS, WARM_UP, ROUND_SECONDS = 9, 3, 0.02


def seconds_of(torch, work):
    """Median of some rounds of so many calls that a round takes a while."""

    def round_of(calls):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    once = min(round_of(1) for _ in range(WARM_UP))
    calls = max(1, round(ROUND_SECONDS / once))
    return statistics.median(round_of(calls) for _ in range(ROUNDS))


def main():
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError as error:
        print(f"torch_attention.py: {error}", file=sys.stderr)
        return 3
    if not torch.cuda.is_available():
        print("torch_attention.py: PyTorch sees no CUDA device", file=sys.stderr)
        return 3
    attention, found = torch.nn.functional.scaled_dot_product_attention, {}
    for name in sys.argv[1:]:
        batch, heads, tokens, size = map(int, re.fullmatch(r"B (\d+), H (\d+), T (\d+), D (\d+)", name).groups())
        # Packed as in a GPT, whose linear layer gives queries, keys and values side by side.
        packed = torch.rand(batch, tokens, 3, heads, size, device="cuda", dtype=torch.bfloat16) * 2 - 1
        q, k, v = (part.transpose(1, 2).detach().requires_grad_() for part in packed.unbind(2))
        try:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
                with torch.no_grad():
                    forward = seconds_of(torch, lambda: attention(q, k, v, is_causal=True))
                out = attention(q, k, v, is_causal=True)
            dout = torch.rand_like(out)
            backward = seconds_of(torch, lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True))
        except RuntimeError as error:
            print(f"torch_attention.py: {name}: {error}", file=sys.stderr)
            return 3
        found[name] = {"forward": forward, "backward": backward}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
