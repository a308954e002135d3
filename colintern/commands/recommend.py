"""`colintern recommend`: settings for a base and a GPU, and the predicted or measured cost of a step."""

import argparse
import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from colintern.commands import print_phase
from colintern.core.errors import UserError
from colintern.core.rules import parse_mixture
from colintern.params import Params, load_params, update_params
from colintern.storage.paths import require_base

if TYPE_CHECKING:
    from colintern.planning.costs import StepCost
    from colintern.planning.recommend import Forecast, Recommendation, TableRow

SUMMARY = "recommend settings for a base and a GPU, and predict memory and time"
EXAMPLE = "colintern recommend --base internvl3_5-1b --gpu rtx-5090"
PARAMS, SURVEY = Path("params.yaml"), Path("data/survey.json")
COLPALI = "vidore/colpali_train_set", 118_195, 39_239  # its pairs and its pages
# Distinct pages of each task of mteb's benchmarks, added up.
BENCHMARK_PAGES = {"ViDoRe(v1)": 6_718, "ViDoRe(v2)": 4_496, "ViDoRe(v3)": 18_994, "ViDoRe(v3.1)": 18_994}
RECIPE_BENCHMARKS = ("ViDoRe(v1)", "ViDoRe(v2)", "ViDoRe(v3)")  # of the recipe internvl3_5-1b
DEFAULT_GPU = "rtx-5090"  # what the guide recommends


class Head(NamedTuple):
    """Base, card and data of a recommendation."""

    base: str
    parameters: int
    trained: int
    gpu: str | None
    gpu_memory_gb: float
    data: str
    rows: int
    pages: int
    negatives: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add = parser.add_argument
    add("--base", metavar="BASE", help="a folder, ID@COMMIT, or internvl3_5-1b, -2b, -4b, -8b (default: params.yaml's)")
    add("--gpu", metavar="NAME", help="the card, such as a100-80gb (default: the one here, else rtx-5090)")
    add("--gpu-memory", metavar="GB", help="its memory, or `auto`: that of the GPU here (default: that of --gpu)")
    add("--rows", type=_parse_count, metavar="N", help="training pairs (default: data/survey.json's, or ColPali's)")
    add("--pages", type=_parse_count, metavar="N", help="pages with those of evaluation (default: as for --rows)")
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument("--table", action="store_true", help="only the guide's batch sizes and the computed ones")
    modes.add_argument("--probe", action="store_true", help="only run a training step here, to measure time and memory")
    modes.add_argument("--write", action="store_true", help="write the values into params.yaml")
    add("--json", action="store_true", help="all of it as JSON")


def run(args: argparse.Namespace) -> None:
    """Run the command."""
    params = load_params(PARAMS)
    base = args.base or params.base
    if (args.write or args.probe) and not _is_same_base(base, params):
        option, hint = ("--write" if args.write else "--probe"), "see `colintern recipe` for another base"
        raise UserError(f"{option}: {PARAMS} is for base {params.base}, not {base}; {hint}")
    require_base(base, params)
    if args.probe:
        _run_probe(params, args.json)
        return
    data, memory = _count_data(args, params), _parse_memory(args.gpu_memory)
    print_phase(f"recommend: counting memory and operations of a training step of {base}")
    from colintern.modeling.base_config import load_base_config
    from colintern.planning import recommend as rules
    from colintern.planning.costs import CostModel, count_parameters
    from colintern.planning.gpus import GPUS, find_nearest_gpu

    card, memory = _choose_gpu(args.gpu, memory)
    architecture = load_base_config(base, params)
    costs = CostModel(architecture, rules.apply_guide(params, count_parameters(architecture)))
    head = Head(base, costs.num_parameters, costs.num_trained, card, memory, *data, params.negatives)
    if args.table:
        table = list(rules.compute_batch_size_table(costs))
        as_json = json.dumps(head._asdict() | {"table": table}, allow_nan=False)
        print(as_json if args.json else "\n".join(_format_table(base, table)))
        return
    plan = rules.plan_step(costs, memory, GPUS[card] if card else find_nearest_gpu(memory))
    values = list(rules.recommend_settings(costs, plan, memory, head.rows, head.pages))
    forecast = rules.forecast_run(costs, plan, GPUS[card], head.rows, head.pages) if card else None
    if args.json:
        cost = {"peak_bytes": plan.cost.peak_bytes, "memory": plan.cost.memory, "operations": plan.cost.operations}
        predicted = cost | (forecast._asdict() if forecast else {})
        report = {"values": [value._asdict() for value in values], "predicted": predicted}
        print(json.dumps(head._asdict() | report, indent=2))
    else:
        lines = [*_format_head(head), "", *_format_values(values), "", *_format_cost(plan.cost)]
        print("\n".join([*lines, *_format_forecast(forecast, card)]))
    if args.write:
        changed = update_params(PARAMS, {value.key: value.value for value in values if value.value is not None})
        if not args.json:
            print(f"\n{PARAMS}: " + (", ".join(changed) + " written" if changed else "has these values already"))


def _run_probe(params: Params, as_json: bool) -> None:
    from colintern.storage.manifest import ensure_base

    base = ensure_base(params.base, params.base_revision)
    print_phase(f"recommend: running a training step of {params.base} as in {PARAMS}, on this machine")
    from colintern.planning.probe import probe_steps

    for step in probe_steps(params, base):
        if as_json:
            measured = {"seconds": step.seconds, "peak_bytes": step.peak_bytes}
            predicted = {"seconds": step.predicted_seconds, "peak_bytes": step.predicted.peak_bytes}
            report = step.settings._asdict() | {"measured": measured, "predicted": predicted}
            print(json.dumps(report), flush=True)
            continue
        sizes = f"batch_size {step.settings.batch_size}, micro_batch_size {step.settings.micro_batch_size}"
        seconds = f" (predicted {step.predicted_seconds:.3g})" if step.predicted_seconds else ""
        peak = f"peak {step.peak_bytes / 2**20:,.0f} MiB (predicted {step.predicted.peak_bytes / 2**20:,.0f})"
        print(f"{sizes}: {step.seconds:.3g} s{seconds}, {peak}", flush=True)


def _is_same_base(base: str, params: Params) -> bool:
    """Return whether it is the base of params.yaml: internvl3_5-1b is OpenGVLab/InternVL3_5-1B-HF."""
    return base == params.base or f"opengvlab/{base}-hf" == params.base.lower()


def _count_data(args: argparse.Namespace, params: Params) -> tuple[str, int, int]:
    """Return the source of the numbers of pairs and pages, with benchmarks that are not counted, and the numbers."""
    if args.rows and args.pages:
        return "--rows, --pages", args.rows, args.pages
    weights = dict(parse_mixture(params.train_data))
    survey = json.loads(SURVEY.read_text(encoding="utf-8")) if SURVEY.is_file() else {}
    is_other_base = bool(args.base) and not _is_same_base(args.base, params)
    benchmarks = RECIPE_BENCHMARKS if is_other_base else params.benchmarks
    if is_other_base or list(weights) == [COLPALI[0]]:
        source, rows, pages = COLPALI
    elif all(f"{name} (train)" in survey for name in weights):
        rows = sum(survey[f"{name} (train)"]["rows"] * weight for name, weight in weights.items())
        source, pages = str(SURVEY), sum(facts["pages"] for facts in survey.values())
    else:
        raise UserError(f"--rows, --pages: {SURVEY} does not know {params.train_data}; give both, or run `dvc repro`")
    uncounted = [name for name in benchmarks if name not in BENCHMARK_PAGES and f"{name} (test)" not in survey]
    source = f"{source}, without {', '.join(uncounted)}" if uncounted else source
    pages += sum(BENCHMARK_PAGES.get(name, 0) for name in benchmarks)
    return source, args.rows or rows, args.pages or pages


def _parse_memory(text: str | None) -> float | None:
    """Return --gpu-memory in GB, None where it is not given."""
    if text is None:
        return None
    if text == "auto":
        import torch

        if not torch.cuda.is_available():
            raise UserError("--gpu-memory: 'auto' reads the CUDA device, and there is none here; give GB, such as 32")
        return round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    try:
        memory = float(text)
    except ValueError:
        memory = 0.0
    if not 1 <= memory <= 1024:
        raise UserError(f"--gpu-memory: {text!r} is not valid; it must be GB from 1 to 1024, or auto")
    return memory


def _choose_gpu(name: str | None, memory: float | None) -> tuple[str | None, float]:
    """Return the card to predict times for, None where only its memory is known, and the memory in GB."""
    import torch

    from colintern.planning.gpus import GPUS, find_gpu, find_local_gpu

    if name is None and torch.cuda.is_available():
        return find_local_gpu(), memory or _parse_memory("auto") or 0.0
    if name is None and memory is not None:
        return None, memory
    card = find_gpu(name or DEFAULT_GPU)
    return card, memory or GPUS[card].memory


def _format_head(head: Head) -> list[str]:
    negatives = f" with {head.negatives} hard negatives each" if head.negatives else ""
    lines = (
        f"base  {head.base}: {head.parameters / 1e6:,.1f} M parameters, {head.trained / 1e6:,.1f} M trained",
        f"GPU   {head.gpu or 'not named'}, {head.gpu_memory_gb:g} GB",
        f"data  {head.rows:,} pairs{negatives}, {head.pages:,} pages ({head.data})",
    )
    return [part for line in lines for part in wrap(line, 79, subsequent_indent=" " * 6)]


def _format_values(values: "list[Recommendation]") -> list[str]:
    unchanged = [value for value in values if value.value is None]
    lines = []
    if unchanged:
        lines += [*wrap(f"{', '.join(v.key for v in unchanged)}: as they are. {unchanged[0].reason}", 79), ""]
    for value in (value for value in values if value.value is not None):
        first, *more = wrap(value.reason, 37)
        text = str(value.value).lower() if isinstance(value.value, bool) else str(value.value)
        lines.append(f"{value.key:<23}{text:<10}{value.source:<10}{first}")
        lines += [f"{'':43}{line}" for line in more]
    return lines


def _format_cost(cost: "StepCost") -> list[str]:
    unit, size = ("GiB", 2**30) if cost.peak_bytes > 2**30 else ("MiB", 2**20)
    memory = cost.memory | {"peak of a step": cost.peak_bytes}
    return [
        "predicted, not measured:",
        *(f"  {name:<22}{number / size:>7.2f} {unit}" for name, number in memory.items()),
        f"  {'operations a step':<22}{cost.operations / 1e12:>7.1f} x 10^12",
    ]


def _format_forecast(forecast: "Forecast | None", card: str | None) -> list[str]:
    if forecast is None:
        return ["  no times: name a card with --gpu"]
    return [
        f"  {'time of a step':<22}{forecast.seconds_per_step:>7.2f} s on {card}",
        f"  {'all ' + format(forecast.steps, ',') + ' steps':<22}{forecast.training_hours:>7.1f} h",
        f"  {'page features, once':<22}{forecast.feature_hours:>7.1f} h",
        f"  {forecast.assumes}",
    ]


def _format_table(base: str, table: "list[TableRow]") -> list[str]:
    lines = [
        *wrap(f"Largest micro_batch_size, batch 64 without hard negatives, {base}, 1536 visual tokens a page", 79),
        f"{'':8}{'guide':>9}   {'without checkpointing':>24}   {'with checkpointing':>24}",
    ]
    for memory, guide, row in table:
        cells = (f"{m:>9} at {peak:>6.1f} GiB" if m else f"{'none fits':>9}" for m, peak in row)
        lines.append(f"{memory:>5} GB{guide:>9}" + "".join(f"   {cell:>24}" for cell in cells))
    return [*lines, "predicted, not measured; 85 % of the card is used"]


def _parse_count(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 9 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
