"""LoRA on ColIntern3_5: which modules are adapted, counted on the model that PEFT really wrapped.

A list of targets does not understand `*` in PEFT: an entry that matches nothing is skipped without a word, and the
guide's list would adapt custom_text_proj alone (36,864 parameters). Here the targets are regular expressions, joined
into the one string that PEFT matches against whole module names, and the count is taken after wrapping.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import InternVLConfig

from colintern.model import ColIntern3_5, quiet

HEAD = "custom_text_proj"
FROZEN = ("vision_tower", "multi_modal_projector")


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


def meta_model(base: str, revision: str | None) -> ColIntern3_5:
    """The architecture of `base` without memory or weights, from its config.json alone."""
    config = InternVLConfig.from_pretrained(base, revision=revision or "main")
    with torch.device("meta"):
        return ColIntern3_5(config)


def count(wrapped: PeftModel, targets: Sequence[str]) -> dict[str, Any]:
    """What is trained and what is frozen.

    Returns:
        `patterns` (per target: matches, layers), `lora_modules`, `trainable_parameters`, `total_parameters` (those
        of the base model with its head), `frozen_vision_modules`, `frozen_projector_modules` (linear modules left
        alone), `adapted_vision_modules` (of tower and projector; must be 0), `head` (its in and out sizes).
    """
    model = wrapped.base_model.model
    adapted = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    lora = sum(p.numel() for name, p in wrapped.named_parameters() if ".lora_" in name)
    patterns = {}
    for target in targets:
        matches = [name for name in adapted if re.fullmatch(target, name)]
        layers = sorted({int(m[1]) for name in matches if (m := re.search(r"\.layers\.(\d+)\.", name))})
        patterns[target] = {"matches": len(matches), "layers": layers}
    frozen = [sum(name.startswith(part) for name in set(linear) - set(adapted)) for part in FROZEN]
    head = model.custom_text_proj
    return {
        "patterns": patterns,
        "lora_modules": len(adapted),
        "trainable_parameters": trainable,
        "total_parameters": sum(p.numel() for p in wrapped.parameters()) - lora,
        "frozen_vision_modules": frozen[0],
        "frozen_projector_modules": frozen[1],
        "adapted_vision_modules": sum(name.startswith(FROZEN) for name in adapted),
        "head": [head.in_features, head.out_features] if HEAD in adapted else None,
    }


def faults(counts: dict[str, Any]) -> list[str]:
    """What would make the training wrong, one sentence each with what to write instead; empty when all is well."""
    found = [
        f"lora_targets: {target!r} matches no module; whole names are matched, such as "
        r"language_model\.layers\.\d+\.self_attn\.q_proj"
        for target, row in counts["patterns"].items()
        if not row["matches"]
    ]
    if counts["head"] is None:
        found.append(f"lora_targets: {HEAD} is not adapted; add {HEAD} to the list")
    if counts["adapted_vision_modules"]:
        found.append(
            f"lora_targets: {counts['adapted_vision_modules']} modules of the vision tower or projector are hit, "
            r"which stay frozen; begin the patterns with language_model\."
        )
    if not counts["trainable_parameters"]:
        found.append("lora_targets: nothing is trained")
    return found


def table(base: str, counts: dict[str, Any]) -> str:
    """The guide's verification table, at most 80 columns wide."""
    line = "=" * 80
    rows = [line, f"LoRA target verification: {base}"[:80], line]
    for target, row in counts["patterns"].items():
        layers = row["layers"]
        whole = layers == list(range(len(layers)))
        covers = (f"layers 0-{layers[-1]}" if whole else f"layers {layers}") if layers else ""
        if target == HEAD and counts["head"]:
            covers = "Linear({} -> {})".format(*counts["head"])
        rows.append(f"{'ok ' if row['matches'] else 'NO '} {target:<48} {row['matches']:>4}  {covers}"[:80])
    tower, projector = counts["frozen_vision_modules"], counts["frozen_projector_modules"]
    share = counts["trainable_parameters"] / counts["total_parameters"]
    rows += [
        "-" * 80,
        f"trained: {counts['lora_modules']} LoRA modules, {counts['trainable_parameters']:,} parameters "
        f"({share:.2%} of {counts['total_parameters']:,})",
        f"frozen:  vision tower {tower} and projector {projector} linear modules, and the rest",
    ]
    return "\n".join(rows)
