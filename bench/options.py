"""What dropout, `deterministic: true` and `gradient_checkpointing` cost a step, and whether they change the gradient.

    .venv/bin/python -m bench.options           # in the repository root; --layers, --batch, --micro, --rounds
    .venv/bin/python -m bench.options --demo    # the demo's sizes

In: InternVL3.5-1B's widths with a few layers, random weights, bfloat16 (the demo: float32), cached page features, pages
of 1 to 6 tiles, on the GPU where there is one. `nn.Dropout` draws a number for each element, ours takes a mask for each
token. Time is the median of this process's CPU seconds, on a GPU of the clock's, for forward and backward; each round
runs all rows, in turn, after one that is not counted. Last line: `RESULT plain=... by_token=... deterministic=...
recomputed=... half=... same_gradient=...`: the first two over the step without dropout, the others over the second.
"""

import argparse
import tempfile
import time
from contextlib import nullcontext
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from bench.gpu import REAL, TINY, Engine
from colintern.modeling.dropout import DropoutMaskBank
from colintern.training.run import set_deterministic

WAYS = {  # dropout, by token, deterministic, share of the layers that are recomputed
    "no dropout": (0.0, True, False, 0.0),
    "nn.Dropout": (0.1, False, False, 0.0),
    "by token": (0.1, True, False, 0.0),
    "by token, deterministic": (0.1, True, True, 0.0),
    "by token, all layers recomputed": (0.1, True, False, 1.0),
    "by token, half of them": (0.1, True, False, 0.5),
}


def clock() -> float:
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for key, value in {"layers": 2, "batch": 6, "micro": 6, "rounds": 5}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--demo", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_deterministic(True)  # before the GPU is used; switched below
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    gradients: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as scratch:
        sizes, dtype = (TINY, "float32") if args.demo else (REAL, "bfloat16")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = Engine(sizes, dtype, None if args.demo else args.layers, scratch, device)
        rows, layers = DropoutMaskBank.assign_rows, len(engine.base.decoder_layers)
        for _ in range(1 + args.rounds):
            for name, (p, by_token, deterministic, share) in WAYS.items():
                set_deterministic(deterministic)
                engine.set(args.micro, int(share * layers), dropout=p)
                batch = engine.batch([1 + i % 6 for i in range(args.batch)])
                with patch.object(DropoutMaskBank, "assign_rows", rows if by_token else lambda *_: nullcontext()):
                    start = clock()
                    engine.trainer.training_step(engine.model, batch)
                    found[name].append(clock() - start)
                gradients[name] = torch.cat([p.grad.flatten() for p in engine.model.parameters() if p.grad is not None])
                engine.model.zero_grad()
    seconds = {name: median(times[1:]) for name, times in found.items()}
    none, plain, ours, *others = seconds.values()
    for name, taken in seconds.items():
        print(f"{name:<32}{taken:>8.3f} s{taken / none:>7.2f}x")
    same = all(torch.equal(gradients["by token"], made) for made in list(gradients.values())[3:])
    deterministic_, all_, half = (taken / ours for taken in others)
    print(
        f"RESULT plain={plain / none:.2f} by_token={ours / none:.2f} deterministic={deterministic_:.2f} "
        f"recomputed={all_:.2f} half={half:.2f} same_gradient={same}"
    )


if __name__ == "__main__":
    main()
