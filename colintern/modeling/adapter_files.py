"""The files of an adapter folder: read them, validate them (`find_faults`), describe their weights, write them."""

import copy
import hashlib
import os
import re
import reprlib
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from colintern.core.errors import UserError
from colintern.modeling.configuration_colintern import HEAD, HEAD_KEYS
from colintern.modeling.modeling_colintern import shorten_names
from colintern.params import is_on_hub
from colintern.storage.files import read_json_object, require_regular_file
from colintern.storage.paths import ADAPTER

WEIGHTS_FILE, CONFIG_FILE = ADAPTER
HEAD_FILE = "head.safetensors"
PREFIX = "base_model.model."  # of every tensor that PEFT saves
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_CPU_SECONDS = 20.0  # for matching the patterns of a configuration
MAX_ALPHA = 1e6  # scales every vector that LoRA adds

ADAPTER_README = """\
---
{base_model}library_name: peft
pipeline_tag: visual-document-retrieval
tags: [colpali, late-interaction, lora, multi-vector]
---

# ColIntern3.5 adapter

LoRA of rank {rank} (alpha {alpha:g}) on `{base}`{at_revision}, for visual document retrieval: a page image and a query
each become many 128-d vectors, scored by MaxSim. A page has at most {max_visual_tokens} visual tokens (tiling:
{tiling}), a query at most {max_query_tokens} tokens.

With colintern (`colintern evaluate` and `colintern search --model` take this folder too). If the base is a local
folder, its path is relative to the current working directory:

```python
from colintern import ColIntern3_5, ColIntern3_5Processor

folder = "."  # the folder of this README
model = ColIntern3_5.from_pretrained(folder)
processor = ColIntern3_5Processor.from_pretrained(folder)
```

With plain PEFT:

```python
from colintern import ColIntern3_5
from peft import PeftModel

folder = "."  # the folder of this README
base = ColIntern3_5.from_pretrained({base!r}{revision_argument})
model = PeftModel.from_pretrained(base, folder).eval()
```

The base model has no projection head, so `from_pretrained` initializes one randomly. The head that this adapter was
trained with is in `adapter_model.safetensors` as `base_model.model.custom_text_proj.base_layer.*`, where PEFT finds it,
and again in `head.safetensors`.

The adapter is derived from `{base}`, whose license applies to it.
"""

State = dict[str, Tensor]


class AdapterFiles(NamedTuple):
    """Content of an adapter folder.

    `weights`: adapter_model.safetensors. `head`: the head's base weights, from head.safetensors where there is one.
    """

    folder: Path
    config: LoraConfig
    weights: State
    head: State


class AdapterFault(NamedTuple):
    """An error in an adapter; `check` is the name of the `colintern check-adapter` check that reports it."""

    check: str
    file: str
    message: str


class WeightStats(TypedDict):
    """Number, standard deviation and sha256 (16 hex digits) of a group of tensors, as identity.json has them."""

    tensors: int
    std: float
    sha256: str


def is_adapter(folder: Path) -> bool:
    """Return whether a folder has an adapter_config.json, even a damaged one."""
    return os.path.lexists(folder / CONFIG_FILE)


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read the configuration and the weights of an adapter.

    Raises:
        UserError: a file is missing or damaged.
    """
    config = read_adapter_config(folder)
    weights = read_tensors(folder / WEIGHTS_FILE)
    return AdapterFiles(folder, config, weights, _read_head(folder, weights))


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        UserError: the file is damaged, is not a LoRA configuration or names no base model.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file)
    for key, is_valid, words in (
        ("peft_type", lambda value: value == "LORA", "LORA"),
        ("base_model_name_or_path", lambda value: isinstance(value, str) and value.strip(), "a folder or a hub id"),
        ("revision", lambda value: value is None or isinstance(value, str), "a hub commit or null"),
        ("lora_alpha", _is_alpha, f"a number above 0 and at most {MAX_ALPHA:g}"),
        (
            "alpha_pattern",
            lambda value: value is None or (isinstance(value, dict) and all(map(_is_alpha, value.values()))),
            f"an object of names with numbers above 0 and at most {MAX_ALPHA:g}",
        ),
        ("alora_invocation_tokens", lambda value: not value, "null: activated LoRA (aLoRA) is not supported"),
    ):
        if not is_valid(content.get(key)):
            raise UserError(f"{file}: {key}: {reprlib.repr(content.get(key))} is not valid; it must be {words}")
    try:
        config: Any = PeftConfig.from_peft_type(**content)
    except Exception as error:  # whatever a wrong value leads to in PEFT
        raise UserError(f"{file}: {describe_error(error)}") from error
    config.task_type = None  # PEFT's class for a task adds methods that this model has no use for
    return config


def _is_alpha(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and 0 < value <= MAX_ALPHA


def read_tensors(file: Path) -> State:
    """Read a safetensors file.

    Raises:
        UserError: it is not a regular file, or not a safetensors file.
    """
    require_regular_file(file)
    try:
        return load_file(file)
    except Exception as error:  # SafetensorError, OSError, and what a type that torch lacks raises
        raise UserError(f"{file}: cannot be read: {error}") from error


def _read_head(folder: Path, weights: State) -> State:
    file = folder / HEAD_FILE
    if os.path.lexists(file):
        head = read_tensors(file)
    elif all(PREFIX + key in weights for key in HEAD_KEYS):  # PEFT's modules_to_save: the whole head as it was trained
        head = {key: weights[PREFIX + key] for key in HEAD_KEYS}
    else:
        raise UserError(
            f"{file}: missing. It contains the base weights of {HEAD}; without them the adapter would be "
            f"applied to a randomly initialized projection. Copy it from the run that trained {folder}"
        )
    if sorted(head) != sorted(HEAD_KEYS):
        names = f"{shorten_names(sorted(head))}, expected {shorten_names(sorted(HEAD_KEYS))}"
        raise UserError(f"{file}: contains {names}; copy it again from the training run")
    return head


def name_head_copy(key: str, has_lora: bool) -> str:
    """Return the name under which plain PEFT finds one of the head's base weights in adapter_model.safetensors."""
    return PREFIX + (key.replace(".", ".base_layer.") if has_lora else key)


def validate_adapter(files: AdapterFiles, base: nn.Module | None) -> None:
    """Raise UserError for the first error that `find_faults` yields."""
    for fault in find_faults(files, base):
        raise UserError(f"{files.folder / fault.file}: {fault.message}")


def find_faults(files: AdapterFiles, base: nn.Module | None) -> Iterator[AdapterFault]:
    """Yield an adapter's errors: shapes and names, data types, non-finite values, untrained weights, head.

    Args:
        files: see `read_adapter_files`.
        base: its base on the meta device, see `retriever.build_meta_model`; PEFT changes it. None if unknown:
            names and shapes are not checked.

    Raises:
        UserError: PEFT cannot apply the adapter's configuration to this base, or takes too long to match names.
    """
    if base is not None:
        if message := _find_shape_fault(files.head, {key: base.get_parameter(key).shape for key in HEAD_KEYS}):
            yield AdapterFault("whole", HEAD_FILE, message)
        if message := _find_name_fault(files, _expect_shapes(files, base)):
            yield AdapterFault("whole", WEIGHTS_FILE, message)
    tensors = [(WEIGHTS_FILE, *item) for item in sorted(files.weights.items())]
    tensors += [(HEAD_FILE, *item) for item in sorted(files.head.items())]
    for file, name, value in tensors:
        if value.dtype not in FLOATS:
            kind = str(value.dtype).removeprefix("torch.")
            yield AdapterFault("whole", file, f"{name} is {kind}; expected float32, bfloat16 or float16")
            return  # the checks below compute with the values
    broken = [(file, name) for file, name, value in tensors if not value.float().isfinite().all()]
    if broken:
        file, name = broken[0]
        yield AdapterFault(
            "finite", file, f"{name} has NaN or infinite values ({len(broken)} such tensors); use another checkpoint"
        )
    if message := _find_untrained(files.weights):
        yield AdapterFault("trained", WEIGHTS_FILE, message)
    if message := _find_head_fault(files):
        yield AdapterFault("head", HEAD_FILE, message)


def _expect_shapes(files: AdapterFiles, base: nn.Module) -> dict[str, torch.Size]:
    """Return the names and shapes of the tensors that PEFT would save for an adapter of this configuration."""
    config, file = copy.deepcopy(files.config), files.folder / CONFIG_FILE
    hint = "remove nested quantifiers such as (a+)+ from its regular expressions"
    too_slow = f"{file}: PEFT needs more than {MAX_CPU_SECONDS:g} s to match its patterns against module names; {hint}"
    try:
        with _limit_cpu_time(MAX_CPU_SECONDS, too_slow), torch.device("meta"), warnings.catch_warnings(action="ignore"):
            wrapped = PeftModel(base, config)  # type: ignore[arg-type]
            state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    except UserError:
        raise
    except Exception as error:  # PEFT checks few values of a configuration
        raise UserError(f"{file}: cannot be applied to its base: {describe_error(error)}") from error
    return {name: value.shape for name, value in state.items()}


def _find_name_fault(files: AdapterFiles, expected: dict[str, torch.Size]) -> str:
    if not files.weights:
        return f"contains no weights, but {CONFIG_FILE} implies {len(expected)}; copy both files from the same run"
    has_lora = f"{PREFIX}{HEAD}.lora_A.weight" in expected
    copies = {name_head_copy(key, has_lora): value.shape for key, value in files.head.items()}
    if copies.keys() & files.weights.keys():  # older adapters have no copy of the head
        expected = expected | copies
    parts = []
    if missing := sorted(expected.keys() - files.weights.keys()):
        parts.append(f"lacks {shorten_names(missing)}")
    if unexpected := sorted(files.weights.keys() - expected.keys()):
        parts.append(f"has unexpected {shorten_names(unexpected)}")
    if shape := _find_shape_fault(files.weights, expected):
        parts.append(shape)
    hint = "use both files of one run, with its base"
    return f"does not match {CONFIG_FILE} on this base: {'; '.join(parts)}; {hint}" if parts else ""


def _find_shape_fault(tensors: State, expected: dict[str, torch.Size]) -> str:
    for name in sorted(tensors.keys() & expected.keys()):
        if tensors[name].shape != expected[name]:
            return f"{name} has the shape {tuple(tensors[name].shape)}; expected {tuple(expected[name])}"
    return ""


def _find_untrained(weights: State) -> str:
    """Describe the LoRA matrices that are zero, "" if there is none: training starts with B at zero and A at random."""
    for kind, effect in (
        ("lora_B", "as before the first step: nothing was learned there"),
        ("lora_A", "so the adapter has no effect there"),
    ):
        matrices = {name: value for name, value in weights.items() if f".{kind}" in name}
        if zero := [name for name, value in matrices.items() if not value.any()]:
            some = f"{len(zero)} of {len(matrices)} {kind}, such as {zero[0]},"
            which = f"every {kind}" if len(zero) == len(matrices) else some
            return f"{which} is zero, {effect}; give an adapter that was trained"
    return ""


def _find_head_fault(files: AdapterFiles) -> str:
    for key, value in files.head.items():
        for name in (name_head_copy(key, True), name_head_copy(key, False)):
            if name in files.weights and not torch.equal(files.weights[name].float(), value.float()):
                return f"{key} differs from its copy in {WEIGHTS_FILE}: copy both files from one run"
    if not files.head[f"{HEAD}.weight"].any():
        return f"{HEAD}.weight is all zero, so every page would get the same vectors; use another checkpoint"
    return ""


def adapter_weight_stats(adapter: State, head: State) -> dict[str, WeightStats]:
    """Describe an adapter's weights, to find out later whether they were trained, and over which head.

    Training starts with lora_B at zero, lora_A at random and a head that stays as it was initialized: lora_B shows
    whether anything was trained, and the head's hash whether it is the one of the training. The guide's test, a
    standard deviation "far from 0.02", shows neither.

    Args:
        adapter: tensors as PEFT saves them, `base_model.model.<module>.lora_A.weight` and so on; others are ignored.
        head: tensors of head.safetensors.

    Returns:
        One entry for each kind of module over all layers, "<module, * for its layer> lora_A", and one for "head".
    """
    groups: dict[str, State] = {"head": {key: head[key] for key in HEAD_KEYS}}
    for name, value in adapter.items():
        if ".lora_" in name:  # the others are the copy of the head's base weights
            module, kind = re.sub(r"\.\d+\.", ".*.", name.removeprefix(PREFIX)).rsplit(".lora_", 1)
            groups.setdefault(f"{module} lora_{kind.removesuffix('.weight')}", {})[name] = value
    return {name: _weight_stats(members) for name, members in sorted(groups.items())}


def _weight_stats(members: State) -> WeightStats:
    digest = hashlib.sha256()
    values = [members[name].detach().float().cpu().contiguous() for name in sorted(members)]
    for value in values:
        digest.update(value.numpy().tobytes())
    std = torch.cat([value.flatten() for value in values]).double().std().item()
    return {"tensors": len(values), "std": float(f"{std:.6g}"), "sha256": digest.hexdigest()[:16]}


def write_head(head: State, folder: Path, has_lora: bool) -> None:
    """Write head.safetensors, and the same tensors into an adapter_model.safetensors that is there."""
    file = folder / WEIGHTS_FILE
    save_file(head, folder / HEAD_FILE)
    if file.is_file():
        copies = {name_head_copy(key, has_lora): value for key, value in head.items()}
        save_file(read_tensors(file) | copies, file, metadata={"format": "pt"})


def save_adapter_extras(wrapped: Any, processor: Any, folder: Path) -> None:
    """Save what PEFT leaves out of an adapter's folder: the head, the processor and a README.

    Args:
        wrapped: the PeftModel.
        processor: saved with the token limits used in training.
        folder: where PEFT has saved the adapter.
    """
    wrapped.base_model.model.save_head(folder)
    processor.save_pretrained(folder)
    config = wrapped.peft_config["default"]
    base, revision = config.base_model_name_or_path, config.revision
    text = ADAPTER_README.format(
        base_model=f"base_model: {base}\n" if revision and is_on_hub(base) else "",
        base=base,
        at_revision=f" at `{revision}`" if revision else "",
        revision_argument=f", revision={revision!r}" if revision else "",
        rank=config.r,
        alpha=config.lora_alpha,
        max_visual_tokens=processor.max_visual_tokens,
        tiling=processor.tiling,
        max_query_tokens=processor.max_query_tokens,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


@contextmanager
def _limit_cpu_time(seconds: float, message: str) -> Iterator[None]:
    """Raise UserError after so many seconds of CPU time; not in threads, since only the main one handles signals."""

    def raise_timeout(*_: object) -> None:
        raise UserError(message)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGVTALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


def describe_error(error: Exception) -> str:
    """Return the type and the first line of a library's error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
