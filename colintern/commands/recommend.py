"""`colintern recommend`: settings for a base and a GPU, and what a step will cost."""

import argparse
import json
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from colintern.core.errors import UserError
from colintern.core.rules import parse_mixture
from colintern.core.terminal import print_phase
from colintern.params import Params, load_params, update_params
from colintern.storage.paths import require_base

if TYPE_CHECKING:
    from colintern.planning.recommend import Plan, Value

SUMMARY = "recommend settings for a base and a GPU, and predict memory and time"
EXAMPLE = "colintern recommend --base internvl3_5-1b --gpu rtx-5090"
PARAMS, SURVEY = Path("params.yaml"), Path("data/survey.json")
COLPALI = "vidore/colpali_train_set", 118_195, 39_239 + 11_214  # its pairs, its pages with those of ViDoRe v1 and v2
CARD = "rtx-5090"  # what the guide recommends


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--base", metavar="BASE", help="a folder, ID@COMMIT, or internvl3_5-1b, -2b, -4b, -8b (default: params.yaml's)")
    add("--gpu", metavar="NAME", help="the card, such as a100-80gb (default: the one here, else rtx-5090)")
    add("--gpu-memory", metavar="GB", help="its memory, or `auto`: that of the GPU here (default: that of --gpu)")
    add("--rows", type=_whole, metavar="N", help="training pairs (default: data/survey.json's, or ColPali's)")
    add("--pages", type=_whole, metavar="N", help="pages, those of evaluation among them (default: as for --rows)")
    add("--table", action="store_true", help="the guide's table of batch sizes beside the computed one, and no more")
    add("--write", action="store_true", help="write the values into params.yaml")
    add("--json", action="store_true", help="all of it as JSON")


def run(args: argparse.Namespace) -> None:
    params = load_params(PARAMS)
    base = args.base or params.base
    if args.write and (not _same(base, params) or args.table):
        what = "--table recommends nothing" if args.table else f"{PARAMS} is for base {params.base}, not {base}"
        raise UserError(f"--write: {what}; see `colintern recipe` for another base")
    require_base(base, params)
    data, rows, pages = _data(args, params)
    memory = _memory(args.gpu_memory)
    print_phase(f"recommend: counting memory and operations of a training step of {base}")
    import torch

    from colintern.modeling.configuration_colintern import load_base_config
    from colintern.monitoring import guide
    from colintern.planning import recommend as rules
    from colintern.planning.costs import Costs, parameters
    from colintern.planning.gpus import GPUS

    card, memory = _card(args.gpu, memory)
    architecture = load_base_config(base, params)
    size, query = parameters(architecture), params.max_query_tokens
    known = size >= guide.MIN_GUIDE_PARAMETERS
    dtype, dropout = (rules.DTYPE, rules.DROPOUT) if known else (params.dtype, params.lora_dropout)
    rank = guide.get_optimal_rank(size) if known else params.lora_rank
    costs = Costs(architecture, getattr(torch, dtype), params.lora_targets, rank, dropout)
    head = {"base": base, "parameters": size, "trained": costs.trained, "gpu": card, "gpu_memory_gb": memory}
    if args.table:
        table = list(rules.memory_table(costs, query))
        print(
            json.dumps(head | {"table": table}, allow_nan=False) if args.json else "\n".join(_memory_table(base, table))
        )
        return
    batch, tokens = (
        (guide.MIN_BATCH_SIZE, rules.VISUAL_TOKENS) if known else (params.batch_size, (params.max_visual_tokens,))
    )
    gpu = GPUS[card] if card else rules.nearest(memory)
    found = rules.plan(costs, memory, gpu, batch, tokens, query, params.negatives)
    values = list(rules.recommend(costs, found, memory, rows, pages))
    epochs = guide.MIN_EPOCHS if known else params.epochs
    forecast = rules.forecast(costs, found, gpu if card else None, rows // batch * epochs, pages)
    head |= {"data": data, "rows": rows, "pages": pages, "negatives": params.negatives}
    if args.json:
        print(json.dumps(head | {"values": [value._asdict() for value in values], "predicted": forecast}, indent=2))
    else:
        print("\n".join([*_head(head), "", *_table(values), "", *_forecast(found, forecast, card)]))
    if args.write:
        changed = update_params(PARAMS, {value.key: value.value for value in values if value.value is not None})
        if not args.json:
            print(f"\n{PARAMS}: " + (", ".join(changed) + " written" if changed else "has these values already"))


def _same(base: str, params: Params) -> bool:
    """Whether it is the base of params.yaml: internvl3_5-1b is OpenGVLab/InternVL3_5-1B-HF."""
    return base == params.base or f"opengvlab/{base}-hf" == params.base.lower()


def _data(args: argparse.Namespace, params: Params) -> tuple[str, int, int]:
    """Where the numbers of pairs and pages come from, and the numbers."""
    names = [name for name, _ in parse_mixture(params.train_data)]
    own = json.loads(SURVEY.read_text(encoding="utf-8")) if SURVEY.is_file() else {}
    if args.rows and args.pages:
        return "--rows, --pages", args.rows, args.pages
    if (args.base and not _same(args.base, params)) or names == [COLPALI[0]]:
        origin, rows, pages = COLPALI
    elif all(f"{name} (train)" in own for name in names):
        weights = dict(parse_mixture(params.train_data))
        rows = sum(own[f"{name} (train)"]["rows"] * weights[name] for name in names)
        origin, pages = str(SURVEY), sum(facts["pages"] for facts in own.values())
    else:
        raise UserError(f"--rows, --pages: {SURVEY} does not know {params.train_data}; give both, or run `dvc repro`")
    return origin, args.rows or rows, args.pages or pages


def _memory(text: str | None) -> float | None:
    """Of --gpu-memory in GB; None where it does not say."""
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


def _card(name: str | None, memory: float | None) -> tuple[str | None, float]:
    """The card to predict times for, None where only its memory is known, and the memory in GB."""
    import torch

    from colintern.planning.gpus import GPUS, find

    if name is None and torch.cuda.is_available():
        memory = memory or _memory("auto")
        try:
            return find(torch.cuda.get_device_name(0)), memory or 0.0
        except UserError:  # a card whose data sheet is not in the table: no times
            return None, memory or 0.0
    if name is None and memory is not None:
        return None, memory
    card = find(name or CARD)
    return card, memory or GPUS[card].memory


def _head(head: dict[str, Any]) -> list[str]:
    gpu = head["gpu"] or "not named"
    data = f"{head['rows']:,} pairs"
    if head["negatives"]:
        data += f" with {head['negatives']} hard negatives each"
    size = f"{head['parameters'] / 1e6:,.1f} M parameters, {head['trained'] / 1e6:,.1f} M trained"
    return [
        *wrap(f"base  {head['base']}: {size}", 79, subsequent_indent=" " * 6),
        f"GPU   {gpu}, {head['gpu_memory_gb']:g} GB",
        *wrap(f"data  {data}, {head['pages']:,} pages ({head['data']})", 79, subsequent_indent=" " * 6),
    ]


def _table(values: "list[Value]") -> list[str]:
    kept = [value for value in values if value.value is None]
    lines = [*wrap(f"{', '.join(v.key for v in kept)}: as they are. {kept[0].reason}", 79), ""] if kept else []
    for value in (value for value in values if value not in kept):
        first, *more = wrap(value.reason, 37)
        lines.append(f"{value.key:<23}{_yaml(value.value):<10}{value.source:<10}{first}")
        lines += [f"{'':43}{line}" for line in more]
    return lines


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _forecast(found: "Plan", forecast: dict[str, Any], card: str | None) -> list[str]:
    unit, size = ("GiB", 2**30) if found.step.peak > 2**30 else ("MiB", 2**20)
    rows = found.step.memory | {"peak of a step": found.step.peak}
    lines = [
        "predicted, not measured:",
        *(f"  {what:<22}{number / size:>7.2f} {unit}" for what, number in rows.items()),
        f"  {'operations a step':<22}{forecast['operations'] / 1e12:>7.1f} x 10^12",
    ]
    if not card:
        return [*lines, "  no times: name a card with --gpu"]
    return [
        *lines,
        f"  {'time of a step':<22}{forecast['seconds_per_step']:>7.2f} s on {card}",
        f"  {'all ' + format(forecast['steps'], ',') + ' steps':<22}{forecast['training_hours']:>7.1f} h",
        f"  {'page features, once':<22}{forecast['feature_hours']:>7.1f} h",
        f"  {forecast['assumes']}",
    ]


def _memory_table(base: str, table: list[Any]) -> list[str]:
    lines = [
        *wrap(f"Largest micro_batch_size, batch 64 without hard negatives, {base}, 1536 visual tokens a page", 79),
        f"{'':8}{'guide':>9}   {'without checkpointing':>24}   {'with checkpointing':>24}",
    ]
    for memory, guide, row in table:
        cells = (f"{m:>9} at {peak:>6.1f} GiB" if m else f"{'none fits':>9}" for m, peak in row)
        lines.append(f"{memory:>5} GB{guide:>9}" + "".join(f"   {cell:>24}" for cell in cells))
    return [*lines, "predicted, not measured; 85 % of the card is used"]


def _whole(text: str) -> int:
    if not (text.isdecimal() and len(text) <= 9 and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)
