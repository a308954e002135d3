"""Read and validate params.yaml as one frozen object.

There are no defaults. The rule of a key is beside its field in `Params`; its meaning, unit and the guide's value are
beside it in params.yaml.
"""

import difflib
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import UnionType
from typing import Annotated, Any, get_args, get_type_hints

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.recipes import render_recipe
from colintern.core.rules import (
    KERNEL,
    LAUNCH,
    LAYERS,
    MIXTURE,
    NON_EMPTY,
    PATTERN,
    POSITIVE,
    REVISION,
    Rule,
    at_least,
    between,
    is_hub_id,
    one_of,
    parse_mixture,
)

PRECISIONS = ("float32", "float16", "int8", "binary")  # in which the numbers of a page's vectors are kept
# The embeddings as they are; see encoding/pooling.py and encoding/precision.py.
FULL_SIZE: dict[str, Any] = {"pool_factor": 1, "dim": 128, "embedding_precision": "float32", "rescore_top_k": 0}


@dataclass(frozen=True, slots=True)
class Params:
    """The keys of params.yaml, in its order. A rule of a list applies to each of its entries."""

    base: Annotated[str, NON_EMPTY]
    base_revision: Annotated[str, REVISION]
    train_data: Annotated[str, NON_EMPTY, MIXTURE]
    train_revision: Annotated[str, REVISION]
    train_corpus: str
    train_corpus_revision: Annotated[str, REVISION]
    negatives: Annotated[int, between(0, 1000)]
    negatives_file: str
    max_bad_fraction: Annotated[float, Rule("0 <= max_bad_fraction < 1", lambda value: 0 <= value < 1)]
    split_by: Annotated[str, one_of("page", "document")]
    train_on_test_pages: bool
    benchmarks: Annotated[tuple[str, ...], NON_EMPTY]
    baselines: Annotated[Sequence[str], NON_EMPTY]
    eval_untrained: bool
    max_visual_tokens: Annotated[int, between(1, 65536)]
    tiling: Annotated[str, one_of("exact", "stock")]
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
    embedding_precision: Annotated[str, one_of(*PRECISIONS)]
    rescore_top_k: Annotated[int, between(0, 10**6)]
    feature_cache_gb: Annotated[float, between(0, 10**6)]
    feature_cache_format: Annotated[str, one_of("exact", "fp8")]
    embedding_cache_gb: Annotated[float, between(0, 10**6)]
    seed: Annotated[int, between(0, 2**32 - 1)]
    deterministic: bool
    threads: Annotated[int, between(1, 1024)]
    workers: Annotated[int, between(0, 1024)]


MAX_BYTES = 100_000  # of a file of settings
REPR = reprlib.Repr()  # bounds what aliases multiply
REPR.maxstring = REPR.maxother = REPR.maxlong = 80
TYPES = get_type_hints(Params, include_extras=True)
LIST, MAYBE_EMPTY_LIST = tuple[str, ...], Sequence[str]
TYPE_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    int | str: "a whole number or auto",
    bool | int: "true, false or a whole number",
    LIST: "a list of one or more texts",
    MAYBE_EMPTY_LIST: "a list of texts or []",
}
# Keys whose value may be a hub id, the key of its commit, and the method of HfApi that returns the commit.
HUB_KEYS = (
    ("base", "base_revision", "model_info"),
    ("train_data", "train_revision", "dataset_info"),
    ("train_corpus", "train_corpus_revision", "dataset_info"),
)


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and validate a params file. Folders in it are below `root`, as the stages take them.

    Raises:
        UserError: the file is not a YAML mapping, or keys are missing, unknown, repeated, of the wrong type or out of
            range; one message lists every problem.
    """
    hint = "go to the repository root; if none is there, `colintern recipe demo` writes one"
    values, problems = _validate_values(read_yaml_mapping(Path(path), "`key: value` on each line", hint))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{path}: {count}" + "".join(f"\n  {problem}" for problem in problems))
    return Params(**values)


def load_recipe(recipe: Path) -> Params:
    """Return the validated settings of a recipe."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / recipe.name
        path.write_text(render_recipe(recipe), encoding="utf-8")
        return load_params(path)


def list_problems(values: Mapping[str, object]) -> list[str]:
    """Return a message for each problem of the values of a params.yaml."""
    return _validate_values(values)[1]


def update_params(path: str | Path, values: Mapping[str, object]) -> list[str]:
    """Write values into a params.yaml as `dvc exp run -S` does, which keeps comments; return the keys that changed."""
    from dvc.utils.hydra import apply_overrides

    before = load_params(path)
    apply_overrides(Path(path), [format_override(key, value) for key, value in values.items()])
    after = load_params(path)
    return [key for key in values if getattr(before, key) != getattr(after, key)]


def format_override(key: str, value: object) -> str:
    """Format KEY=VALUE as `dvc exp run -S` takes it."""
    if isinstance(value, bool):
        return f"{key}={str(value).lower()}"
    if isinstance(value, str):  # in quotes, or "4" would become a number
        quoted = value.replace("'", "\\'")
        return f"{key}='{quoted}'"
    return f"{key}={value}"


def read_yaml_mapping(path: Path, form: str, hint: str) -> dict[str, Any]:
    """Read the mapping of a YAML 1.2 file.

    Args:
        path: the file, at most `MAX_BYTES` long.
        form: what the file must hold, for the message.
        hint: what to do if there is no such file.

    Raises:
        UserError: the file cannot be read, is too large, repeats a key, or is no YAML mapping.
    """
    from ruamel.yaml import YAML  # here, because it takes longer to import than `colintern --help` may take
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import YAMLError

    # YAML 1.2, because DVC writes `lr: 3e-05`, which a YAML 1.1 reader such as PyYAML takes for text.
    reader = YAML(typ="safe", pure=True)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        raw = reader.load(text) if len(text) <= MAX_BYTES else None
    except OSError as error:
        more = f"; {hint}" if isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{path}: cannot be read: {error.strerror}{more}") from error
    except DuplicateKeyError as error:
        raise UserError(f"{path}: {error.problem}, line {error.problem_mark.line + 1}; keep one") from error
    except (YAMLError, ValueError, RecursionError) as error:  # the date 2026-13-45; [[[[[[...
        raise UserError(f"{path}: is not valid YAML: {error}") from error
    if len(text) > MAX_BYTES:
        raise UserError(f"{path}: is larger than {MAX_BYTES:,} bytes, so it is no file of settings")
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a mapping, {form}; it holds {_show_value(raw)}")
    return raw


def _validate_values(raw: Mapping[str, object]) -> tuple[dict[str, Any], list[str]]:
    """Return the valid values of a file, converted, and its problems."""
    problems = _check_keys(raw)
    valid: dict[str, Any] = {}
    for key in TYPES:
        if key in raw:
            errors = check_value(key, raw[key])
            problems += errors
            if not errors:
                valid[key] = _convert_value(key, raw[key])
    return valid, problems + _check_batches(valid) + _check_revisions(valid)


def _check_keys(raw: Mapping[str, object]) -> list[str]:
    missing = [key for key in TYPES if key not in raw]
    unknown = {str(key): value for key, value in raw.items() if key not in TYPES}
    problems = []
    for key in missing:
        near = difflib.get_close_matches(key, unknown, n=1)
        hint = f"; nearest key in the file: {near[0]}" if near else ""
        problems.append(f"{key}: missing; it must be {_describe_key(key)}{hint}")
    for key, value in unknown.items():
        # A misspelt key leaves its right name missing: `learning_rate` means lr, though other names look more alike.
        [near] = difflib.get_close_matches(key, missing or TYPES, n=1, cutoff=0.0)
        problems.append(f"{key}: unknown key, value {_show_value(value)}; nearest key: {near}, {_describe_key(near)}")
    return problems


def check_value(key: str, value: object) -> list[str]:
    """Return what is wrong with a value by itself; with a list, what is wrong with each of its entries."""
    kind, rules = _get_type_and_rules(key)
    named = {key: value}
    if type(value) is list and (kind == MAYBE_EMPTY_LIST or (kind == LIST and value)):
        kind, named = str, {f"{key}[{i}]": entry for i, entry in enumerate(value)}
    return [
        f"{name}: {_show_value(entry)} is not valid; it must be {_format_rules(kind, rules)}"
        for name, entry in named.items()
        if not (_has_type(kind, entry) and all(rule.is_valid(entry) for rule in rules))
    ]


def _has_type(kind: object, value: object) -> bool:
    if kind is float:  # compared, not converted: nan, inf and whole numbers too large for a float all fail here
        return isinstance(value, int | float) and type(value) is not bool and abs(value) <= sys.float_info.max
    kinds = get_args(kind) if isinstance(kind, UnionType) else (kind,)
    return type(value) in kinds  # not isinstance, because True is an instance of int


def _convert_value(key: str, value: object) -> object:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if isinstance(value, int) and _get_type_and_rules(key)[0] is float else value


def _check_batches(valid: dict[str, Any]) -> list[str]:
    problems = []
    if {"micro_batch_size", "batch_size", "negatives"} <= valid.keys():
        pages = valid["batch_size"] * (1 + valid["negatives"])
        if valid["micro_batch_size"] > pages:
            most = "batch_size x (1 + negatives)" if valid["negatives"] else "batch_size"
            problems.append(
                f"micro_batch_size: {valid['micro_batch_size']} is not valid; it must be at most {most}, {pages}"
            )
    if valid.get("negatives_file") and valid.get("negatives") == 0:
        shown = _show_value(valid["negatives_file"])
        problems.append(f"negatives_file: {shown} has no effect with negatives: 0; give how many, or ''")
    return problems


def _check_revisions(valid: dict[str, Any]) -> list[str]:
    """Check that hub ids, and only they, have a commit: the moving `main` would give other bytes on another day."""
    problems = []
    for key, revision_key, api in HUB_KEYS:
        if not {key, revision_key} <= valid.keys():
            continue
        revision = valid[revision_key]
        names = [name for name, _ in parse_mixture(valid[key])] if key == "train_data" else [valid[key]]
        hub_ids = [name for name in names if is_on_hub(name)]
        if hub_ids and not revision:
            problems.append(
                f"{revision_key}: {_show_value(revision)} is not valid; {key} {hub_ids[0]!r} is not a folder here, so "
                f"it is a hub id and needs its 40-hex revision: huggingface_hub.HfApi().{api}({hub_ids[0]!r}).sha"
            )
        if revision and not hub_ids:
            problems.append(
                f'{revision_key}: {_show_value(revision)} is not valid; it must be "", because {key} {valid[key]!r} is '
                f"not a hub id"
            )
        if len(hub_ids) > 1:
            problems.append(f"{key}: {valid[key]!r} names {len(hub_ids)} hub ids, but {revision_key} can pin only one")
    return problems


def list_unreadable_sources(base: str, sources: Iterable[str]) -> list[str]:
    """List the sources of pages that the demo's base cannot read: all but its own pages; none for another base."""
    is_demo = Path(base).parts[-2:] == ("demo", "base")
    return sorted({name for name in sources if name != "demo"}) if is_demo else []


def describe_demo_base(base: str, sources: Iterable[str]) -> str:
    """Say in a sentence that the demo's base cannot read some of the sources; "" if it can."""
    names = ", ".join(list_unreadable_sources(base, sources))
    if not names:
        return ""
    return (
        f"note: {base} knows about 300 words in six fonts and cannot read {names}; expect scores near chance, or take "
        "the recipe internvl3_5-1b, whose base reads"
    )


def is_on_hub(name: str) -> bool:
    """Return whether a base or data set is a hub id: it looks like one, and no such folder is in the repository."""
    return is_hub_id(name) and not (root() / name).is_dir()


def split_hub_id(key: str, text: str, hint: str = "") -> tuple[str, str]:
    """Split `ID@COMMIT`, which a user wrote as `key`, into hub id and commit.

    Raises:
        UserError: it has another form; `hint` says what else would be valid.
    """
    name, _, revision = text.partition("@")
    if not is_on_hub(name) or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise UserError(
            f"{key}: {text!r} is no folder here, and a hub id needs its commit: write {name}@<40 hex digits>, from "
            f"huggingface_hub.HfApi().model_info({name!r}).sha{hint}"
        )
    return name, revision


def _get_type_and_rules(key: str) -> tuple[object, list[Rule]]:
    kind, *rules = get_args(TYPES[key]) or (TYPES[key],)
    return kind, rules


def _describe_key(key: str) -> str:
    return _format_rules(*_get_type_and_rules(key))


def _format_rules(kind: object, rules: list[Rule]) -> str:
    return (", each " if kind in (LIST, MAYBE_EMPTY_LIST) else ", ").join(
        [TYPE_NAMES[kind], *(rule.description for rule in rules)]
    )


def _show_value(value: object) -> str:
    return f"{REPR.repr(value)} ({type(value).__name__})"
