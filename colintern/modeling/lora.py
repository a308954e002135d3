"""LoRA on ColIntern3_5: which modules are adapted, counted on the model that PEFT really wrapped.

A list of targets does not understand `*` in PEFT: an entry that matches nothing is skipped without a word, and the
guide's list would adapt custom_text_proj alone (36,864 parameters). Here the targets are regular expressions, joined
into the one string that PEFT matches against whole module names, and the count is taken after wrapping.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from textwrap import wrap
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from colintern.modeling.modeling_colintern import ColIntern3_5, quiet
from colintern.modeling.patterns import reading, suggestion
from colintern.params import Params

HEAD = "custom_text_proj"
FROZEN = ("vision_tower", "multi_modal_projector")
PARTS = ("language_model", HEAD, *FROZEN)
# Bytes. PEFT keeps LoRA weights in float32 whatever the base's format is; so are AdamW's moments and the head's file.
FLOAT32 = 4


def add_lora(
    model: ColIntern3_5, targets: Sequence[str], rank: int, alpha: int, dropout: float, revision: str | None = None
) -> PeftModel:
    """Wrap `model`: LoRA of `rank` on every module whose whole name one of the `targets` matches.

    The adapter names the base it belongs to: `model.name_or_path`, and its hub commit `revision`.

    Raises:
        ValueError: no module matches at all (PEFT's own error).
    """
    pattern = "|".join(f"(?:{target})" for target in targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=pattern, revision=revision)
    with quiet():
        return get_peft_model(model, config)  # type: ignore[arg-type, return-value]


def examine(model: ColIntern3_5, params: Params) -> dict[str, Any]:
    """Wrap a `meta_model` as training would wrap it, and count; see `count`.

    Where PEFT would refuse the targets, the bare model is counted, with nothing trained; `faults` says why.
    """
    hit = [module for name, module in model.named_modules() if any(re.fullmatch(t, name) for t in params.lora_targets)]
    if not hit or not all(isinstance(module, nn.Linear) for module in hit):
        return count(model, params.lora_targets)
    with torch.device("meta"):  # PEFT draws A on the CPU before it moves it to where its base layer is
        wrapped = add_lora(model, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
    return count(wrapped, params.lora_targets)


def count(model: PeftModel | ColIntern3_5, targets: Sequence[str]) -> dict[str, Any]:
    """What is trained and what is frozen.

    Returns:
        `patterns` (per target `matches`; `layers`; `frozen`: matches in tower and projector; `unfit`: a match that is
        no linear layer; `reads` and `instead`: see patterns.py), `lora_modules`, `trainable_parameters`,
        `total_parameters` (those of the base model with its head), `frozen_vision_modules`,
        `frozen_projector_modules` (linear modules left alone), `adapted_vision_modules` (of tower and projector; must
        be 0), `head` (its in and out sizes), `layers` (of the language model), `parts` (linear and adapted modules,
        parameters and trained parameters of each), and in bytes `adapter_bytes` (LoRA weights, and the head
        in both files) and `optimizer_bytes` (AdamW's two moments).
    """
    wrapped = isinstance(model, PeftModel)
    core: Any = model.base_model.model if wrapped else model  # type: ignore[union-attr]
    modules = {name: module for name, module in core.named_modules() if ".lora_" not in name}
    linear = {n.removesuffix(".base_layer") for n, module in modules.items() if isinstance(module, nn.Linear)}
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    names = adapted if wrapped else {n for n in modules if any(re.fullmatch(target, n) for target in targets)}
    lora = {name: p for name, p in core.named_parameters() if ".lora_" in name}
    trained = {name: p for name, p in core.named_parameters() if wrapped and p.requires_grad}
    parts = {}
    for part in PARTS:
        own = [p.numel() for name, p in core.named_parameters() if name.startswith(part) and name not in lora]
        parts[part] = {
            "linear": sum(name.startswith(part) for name in linear),
            "adapted": sum(name.startswith(part) for name in adapted),
            "parameters": sum(own),
            "trained": sum(p.numel() for name, p in trained.items() if name.startswith(part)),
        }
    trainable = sum(p.numel() for p in trained.values())
    head = core.custom_text_proj
    return {
        "patterns": {target: _pattern(target, names, linear) for target in targets},
        "lora_modules": len(adapted),
        "trainable_parameters": trainable,
        "total_parameters": sum(row["parameters"] for row in parts.values()),
        "frozen_vision_modules": parts[FROZEN[0]]["linear"] - parts[FROZEN[0]]["adapted"],
        "frozen_projector_modules": parts[FROZEN[1]]["linear"] - parts[FROZEN[1]]["adapted"],
        "adapted_vision_modules": sum(name.startswith(FROZEN) for name in adapted),
        "head": [head.in_features, head.out_features] if HEAD in adapted else None,
        "layers": len(_layers(linear)),
        "parts": parts,
        "adapter_bytes": FLOAT32 * (trainable + 2 * parts[HEAD]["parameters"]),
        "optimizer_bytes": 2 * FLOAT32 * trainable,
    }


def _pattern(target: str, names: Collection[str], linear: Collection[str]) -> dict[str, Any]:
    matches = [name for name in names if re.fullmatch(target, name)]
    return {
        "matches": len(matches),
        "layers": _layers(matches),
        "frozen": sum(name.startswith(FROZEN) for name in matches),
        "unfit": sorted(set(matches) - set(linear))[:1],
        "reads": reading(target, linear),
        "instead": suggestion(target, [name for name in linear if not name.startswith(FROZEN)]),
    }


def _layers(names: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in names if (m := re.match(r"language_model\.layers\.(\d+)\.", name))})


def faults(counts: dict[str, Any]) -> list[str]:
    """What would make the training wrong, one sentence each with what to write instead; empty when all is well."""
    found = []
    for target, row in counts["patterns"].items():
        what = f"lora_targets: {target} "
        if not row["matches"]:
            found.append(f"{what}matches no module; whole names are matched: write {row['instead']}")
        elif row["unfit"]:
            found.append(
                f"{what}matches {row['unfit'][0]}, which is no linear layer; end it with the name of one: "
                r"\.q_proj, not \.self_attn"
            )
        elif row["frozen"]:
            found.append(
                f"{what}hits {row['frozen']} modules of the vision tower or projector, which stay frozen; begin it "
                r"with language_model\."
            )
        elif row["reads"] == "not as a glob":
            found.append(
                f"{what}matches {row['matches']} modules and would match others as a shell's pattern: `*` repeats "
                rf"what stands before it; write \d+ for a layer's number and .* for any text"
            )
    if not any(re.fullmatch(target, HEAD) for target in counts["patterns"]):
        found.append(f"lora_targets: {HEAD} is not adapted; add {HEAD} to the list")
    if not counts["trainable_parameters"]:
        found.append("lora_targets: nothing is trained, 0 LoRA modules and 0 parameters")
    return found


def notes(counts: dict[str, Any]) -> list[str]:
    """What is not wrong but may surprise, one sentence each."""
    found = []
    for target, row in counts["patterns"].items():
        if row["reads"] == "as a glob" and not row["unfit"]:
            found.append(
                f"{target}: does what the same shell's pattern would, but is read as a regular expression, and PEFT "
                f"would skip it in a list; more exact: {row['instead']}"
            )
        if 0 < len(row["layers"]) < counts["layers"]:
            found.append(f"{target}: only layers {ranges(row['layers'])} of 0-{counts['layers'] - 1}")
    if counts["trainable_parameters"] and not counts["parts"]["language_model"]["adapted"]:
        found.append("no module of the language model gets LoRA, only the head")
    return found


def ranges(numbers: Sequence[int]) -> str:
    """Rising whole numbers as text: [0, 1, 2, 7] is "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def table(base: str, counts: dict[str, Any]) -> str:
    """The guide's verification report with the `notes`, at most 80 columns wide."""
    line = "=" * 80
    rows = [line, f"LORA TARGET MODULE VERIFICATION FOR {base}"[:80], line]
    for target, row in counts["patterns"].items():
        covers = f"layers {ranges(row['layers'])}" if row["layers"] else ""
        if target == HEAD and counts["head"]:
            covers = "Linear({} -> {})".format(*counts["head"])
        if len(target) > 47:
            rows.append(f"   {target}"[:80])
        name = "" if len(target) > 47 else target
        rows.append(f"{'ok' if row['matches'] else 'NO'} {name:<47} {row['matches']:>2} found {covers}"[:80])
    rows += ["-" * 80, f"{'':<24}{'linear modules':>15}{'with LoRA':>11}{'parameters':>16}{'trained':>14}"]
    total = {key: sum(row[key] for row in counts["parts"].values()) for key in ("linear", "adapted", "parameters")}
    total |= {"trained": counts["trainable_parameters"]}
    for name, row in (counts["parts"] | {"total": total}).items():
        trained = f"{row['trained']:,}" if row["trained"] else "frozen"
        rows.append(f"{name:<24}{row['linear']:>15}{row['adapted']:>11}{row['parameters']:>16,}{trained:>14}")
    rows += [
        "-" * 80,
        f"{counts['lora_modules']} modules get LoRA: {counts['trainable_parameters']:,} trainable parameters, "
        f"{counts['trainable_parameters'] / counts['total_parameters']:.2%} of the model's",
        f"on disk {counts['adapter_bytes'] / 1e6:,.1f} MB of adapter and head; in memory "
        f"{counts['optimizer_bytes'] / 1e6:,.1f} MB of optimizer state",
    ]
    rows += [part for note in notes(counts) for part in wrap(f"note: {note}", 80, subsequent_indent="  ")]
    return "\n".join(rows)
