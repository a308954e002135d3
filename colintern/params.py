"""params.yaml: read once, checked whole, handed on as one frozen object.

There are no defaults: what the file says is what runs. Each key's rule stands beside its field in `Params`; what a key
means, its unit and the guide's value stand beside it in params.yaml.
"""

import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.recipes import render_recipe
from colintern.core.rules import (
    FILLED,
    KERNEL,
    LAUNCH,
    LAYERS,
    MIXTURE,
    PATTERN,
    POSITIVE,
    REVISION,
    Rule,
    at_least,
    between,
    is_hub_id,
    mixture,
    one_of,
)


@dataclass(frozen=True, slots=True)
class Params:
    """The keys of params.yaml, in its order. A rule on a list holds for each of its entries."""

    base: Annotated[str, FILLED]
    base_revision: Annotated[str, REVISION]
    train_data: Annotated[str, FILLED, MIXTURE]
    train_revision: Annotated[str, REVISION]
    train_corpus: str
    train_corpus_revision: Annotated[str, REVISION]
    negatives: Annotated[int, between(0, 1000)]
    negatives_file: str
    max_bad_fraction: Annotated[float, Rule("0 <= max_bad_fraction < 1", lambda value: 0 <= value < 1)]
    benchmarks: Annotated[tuple[str, ...], FILLED]
    eval_untrained: bool
    max_visual_tokens: Annotated[int, between(1, 65536)]
    max_query_tokens: Annotated[int, between(16, 4096)]
    dtype: Annotated[str, one_of("float32", "bfloat16")]
    attention: Annotated[str, KERNEL]
    gradient_checkpointing: Annotated[bool | int, LAYERS]
    compile: bool
    launch: Annotated[int | str, LAUNCH]
    lora_targets: Annotated[tuple[str, ...], PATTERN]
    lora_rank: Annotated[int, between(1, 1024)]
    lora_alpha: Annotated[int, between(1, 65536)]
    lora_dropout: Annotated[float, Rule("0 <= lora_dropout < 1", lambda value: 0 <= value < 1)]
    epochs: Annotated[int, between(1, 100_000)]
    lr: Annotated[float, Rule("0 < lr <= 1", lambda value: 0 < value <= 1)]
    lr_scheduler: Annotated[str, one_of("linear", "cosine", "constant_with_warmup")]
    warmup_steps: Annotated[int, between(0, 10**8)]
    weight_decay: Annotated[float, at_least(0)]
    max_grad_norm: Annotated[float, POSITIVE]
    batch_size: Annotated[int, between(2, 65536)]
    micro_batch_size: Annotated[int, between(1, 10**8)]
    temperature: Annotated[float, POSITIVE]
    symmetric_loss: bool
    logging_steps: Annotated[int, between(1, 10**8)]
    dev_queries: Annotated[int, between(1, 10**8)]
    save_steps: Annotated[int, between(1, 10**8)]
    tracker: Annotated[str, one_of("none", "wandb", "tensorboard", "trackio")]
    eval_batch_size: Annotated[int, between(1, 65536)]
    pool_factor: Annotated[int, between(1, 64)]
    dim: Annotated[int, between(1, 128)]
    feature_cache_gb: Annotated[float, between(0, 10**6)]
    feature_cache_format: Annotated[str, one_of("exact", "fp8")]
    embedding_cache_gb: Annotated[float, between(0, 10**6)]
    seed: Annotated[int, between(0, 2**32 - 1)]
    deterministic: bool
    threads: Annotated[int, between(1, 1024)]
    workers: Annotated[int, between(0, 1024)]


MAX_BYTES, MAX_DIGITS = 100_000, 4000  # of a file of settings, and of a number in it
HINTS = get_type_hints(Params, include_extras=True)
LIST = tuple[str, ...]
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    int | str: "a whole number or auto",
    bool | int: "true, false or a whole number",
    LIST: "a list of one or more texts",
}


def load(path: str | Path = "params.yaml") -> Params:
    """Read and check a params file. Folders named in it are below `root`, as the stages take them.

    Raises:
        UserError: the file cannot be read as a YAML mapping, or keys are missing, unknown, given twice, of the wrong
            type or out of range; every problem of the file is in the one message.
    """
    hint = "go to the repository root; if none is there, `colintern recipe demo` writes one"
    raw, problems = read_mapping(Path(path), "`key: value` on each line", hint)
    found, more = _checked(raw)
    problems += more
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{path}: {count}" + "".join(f"\n  {problem}" for problem in problems))
    return Params(**found)


def load_recipe(recipe: Path) -> Params:
    """Return the validated settings of a recipe.

    Raises:
        UserError: see `load` and `render_recipe`.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / recipe.name
        path.write_text(render_recipe(recipe), encoding="utf-8")
        return load(path)


def problems_of(values: dict[str, Any]) -> list[str]:
    """What is wrong with the values of a params.yaml, a message each; [] where it is valid."""
    return _checked(values)[1]


def write(path: str | Path, values: dict[str, Any]) -> list[str]:
    """Write values into a params.yaml as `dvc exp run -S` does, so that comments stay; the keys whose value changed."""
    from dvc.utils.hydra import apply_overrides

    before = load(path)
    apply_overrides(Path(path), [override(key, value) for key, value in values.items()])
    after = load(path)
    return [key for key in values if getattr(before, key) != getattr(after, key)]


def override(key: str, value: Any) -> str:
    """KEY=VALUE as `dvc exp run -S` takes it."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str):  # in quotes, or "4" would become a number
        quoted = value.replace("'", "\\'")
        return f"{key}='{quoted}'"
    return f"{key}={value}"


def _checked(raw: dict[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """The valid values of a file, converted, and its problems."""
    problems = _key_problems(raw)
    good: dict[str, Any] = {}
    for key in HINTS:
        if key in raw:
            faults = _faults(key, raw[key])
            problems += faults
            if not faults:
                good[key] = _converted(key, raw[key])
    return good, problems + _cross_problems(good)


def read_mapping(path: Path, form: str, hint: str) -> tuple[dict[Any, Any], list[str]]:
    """Read a YAML 1.2 file: its mapping, and one problem for each key that is given more than once.

    Args:
        path: the file, at most `MAX_BYTES` long.
        form: what the file must hold, for the message.
        hint: what to do where there is no such file.

    Raises:
        UserError: the file cannot be read, is too large, is no YAML mapping, or uses what a settings file does not
            need: aliases, which can multiply without bound, merge keys, and numbers of thousands of digits.
    """
    from ruamel.yaml import YAML  # here, because it takes longer to import than `colintern --help` may take
    from ruamel.yaml.error import YAMLError

    # YAML 1.2, because DVC writes `lr: 3e-05`, which a YAML 1.1 reader such as PyYAML takes for text.
    reader = YAML(typ="safe", pure=True)
    reader.allow_duplicate_keys = True  # reported together with the file's other problems
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes, so it is no file of settings")
        node = reader.compose(text)
        if fault := _node_fault(node):
            raise UserError(f"{path}: {fault}")
        raw = reader.load(text)
    except OSError as error:
        more = f"; {hint}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path}: cannot be read: {error.strerror}{more}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        # ValueError: YAML takes 2026-13-45 for a date, and finds it impossible. RecursionError: [[[[[[...
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: is not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping, {form}; it holds {_show(raw)}")
    return raw, list(_repeated_keys(node))


def _repeated_keys(mapping: Any) -> Iterator[str]:
    """Yield a problem for each key that a mapping, or one inside it, gives more than once."""
    seen = defaultdict(list)
    for key, value in mapping.value:
        seen[str(key.value)].append(f"{str(value.value)[:80]} (line {key.start_mark.line + 1})")
        if value.id == "mapping":
            yield from _repeated_keys(value)
    for name, found in seen.items():
        if len(found) > 1:
            yield f"{name}: given {len(found)} times: {', '.join(found)}; keep one"


def _node_fault(top: Any) -> str:
    """The first thing in a YAML document that a settings file does not need, with its line; "" if there is none."""
    waiting, seen = [top], set()
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        if id(node) in seen:
            return f"an alias of what is on line {node.start_mark.line + 1}; write the value itself in each place"
        seen.add(id(node))
        if not isinstance(node.value, list):
            digits = sum(map(str.isdigit, node.value))
            if digits > MAX_DIGITS and digits > len(node.value) - 5:
                return f"a number of {digits} digits on line {node.start_mark.line + 1}; at most {MAX_DIGITS} are read"
            continue
        for child in node.value:
            waiting += child if isinstance(child, tuple) else [child]
            if isinstance(child, tuple) and child[0].value == "<<":
                return f"<<, a merge key, on line {child[0].start_mark.line + 1}; write the keys themselves"
    return ""


def _key_problems(raw: dict[Any, Any]) -> list[str]:
    missing = [key for key in HINTS if key not in raw]
    unknown = {str(key): value for key, value in raw.items() if key not in HINTS}
    problems = []
    for key in missing:
        near = difflib.get_close_matches(key, unknown, n=1)
        problems.append(
            f"{key}: missing; it must be {_valid(key)}" + (f"; nearest key in the file: {near[0]}" if near else "")
        )
    for key, value in unknown.items():
        # A misspelt key leaves its right name missing: `learning_rate` means lr, though other names look more alike.
        [near] = difflib.get_close_matches(key, missing or HINTS, n=1, cutoff=0.0)
        problems.append(f"{key}: unknown key, value {_show(value)}; nearest key: {near}, {_valid(near)}")
    return problems


def _faults(key: str, value: Any) -> list[str]:
    """What is wrong with one key's value by itself; in a list, what is wrong with each of its entries."""
    kind, rules = _kind_and_rules(key)
    if kind == LIST and type(value) is list and value:
        return [fault for i, entry in enumerate(value) for fault in _misfit(f"{key}[{i}]", str, rules, entry)]
    return _misfit(key, kind, rules, value)


def _misfit(name: str, kind: Any, rules: list[Rule], value: Any) -> list[str]:
    if _is_a(kind, value) and all(rule.holds(value) for rule in rules):
        return []
    return [f"{name}: {_show(value)} is not valid; it must be {_words(kind, rules)}"]


def _is_a(kind: Any, value: Any) -> bool:
    if kind is float:  # compared, not converted: nan, inf and whole numbers too large for a float all fail here
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return type(value) in kinds  # not isinstance, because True is an instance of int


def _converted(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if _kind_and_rules(key)[0] is float else value


def _cross_problems(good: dict[str, Any]) -> list[str]:
    """Rules between keys, for those keys that are valid by themselves."""
    problems = []
    if {"micro_batch_size", "batch_size", "negatives"} <= good.keys():
        pages = good["batch_size"] * (1 + good["negatives"])
        if good["micro_batch_size"] > pages:
            most = "batch_size x (1 + negatives)" if good["negatives"] else "batch_size"
            problems.append(
                f"micro_batch_size: {good['micro_batch_size']} is not valid; it must be at most {most}, {pages}"
            )
    if good.get("negatives_file") and good.get("negatives") == 0:
        problems.append(
            f"negatives_file: {_show(good['negatives_file'])} has no effect with negatives: 0; give how many, or ''"
        )
    for key, revision_key, api in (
        ("base", "base_revision", "model_info"),
        ("train_data", "train_revision", "dataset_info"),
        ("train_corpus", "train_corpus_revision", "dataset_info"),
    ):
        if not {key, revision_key} <= good.keys():
            continue
        revision = good[revision_key]
        names = [name for name, _ in mixture(good[key])] if key == "train_data" else [good[key]]
        hub = [name for name in names if on_hub(name)]
        # The hub's moving `main` would give other bytes on another day.
        if hub and not revision:
            problems.append(
                f"{revision_key}: {_show(revision)} is not valid; {key} {hub[0]!r} is not a folder here, so it is a "
                f"hub id and needs its 40-hex revision: huggingface_hub.HfApi().{api}({hub[0]!r}).sha"
            )
        if revision and not hub:
            problems.append(
                f'{revision_key}: {_show(revision)} is not valid; it must be "", because {key} {good[key]!r} is not a '
                f"hub id"
            )
        if len(hub) > 1:
            problems.append(f"{key}: {good[key]!r} names {len(hub)} hub ids, but {revision_key} can pin only one")
    return problems


def on_hub(name: str) -> bool:
    """Whether a base or data set is a hub id: it looks like one, and no such folder is in the repository."""
    return is_hub_id(name) and not (root() / name).is_dir()


def at_commit(key: str, text: str, hint: str = "") -> tuple[str, str]:
    """Hub id and commit of `ID@COMMIT`, which a user wrote as `key`.

    Raises:
        UserError: it is something else; `hint`: what else would be valid.
    """
    name, _, revision = text.partition("@")
    if not on_hub(name) or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"{key}: {text!r} is no folder here, and a hub id needs its commit: write {name}@<40 hex digits>, which "
            f"huggingface_hub.HfApi().model_info({name!r}).sha tells{hint}"
        )
    return name, revision


def _kind_and_rules(key: str) -> tuple[Any, list[Rule]]:
    kind, *rules = get_args(HINTS[key]) or (HINTS[key],)
    return kind, rules


def _valid(key: str) -> str:
    return _words(*_kind_and_rules(key))


def _words(kind: Any, rules: list[Rule]) -> str:
    return (", each " if kind == LIST else ", ").join([KINDS[kind], *(rule.words for rule in rules)])


def _show(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
