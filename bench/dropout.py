"""What dropout costs a step: PEFT's `nn.Dropout`, which draws a number for each element, and ours, by token.

    .venv/bin/python -m bench.dropout           # in the repository root; --layers, --batch, --micro, --rounds
    .venv/bin/python -m bench.dropout --demo    # the demo's sizes

In: InternVL3.5-1B's widths with a few layers, random weights, bfloat16, cached page features, pages of 1 to 6 tiles.
Time is the median of this process's CPU seconds for forward and backward; each round runs all three, in turn, after one
that is not counted. Last line: `RESULT plain=... by_token=...`, each as a share of the step without dropout.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import torch

from bench.gpu import REAL, TINY, Engine
from colintern.modeling.dropout import Masks

WAYS = {"no dropout": (0.0, True), "nn.Dropout": (0.1, False), "by token": (0.1, True)}  # p, ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"layers": 2, "batch": 6, "micro": 6, "rounds": 5}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        sizes, dtype = (TINY, "float32") if args.demo else (REAL, "bfloat16")
        engine = Engine(sizes, dtype, None if args.demo else args.layers, scratch, "cpu")
        rows = Masks.rows
        for _ in range(1 + args.rounds):
            for name, (p, ours) in WAYS.items():
                engine.set(args.micro, checkpointing=False, dropout=p)
                batch = engine.batch([1 + i % 6 for i in range(args.batch)])
                with patch.object(Masks, "rows", rows if ours else lambda *_: nullcontext()):
                    start = time.process_time()
                    engine.trainer.training_step(engine.model, batch)
                    found[name].append(time.process_time() - start)
                engine.model.zero_grad()
    seconds = {name: median(times[1:]) for name, times in found.items()}
    none, plain, ours_ = seconds.values()
    for name, taken in seconds.items():
        print(f"{name:<12}{taken:>8.3f} s{taken / none:>7.2f}x")
    print(f"RESULT plain={plain / none:.2f} by_token={ours_ / none:.2f}")


if __name__ == "__main__":
    main()
