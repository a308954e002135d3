"""The training engine on one GPU: seconds a step, memory for each micro_batch_size, exactness. At most 8 minutes.

    .venv/bin/python -m bench.gpu           # in the repository root, on a machine with an NVIDIA GPU
    .venv/bin/python -m bench.gpu --tiny    # the same code on the CPU with the demo's sizes: says nothing about speed

In: tests/internvl3_5-1b.json at full size with random weights, recipes/internvl3_5-1b.yaml, cached features drawn at
random: batches of 64 at 6 and 3 tiles a page. Out: text only. A step is forward, backward and AdamW, the second of its
kind; `recomputed`: of how many layers (gradient_checkpointing); the last rows of a page size are the fastest setting
without dropout, then compiled; they end where compiling fails. Memory is the most that torch's allocator held, and what
CUDA holds beside it; `fits` is the smallest card, of 16, 24, 32, 40 and 80 GB, with that much. The roofline is
calculated, for 6 tiles, and known for the cards in ROOFLINE.
Checks, exit 1 where one fails: the gradient does not depend on micro_batch_size (float32, quarter depth), and the loss
and its gradients are those of the definition in float64 on the CPU, with the same bits twice. Exit 2 without CUDA.
Last line: `RESULT seconds_6_tiles=... seconds_3_tiles=... roofline_share=... gradient_error=... loss_error=...`.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import InternVLConfig

from colintern.core.errors import OutOfMemoryError, UserError, exit_on_user_error
from colintern.encoding.page_features import Page
from colintern.modeling.attention import choose_attn_implementation
from colintern.modeling.dropout import BatchInvariantDropout
from colintern.modeling.lora import add_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.modeling.runtime import checkpoint_layers, compile_layers, num_checkpointed_layers
from colintern.params import Params, load_recipe
from colintern.training.loss import maxsim_matrix
from colintern.training.pairs import TrainingPair
from colintern.training.run import assemble_trainer, build_training_arguments
from colintern.training.trainer import RetrievalEvaluator

RECIPE, TOKENIZER = Path("recipes/internvl3_5-1b.yaml"), Path("demo/base")
ROOFLINE = {"H200": 0.53, "A100": 1.46}  # seconds of a step of 64 pages of 6 tiles, everything fused
CARDS = (16, 24, 32, 40, 80)  # GB of 1e9 bytes
MOST_SECONDS = 400  # no further row of the table is begun then; the checks are done first
Row = tuple[int, bool | int, float, bool]  # micro, recomputed, dropout, compiled


@dataclass(frozen=True)
class Sizes:
    config: Path
    batch: int
    tiles: tuple[int, ...]
    micro: tuple[int, ...]
    compile: bool
    layers: int  # of the model whose gradients are compared


REAL = Sizes(Path("tests/internvl3_5-1b.json"), 64, (6, 3), (4, 8, 12, 16, 24, 32, 64), True, 7)
TINY = Sizes(TOKENIZER / "config.json", 4, (2, 1), (2, 4), False, 1)


class Engine:
    """A model of random weights in the project's own trainer, with its optimiser."""

    def __init__(self, sizes: Sizes, dtype: str, layers: int | None, scratch: str, device: str):
        torch.manual_seed(0)
        self.processor = ColIntern3_5Processor.from_pretrained(TOKENIZER)
        raw = json.loads(sizes.config.read_text()) | {"image_token_id": self.processor.image_token_id}
        raw["text_config"]["num_hidden_layers"] = layers or raw["text_config"]["num_hidden_layers"]
        raw["text_config"].pop("layer_types", None)
        self.processor.image_seq_length = raw["image_seq_length"]
        self.params: Params = replace(
            load_recipe(RECIPE), dtype=dtype, batch_size=sizes.batch, workers=0, compile=False
        )
        kernel = choose_attn_implementation(self.params.attention, dtype)
        with torch.device(device):
            config = InternVLConfig(**raw)
            self.base = ColIntern3_5._from_config(config, dtype=getattr(torch, dtype), attn_implementation=kernel)
        self.base.init_head(0)
        lora = (self.params.lora_targets, self.params.lora_rank, self.params.lora_alpha, self.params.lora_dropout)
        self.model: Any = add_lora(self.base, *lora).to(device)
        with torch.no_grad():  # as after a few steps: while B is zero, A has no gradient
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.01)
        dev = RetrievalEvaluator([TrainingPair("never asked", Page("0", Path))], None, 1)  # type: ignore[arg-type]
        args = build_training_arguments(self.params, Path(scratch), quiet=True)
        self.trainer = assemble_trainer(self.params, self.model, self.processor, args, dev)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-5)

    def batch(self, counts: Sequence[int], rows: slice = slice(None)) -> Any:
        generator = torch.Generator().manual_seed(0)
        shape = self.processor.image_seq_length, self.base.config.get_text_config().hidden_size
        items = []
        for i, tiles in enumerate(counts):
            features = torch.randn(tiles, *shape, generator=generator).to(self.base.dtype)
            query = f"page {i} of the report on freight in March"
            items.append({"query": query, "pages": [{"key": f"{i:014x}", "features": features}]})
        made = self.trainer.data_collator(items[rows])
        if torch.cuda.is_available():  # as the trainer's loader does: else a step waits for a copy that no run makes
            made["features"] = made["features"].pin_memory()
        return made

    def set(self, micro: int, checkpointing: bool | int, dropout: float) -> None:
        self.trainer.micro_batch_size = micro
        checkpoint_layers(self.model, checkpointing)
        for module in self.model.modules():
            if isinstance(module, BatchInvariantDropout):
                module.p = dropout

    def gradient(self, counts: Sequence[int], micro: int) -> Tensor:
        self.set(micro, checkpointing=False, dropout=0.0)
        self.model.zero_grad()
        self.trainer.training_step(self.model, self.batch(counts))
        return torch.cat([p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None])

    def step(self, batch: Any) -> None:
        # The trainer puts the pages' features into the batch's `page`, so each step gets one of its own.
        self.trainer.training_step(self.model, batch | {"page": dict(batch["page"])})
        self.optimizer.step()
        self.model.zero_grad()


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(engine: Engine, batch: dict[str, Any]) -> tuple[float, float]:
    """Seconds of a second step, and GB at the peak of both; NaN and infinity where memory does not suffice."""
    cuda = torch.cuda.is_available()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        asked = engine.trainer.micro_batch_size
        engine.step(batch)
        if engine.trainer.micro_batch_size < asked:  # it did not fit, and the trainer went on with less
            return math.nan, math.inf
        took = seconds(lambda: engine.step(batch))
    except OutOfMemoryError:
        engine.model.zero_grad()
        return math.nan, math.inf
    if not cuda:
        return took, math.nan
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    return took, (torch.cuda.max_memory_reserved() + beside) / 1e9


def table(engine: Engine, sizes: Sizes, tiles: int, start: float) -> float:
    """Print the rows of one page size; the fastest step's seconds."""
    print(f"\n{tiles} tiles a page, batch {sizes.batch}, {engine.params.dtype}, cached features")
    print(f"{'micro':>5} {'recomputed':>13} {'dropout':>7} {'compile':>7} {'s/step':>8} {'peak GB':>8}  fits")
    batch, best = engine.batch([tiles] * sizes.batch), math.nan
    keep = engine.params.lora_dropout
    levers: tuple[int, bool | int] | None = None
    layers = len(engine.base.decoder_layers)
    some = sorted({layers * 3 // 4, layers // 2, layers // 4} - {0}, reverse=True)
    rows: list[Row] = [
        (micro, on, keep, False)
        for micro in sizes.micro
        for on in (False, True, *(some if micro == sizes.batch else ()))
    ]
    while rows:
        micro, checkpointing, dropout, compiled = rows.pop(0)
        if time.perf_counter() - start > MOST_SECONDS:
            print(f"{len(rows) + 1} rows left out: {MOST_SECONDS} s are over")
            break
        for layer in engine.base.decoder_layers:
            layer._compiled_call_impl = None
        if compiled:
            compile_layers(engine.model)
        engine.set(micro, checkpointing, dropout)
        again = num_checkpointed_layers(layers, checkpointing)
        words = f"{again:>6} of {layers:<3} {dropout:>7} {'on' if compiled else 'off':>7}"
        try:
            took, peak = measure(engine, batch)
        except Exception as error:  # whatever a compiler raises; without one the rest is worth as much
            if not compiled:
                raise
            print(f"{micro:>5} {words}      NO compiled: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            engine.model.zero_grad()
            break
        fits = next((f"{card} GB" for card in CARDS if peak <= card), "none of them" if peak > CARDS[-1] else "-")
        print(f"{micro:>5} {words} {took:>8.3f} {peak:>8.1f}  {fits}", flush=True)
        if not took >= best:  # also where none is known yet
            best, levers = (took, (micro, checkpointing)) if took == took else (best, levers)
        if not rows and not compiled and levers:  # last: the fastest setting without dropout, then compiled too
            if dropout:
                rows.append((*levers, 0.0, False))
            elif sizes.compile:
                rows += _compiled(levers, layers, keep)
        if compiled and took != took:
            rows = [row for row in rows if num_checkpointed_layers(layers, row[1]) > again]  # fewer do not fit either
    return best


def _compiled(levers: tuple[int, bool | int], layers: int, dropout: float) -> list[Row]:
    """A compiled layer keeps less than another, so fewer of them may have to be computed again; with dropout too."""
    micro, again = levers[0], num_checkpointed_layers(layers, levers[1])
    fewer = sorted({again, again // 2, 0}, reverse=True)
    return [*((micro, count, 0.0, True) for count in fewer), (micro, again, dropout, True)]


def gradient_error(sizes: Sizes, scratch: str, device: str) -> float:
    engine = Engine(sizes, "float32", sizes.layers, scratch, device)
    counts = [2, 1, 3, 1]
    whole = engine.gradient(counts, len(counts))
    return max(((engine.gradient(counts, m) - whole).norm() / whole.norm()).item() for m in (1, 3))


def loss_error(device: str) -> float:
    """Largest relative difference of loss and gradients from float64's on the CPU; infinite if two runs differ."""
    generator = torch.Generator().manual_seed(0)
    q, p = (normalize(torch.randn(16, n, 128, generator=generator), dim=-1) for n in (30, 400))
    q_mask = torch.arange(30) < torch.randint(5, 31, (16, 1), generator=generator)
    p_mask = torch.arange(400) < torch.randint(100, 401, (16, 1), generator=generator)

    def definition(q: Tensor, q_mask: Tensor, p: Tensor, p_mask: Tensor) -> Tensor:
        alike = torch.einsum("qnd,pmd->qpnm", q, p).masked_fill(~p_mask[None, :, None], -torch.inf)
        return (alike.amax(-1) * q_mask[:, None]).sum(-1) / q_mask.sum(-1)[:, None]

    def run(score: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
        q, q_mask, p, p_mask = (x.detach().clone() for x in inputs)
        q, p = q.requires_grad_(), p.requires_grad_()
        loss = cross_entropy(score(q, q_mask, p, p_mask) / 0.02, torch.arange(len(q), device=q.device))
        return [loss.detach(), *torch.autograd.grad(loss, (q, p))]

    true = run(definition, q.double(), q_mask, p.double(), p_mask)
    inputs = [x.to(device) for x in (q, q_mask, p, p_mask)]
    first, second = run(maxsim_matrix, *inputs), run(maxsim_matrix, *inputs)
    if not all(map(torch.equal, first, second)):
        return math.inf
    return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(first, true, strict=True))


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="the demo's sizes, on the CPU where there is no GPU")
    args = parser.parse_args(argv)
    if not (torch.cuda.is_available() or args.tiny):
        raise UserError("no CUDA device is available, and this measures one; --tiny runs the same code on the CPU")
    start = time.perf_counter()
    device, sizes = "cuda" if torch.cuda.is_available() else "cpu", TINY if args.tiny else REAL
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, sizes of the demo"
    with tempfile.TemporaryDirectory() as scratch:
        errors = {"gradient": gradient_error(sizes, scratch, device), "loss": loss_error(device)}
        for what, error in errors.items():
            print(f"{'ok ' if error < 1e-4 else 'NO '} {what}: relative error {error:.1e}, at most 1e-4", flush=True)
        engine = Engine(sizes, "bfloat16", None, scratch, device)
        print(f"{name}, torch {torch.__version__}, attention {engine.base.config._attn_implementation}")
        took = {tiles: table(engine, sizes, tiles, start) for tiles in sizes.tiles}
    known = next((value for card, value in ROOFLINE.items() if card in name), None)
    share = f"{known / took[6]:.2f}" if known and 6 in took else "unknown"
    print(
        f"RESULT {' '.join(f'seconds_{tiles}_tiles={value:.3f}' for tiles, value in took.items())} "
        f"roofline_share={share} gradient_error={errors['gradient']:.1e} loss_error={errors['loss']:.1e}"
    )
    if not max(errors.values()) < 1e-4:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
