"""The loss against its peers': CPU time and memory of forward and backward, all variants side by side in one run.

    .venv/bin/python -m bench.loss    # in the repository root; --help: sizes, threads, rounds

In: random unit vectors, float32, without padding, the one case in which all four mean the same. Out: text only. Time is
the median of this process's CPU seconds over `--rounds` rounds, each of which runs every variant once. Memory is the
most that one forward and backward adds to a fresh process that has already run a small batch (VmHWM, set back just
before, less VmRSS), gradients of the embeddings included. Exit 1 where a loss or a gradient differs from ours. The last
line compares ours with colpali-engine's ColbertLoss: `RESULT speedup=... memory_ratio=...`.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from colpali_engine.loss import ColbertLoss
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from colintern.training.loss import contrastive_loss, maxsim_matrix

TEMPERATURE = 0.02
Loss = Callable[[Tensor, Tensor], Tensor]


def ones(tokens: Tensor) -> Tensor:
    return torch.ones(tokens.shape[:2], dtype=torch.bool)


def ours(q: Tensor, p: Tensor) -> Tensor:
    scores = maxsim_matrix(q, ones(q), p, ones(p))
    return contrastive_loss(scores, torch.zeros(scores.shape, dtype=torch.bool), TEMPERATURE, symmetric=False)


def colpali(q: Tensor, p: Tensor) -> Tensor:
    return ColbertLoss(temperature=TEMPERATURE, normalize_scores=True)(q, p)


def sentence_transformers(q: Tensor, p: Tensor) -> Tensor:
    """The scoring and the cross-entropy of MultiVectorMultipleNegativesRankingLoss, which itself wants an encoder."""
    scores = mean_colbert_scores(q, p[:, None], queries_mask=ones(q), documents_mask=ones(p)[:, None])
    return cross_entropy(scores / TEMPERATURE, torch.arange(len(q)))


def einsum(q: Tensor, p: Tensor) -> Tensor:
    best = torch.einsum("qnd,pmd->qpnm", q, p).amax(-1)
    return cross_entropy(best.mean(-1) / TEMPERATURE, torch.arange(len(q)))


VARIANTS: dict[str, Loss] = {
    "ours": ours,
    "colpali-engine ColbertLoss": colpali,
    "sentence-transformers": sentence_transformers,
    "plain einsum": einsum,
}


def embeddings(batch: int, query_tokens: int, page_tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator)
    q, p = draw(batch, query_tokens, dim), draw(batch, page_tokens, dim)
    return normalize(q, dim=-1).requires_grad_(), normalize(p, dim=-1).requires_grad_()


def step(loss: Loss, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    value = loss(q, p)
    of_queries, of_pages = torch.autograd.grad(value, (q, p))
    return value.detach(), of_queries, of_pages


def kib(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, field
    return int(found[1])


def extra_mb(name: str, sizes: list[int]) -> float:
    """MB that one step of a variant adds at its peak; for a separate process."""
    step(VARIANTS[name], *embeddings(2, 4, 8, sizes[-1]))  # threads, kernels and code that the first step loads
    q, p = embeddings(*sizes)
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    step(VARIANTS[name], q, p)
    return (kib("VmHWM") - before) * 1024 / 1e6


def in_fresh_process(name: str, sizes: list[int], threads: int) -> float:
    flags = [f"--{key}={value}" for key, value in zip(SIZES, sizes, strict=True)]
    command = [sys.executable, "-m", "bench.loss", f"--memory={name}", f"--threads={threads}", *flags]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def agree(q: Tensor, p: Tensor) -> None:
    want = step(ours, q, p)
    for name, loss in VARIANTS.items():
        for what, mine, theirs in zip(("loss", "query gradient", "page gradient"), want, step(loss, q, p), strict=True):
            apart = ((mine - theirs).norm() / mine.norm()).item()
            if not apart < 1e-4:
                raise SystemExit(f"NO  {what} of {name} differs from ours by {apart:.1e}")


SIZES = {"batch": 32, "query_tokens": 30, "page_tokens": 1600, "dim": 128}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in SIZES.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=VARIANTS, help="print one variant's peak extra memory in MB, no table")
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    sizes = [getattr(args, key) for key in SIZES]
    if args.memory:
        print(extra_mb(args.memory, sizes))
        return
    q, p = embeddings(*sizes)
    agree(q, p)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(args.rounds):
        for name, loss in VARIANTS.items():
            start = time.process_time()
            step(loss, q, p)
            seconds[name].append(time.process_time() - start)
    memory = {name: in_fresh_process(name, sizes, args.threads) for name in VARIANTS}
    print(f"{args.batch} queries of {args.query_tokens} tokens, {args.batch} pages of {args.page_tokens}, {args.dim}-d")
    print(f"float32, {args.threads} thread(s), {args.rounds} rounds; losses and gradients agree to 1e-4")
    print(f"{'forward and backward':<28} {'CPU ms':>8} {'extra MB':>9} {'time':>7} {'memory':>7}")
    ms = {name: 1000 * median(values) for name, values in seconds.items()}
    for name in VARIANTS:
        times, shares = ms[name] / ms["ours"], memory[name] / memory["ours"]
        print(f"{name:<28} {ms[name]:>8.0f} {memory[name]:>9.1f} {times:>6.2f}x {shares:>6.2f}x")
    peer = "colpali-engine ColbertLoss"
    print(f"RESULT speedup={ms[peer] / ms['ours']:.2f} memory_ratio={memory['ours'] / memory[peer]:.3f}")


if __name__ == "__main__":
    main()
