"""tune.yaml: what is searched, and how; checked whole against params.yaml before anything runs."""

import difflib
from collections.abc import Iterator
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple, get_args

from ruamel.yaml import YAML

from colintern.core.errors import UserError
from colintern.params import LIST, TYPES, list_problems, read_yaml_mapping

SCORED = ("fetch-data", "verify", "train")  # the stages that decide the dev score
# They decide on what it is measured, so that scores under two values of one of them say nothing beside each other.
MEASURE = {"benchmarks", "dev_queries", "max_bad_fraction", "train_corpus", "train_corpus_revision", "train_data"}
MEASURE |= {"train_revision"}
# They cost time or memory, and change the score by rounding at most.
STILL = {"attention", "compile", "deterministic", "eval_batch_size", "feature_cache_gb", "gradient_checkpointing"}
STILL |= {"launch", "logging_steps", "micro_batch_size", "save_steps", "threads", "tracker", "workers"}
BYTES, SECONDS = "bytes_per_page", "training_seconds"  # what the dev score may be weighed against
SIZE = {"pool_factor", "dim"}  # keys that decide bytes per page, and on which the score is measured then
KIND = {key: hint if hint == LIST else (get_args(hint) or (hint,))[0] for key, hint in TYPES.items()}
RULES = {
    "seed": ("a whole number from 0", lambda v: type(v) is int and v >= 0),
    "sampler": ("tpe or random", lambda v: v in ("tpe", "random")),
    "startup_trials": ("a whole number from 1", lambda v: type(v) is int and v >= 1),
    "pruner": ("median, hyperband or none", lambda v: v in ("median", "hyperband", "none")),
    "warmup_evaluations": ("a whole number from 0", lambda v: type(v) is int and v >= 0),
    "against": (f"none, {BYTES} or {SECONDS}", lambda v: v in ("none", BYTES, SECONDS)),
}


class Range(NamedTuple):
    """The values a key may take: `choices`, or all from `low` to `high`, evenly in their logarithm if `log`."""

    key: str
    choices: list[Any]
    low: float
    high: float
    log: bool
    whole: bool

    @property
    def ends(self) -> list[Any]:
        return self.choices or [self.low, self.high]

    def distribution(self) -> Any:
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.choices:
            return CategoricalDistribution(self.choices)
        if self.whole:
            return IntDistribution(int(self.low), int(self.high), log=self.log)
        return FloatDistribution(self.low, self.high, log=self.log)


class Search(NamedTuple):
    """tune.yaml: `settings` are seed, sampler, pruner, what they take, and what the score is weighed against."""

    settings: dict[str, Any]
    space: list[Range]

    @property
    def against(self) -> str:
        """The second objective, minimised; "" where the dev score is the only one."""
        return "" if self.settings["against"] == "none" else self.settings["against"]

    @property
    def directions(self) -> list[Any]:
        return ["maximize", "minimize"] if self.against else ["maximize"]

    def distributions(self) -> dict[str, Any]:
        return {one.key: one.distribution() for one in self.space}

    def facts(self) -> dict[str, Any]:
        """The space as the study keeps it, to be compared when it is resumed."""
        return {r.key: {"choices": r.choices} if r.choices else [r.low, r.high, r.log] for r in self.space}


def read(params: dict[str, Any], path: Path) -> Search:
    """tune.yaml, held against the values of params.yaml and the params of dvc.yaml's stages.

    Raises:
        UserError: it cannot be read, or some of its keys or values cannot be searched; all problems are in the message.
    """
    raw, problems = read_yaml_mapping(path, "of the settings and the space", "the repository has one to begin with")
    problems += [f"{key}: missing; it must be {words}" for key, (words, _) in RULES.items() if key not in raw]
    problems += [
        f"{key}: {raw[key]!r} is not valid; it must be {words}"
        for key, (words, holds) in RULES.items()
        if key in raw and not holds(raw[key])
    ]
    for key in raw.keys() - RULES.keys() - {"space"}:
        [near] = difflib.get_close_matches(str(key), [*RULES, "space"], n=1, cutoff=0.0)
        problems.append(f"{key}: unknown key; nearest key: {near}")
    space = raw.get("space")
    if not isinstance(space, dict) or not space:
        problems.append("space: it must be a mapping with at least one key of params.yaml")
        space = {}
    read_by = _read_by()
    problems += _objective_faults(raw, space)
    sized = raw.get("against") == BYTES
    found = []
    for key, value in space.items():
        wrong = "" if sized and key in SIZE else _key_fault(str(key), read_by)
        wrong = wrong or _range_fault(str(key), value)
        if wrong:
            problems.append(f"space.{key}: {wrong}")
        else:
            found.append(_range(key, value))
    problems += _combined(params, found)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UserError(f"{path}: {count}" + "".join(f"\n  {problem}" for problem in problems))
    return Search({key: raw[key] for key in RULES}, found)


def _objective_faults(raw: dict[Any, Any], space: dict[Any, Any]) -> Iterator[str]:
    """Of two objectives: there is no order in which trials could be stopped, and the space must move both."""
    against = raw.get("against")
    if against in (BYTES, SECONDS) and raw.get("pruner") in ("median", "hyperband"):
        yield f"pruner: {raw['pruner']!r} is not valid with against: {against}; it must be none, with two objectives"
    if against == BYTES and space and not space.keys() - SIZE:
        yield "space: it needs a key that training reads; `colintern evaluate --pool-factor` takes sizes alone"
    if against == BYTES and not space.keys() & (SIZE | {"max_visual_tokens"}):
        yield f"against: {BYTES} needs pool_factor, dim or max_visual_tokens in the space, or it is the same everywhere"


def _read_by() -> dict[str, set[str]]:
    """The params of each stage of dvc.yaml that names some."""
    stages = YAML(typ="safe", pure=True).load(Path("dvc.yaml"))["stages"]
    return {name: {key for key in stage["params"] if isinstance(key, str)} for name, stage in stages.items()}


def _key_fault(key: str, read_by: dict[str, set[str]]) -> str:
    """Why a key cannot be searched, or ""."""
    decide = set().union(*(read_by[stage] for stage in SCORED))
    can = sorted(key for key in decide - MEASURE - STILL if KIND[key] != LIST)
    if key not in TYPES:
        [near] = difflib.get_close_matches(key, can, n=1, cutoff=0.0)
        return f"unknown key; nearest key: {near}"
    if key not in decide:
        readers = ", ".join(stage for stage, keys in read_by.items() if key in keys)
        more = f", and with against: {BYTES} it can be searched" if key in SIZE else ""
        return f"no stage that decides the dev score reads it, only {readers}{more}; these are read: {', '.join(can)}"
    if key in MEASURE:
        return "it decides on what the dev score is measured, so trials could not be compared"
    if key in STILL:
        return "it does not change the dev score, but for rounding"
    return "lists cannot be searched" if KIND[key] == LIST else ""


def _range_fault(key: str, value: Any) -> str:
    """What is wrong with the values of a key, or ""."""
    words = "it must be {low: A, high: B}, with log: true if wanted, or {choices: [A, B]}"
    if not isinstance(value, dict) or set(value) not in ({"choices"}, {"low", "high"}, {"low", "high", "log"}):
        return f"{value!r} is not valid; {words}"
    if "choices" in value:
        choices = value["choices"]
        distinct = isinstance(choices, list) and len({(type(c), str(c)) for c in choices}) == len(choices) > 1
        return "" if distinct else f"choices: {choices!r} is not valid; two or more different values"
    low, high, log = value["low"], value["high"], value.get("log", False)
    kind = KIND[key]
    numbers = (int,) if kind is int else (int, float) if kind is float else ()
    if type(low) not in numbers or type(high) not in numbers:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "no range: this key takes choices")
        return f"low and high, {low!r} and {high!r}, are not valid; they must be {what}"
    if not low < high or type(log) is not bool or (log and low <= 0):
        return f"{value!r} is not valid; low < high, log true or false, and above 0 with log: true"
    return ""


def _range(key: str, value: dict[str, Any]) -> Range:
    kind = KIND[key]
    if "choices" in value:
        choices = [float(one) if kind is float and type(one) is int else one for one in value["choices"]]
        return Range(key, choices, 0, 0, False, kind is int)
    low, high = kind(value["low"]), kind(value["high"])
    return Range(key, [], low, high, value.get("log", False), kind is int)


def _combined(params: dict[str, Any], space: list[Range]) -> Iterator[str]:
    """What params.yaml's rules say of the ends of each range, and of the ends of each two, with the rest as it is."""
    told, wrong = set[str](), set[str]()
    pairs = [(one, one) for one in space] + list(combinations(space, 2))
    for one, other in pairs:
        for a, b in product(one.ends, other.ends):
            changed = {one.key: a, other.key: b} if other is not one else {one.key: a}
            if wrong & changed.keys() and len(changed) > 1:
                continue
            for problem in list_problems(params | changed):
                if problem not in told:
                    told.add(problem)
                    wrong.update(changed)
                    yield f"space: {problem} (with {', '.join(f'{key}: {value}' for key, value in changed.items())})"
