"""Measure a training step on this machine: `colintern recommend --probe`."""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch.optim import Optimizer

from colintern.encoding.page_features import Page
from colintern.modeling.attention import resolve_attn_implementation
from colintern.modeling.lora import add_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import Params
from colintern.planning.costs import CostModel, StepCost, StepSettings
from colintern.planning.gpus import GPUS, find_local_gpu, predict_seconds
from colintern.training.distributed import Batch
from colintern.training.pairs import TrainingPair
from colintern.training.run import assemble_trainer, build_training_arguments
from colintern.training.trainer import ContrastiveTrainer, RetrievalEvaluator

QUERY = "total of all freight from Oslo to Rome in March"


class ProbedStep(NamedTuple):
    """Measured step beside its prediction; no time is predicted for a device that is not in `GPUS`."""

    settings: StepSettings
    seconds: float
    peak_bytes: int
    predicted: StepCost
    predicted_seconds: float | None


def probe_steps(params: Params, base: str) -> Iterator[ProbedStep]:
    """Run a step with a quarter of the batch, which warms up, and one with the whole batch; nothing is saved.

    Args:
        params: of the run.
        base: hub id or folder of the base, whose weights are loaded.
    """
    torch.set_num_threads(params.threads)
    sizes = {"max_visual_tokens": params.max_visual_tokens, "max_query_tokens": params.max_query_tokens}
    revision = params.base_revision or "main"
    processor = ColIntern3_5Processor.from_pretrained(base, revision=revision, tiling=params.tiling, **sizes)
    attention, dtype = (
        resolve_attn_implementation(params.attention, params.dtype),
        getattr(torch, params.dtype),
    )
    model = ColIntern3_5.from_pretrained(
        base, revision=params.base_revision or None, dtype=dtype, attn_implementation=attention
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer, costs = build_probe_trainer(params, model, processor, folder)
        for batch_size in sorted({max(1, params.batch_size // 4), params.batch_size}):
            yield probe_step(params, trainer, costs, batch_size)


def build_probe_trainer(
    params: Params, model: ColIntern3_5, processor: ColIntern3_5Processor, folder: str
) -> tuple[ContrastiveTrainer, CostModel]:
    """Build a trainer without data, and the cost model of its steps."""
    costs = CostModel(model.config, params)  # type: ignore[arg-type]
    wrapped = add_lora(model, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
    evaluator = RetrievalEvaluator([TrainingPair("", Page("0", Path))], None, 1)  # type: ignore[arg-type]
    args = build_training_arguments(replace(params, workers=0), Path(folder), quiet=True)
    wrapped.to(args.device)
    trainer = assemble_trainer(params, wrapped, processor, args, evaluator)
    trainer.create_optimizer()
    return trainer, costs


def probe_step(params: Params, trainer: ContrastiveTrainer, costs: CostModel, batch_size: int) -> ProbedStep:
    """Run one step, optimizer included, on made-up pairs with the longest pages and cached features."""
    optimizer = cast("Optimizer", trainer.optimizer)
    before = _reset_peak_memory()
    tiles, tokens = params.max_visual_tokens // costs.config.image_seq_length, costs.config.image_seq_length
    features = torch.randn(tiles, tokens, costs.text.hidden_size).to(costs.dtype)
    num_pages = batch_size * (1 + params.negatives)
    pages = [{"key": f"{number:014x}", "features": features} for number in range(num_pages)]
    queries = [f"{number} {QUERY}" for number in range(batch_size)]
    pairs = [{"query": query, "pages": pages[row::batch_size]} for row, query in enumerate(queries)]
    batch = cast("Batch", trainer.data_collator(pairs))
    lengths: tuple[int, int] = batch["page"]["input_ids"].shape[1], batch["query"]["input_ids"].shape[1]
    start = time.perf_counter()
    trainer.training_step(trainer.model, batch)
    optimizer.step()
    peak_bytes, seconds = _read_peak_memory(), time.perf_counter() - start
    optimizer.zero_grad()
    micro_batch_size = min(trainer.micro_batch_size, num_pages)  # the trainer halves it on OOM
    settings = StepSettings(batch_size, micro_batch_size, params.gradient_checkpointing, tiles, *lengths)
    settings = settings._replace(negatives=params.negatives)
    cost, gpu = costs.predict_step(settings), find_local_gpu()
    predicted = predict_seconds(GPUS[gpu], costs.dtype, *cost[1:]) if gpu else None
    # Weights, moments and masks are there before the step; its gradients are not.
    peak_bytes += sum(costs.static_memory.values()) - costs.static_memory["gradients"] - before
    return ProbedStep(settings, seconds, peak_bytes, cost, predicted)


def _reset_peak_memory() -> int:
    """Reset the peak of this process and return the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _read_resident_bytes("VmRSS")


def _read_peak_memory() -> int:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _read_resident_bytes("VmHWM")


def _read_resident_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
