"""Statistics of an adapter's weights, by which it can be told whether they were trained.

LoRA's B starts at zero and its A at random, over a head that stays as it was drawn: so B tells whether anything was
trained, and the head's hash whether it is still the one it was trained with. The guide's test, a standard deviation
"far from 0.02", tells neither: it looks at one matrix, and at a number that neither head nor adapter starts with.
"""

import hashlib
import re
from typing import Any

import torch

from colintern.modeling.adapter_files import HEAD_KEYS, State


def statistics(adapter: State, head: State) -> dict[str, dict[str, Any]]:
    """Of like modules of all layers together, of each of lora_A and lora_B, and of the head's weight.

    Args:
        adapter: as PEFT saves it, `base_model.model.<module>.lora_A.weight` and so on; what is not LoRA's is left out.
        head: as head.safetensors has it.

    Returns:
        {"<module, * for its layer> lora_A": {"tensors", "std", "sha256"}, ..., "head": {...}}.
    """
    groups: dict[str, State] = {"head": {key: head[key] for key in HEAD_KEYS}}
    for name, value in adapter.items():
        if ".lora_" not in name:  # the copy of the head's base weights
            continue
        groups.setdefault(group(name), {})[name] = value
    return {name: _row(members) for name, members in sorted(groups.items())}


def group(name: str) -> str:
    """The group of a tensor of an adapter."""
    module, kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix("base_model.model.")).rsplit(".lora_", 1)
    return f"{module} lora_{kind.removesuffix('.weight')}"


def _row(members: State) -> dict[str, Any]:
    digest = hashlib.sha256()
    values = [members[name].detach().float().cpu().contiguous() for name in sorted(members)]
    for value in values:
        digest.update(value.numpy().tobytes())
    std = torch.cat([value.flatten() for value in values]).double().std().item()
    return {"tensors": len(values), "std": float(f"{std:.6g}"), "sha256": digest.hexdigest()[:16]}
