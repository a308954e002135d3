"""Settings for a base, a GPU and a data set: the guide's hyperparameter optimizer, each value with its reason.

What memory and time decide is computed (costs.py, gpus.py). What only experiments decide is the guide's, and
where the guide says two things, one of them: docs/guide-to-commands.md lists which.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.modeling.tiling import INTERNVL_TILE, choose_grid
from colintern.monitoring.guide import (
    MIN_BATCH_SIZE,
    MIN_EPOCHS,
    MIN_GUIDE_PARAMETERS,
    get_optimal_lr,
    get_optimal_rank,
)
from colintern.planning.costs import Costs, Setting, Step
from colintern.planning.gpus import ASSUMED, GPUS, Gpu, seconds

GIB = 2**30
A4 = 1240, 1754  # pixels, at 150 dpi
USABLE = 0.85  # of a GPU's memory; the guide's table of resources calls 80-90 % normal and more than 95 % a risk
WORTH = 0.05  # of a step's predicted time; the prediction is not better than that
PROMPT_TOKENS = 12  # of a page beside its visual tokens: `ColIntern3_5Processor.visual_prompt`, in Qwen's tokens
WARMUP, DROPOUT, DTYPE = 100, 0.1, "bfloat16"  # the guide's
VISUAL_TOKENS = (1536, 1024, 768, 512, 256)  # the guide's, its way out when memory is short, and further down
MEMORY_TABLE = {16: "8", 24: "12", 32: "16", 40: "24-32", 80: "24-32"}  # GB -> the guide's batch size


class Value(NamedTuple):
    """One line of the recommendation; `value` None: nothing is recommended, and the reason says why."""

    key: str
    value: Any
    source: str  # guide, computed, or the file that holds what was measured
    reason: str


class Plan(NamedTuple):
    """A step that fits: its setting, cost, and predicted seconds; `others`: with more or less checkpointing."""

    setting: Setting
    step: Step
    seconds: float
    others: "tuple[Plan, ...]" = ()


def optimal_micro_batch_size(gpu_memory_gb: float, costs: Costs, setting: Setting) -> int:
    """The largest divisor of a batch's pages with which a step as in `setting` fits the GPU, 0 if none does.

    The guide's get_optimal_batch_size takes 150 MB a pair, which gives 32 for every card from 7 GB up.

    Args:
        gpu_memory_gb: of the card, in GiB as cards are sold; `USABLE` of it is used.
        costs: of the architecture.
        setting: its micro_batch_size is ignored.
    """
    divisors = [n for n in range(1, setting.pages + 1) if setting.pages % n == 0]

    def peak(micro: int) -> int:
        return costs.step(setting._replace(micro_batch_size=micro)).peak

    fitting = bisect_right(divisors, gpu_memory_gb * GIB * USABLE, key=peak)
    return divisors[fitting - 1] if fitting else 0


def _fewest(gpu_memory_gb: float, costs: Costs, setting: Setting) -> int:
    """Of how many layers the activations must be computed again, at least, so that a step as in `setting` fits."""

    def fits(layers: int) -> bool:
        return costs.step(setting._replace(checkpointing=layers)).peak <= gpu_memory_gb * GIB * USABLE

    return bisect_left(range(costs.layers), True, key=fits)


def plan(
    costs: Costs,
    gpu_memory_gb: float,
    gpu: Gpu,
    batch: int,
    visual_tokens: Sequence[int],
    query_tokens: int,
    negatives: int = 0,
) -> Plan:
    """The fastest step that fits, with the first of `visual_tokens` a page that leaves one.

    Raises:
        UserError: nothing fits.
    """
    tile, need = costs.config.image_seq_length, sum(costs.static().values()) / GIB
    tried = visual_tokens if need < gpu_memory_gb * USABLE else ()
    for tiles in (tokens // tile for tokens in tried if tokens >= tile):
        settings = []
        for checkpointing in (False, True):
            tokens = tiles * tile + PROMPT_TOKENS
            setting = Setting(batch, 1, checkpointing, tiles, tokens, query_tokens, negatives=negatives)
            if micro := optimal_micro_batch_size(gpu_memory_gb, costs, setting):
                settings.append(setting._replace(micro_batch_size=micro))
        if settings and settings[-1].micro_batch_size == settings[-1].pages:
            fewest = _fewest(gpu_memory_gb, costs, settings[-1])
            if 0 < fewest < costs.layers:
                settings.append(settings[-1]._replace(checkpointing=fewest))
        if settings:
            steps = map(costs.step, settings)
            plans = (Plan(s, step, seconds(step.kernels, gpu)) for s, step in zip(settings, steps, strict=True))
            best, *rest = sorted(plans, key=_rank)
            return best._replace(others=tuple(rest))
    raise UserError(
        f"--gpu-memory: {gpu_memory_gb:g} GB is too little for any step with batch_size {batch}; weights, adapters, "
        f"gradients and optimizer alone take {need:.1f} GiB, and {USABLE:.0%} of the card is used"
    )


def recommend(costs: Costs, found: Plan, gpu_memory_gb: float, rows: int, pages: int) -> Iterator[Value]:
    """Values for params.yaml; `found` is what `plan` chose. Where the guide's rules do not reach the base, what they
    would decide has no value."""
    setting, step = found.setting, found.step
    size, batch, micro = costs.parameters, setting.batch_size, setting.micro_batch_size
    if size < MIN_GUIDE_PARAMETERS:
        reason = (
            f"The guide's rules are for 1B parameters and up, and do not reach {size / 1e6:.1f} M; for the demo base "
            f'the README has measurements: "How the demo answers to its settings".'
        )
        for key in ("lr", "lora_rank", "lora_alpha", "epochs", "warmup_steps", "batch_size", "max_visual_tokens"):
            yield Value(key, None, "README", reason)
    else:
        visual = setting.tiles * costs.config.image_seq_length
        grid = choose_grid(A4[0], A4[1], setting.tiles, INTERNVL_TILE)
        fit = "" if visual == VISUAL_TOKENS[0] else f"; with {VISUAL_TOKENS[0]} no step fits this GPU"
        steps = steps_of(rows, batch)
        yield Value(
            "lr", get_optimal_lr(size), "guide", f"{size / 1e9:.1f} B: 7e-5 below 0.5 B, 5e-5 below 3 B, then 3e-5"
        )
        yield Value("lora_rank", get_optimal_rank(size), "guide", "16 below 0.5 B, 32 below 3 B, then 64")
        yield Value("lora_alpha", get_optimal_rank(size), "guide", "equal to the rank")
        yield Value("lora_dropout", DROPOUT, "guide", "its LoraConfig")
        yield Value("dtype", DTYPE, "guide", "BF16 training; adapters and AdamW's moments stay float32")
        yield Value("epochs", MIN_EPOCHS, "guide", "5, not 1")
        yield Value("batch_size", batch, "guide", "64 pages to tell apart: no accumulation, so effective and real")
        yield Value("warmup_steps", warmup_of(steps), "guide", f"{WARMUP}, at most a tenth of {steps:,} steps")
        yield Value(
            "max_visual_tokens", visual, "guide", f"{setting.tiles} tiles, {grid.cols} x {grid.rows} of A4{fit}"
        )
    peak = f"{step.peak / GIB:.1f} GiB, of {gpu_memory_gb:g}"
    parts = setting.pages // micro
    whole = "the whole batch in one graph" if parts == 1 else f"{parts} parts, gradient cached"
    yield Value("micro_batch_size", micro, "computed", f"the most that fits: {peak}; {whole}")
    rivals = (
        f"{rival.seconds / found.seconds:.2f} x as long with {_recomputed(rival.setting)}, at micro_batch_size "
        f"{rival.setting.micro_batch_size}"
        for rival in found.others
    )
    why = f"a step takes {'; '.join(rivals)}; predicted" if found.others else "nothing else fits"
    yield Value("gradient_checkpointing", setting.checkpointing, "computed", f"{_recomputed(setting)}; {why}")
    room = math.ceil(pages * costs.feature_bytes(setting.tiles) / 1e8) / 10
    yield Value("feature_cache_gb", room, "computed", f"{pages:,} pages of {setting.tiles} tiles; disk, not memory")


def _recomputed(setting: Setting) -> str:
    if isinstance(setting.checkpointing, bool):
        return "all layers" if setting.checkpointing else "no layer"
    return f"the first {setting.checkpointing} layers"


def _rank(plan: Plan) -> float:
    """By time; a number of layers, which leaves less of the card free, must save `WORTH`."""
    return plan.seconds * (1 if isinstance(plan.setting.checkpointing, bool) else 1 + WORTH)


def steps_of(rows: int, batch: int) -> int:
    """Optimiser steps of a run; the last, incomplete batch of an epoch is dropped."""
    return rows // batch * MIN_EPOCHS


def warmup_of(steps: int) -> int:
    """The guide says 100, in another place 198 and, for unstable runs, 200: 100, but on few data a tenth of the run."""
    return min(WARMUP, steps // 10)


def forecast(costs: Costs, found: Plan, gpu: Gpu | None, steps: int, pages: int) -> dict[str, Any]:
    """Predicted: bytes and operations of a step; where the GPU is known, seconds a step and hours of all steps and
    of the page features, which are computed once."""
    step = found.step
    told: dict[str, Any] = {"peak_bytes": step.peak, "memory": step.memory, "operations": step.operations}
    if gpu:
        told |= {
            "seconds_per_step": found.seconds,
            "steps": steps,
            "training_hours": steps * found.seconds / 3600,
            "feature_hours": pages * seconds(costs.features(found.setting.tiles).kernels, gpu) / 3600,
            "assumes": ASSUMED,
        }
    return told


def memory_table(costs: Costs, query_tokens: int) -> Iterator[tuple[int, str, list[tuple[int, float | None]]]]:
    """The guide's table of batch sizes against the model's: GB, the guide's, then micro-batch and peak GiB without
    and with checkpointing (0 and None: none fits), for pages of 1,536 visual tokens."""
    tiles = VISUAL_TOKENS[0] // costs.config.image_seq_length
    for memory, guide in MEMORY_TABLE.items():
        row = []
        for checkpointing in (False, True):
            tokens = tiles * costs.config.image_seq_length + PROMPT_TOKENS
            setting = Setting(MIN_BATCH_SIZE, 1, checkpointing, tiles, tokens, query_tokens)
            micro = optimal_micro_batch_size(memory, costs, setting)
            peak = costs.step(setting._replace(micro_batch_size=micro)).peak / GIB if micro else None
            row.append((micro, peak))
        yield memory, guide, row


def nearest(gpu_memory_gb: float) -> Gpu:
    """A card to rank plans by where none is named: the one whose memory is nearest."""
    return min(GPUS.values(), key=lambda gpu: abs(gpu.memory - gpu_memory_gb))
