"""Recommend settings for a base, a GPU and a data set: the guide's hyperparameter optimizer, each value with a reason.

Settings that memory and time decide are computed (costs.py, gpus.py). Those that only experiments can decide are the
guide's; where it contradicts itself, docs/guide-to-commands.md lists which of its values is taken.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from colintern.core.errors import UserError
from colintern.modeling.base_config import get_tile_size
from colintern.modeling.tiling import A4, INTERNVL_TILE, MIN_TILES, choose_grid
from colintern.monitoring.guide import (
    MIN_BATCH_SIZE,
    MIN_EPOCHS,
    MIN_GUIDE_PARAMETERS,
    get_optimal_lr,
    get_optimal_rank,
)
from colintern.params import Params
from colintern.planning.costs import CostModel, StepCost, StepSettings
from colintern.planning.gpus import ASSUMED, Gpu, predict_seconds

GIB = 2**30
USABLE_SHARE = 0.85  # of a GPU's memory; the guide's table of resources calls 80-90 % normal and more than 95 % a risk
MIN_TIME_SAVED = 0.05  # share of a step's predicted time; the prediction is not better than that
PROMPT_TOKENS = 12  # of a page beside its visual tokens: `ColIntern3_5Processor.visual_prompt`, in Qwen's tokens
WARMUP, DROPOUT, DTYPE = 100, 0.1, "bfloat16"  # the guide's
VISUAL_TOKENS = (1536, 1024, 768, 512, 256)  # the guide's, its way out when memory is short, and further down
GUIDE_BATCH_SIZES = {16: "8", 24: "12", 32: "16", 40: "24-32", 80: "24-32"}  # by GB
NOT_FOR_SMALL = ("lr", "lora_rank", "lora_alpha", "epochs", "warmup_steps", "batch_size", "max_visual_tokens")
# GB, the guide's batch size; micro_batch_size and peak in GiB, 0 and None where none fits.
TableRow = tuple[int, str, list[tuple[int, float | None]]]


class Recommendation(NamedTuple):
    """Value of a key, None where there is none; `source`: guide, computed, or the file with the measurements."""

    key: str
    value: float | str | None
    source: str
    reason: str


class StepPlan(NamedTuple):
    """Settings of a step that fits, with its cost and predicted seconds; `others` checkpoint more or fewer layers."""

    settings: StepSettings
    cost: StepCost
    seconds: float
    others: "tuple[StepPlan, ...]" = ()


class Forecast(NamedTuple):
    """Prediction of a run on a GPU; `feature_hours`: of the page features, which are computed once."""

    seconds_per_step: float
    steps: int
    training_hours: float
    feature_hours: float
    assumes: str = ASSUMED


def _fits_memory(gpu_memory_gb: float, costs: CostModel, settings: StepSettings) -> bool:
    return costs.predict_step(settings).peak_bytes <= gpu_memory_gb * GIB * USABLE_SHARE


def optimal_micro_batch_size(gpu_memory_gb: float, costs: CostModel, settings: StepSettings) -> int:
    """Return the largest divisor of a batch's pages with which a step as in `settings` fits the GPU, 0 if none does.

    The guide's get_optimal_batch_size takes 150 MB a pair, which gives 32 for every card from 7 GB up.
    """

    def is_too_large(size: int) -> bool:
        return not _fits_memory(gpu_memory_gb, costs, settings._replace(micro_batch_size=size))

    divisors = [n for n in range(1, settings.num_pages + 1) if settings.num_pages % n == 0]
    return [0, *divisors][bisect_left(divisors, True, key=is_too_large)]


def apply_guide(params: Params, num_parameters: int) -> Params:
    """Return params with the guide's values that decide the cost of a step; unchanged for bases without rules."""
    if num_parameters < MIN_GUIDE_PARAMETERS:
        return params
    rank = get_optimal_rank(num_parameters)
    lora = {"lora_rank": rank, "lora_alpha": rank, "lora_dropout": DROPOUT, "dtype": DTYPE}
    return replace(params, batch_size=MIN_BATCH_SIZE, epochs=MIN_EPOCHS, max_visual_tokens=VISUAL_TOKENS[0], **lora)  # type: ignore[arg-type]


def plan_step(costs: CostModel, gpu_memory_gb: float, gpu: Gpu) -> StepPlan:
    """Choose the fastest step that fits; the guide's pages get fewer visual tokens where none does.

    Raises:
        UserError: nothing fits.
    """
    params, tile = costs.params, costs.config.image_seq_length
    needed = sum(costs.static_memory.values()) / GIB
    tried = VISUAL_TOKENS if costs.num_parameters >= MIN_GUIDE_PARAMETERS else (params.max_visual_tokens,)
    least = tile * MIN_TILES[params.tiling]
    for tiles in (tokens // tile for tokens in tried if tokens >= least and needed < gpu_memory_gb * USABLE_SHARE):
        options = []
        for checkpointing in (False, True):
            settings = _make_step_settings(costs, checkpointing, tiles, params.negatives)
            if size := optimal_micro_batch_size(gpu_memory_gb, costs, settings):
                options.append(settings._replace(micro_batch_size=size))
        if options and options[-1].num_chunks == 1:  # find the fewest layers that have to be recomputed
            whole, depths = options[-1], range(costs.num_layers)
            num_layers = bisect_left(
                depths, True, key=lambda n: _fits_memory(gpu_memory_gb, costs, whole._replace(checkpointing=n))
            )
            options += [whole._replace(checkpointing=num_layers)] if 0 < num_layers < costs.num_layers else []
        if options:
            best, *others = sorted((_predict_plan(costs, gpu, settings) for settings in options), key=_rank_plan)
            return best._replace(others=tuple(others))
    raise UserError(
        f"--gpu-memory: {gpu_memory_gb:g} GB is too little for any step with batch_size {params.batch_size}; weights, "
        f"adapters, gradients and optimizer alone take {needed:.1f} GiB, and {USABLE_SHARE:.0%} of the card is used"
    )


def _make_step_settings(costs: CostModel, checkpointing: bool, tiles: int, negatives: int) -> StepSettings:
    page_tokens = tiles * costs.config.image_seq_length + PROMPT_TOKENS
    batch_size, query_tokens = costs.params.batch_size, costs.params.max_query_tokens
    return StepSettings(batch_size, 1, checkpointing, tiles, page_tokens, query_tokens, negatives)


def _predict_plan(costs: CostModel, gpu: Gpu, settings: StepSettings) -> StepPlan:
    """Predict memory for pages of the whole budget, and time for A4 pages."""
    tiles = _count_page_tiles(costs, settings.tiles)
    tokens = settings.page_tokens - (settings.tiles - tiles) * costs.config.image_seq_length
    usual = costs.predict_step(settings._replace(tiles=tiles, page_tokens=tokens))
    return StepPlan(settings, costs.predict_step(settings), predict_seconds(gpu, costs.dtype, *usual[1:]))


def _count_page_tiles(costs: CostModel, max_tiles: int) -> int:
    """Return the tiles of an A4 page: exact tiling takes about all that the budget allows, stock tiling often half."""
    if costs.params.tiling == "exact":
        return max_tiles
    return choose_grid(*A4, max_tiles, get_tile_size(costs.config), costs.params.tiling).tiles


def _rank_plan(plan: StepPlan) -> float:
    """Rank by time; a number of layers, which leaves less memory free, must save `MIN_TIME_SAVED`."""
    return plan.seconds * (1 if isinstance(plan.settings.checkpointing, bool) else 1 + MIN_TIME_SAVED)


def recommend_settings(
    costs: CostModel, plan: StepPlan, gpu_memory_gb: float, rows: int, pages: int
) -> Iterator[Recommendation]:
    """Yield values for params.yaml; those of the guide are None for a base that is too small for its rules."""
    settings = plan.settings
    yield from _apply_guide(costs, settings, rows)
    graph = (
        f"{settings.num_chunks} parts, gradient cached" if settings.num_chunks > 1 else "the whole batch in one graph"
    )
    reason = f"the most that fits: {plan.cost.peak_bytes / GIB:.1f} GiB, of {gpu_memory_gb:g}; {graph}"
    yield Recommendation("micro_batch_size", settings.micro_batch_size, "computed", reason)
    others = (
        f"{other.seconds / plan.seconds:.2f} x as long with {_describe_checkpointing(other.settings)}, at "
        f"micro_batch_size {other.settings.micro_batch_size}"
        for other in plan.others
    )
    reason = f"a step takes {'; '.join(others)}; predicted" if plan.others else "nothing else fits"
    reason = f"{_describe_checkpointing(settings)}; {reason}"
    yield Recommendation("gradient_checkpointing", settings.checkpointing, "computed", reason)
    tiles = _count_page_tiles(costs, settings.tiles)
    cache_gb = math.ceil(pages * costs.feature_bytes(tiles) / 1e8) / 10
    reason = f"{pages:,} pages of {tiles} tiles; disk, not memory"
    yield Recommendation("feature_cache_gb", cache_gb, "computed", reason)


def _apply_guide(costs: CostModel, settings: StepSettings, rows: int) -> Iterator[Recommendation]:
    size = costs.num_parameters
    if size < MIN_GUIDE_PARAMETERS:
        reason = (
            f"The guide's rules are for 1B parameters and up, and do not reach {size / 1e6:.1f} M; for the demo base "
            f'the README has measurements: "How the demo answers to its settings".'
        )
        yield from (Recommendation(key, None, "README", reason) for key in NOT_FOR_SMALL)
        return
    visual_tokens, steps = settings.tiles * costs.config.image_seq_length, count_steps(rows, costs.params)
    grid = choose_grid(*A4, settings.tiles, INTERNVL_TILE, costs.params.tiling)
    fit = "" if visual_tokens == VISUAL_TOKENS[0] else f"; with {VISUAL_TOKENS[0]} no step fits this GPU"
    for key, value, reason in (
        ("lr", get_optimal_lr(size), f"{size / 1e9:.1f} B: 7e-5 below 0.5 B, 5e-5 below 3 B, then 3e-5"),
        ("lora_rank", costs.params.lora_rank, "16 below 0.5 B, 32 below 3 B, then 64"),
        ("lora_alpha", costs.params.lora_alpha, "equal to the rank"),
        ("lora_dropout", DROPOUT, "its LoraConfig"),
        ("dtype", DTYPE, "BF16 training; adapters and AdamW's moments stay float32"),
        ("epochs", MIN_EPOCHS, "5, not 1"),
        ("batch_size", settings.batch_size, "64 pages to tell apart: no accumulation, so effective and real"),
        ("warmup_steps", choose_warmup_steps(steps), f"{WARMUP}, at most a tenth of {steps:,} steps"),
        ("max_visual_tokens", visual_tokens, f"{settings.tiles} tiles, {grid} of A4{fit}"),
    ):
        yield Recommendation(key, value, "guide", reason)


def _describe_checkpointing(settings: StepSettings) -> str:
    if isinstance(settings.checkpointing, bool):
        return "all layers" if settings.checkpointing else "no layer"
    return f"the first {settings.checkpointing} layers"


def count_steps(rows: int, params: Params) -> int:
    """Count the optimizer steps of a run; the last, incomplete batch of an epoch is dropped."""
    return rows // params.batch_size * params.epochs


def choose_warmup_steps(steps: int) -> int:
    """Return 100, but a tenth of a short run; the guide also says 198 and, for unstable runs, 200."""
    return min(WARMUP, steps // 10)


def forecast_run(costs: CostModel, plan: StepPlan, gpu: Gpu, rows: int, pages: int) -> Forecast:
    """Predict the hours of all steps and of the page features."""
    tiles, steps = pages * _count_page_tiles(costs, plan.settings.tiles), count_steps(rows, costs.params)
    seconds = predict_seconds(gpu, costs.dtype, *(tiles * cost for cost in costs.tile_cost))
    return Forecast(plan.seconds, steps, steps * plan.seconds / 3600, seconds / 3600)


def compute_batch_size_table(costs: CostModel) -> Iterator[TableRow]:
    """Compute the guide's table of batch sizes without and with checkpointing, without hard negatives."""
    for memory, guide in GUIDE_BATCH_SIZES.items():
        computed: list[tuple[int, float | None]] = []
        for checkpointing in (False, True):
            settings = _make_step_settings(costs, checkpointing, VISUAL_TOKENS[0] // costs.config.image_seq_length, 0)
            settings = settings._replace(batch_size=MIN_BATCH_SIZE)
            size = optimal_micro_batch_size(memory, costs, settings)
            peak = costs.predict_step(settings._replace(micro_batch_size=size)).peak_bytes / GIB if size else None
            computed.append((size, peak))
        yield memory, guide, computed
