"""Measurements, as ratios of medians within one run: timings drift, ratios do not. Not a test.

    python tests/bench.py mmca      the fast path against the formula and against plain causal attention
    python tests/bench.py mmca --threads 1
"""
import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmca import IMAGE, PAD, TEXT, attend, attend_explicit, attention_matrix, pattern  # noqa: E402


def medians(functions, rounds):
    """Run every function once a round, in turn -> median seconds of each, after one round to warm up"""
    times = [[] for _ in functions]
    for n in range(rounds + 1):
        for function, taken in zip(functions, times):
            began = time.perf_counter()
            function()
            if n:
                taken.append(time.perf_counter() - began)
    return [statistics.median(taken) for taken in times]


def conversation(pictures, text, image_tokens=256):
    """Modality of `text` words spread evenly between and around pictures"""
    parts = [text * (i + 1) // (pictures + 1) - text * i // (pictures + 1) for i in range(pictures + 1)]
    return [m for i, words in enumerate(parts) for m in [TEXT] * words + [IMAGE] * (image_tokens if i < pictures else 0)]


def bench_mmca(args):
    """Forward and backward of one layer's attention, 8 heads of 64"""
    H, d = 8, 64
    batches = {"8 pictures x 256 + 400 text": [conversation(8, 400)],
               "4 rows: 8, 6, 4, 2 pictures, padded": [conversation(n, 400 - 20 * n) for n in (8, 6, 4, 2)]}
    for name, rows in batches.items():
        T = max(map(len, rows))
        modality = torch.tensor([row + [PAD] * (T - len(row)) for row in rows])
        q, k, v = (torch.randn(len(rows), H, T, d, requires_grad=True) for _ in range(3))
        ready, gradient = pattern(modality, modality), torch.randn(len(rows), H, T, d)
        M = attention_matrix(modality, modality)

        def both(forward):
            def run():
                forward().backward(gradient)
                q.grad = k.grad = v.grad = None
            return run

        functions = {"causal attention (torch's scaled_dot_product_attention)": both(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
                     "MMCA, attend": both(lambda: attend(q, k, v, ready)),
                     "MMCA, the formula word for word": both(lambda: attend_explicit(q, k, v, M)),
                     "making the pattern (once a forward, for all layers)": lambda: pattern(modality, modality)}
        causal, *others = medians(list(functions.values()), args.rounds)
        texts = (modality == TEXT).sum(1)
        seen = ((modality == IMAGE).cumsum(1) * (modality == TEXT)).sum(1)
        pairs = (texts * (texts + 1) / 2 + seen).sum() / (len(rows) * T * (T + 1) / 2)
        print(f"\n{name}: B {len(rows)}, T {T}; pairs that MMCA counts: {pairs:.2f} of causal attention's")
        for label, seconds in zip(functions, (causal, *others)):
            print(f"  {label:<56} {seconds * 1000:8.1f} ms  {seconds / causal:6.3f} of causal")


def main():
    """The command line"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["mmca"])
    parser.add_argument("--rounds", type=int, default=9, help="medians of so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.machine()}, {args.threads} threads, torch {torch.__version__}, float32")
    {"mmca": bench_mmca}[args.what](args)


if __name__ == "__main__":
    main()
