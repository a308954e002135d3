"""Peak memory of a training step: predicted by colintern/planning/costs.py against measured.

    nice -n 15 python -m bench.memory [--only demo quarter]

`demo` is the demo base; `quarter` has InternVL3.5-1B's layers at a quarter of their number (7 of the language model, 6
of the tower), random weights, pages of 6 tiles. A separate process for each row runs two steps as
`colintern recommend --probe` does. Measured is how far its memory grows in the second step: on the CPU the peak of
its resident memory (VmHWM, reset as the step begins), with malloc told to return what is freed
(MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_) and without huge pages; on a CUDA device max_memory_allocated.
Predicted is the same without base, adapters, optimizer state and dropout masks, which are there before the step.

Output: one table; the last line is `RESULT demo_worst=... ...`, the largest deviation of each group, as a share.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

CONFIG, TOKENIZER = "tests/internvl3_5-1b.json", "demo/base"
QUERY = "from Oslo to Rome by Halde, the milk of"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
PR_SET_THP_DISABLE = 41
# base, batch_size, micro_batch_size, gradient_checkpointing, lora_dropout
CPU = [
    ("demo", 32, 32, False, 0.0),
    ("demo", 32, 8, False, 0.1),
    ("demo", 64, 64, True, 0.0),
    ("quarter", 2, 2, False, 0.1),
    ("quarter", 2, 1, False, 0.1),
    ("quarter", 4, 4, True, 0.1),
    ("quarter", 4, 2, True, 0.0),
    ("quarter", 4, 4, 4, 0.1),
]
CUDA = [
    ("whole", 64, 64, True, 0.1),
    ("whole", 64, 8, False, 0.1),
    ("whole", 64, 16, True, 0.1),
    ("whole", 64, 64, 14, 0.1),
]


def measure(row: tuple[str, int, int, bool | int, float]) -> dict[str, float]:
    """Run two steps in this process: bytes predicted and measured, seconds of the second step."""
    import torch
    from transformers import set_seed

    from colintern.modeling.retriever import ColIntern3_5
    from colintern.params import load_recipe
    from colintern.planning.probe import build_probe_trainer, probe_step

    name, batch, micro, checkpointing, dropout = row
    torch.set_num_threads(1)
    set_seed(0)
    recipe = load_recipe(Path("recipes", "demo.yaml" if name == "demo" else "internvl3_5-1b.yaml"))
    params = replace(recipe, micro_batch_size=micro, gradient_checkpointing=checkpointing, lora_dropout=dropout)
    config, processor = architecture(name)
    model = ColIntern3_5._from_config(config, dtype=getattr(torch, params.dtype))
    model.init_head(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer, costs = build_probe_trainer(params, model, processor, folder)
        _, step = (probe_step(params, trainer, costs, batch) for _ in range(2))
    static = sum(costs.static_memory.values()) - costs.static_memory["gradients"]
    grown = {"predicted": step.predicted.peak_bytes - static, "measured": step.peak_bytes - static}
    return grown | {"static": static, "seconds": step.seconds}


def architecture(name: str) -> tuple[Any, Any]:
    """Config and processor of a base of the table."""
    from transformers import InternVLConfig

    from colintern.modeling.processor import ColIntern3_5Processor

    processor = ColIntern3_5Processor.from_pretrained(TOKENIZER)
    if name == "demo":
        return InternVLConfig.from_pretrained(TOKENIZER), processor  # a folder # nosec B615
    processor.image_seq_length = 256
    raw = json.loads(Path(CONFIG).read_text()) | {"image_token_id": processor.image_token_id}
    if name == "quarter":
        raw["text_config"]["num_hidden_layers"] //= 4
        raw["vision_config"]["num_hidden_layers"] //= 4
    return InternVLConfig(**raw), processor


def in_process(row: tuple[str, int, int, bool | int, float], device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "bench.memory", "--row", json.dumps(row)]
    env = os.environ | MALLOC | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=("demo", "quarter", "whole"), default=["demo", "quarter", "whole"])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        print(json.dumps(measure(tuple(json.loads(args.row)))))
        return
    import torch

    rows = [(row, "cpu") for row in CPU]
    if torch.cuda.is_available():
        rows += [(row, "cuda") for row in CUDA]
    else:
        print("no CUDA device here: the rows on a GPU are not measured")
    print(f"{'base':<9}{'device':>6}{'batch':>6}{'micro':>6}{'ckpt':>6}{'drop':>5}  {'predicted':>10}{'measured':>10}")
    worst: dict[str, float] = {}
    for row, device in rows:
        if row[0] not in args.only:
            continue
        found = in_process(row, device)
        off = found["predicted"] / found["measured"] - 1
        worst[row[0]] = max(worst.get(row[0], 0.0), abs(off))
        print(
            f"{row[0]:<9}{device:>6}{row[1]:>6}{row[2]:>6}{str(row[3]).lower():>6}{row[4]:>5}"
            f"{found['predicted'] / 1e6:>9.0f} MB{found['measured'] / 1e6:>7.0f} MB {off:>+6.1%}",
            flush=True,
        )
    print("RESULT " + " ".join(f"{name}_worst={off:.3f}" for name, off in worst.items()))


if __name__ == "__main__":
    main()
