r"""LoRA on ColIntern3_5: which modules are adapted, counted on the model that PEFT really wrapped.

PEFT does not interpret `*` in a list of targets: an entry that matches nothing is skipped without a message, and the
guide's list would adapt custom_text_proj alone (36,864 parameters). Here the targets are regular expressions, joined
into the one string that PEFT matches against whole module names, and the count is taken after wrapping.

The guide writes shell patterns, `language_model.layers.*.self_attn.q_proj`. As a regular expression that one happens to
match the same modules, since `.*` is any text; `layers.1*.self_attn` does not, since `1*` repeats the digit 1.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from textwrap import wrap
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from colintern.modeling.configuration_colintern import FROZEN_PARTS, HEAD, LANGUAGE_MODEL, PARTS
from colintern.modeling.modeling_colintern import suppress_load_warnings
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import Params

# Bytes. PEFT keeps LoRA weights in float32 whatever the base's format is; so are AdamW's moments and the head's file.
FLOAT32 = 4
GLOB, MISREAD_GLOB, REGEX = "as a glob", "not as a glob", "as a regular expression"
BRACE_RANGE = re.compile(r"\\?\{\d+(?:\.\.|\\\.\\\.)\d+\\?\}")  # {0..27}, which a shell understands


@dataclass(frozen=True)
class PatternReport:
    """What one of the lora_targets matches.

    `frozen` counts matches in tower and projector; `unfit` has a match that is not a linear layer, if there is one;
    `reads` is from `classify_pattern`, `instead` from `suggest_pattern`.
    """

    matches: int
    layers: list[int]
    frozen: int
    unfit: list[str]
    reads: str
    instead: str


@dataclass(frozen=True)
class PartReport:
    """Linear and adapted modules, parameters without LoRA's, and trained parameters of a part of the model."""

    linear: int
    adapted: int
    parameters: int
    trained: int


@dataclass(frozen=True)
class LoraReport:
    """What LoRA trains and what stays frozen, as `colintern verify --json` prints it.

    `total_parameters` are those of the base with its head. `frozen_*_modules` are linear modules without LoRA,
    `adapted_vision_modules` those of tower and projector with LoRA, which must be 0. `head` has the head's in and out
    sizes if it is adapted, `layers` counts the language model's layers. `adapter_bytes` are LoRA's weights and the head
    in both files, `optimizer_bytes` AdamW's two moments.
    """

    patterns: dict[str, PatternReport]
    lora_modules: int
    trainable_parameters: int
    total_parameters: int
    frozen_vision_modules: int
    frozen_projector_modules: int
    adapted_vision_modules: int
    head: list[int] | None
    layers: int
    parts: dict[str, PartReport]
    adapter_bytes: int
    optimizer_bytes: int


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
    with suppress_load_warnings():
        return get_peft_model(model, config)  # type: ignore[arg-type, return-value]


def report_lora_on_meta(model: ColIntern3_5, params: Params) -> LoraReport:
    """Wrap a model of `build_meta_model` as training would wrap it, and report on it.

    If PEFT would refuse the targets, the bare model is reported on, with nothing trained; `find_lora_errors` says why.
    """
    targets = params.lora_targets
    matches = [module for name, module in model.named_modules() if any(re.fullmatch(t, name) for t in targets)]
    if not matches or not all(isinstance(module, nn.Linear) for module in matches):
        return report_lora(model, targets)
    with torch.device("meta"):  # PEFT draws A on the CPU before it moves it to where its base layer is
        wrapped = add_lora(model, targets, params.lora_rank, params.lora_alpha, params.lora_dropout)
    return report_lora(wrapped, targets)


def report_lora(model: PeftModel | ColIntern3_5, targets: Sequence[str]) -> LoraReport:
    """Count what is trained and what is frozen."""
    wrapped = isinstance(model, PeftModel)
    core: Any = model.base_model.model if wrapped else model  # type: ignore[union-attr]
    modules = {name: module for name, module in core.named_modules() if ".lora_" not in name}
    linear = {n.removesuffix(".base_layer") for n, module in modules.items() if isinstance(module, nn.Linear)}
    adapted = {name for name, module in modules.items() if hasattr(module, "lora_A")}
    names = adapted if wrapped else {n for n in modules if any(re.fullmatch(target, n) for target in targets)}
    sizes = {name: p.numel() for name, p in core.named_parameters() if ".lora_" not in name}
    trained = {name: p.numel() for name, p in core.named_parameters() if wrapped and p.requires_grad}
    parts = {
        part: PartReport(
            linear=sum(name.startswith(part) for name in linear),
            adapted=sum(name.startswith(part) for name in adapted),
            parameters=sum(size for name, size in sizes.items() if name.startswith(part)),
            trained=sum(size for name, size in trained.items() if name.startswith(part)),
        )
        for part in PARTS
    }
    tower, projector = (parts[part] for part in FROZEN_PARTS)
    trainable = sum(trained.values())
    return LoraReport(
        patterns={target: _report_pattern(target, names, linear) for target in targets},
        lora_modules=len(adapted),
        trainable_parameters=trainable,
        total_parameters=sum(part.parameters for part in parts.values()),
        frozen_vision_modules=tower.linear - tower.adapted,
        frozen_projector_modules=projector.linear - projector.adapted,
        adapted_vision_modules=sum(name.startswith(FROZEN_PARTS) for name in adapted),
        head=[core.head.in_features, core.head.out_features] if HEAD in adapted else None,
        layers=len(_find_layers(linear)),
        parts=parts,
        adapter_bytes=FLOAT32 * (trainable + 2 * parts[HEAD].parameters),
        optimizer_bytes=2 * FLOAT32 * trainable,
    )


def _report_pattern(target: str, names: Collection[str], linear: Collection[str]) -> PatternReport:
    matches = [name for name in names if re.fullmatch(target, name)]
    return PatternReport(
        matches=len(matches),
        layers=_find_layers(matches),
        frozen=sum(name.startswith(FROZEN_PARTS) for name in matches),
        unfit=sorted(set(matches) - set(linear))[:1],
        reads=classify_pattern(target, linear),
        instead=suggest_pattern(target, [name for name in linear if not name.startswith(FROZEN_PARTS)]),
    )


def _find_layers(names: Iterable[str]) -> list[int]:
    return sorted({int(m[1]) for name in names if (m := re.match(rf"{LANGUAGE_MODEL}\.layers\.(\d+)\.", name))})


def find_lora_errors(report: LoraReport) -> list[str]:
    """Return what would make the training wrong, one sentence each with what to write instead."""
    errors = []
    for target, row in report.patterns.items():
        subject = f"lora_targets: {target} "
        if not row.matches:
            errors.append(f"{subject}matches no module; whole names are matched: write {row.instead}")
        elif row.unfit:
            errors.append(
                f"{subject}matches {row.unfit[0]}, which is no linear layer; end it with the name of one: "
                r"\.q_proj, not \.self_attn"
            )
        elif row.frozen:
            errors.append(
                f"{subject}hits {row.frozen} modules of the vision tower or projector, which stay frozen; begin it "
                rf"with {LANGUAGE_MODEL}\."
            )
        elif row.reads == MISREAD_GLOB:
            errors.append(
                f"{subject}matches {row.matches} modules and would match others as a shell pattern: `*` repeats "
                r"the character before it; write \d+ for the number of a layer and .* for any text"
            )
    if not any(re.fullmatch(target, HEAD) for target in report.patterns):
        errors.append(f"lora_targets: {HEAD} is not adapted; add {HEAD} to the list")
    if not report.trainable_parameters:
        errors.append("lora_targets: nothing is trained, 0 LoRA modules and 0 parameters")
    return errors


def find_lora_warnings(report: LoraReport) -> list[str]:
    """Return what is valid but may be unintended, one sentence each."""
    warnings = []
    for target, row in report.patterns.items():
        if row.reads == GLOB and not row.unfit:
            warnings.append(
                f"{target}: matches what the same shell pattern would, but is read as a regular expression, and PEFT "
                f"would skip it in a list; more exact: {row.instead}"
            )
        if 0 < len(row.layers) < report.layers:
            warnings.append(f"{target}: only layers {format_ranges(row.layers)} of 0-{report.layers - 1}")
    if report.trainable_parameters and not report.parts[LANGUAGE_MODEL].adapted:
        warnings.append("no module of the language model gets LoRA, only the head")
    return warnings


def format_ranges(numbers: Sequence[int]) -> str:
    """Format ascending integers: [0, 1, 2, 7] is "0-2, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def format_lora_report(base: str, report: LoraReport) -> str:
    """Format the guide's verification report with the warnings, at most 80 columns wide."""
    line = "=" * 80
    rows = [line, f"LORA TARGET MODULE VERIFICATION FOR {base}"[:80], line]
    for target, row in report.patterns.items():
        covers = f"layers {format_ranges(row.layers)}" if row.layers else ""
        if target == HEAD and report.head:
            covers = "Linear({} -> {})".format(*report.head)
        if len(target) > 47:
            rows.append(f"   {target}"[:80])
        name = "" if len(target) > 47 else target
        rows.append(f"{'ok' if row.matches else 'NO'} {name:<47} {row.matches:>2} found {covers}"[:80])
    rows += ["-" * 80, f"{'':<24}{'linear modules':>15}{'with LoRA':>11}{'parameters':>16}{'trained':>14}"]
    parts = report.parts.values()
    total = PartReport(
        linear=sum(part.linear for part in parts),
        adapted=sum(part.adapted for part in parts),
        parameters=report.total_parameters,
        trained=report.trainable_parameters,
    )
    for name, part in (report.parts | {"total": total}).items():
        trained = f"{part.trained:,}" if part.trained else "frozen"
        rows.append(f"{name:<24}{part.linear:>15}{part.adapted:>11}{part.parameters:>16,}{trained:>14}")
    rows += [
        "-" * 80,
        f"{report.lora_modules} modules get LoRA: {report.trainable_parameters:,} trainable parameters, "
        f"{report.trainable_parameters / report.total_parameters:.2%} of the model's",
        f"on disk {report.adapter_bytes / 1e6:,.1f} MB of adapter and head; in memory "
        f"{report.optimizer_bytes / 1e6:,.1f} MB of optimizer state",
    ]
    notes = (wrap(f"note: {warning}", 80, subsequent_indent="  ") for warning in find_lora_warnings(report))
    return "\n".join([*rows, *(row for note in notes for row in note)])


def match_names(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the names that a regular expression matches whole; none if it is not a valid one."""
    try:
        return {name for name in names if re.fullmatch(pattern, name)}
    except re.error:
        return set()


def classify_pattern(target: str, names: Iterable[str]) -> str:
    """Return `GLOB` if a shell pattern would match the same names, `MISREAD_GLOB` if others, else `REGEX`."""
    names = set(names)
    globbed = {name for name in names if fnmatchcase(name, target)}
    if "*" not in target or re.search(r"[\\()|+^$]", target) or not globbed:
        return REGEX
    return GLOB if globbed == match_names(target, names) else MISREAD_GLOB


def suggest_pattern(target: str, names: Iterable[str]) -> str:
    """Return the pattern that the target probably means.

    It is read without its range, as a glob, or below the language model; else the most similar name is taken.
    """
    names = sorted(names)
    plain = re.sub(r"^\^?(?:model\\?\.)?", "", target)
    ranged = BRACE_RANGE.sub(lambda _: r"\d+", plain)
    globbed = re.sub(r"(?<![.\])])\*", ".*", ranged)
    for prefix in ("", rf"{LANGUAGE_MODEL}\.", rf"{LANGUAGE_MODEL}\..*\."):
        for body in (plain, ranged, globbed):
            if matches := match_names(prefix + body, names):
                exact = {_match_every_layer(name) for name in matches}
                return exact.pop() if len(exact) == 1 else prefix + body
    readable = {re.sub(r"\.\d+\.", ".0.", name): _match_every_layer(name) for name in names}
    wanted = re.sub(r"\\d\+?|\.?\*", "0", ranged).replace("\\", "")
    [nearest] = get_close_matches(wanted, readable, n=1, cutoff=0.0)
    return readable[nearest]


def _match_every_layer(name: str) -> str:
    """Return the regular expression for a module in every layer."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
