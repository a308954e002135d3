"""A step in parts of rows of like length against parts of rows as they come, padded to the batch's longest.

    .venv/bin/python -m bench.parts           # in the repository root; --layers, --batch, --micro, --rounds
    .venv/bin/python -m bench.parts --demo    # the demo's sizes

In: InternVL3.5-1B's widths with a few layers, random weights, bfloat16, cached page features, pages of 1 to 6 tiles,
each number as often, in random order. Time is the median of this process's CPU seconds for forward and backward; each
round runs both, in turn, after one of each that is not counted. Last line: `RESULT speedup=...`.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from bench.gpu import REAL, TINY, Engine
from colintern.training import mini_batching


def as_they_come(inputs: dict[str, Any], size: int) -> list[list[int]]:
    return [part.tolist() for part in torch.arange(len(inputs["input_ids"])).split(size)]


def uncut(inputs: dict[str, Any], rows: list[int], processor: Any) -> dict[str, Any]:
    return mini_batching.slice_mini_batch(inputs, rows, processor) | {
        key: inputs[key][rows] for key in ("input_ids", "attention_mask")
    }


WAYS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "rows as they come": (as_they_come, uncut),
    "cut to each part's longest": (as_they_come, mini_batching.slice_mini_batch),
    "rows of like length": (mini_batching.plan_mini_batches, mini_batching.slice_mini_batch),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"layers": 2, "batch": 12, "micro": 4, "rounds": 2}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = [1 + i % 6 for i in range(args.batch)]
    random.Random(0).shuffle(counts)
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        sizes, dtype = (TINY, "float32") if args.demo else (REAL, "bfloat16")
        engine = Engine(sizes, dtype, None if args.demo else args.layers, scratch, "cpu")
        engine.set(args.micro, checkpointing=False, dropout=0.0)
        for _ in range(1 + args.rounds):
            for name, (plan, take) in WAYS.items():
                batch = engine.batch(counts)
                with (
                    patch("colintern.training.trainer.plan_mini_batches", plan),
                    patch("colintern.training.trainer.slice_mini_batch", take),
                ):
                    start = time.process_time()
                    engine.trainer.training_step(engine.model, batch)
                    found[name].append(time.process_time() - start)
                engine.model.zero_grad()
    print(f"{dtype}, {args.batch} pages of 1 to 6 tiles, {args.micro} at once, {args.rounds} round(s); CPU s of a step")
    seconds = {name: median(times[1:]) for name, times in found.items()}
    first, *_, last = seconds.values()
    for name, taken in seconds.items():
        print(f"{name:<28}{taken:>8.2f}{first / taken:>7.2f}x")
    print(f"RESULT speedup={first / last:.2f}")


if __name__ == "__main__":
    main()
