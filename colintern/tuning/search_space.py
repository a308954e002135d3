"""tune.yaml: what is searched, and how; checked whole against params.yaml before anything runs."""

import difflib
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.params import LIST, TYPES, Params, list_problems, read_yaml_mapping

SCORED_STAGES = ("fetch-data", "verify", "train")  # the stages that decide the dev score
# They decide what the score is measured on, so that scores under two values of one of them cannot be compared.
SCORE_DEFINING_KEYS = {
    "benchmarks", "dev_queries", "max_bad_fraction", "split_by", "train_corpus", "train_corpus_revision",
    "train_on_test_pages",
}  # fmt: skip
SCORE_DEFINING_KEYS |= {"train_data", "train_revision"}
# They cost time or memory, and change the score by rounding at most.
SCORE_NEUTRAL_KEYS = {"attention", "compile", "deterministic", "eval_batch_size", "feature_cache_gb"}
SCORE_NEUTRAL_KEYS |= {"gradient_checkpointing", "launch", "logging_steps", "micro_batch_size", "save_steps"}
SCORE_NEUTRAL_KEYS |= {"threads", "tracker", "workers"}
BYTES_PER_PAGE, TRAINING_SECONDS = "bytes_per_page", "training_seconds"  # possible second objectives
PAGE_SIZE_KEYS = ("pool_factor", "dim")  # they decide bytes per page, and the score is then measured at that size
KEY_TYPES = {key: hint if hint == LIST else (get_args(hint) or (hint,))[0] for key, hint in TYPES.items()}
SETTING_RULES = {
    "seed": ("a whole number from 0", lambda v: type(v) is int and v >= 0),
    "sampler": ("tpe or random", lambda v: v in ("tpe", "random")),
    "startup_trials": ("a whole number from 1", lambda v: type(v) is int and v >= 1),
    "pruner": ("median, hyperband or none", lambda v: v in ("median", "hyperband", "none")),
    "warmup_evaluations": ("a whole number from 0", lambda v: type(v) is int and v >= 0),
    "against": (
        f"none, {BYTES_PER_PAGE} or {TRAINING_SECONDS}",
        lambda v: v in ("none", BYTES_PER_PAGE, TRAINING_SECONDS),
    ),
}


class SearchSpace(NamedTuple):
    """The content of tune.yaml.

    Attributes:
        settings: Seed, sampler and pruner with what belongs to them, and `against`, the second objective.
        distributions: The values that each searched key of params.yaml may take.
    """

    settings: dict[str, Any]
    distributions: dict[str, BaseDistribution]

    @property
    def second_objective(self) -> str:
        """Return what is minimised beside the dev score, "" where the dev score is the only objective."""
        return "" if self.settings["against"] == "none" else self.settings["against"]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Return Optuna's direction of each objective."""
        return ["maximize", "minimize"] if self.second_objective else ["maximize"]

    def describe_distributions(self) -> dict[str, object]:
        """Return the distributions as the study stores them, to be compared when it is resumed."""
        return {
            key: {"choices": list(d.choices)} if isinstance(d, CategoricalDistribution) else [d.low, d.high, d.log]
            for key, d in self.distributions.items()
            if isinstance(d, CategoricalDistribution | IntDistribution | FloatDistribution)
        }


def read_search_space(params: Params, path: Path) -> SearchSpace:
    """Read tune.yaml and check it against the values of params.yaml and the params of dvc.yaml's stages.

    Raises:
        UserError: It cannot be read, or some of its keys or values cannot be searched; all problems are in the message.
    """
    raw = read_yaml_mapping(path, "of the settings and the space", "the repository has one to begin with")
    problems: list[str] = []
    for key, (words, is_valid) in SETTING_RULES.items():
        if key not in raw:
            problems.append(f"{key}: missing; it must be {words}")
        elif not is_valid(raw[key]):
            problems.append(f"{key}: {reprlib.repr(raw[key])} is not valid; it must be {words}")
    for key in raw.keys() - SETTING_RULES.keys() - {"space"}:
        problems.append(f"{key}: unknown key; nearest key: {_find_nearest(key, [*SETTING_RULES, 'space'])}")
    space = raw.get("space")
    if not isinstance(space, dict) or not space:
        problems.append("space: it must be a mapping with at least one key of params.yaml")
        space = {}
    problems += _check_objectives(raw, set(space))
    stage_params = read_stage_params()
    distributions = {}
    for key, value in space.items():
        is_page_size = raw.get("against") == BYTES_PER_PAGE and key in PAGE_SIZE_KEYS
        problem = "" if is_page_size else _find_key_problem(str(key), stage_params)
        if problem := problem or _find_range_problem(str(key), value):
            problems.append(f"space.{key}: {problem}")
        else:
            distributions[key] = _make_distribution(key, value)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(params).items()}
    problems += _check_combinations(values, distributions)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{path}: {count}" + "".join(f"\n  {problem}" for problem in problems))
    return SearchSpace({key: raw[key] for key in SETTING_RULES}, distributions)


def read_stage_params() -> dict[str, set[str]]:
    """Return the keys of params.yaml that each stage of dvc.yaml lists."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    return {name: {key for key in stage["params"] if isinstance(key, str)} for name, stage in stages.items()}


def _find_nearest(key: object, keys: list[str]) -> str:
    return difflib.get_close_matches(str(key), keys, n=1, cutoff=0.0)[0]


def _check_objectives(raw: Mapping[str, object], keys: set[str]) -> Iterator[str]:
    """Yield problems of two objectives: no order exists in which to stop trials, and the space must move both."""
    against = raw.get("against")
    if against in (BYTES_PER_PAGE, TRAINING_SECONDS) and raw.get("pruner") in ("median", "hyperband"):
        yield f"pruner: {raw['pruner']!r} is not valid with against: {against}; it must be none, with two objectives"
    if against == BYTES_PER_PAGE and keys and keys <= {*PAGE_SIZE_KEYS}:
        yield "space: it needs a key that training reads; `colintern evaluate --pool-factor` takes sizes alone"
    if against == BYTES_PER_PAGE and not keys & {*PAGE_SIZE_KEYS, "max_visual_tokens", "tiling"}:
        needed = "pool_factor, dim, max_visual_tokens or tiling"
        yield f"against: {against} needs {needed} in the space, or it is the same everywhere"


def _find_key_problem(key: str, stage_params: dict[str, set[str]]) -> str:
    """Return why a key cannot be searched, or ""."""
    scored = set().union(*(stage_params[stage] for stage in SCORED_STAGES))
    searchable = sorted(k for k in scored - SCORE_DEFINING_KEYS - SCORE_NEUTRAL_KEYS if KEY_TYPES[k] != LIST)
    if key not in TYPES:
        return f"unknown key; nearest key: {_find_nearest(key, searchable)}"
    if key not in scored:
        readers = ", ".join(stage for stage, keys in stage_params.items() if key in keys)
        more = f", and with against: {BYTES_PER_PAGE} it can be searched" if key in PAGE_SIZE_KEYS else ""
        listed = ", ".join(searchable)
        return f"no stage that decides the dev score reads it, only {readers}{more}; these are read: {listed}"
    if key in SCORE_DEFINING_KEYS:
        return "it decides what the dev score is measured on, so trials could not be compared"
    if key in SCORE_NEUTRAL_KEYS:
        return "it does not change the dev score, except by rounding"
    return "lists cannot be searched" if KEY_TYPES[key] == LIST else ""


def _find_range_problem(key: str, value: object) -> str:
    """Return what is wrong with the values of a key, or ""."""
    if not isinstance(value, dict) or set(value) not in ({"choices"}, {"low", "high"}, {"low", "high", "log"}):
        shown = reprlib.repr(value)
        return f"{shown} is not valid; it must be {{low: A, high: B}}, with log: true if wanted, or {{choices: [A, B]}}"
    if "choices" in value:
        choices = value["choices"]
        distinct = isinstance(choices, list) and len({(type(c), str(c)) for c in choices}) == len(choices) > 1
        return "" if distinct else f"choices: {reprlib.repr(choices)} is not valid; two or more different values"
    low, high, log = value["low"], value["high"], value.get("log", False)
    number_types = {int: (int,), float: (int, float)}.get(KEY_TYPES[key], ())
    if type(low) not in number_types or type(high) not in number_types:
        valid = {int: "whole numbers", float: "numbers"}.get(KEY_TYPES[key], "no range: this key takes choices")
        return f"low and high, {reprlib.repr(low)} and {reprlib.repr(high)}, are not valid; they must be {valid}"
    if not low < high or type(log) is not bool or (log and low <= 0):
        return f"{reprlib.repr(value)} is not valid; low < high, log true or false, and above 0 with log: true"
    return ""


def _make_distribution(key: str, value: dict[str, Any]) -> BaseDistribution:
    is_float = KEY_TYPES[key] is float
    if "choices" in value:
        return CategoricalDistribution([float(c) if is_float and type(c) is int else c for c in value["choices"]])
    low, high, log = value["low"], value["high"], value.get("log", False)
    if is_float:
        return FloatDistribution(float(low), float(high), log=log)
    return IntDistribution(low, high, log=log)


def list_extremes(distribution: BaseDistribution) -> list[object]:
    """Return the choices of a distribution, or its lowest and its highest value."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    return [distribution.low, distribution.high]


def _check_combinations(params: dict[str, object], distributions: dict[str, BaseDistribution]) -> Iterator[str]:
    """Yield where extremes of one key, or of two together, break a rule of params.yaml, the other keys unchanged."""
    reported, failing_keys = set[str](), set[str]()
    extremes = {key: list_extremes(distribution) for key, distribution in distributions.items()}
    for keys in [*((key,) for key in extremes), *combinations(extremes, 2)]:
        for values in product(*(extremes[key] for key in keys)):
            if len(keys) > 1 and failing_keys & {*keys}:
                continue
            for problem in list_problems(params | dict(zip(keys, values, strict=True))):
                if problem not in reported:
                    reported.add(problem)
                    failing_keys.update(keys)
                    pairs = ", ".join(f"{key}: {value}" for key, value in zip(keys, values, strict=True))
                    yield f"space: {problem} (with {pairs})"
