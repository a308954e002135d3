"""A training step of ours against the stock path's, on the same weights, each lever added to those above it.

    CUDA_VISIBLE_DEVICES= .venv/bin/python -m bench.train_step    # in the repository root; --help: sizes, rounds

In: tests/internvl3_5-1b.json at a quarter of its depth (7 language and 6 vision layers, real widths, random weights),
or less on a CPU that needs more than `--minutes` for that (one without bfloat16 units): a step of one layer tells,
recipes/internvl3_5-1b.yaml. Out: text only. The stock path is colpali-engine's ContrastiveTrainer and ColbertLoss on
transformers' InternVLModel, padded on the left, with checkpointing as the Trainer switches it on (which puts the frozen
tower into the graph) and PEFT's float32 adapters with dropout 0.1. Time is the median of this process's CPU seconds for
forward and backward; each round runs every row once, in turn, the ends of the ladder first, and prints it as it is
measured. Rows that would begin after `--minutes` are left out and named. The last page has one tile less than the
others, as a batch of real pages is never all alike. Rows up to `no dropout` are what the recipe's keys and code give
without a warm-up; `compile: true` pays its first step, shown in brackets. With more than `--ladder-tiles` a page only
the ends of the ladder are run; with `--dtypes bfloat16 float32` those are run in float32 too.
Last line: stock over the best row, of the first of `--dtypes`: `RESULT speedup_3_tiles=... speedup_6_tiles=...`.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from colpali_engine.loss import ColbertLoss
from colpali_engine.trainer import ContrastiveTrainer as StockTrainer
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import TensorDataset
from transformers import InternVLConfig, InternVLModel, TrainingArguments
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

from bench.parts import as_they_come
from colintern.encoding.page_features import Page
from colintern.modeling.dropout import BatchInvariantDropout
from colintern.modeling.lora import add_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.modeling.runtime import compile_layers
from colintern.params import Params, load_recipe
from colintern.training import mini_batching
from colintern.training.loss import make_contrastive_loss
from colintern.training.pairs import TrainingPair
from colintern.training.run import assemble_trainer, build_training_arguments
from colintern.training.trainer import RetrievalEvaluator

CONFIG, RECIPE, TOKENIZER = Path("tests/internvl3_5-1b.json"), Path("recipes/internvl3_5-1b.yaml"), "demo/base"
QUERIES = ["invoice of the harbour office in Oslo from March", "who sent the milk to Rome", "total of all freight"]


class Levers(NamedTuple):
    """What is on, in the order in which the rows add it."""

    graph: bool = False  # our trainer: tower outside the graph, right padding without a mask
    cached: bool = False
    no_checkpointing: bool = False
    argmax: bool = False
    bf16_adapters: bool = False
    no_dropout: bool = False
    like_length: bool = False
    compiled: bool = False


ROWS = {
    "stock": Levers(),
    "tower out of the graph, no mask": Levers(*[True] * 1),
    "+ cached page features": Levers(*[True] * 2),
    "+ no checkpointing": Levers(*[True] * 3),
    "+ argmax loss": Levers(*[True] * 4),
    "+ adapters computed in bf16": Levers(*[True] * 5),
    "+ no dropout": Levers(*[True] * 6),
    "+ parts of like length": Levers(*[True] * 7),
    "+ compile": Levers(*[True] * 8),
}
ENDS = ("stock", "+ no dropout", "+ parts of like length", "+ compile")


class Model(ColIntern3_5):
    """Ours, or colpali-engine's way of putting a head on a model, on the same weights."""

    stock = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        if not self.stock:
            return super().forward(input_ids, attention_mask, **kwargs)
        out = InternVLModel.forward(self, input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs)
        return normalize(self.head(out.last_hidden_state), dim=-1) * attention_mask.unsqueeze(-1)


class Bench:
    """One model, and one step of it under any set of levers."""

    def __init__(self, dtype: str, tiles: int, batch: int, depth: tuple[int, int], scratch: str):
        torch.manual_seed(0)
        size = {"height": 448, "width": 448}
        tokenizer = ColIntern3_5Processor.from_pretrained(TOKENIZER).tokenizer
        self.processor = ColIntern3_5Processor(
            GotOcr2ImageProcessor(size=size, crop_to_patches=True), tokenizer, InternVLVideoProcessor(size=size)
        )
        self.params = params(dtype, batch)
        self.base = build(self.processor, dtype, depth)
        lora = (self.params.lora_targets, self.params.lora_rank, self.params.lora_alpha, self.params.lora_dropout)
        self.model = add_lora(self.base, *lora)
        counts = [tiles] * (batch - 1) + [tiles - 1]
        self.tiles = [torch.randn(n, 3, 448, 448, dtype=getattr(torch, dtype)) for n in counts]
        with torch.no_grad():
            self.features = [self.base.get_page_features(page) for page in self.tiles]
        self.texts = [QUERIES[i % len(QUERIES)] for i in range(batch)]
        args = build_training_arguments(self.params, Path(scratch), quiet=True)
        dev = RetrievalEvaluator([TrainingPair("never asked", Page("0", Path))], None, 1)  # type: ignore[arg-type]
        self.ours = assemble_trainer(self.params, self.model, self.processor, args, dev)
        self.stock = StockTrainer(
            loss_func=ColbertLoss(temperature=self.params.temperature), is_vision_model=True, model=self.model,
            args=TrainingArguments(scratch, report_to="none"), train_dataset=TensorDataset(torch.zeros(batch)),
            eval_dataset=None,
        )  # fmt: skip
        self.stock.current_gradient_accumulation_steps = 1

    def colbert(self, queries: Tensor, query_mask: Tensor, pages: Tensor, page_mask: Tensor, masked: Tensor) -> Tensor:
        return ColbertLoss(temperature=self.params.temperature)(queries, pages)

    def our_batch(self, cached: bool) -> Any:
        kind = "features" if cached else "tiles"
        rows = zip(self.texts, self.features if cached else self.tiles, range(len(self.texts)), strict=True)
        return self.ours.data_collator(
            [{"query": text, "pages": [{"key": f"{i:014x}", kind: page}]} for text, page, i in rows]
        )

    def stock_batch(self) -> Any:
        query, page = self.processor.process_queries(self.texts), self.processor.tokenize_pages([*map(len, self.tiles)])
        sides = {f"{kind}_{key}": left(side[key], side["attention_mask"]) for kind, side in
                 (("query", query), ("doc", page)) for key in ("input_ids", "attention_mask")}  # fmt: skip
        return sides | {"doc_pixel_values": torch.cat(self.tiles)}

    def step(self, on: Levers) -> tuple[float, float]:
        """CPU seconds of one forward and backward, and the loss."""
        self.base.stock = not on.graph
        self.ours.is_low_precision = on.bf16_adapters and self.params.dtype == "bfloat16"  # as the trainer sets it
        self.ours.loss_function = make_contrastive_loss(self.params.temperature, False) if on.argmax else self.colbert
        for module in self.model.modules():
            if isinstance(module, BatchInvariantDropout):
                module.p = 0.0 if on.no_dropout else 0.1
        if on.no_checkpointing:
            self.base.activation_checkpointing_disable()
            self.base.disable_input_require_grads()
        else:
            self.base.activation_checkpointing_enable()
        for layer in self.base.decoder_layers:
            layer._compiled_call_impl = None
        if on.compiled:
            compile_layers(self.model)
        batch, trainer = (self.our_batch(on.cached), self.ours) if on.graph else (self.stock_batch(), self.stock)
        cut = mini_batching.plan_mini_batches if on.like_length else as_they_come
        torch.manual_seed(1)
        with patch("colintern.training.trainer.plan_mini_batches", cut):
            start = time.process_time()
            loss = trainer.training_step(self.model, batch)
            seconds = time.process_time() - start
        self.model.zero_grad()
        return seconds, loss.item()


def params(dtype: str, batch: int) -> Params:
    sizes = {"dtype": dtype, "batch_size": batch, "micro_batch_size": batch}
    return replace(load_recipe(RECIPE), gradient_checkpointing=False, lora_dropout=0.1, workers=0, **sizes)  # type: ignore[arg-type]


def build(processor: ColIntern3_5Processor, dtype: str, depth: tuple[int, int]) -> Model:
    raw = json.loads(CONFIG.read_text()) | {"image_token_id": processor.image_token_id}
    raw["text_config"] |= {"num_hidden_layers": depth[0], "vocab_size": len(processor.tokenizer)}
    raw["vision_config"] |= {"num_hidden_layers": depth[1]}
    config = InternVLConfig(**raw)
    model = Model._from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.init_head(0)
    return model


def left(rows: Tensor, mask: Tensor) -> Tensor:
    """The same rows, padded on the left."""
    return torch.stack([row.roll(len(row) - int(keep.sum())) for row, keep in zip(rows, mask, strict=True)])


def fit_depth(dtype: str, tiles: int, args: argparse.Namespace, seconds: float) -> tuple[int, int]:
    """Return how many language and vision layers leave time for the ends of the ladder."""
    with tempfile.TemporaryDirectory() as scratch:
        one = Bench(dtype, tiles, args.batch, (1, 1), scratch).step(ROWS["stock"])[0]
    steps = args.rounds * len(ENDS) + 1  # the first compiled one is run twice
    share = min(1.0, seconds / (steps * one * max(args.language_layers, args.vision_layers)))
    return max(1, int(args.language_layers * share)), max(1, int(args.vision_layers * share))


def measure(dtype: str, tiles: int, args: argparse.Namespace, seconds: float) -> float:
    """Print one table; return stock's time over the best row's."""
    start = time.perf_counter()
    whole = dtype == "bfloat16" and tiles <= args.ladder_tiles
    rows = {name: ROWS[name] for name in ENDS} | (ROWS if whole else {})
    if not args.compile:
        rows = {name: on for name, on in rows.items() if not on.compiled}
    depth = fit_depth(dtype, tiles, args, seconds)
    runs: dict[str, list[float]] = {}
    left_out = dict[str, None]()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(dtype, tiles, args.batch, depth, scratch)
        print(f"\n{dtype}, {tiles} tiles, batch {args.batch}, {depth[0]} + {depth[1]} layers; CPU s of a step")
        for _ in range(args.rounds):
            for name, on in rows.items():
                if len(runs) > 1 and time.perf_counter() - start > seconds:
                    left_out[name] = None
                    continue
                first = f" (first step {bench.step(on)[0]:.0f})" if on.compiled and name not in runs else ""
                taken, loss = bench.step(on)
                runs.setdefault(name, []).append(taken)
                ratio = median(runs["stock"]) / median(runs[name])
                print(f"{name:<34} {taken:>7.2f} {ratio:>6.2f}x  loss {loss:.4f}{first}", flush=True)
    if left_out:
        print(f"left out after {seconds / 60:.1f} minutes: {', '.join(left_out)}", flush=True)
    return median(runs["stock"]) / min(map(median, runs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    # The whole ladder at 6 tiles takes longer than 15 minutes.
    parser.add_argument("--ladder-tiles", type=int, default=3, help="with more tiles a page, only stock and the ends")
    for key, value in {"batch": 2, "rounds": 1, "threads": 1, "language-layers": 7, "vision-layers": 6}.items():
        parser.add_argument(f"--{key}", type=int, default=value)
    parser.add_argument("--minutes", type=float, default=8, help="in which all tables are measured; more than 2")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tables = [(dtype, tiles) for dtype in args.dtypes for tiles in args.tiles]
    tokens = sum(tiles for _, tiles in tables)
    ratios = {(dtype, n): measure(dtype, n, args, args.minutes * 60 * n / tokens) for dtype, n in tables}
    found = {tiles: ratio for (dtype, tiles), ratio in ratios.items() if dtype == args.dtypes[0]}
    print("RESULT " + " ".join(f"speedup_{tiles}_tiles={ratio:.2f}" for tiles, ratio in found.items()))


if __name__ == "__main__":
    main()
