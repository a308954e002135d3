"""The files of an adapter folder, and what must hold for them before the adapter is used.

Loading, check-adapter, evaluation, search, export, report and mining all read a folder with `read_adapter_files` and
take it only if `find_faults` finds nothing.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from colintern.params import UserError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD_FILE = "head.safetensors"
IDENTITY_FILE = "identity.json"
HEAD_KEYS = ("custom_text_proj.bias", "custom_text_proj.weight")
PREFIX = "base_model.model."  # of every tensor that PEFT saves
MAX_JSON_BYTES = 16 * 2**20
MAX_NUMBER = 10**9  # of lora_alpha and of ranks; far more is infinite in float32
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

State = dict[str, Tensor]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= MAX_NUMBER


def _is_name(value: Any) -> bool:
    """Return whether a text is matched in linear time where PEFT reads it as a regular expression."""
    return isinstance(value, str) and re.fullmatch(r"[\w.^$\\-]{1,200}", value) is not None


def _are_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(map(_is_name, value)))


def _is_pattern(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_name(key) and _is_number(number) for key, number in value.items())


# What a key of adapter_config.json must hold, in words and as a test. Other keys must have PEFT's default value.
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "peft_type": ("LORA", lambda value: value == "LORA"),
    "base_model_name_or_path": ("a folder or a hub id", lambda value: isinstance(value, str) and bool(value.strip())),
    "revision": ("a hub commit or null", lambda value: value is None or isinstance(value, str)),
    "r": ("a whole number from 1 to 10^9", lambda value: type(value) is int and 1 <= value <= MAX_NUMBER),
    "lora_alpha": ("a number above 0 and at most 10^9", _is_number),
    "lora_dropout": ("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1),
    "target_modules": (
        "a regular expression, or a list of names",
        lambda value: bool(value) and (isinstance(value, str) or (isinstance(value, list) and _are_names(value))),
    ),
    "exclude_modules": ("a list of names", lambda value: _is_name(value) or _are_names(value)),
    "modules_to_save": ("a list of names", _are_names),
    "layers_pattern": ("a list of names", lambda value: value == "" or _is_name(value) or _are_names(value)),
    "layers_to_transform": (
        "whole numbers",
        lambda value: value is None or all(type(n) is int for n in (value if isinstance(value, list) else [value])),
    ),
    "rank_pattern": ("names with numbers above 0 and at most 10^9", _is_pattern),
    "alpha_pattern": ("names with numbers above 0 and at most 10^9", _is_pattern),
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "init_lora_weights": (  # others change the base's weights when the adapter is added
        "true, false, gaussian or orthogonal",
        lambda value: isinstance(value, bool) or value in ("gaussian", "orthogonal"),
    ),
    **{
        key: ("true or false", lambda value: isinstance(value, bool))
        for key in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias")
    },
}
REQUIRED = ("peft_type", "base_model_name_or_path", "r", "lora_alpha", "target_modules")
UNUSED = ("task_type", "auto_mapping", "peft_version", "inference_mode", "runtime_config")


class AdapterFiles(NamedTuple):
    """What a folder holds.

    `weights`: adapter_model.safetensors. `head`: the head's weights, from head.safetensors where that exists.
    `head_copy`: those in adapter_model.safetensors, for plain PEFT; adapters made before there was a copy have none.
    """

    folder: Path
    config: LoraConfig
    weights: State
    head: State
    head_copy: State


class ExpectedTensors(NamedTuple):
    """Names and shapes that an adapter's configuration implies on its base."""

    weights: dict[str, tuple[int, ...]]
    head: dict[str, tuple[int, ...]]


class AdapterFault(NamedTuple):
    """A reason not to use an adapter; `check`: the finding of `colintern check-adapter` that it belongs to."""

    check: str
    file: str
    message: str


def is_adapter(folder: Path) -> bool:
    """Return whether the folder says that it is an adapter, even if the file that says so is damaged."""
    return os.path.lexists(folder / CONFIG_FILE)


def read_adapter_files(folder: Path) -> AdapterFiles:
    """Read an adapter folder, all but its identity and its processor.

    Raises:
        UserError: a file is missing, cannot be read, or holds something else.
    """
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not os.path.lexists(folder / name):
            raise UserError(f"{folder}: holds no {name}; run the stage that makes it: dvc repro train")
    config = read_adapter_config(folder)
    weights = read_tensors(folder / WEIGHTS_FILE)
    head, head_copy = _read_head(folder, weights)
    return AdapterFiles(folder, config, weights, head, head_copy)


def read_head(folder: Path) -> State:
    """Return the head's weights from head.safetensors or, where PEFT saved the head whole, from its own file.

    Raises:
        UserError: neither has them, both have them and differ, or they are not finite.
    """
    weights = read_tensors(folder / WEIGHTS_FILE) if os.path.lexists(folder / WEIGHTS_FILE) else {}
    head, copy = _read_head(folder, weights)
    for name, value in head.items():
        if message := find_value_fault(name, value):
            raise UserError(f"{folder / HEAD_FILE}: {message}")
    if message := _find_head_fault(head, copy):
        raise UserError(f"{folder / HEAD_FILE}: {message}")
    return head


def _read_head(folder: Path, weights: State) -> tuple[State, State]:
    copy = {key: value for name, value in weights.items() if (key := _head_key(name))}
    file = folder / HEAD_FILE
    if not os.path.lexists(file):
        if all(PREFIX + key in weights for key in HEAD_KEYS):  # PEFT's modules_to_save: the head as it was trained
            return copy, copy
        raise UserError(
            f"{file}: missing. It holds the base weights of custom_text_proj, without which the adapter would sit on a "
            f"random projection; copy it from the run that trained {folder}"
        )
    head = read_tensors(file)
    if sorted(head) != sorted(HEAD_KEYS):
        raise UserError(f"{file}: holds {shorten(sorted(head))}, expected {shorten(sorted(HEAD_KEYS))}")
    return head, copy


def _head_key(name: str) -> str:
    """Return the key in head.safetensors of a tensor in adapter_model.safetensors, "" if it is not of the head.

    PEFT calls the weights under LoRA `base_layer`, and has no such part in the name of a module that is saved whole.
    """
    key = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return key if name.startswith(PREFIX) and key in HEAD_KEYS else ""


def find_faults(files: AdapterFiles, expected: ExpectedTensors | None) -> Iterator[AdapterFault]:
    """Yield what is wrong with an adapter's tensors, the most basic first.

    Args:
        files: see `read_adapter_files`.
        expected: see `colintern.model.expect_tensors`; None where the base is not known.
    """
    if expected is not None and (message := _find_name_fault(files, expected)):
        yield AdapterFault("whole", WEIGHTS_FILE, message)
    broken = []
    for file, state in ((WEIGHTS_FILE, files.weights), (HEAD_FILE, files.head)):
        for name, value in sorted(state.items()):
            if value.dtype not in FLOATS:
                yield AdapterFault("whole", file, find_value_fault(name, value))
                return  # what follows computes with the values
            broken += [(file, name)] * bool(find_value_fault(name, value))
    if broken:
        file, name = broken[0]
        yield AdapterFault("finite", file, f"{name} has NaN or infinite values ({len(broken)} such weights)")
    if message := find_untrained(files.weights):
        yield AdapterFault("trained", WEIGHTS_FILE, message)
    if message := _find_head_fault(files.head, files.head_copy):
        yield AdapterFault("head", HEAD_FILE, message)


def require_sound(files: AdapterFiles, expected: ExpectedTensors | None) -> None:
    """Raise UserError for the first of `find_faults`."""
    for fault in find_faults(files, expected):
        hint = "; give an adapter that was trained" if fault.check == "trained" else ""
        raise UserError(f"{files.folder / fault.file}: {fault.message}{hint}")


def _find_name_fault(files: AdapterFiles, expected: ExpectedTensors) -> str:
    want, have = expected.weights, {name: tuple(value.shape) for name, value in files.weights.items()}
    if not have:
        return f"holds no weights, but {CONFIG_FILE} implies {len(want)}"
    parts = []
    if missing := sorted(want.keys() - have.keys()):
        parts.append(f"lacks {shorten(missing)}")
    part = ".base_layer." if f"{PREFIX}custom_text_proj.lora_A.weight" in want else "."
    copies = {PREFIX + key.replace(".", part) for key in HEAD_KEYS}
    if unexpected := sorted(have.keys() - want.keys() - copies):
        parts.append(f"holds {shorten(unexpected)}, which {CONFIG_FILE} does not imply on this base")
    for name in sorted(want.keys() & have.keys()):
        if want[name] != have[name]:
            parts.append(f"{name} has the shape {have[name]}, but {CONFIG_FILE} implies {want[name]}")
            break
    for key, value in [*files.head.items(), *files.head_copy.items()]:
        if tuple(value.shape) != expected.head[key]:
            parts.append(f"the head's {key} has the shape {tuple(value.shape)}, expected {expected.head[key]}")
            break
    return "; ".join(parts)


def find_value_fault(name: str, value: Tensor) -> str:
    """Return what is wrong with a tensor's type or values in float32, "" if nothing is."""
    if value.dtype not in FLOATS:
        return f"{name} is {str(value.dtype).removeprefix('torch.')}; expected float32, bfloat16 or float16"
    return "" if value.float().isfinite().all() else f"{name} has NaN or infinite values"


def find_untrained(weights: Mapping[str, Tensor]) -> str:
    """Return which LoRA matrices are zero, in words, "" if none is: training starts with B at zero, and A at random."""
    for kind, why in (
        ("lora_B", "as before the first step: nothing was learned there"),
        ("lora_A", "so the adapter has no effect there"),
    ):
        all_of_kind = {name: value for name, value in weights.items() if f".{kind}" in name}
        if zero := [name for name, value in all_of_kind.items() if not value.any()]:
            every = len(zero) == len(all_of_kind)
            which = f"every {kind}" if every else f"{len(zero)} of {len(all_of_kind)} {kind}, such as {zero[0]},"
            return f"{which} is zero, {why}"
    return ""


def _find_head_fault(head: State, copy: State) -> str:
    if not head["custom_text_proj.weight"].any():
        return "custom_text_proj.weight is all zero: every page would get the same vectors"
    for key, value in copy.items():
        if value.dtype not in FLOATS or not torch.equal(value.float(), head[key].float()):
            return f"{key} is another one than the copy in {WEIGHTS_FILE}, so one of the two files is of another run"
    if copy and len(copy) < len(HEAD_KEYS):
        return f"of the head, {WEIGHTS_FILE} has a copy of {shorten(list(copy))} only"
    return ""


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


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it is not a regular file, is too large, is not JSON, or holds something else.
    """
    require_regular_file(file)
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise UserError(f"{file}: {size} bytes, expected at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {show(content)}, expected a JSON object")
    return content


def require_regular_file(file: Path) -> None:
    """Raise UserError where there is no such file, or a folder, a pipe or a device has its name."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        what = "is a link to a file that does not exist" if file.is_symlink() else f"{error.strerror}"
        raise UserError(f"{file}: {what}") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{file}: is not a regular file; expected one, not a folder, a pipe or a device")


def read_adapter_config(folder: Path) -> LoraConfig:
    """Read adapter_config.json.

    Raises:
        UserError: it is damaged, or has an option that is new to this PEFT or does more than plain LoRA.
    """
    file = folder / CONFIG_FILE
    content = read_json_object(file)
    defaults = LoraConfig().to_dict()
    for key, value in {**dict.fromkeys(REQUIRED), **content}.items():
        if key in RULES:
            words, is_valid = RULES[key]
            if not is_valid(value):
                raise UserError(f"{file}: {key}: {show(value)} is not valid; it must be {words}")
        elif key not in UNUSED and value and value != defaults.get(key):
            raise UserError(f"{file}: {key}: {show(value)} is not supported here; give an adapter without it")
    try:
        config = LoraConfig(**{key: value for key, value in content.items() if key in RULES})
    except Exception as error:
        raise UserError(f"{file}: PEFT cannot read it: {error}") from error
    config.task_type = None  # PEFT's class for a task adds methods that this model has no use for
    return config


def show(value: Any) -> str:
    """Return a value for a message, shortened."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shorten(names: list[str]) -> str:
    """Return the first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"
