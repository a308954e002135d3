"""Causal attention of InternVL3.5-1B's sizes on the CPU: `blocked` of modeling/causal.py against torch's kernel.

    .venv/bin/python -m bench.attention     # in the repository root; --help: tokens, batch, rounds

In: random numbers, 16 query heads and 8 key heads of 128. Time is the median of this process's CPU seconds for forward
and backward over `--rounds` rounds, each of which runs both, on one thread. The errors are those of the result and of
the worst of the three gradients, held against float64, as a share of its norm. Last line: bfloat16,
`RESULT speedup_at_1560=... ...`.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colintern.modeling.causal import blocked_attention

HEADS, KEY_HEADS, WIDTH = 16, 8, 128
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
WAYS: dict[str, Attention] = {
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    "blocked": lambda q, k, v: blocked_attention(q, k, v, WIDTH**-0.5),
}


def both(attention: Attention, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attention(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def measure(dtype: torch.dtype, tokens: int, batch: int, rounds: int) -> float:
    """Print two rows; sdpa's time over ours."""
    generator = torch.Generator().manual_seed(tokens)
    query, key, value, grad = (
        torch.randn(batch, tokens, heads, WIDTH, generator=generator).transpose(1, 2).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    wanted = both(WAYS["sdpa"], [x.double() for x in (query, key, value)], grad.double())
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(1 + rounds):
        for name, attention in WAYS.items():
            start = time.process_time()
            found = both(attention, [query, key, value], grad)
            times[name].append(time.process_time() - start)
            if len(times[name]) == 1:
                errors = [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, wanted, strict=True)]
                print(f"{dtype!s:<15}{tokens:>5} tokens  {name:<8}", end="")
                print(f"  errors {errors[0]:.1e}, {max(errors[1:]):.1e}", flush=True)
    seconds = {name: median(taken[1:]) for name, taken in times.items()}
    print(" " * 22 + ", ".join(f"{name} {taken:.4f} s" for name, taken in seconds.items()), flush=True)
    return seconds["sdpa"] / seconds["blocked"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[30, 110, 780, 1560])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {(dtype, n): measure(dtype, n, args.batch, args.rounds)
             for dtype in (torch.float32, torch.bfloat16) for n in args.tokens}  # fmt: skip
    print("float32: " + ", ".join(f"{found[torch.float32, n]:.2f}x at {n}" for n in args.tokens))
    print("RESULT " + " ".join(f"speedup_at_{n}={found[torch.bfloat16, n]:.2f}" for n in args.tokens))


if __name__ == "__main__":
    main()
