"""dvc.yaml held against the code: what a stage declares is what it reaches and reads, no more and no less."""

import dataclasses
import itertools
import re

import pytest
from pipeline_facts import ROOT, imports, params_read, reached
from ruamel.yaml import YAML

from colintern.params import Params

STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
KEYS = {field.name for field in dataclasses.fields(Params)}
# From the top down; a module imports only from lower levels.
LEVELS = [
    {"stages", "cli", "commands"},
    {"runs", "evaluation", "mining"},
    {"subjects", "verdicts", "differences"},
    {"comparison", "outcomes"},
    {"recommend"},
    {"costs", "gpus"},
    {"training", "sources", "mteb_model", "benchmarks", "checks", "inventory", "adapters", "loading", "surroundings"},
    {"doctor", "queries", "scores"},
    {"watch", "data", "embed", "lora", "survey", "own", "checkpoints", "bases", "machine", "weights"},
    {"trainset", "negatives", "parts"},
    {"features", "processor", "model", "manifest", "demo", "identity", "pdfs", "jsonl", "splits"},
    {"hub"},
    {
        "params",
        "health",
        "cache",
        "maxsim",
        "loss",
        "tiles",
        "formats",
        "pages",
        "jsonfile",
        "collected",
        "pseudo",
        "patterns",
    },
    {"images", "lock", "parallel", "digests", "hub_errors", "index", "language", "meter", "guide"},
]


def script(stage: str):
    module = re.fullmatch(r"python -m (stages\.\w+)", STAGES[stage]["cmd"])
    assert module, STAGES[stage]["cmd"]
    return ROOT / (module[1].replace(".", "/") + ".py")


def declared(stage: str, *kinds: str) -> set[str]:
    entries = (entry for kind in kinds for entry in STAGES[stage].get(kind, []))
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def test_the_stages_are_the_guides():
    assert list(STAGES) == ["fetch-data", "verify", "train", "eval"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_modules_the_script_reaches(stage):
    code = {d for d in declared(stage, "deps") if d.endswith(".py")}
    assert code == {f.relative_to(ROOT).as_posix() for f in reached(script(stage)) if f.name != "__init__.py"}


def test_what_no_import_shows_is_among_the_deps():
    assert all("requirements.txt" in declared(stage, "deps") for stage in STAGES), "versions decide results"
    assert "Dockerfile" in declared("train", "deps")
    assert "demo/base" in declared("fetch-data", "deps")
    assert all("data/manifest.json" in declared(stage, "deps") for stage in ("verify", "train", "eval"))


@pytest.mark.parametrize("stage", STAGES)
def test_params_are_those_the_code_reads(stage):
    read = set().union(*map(params_read, reached(script(stage)))) & KEYS
    assert set(STAGES[stage]["params"]) == read


def test_every_key_is_read_by_a_stage():
    assert set().union(*(STAGES[stage]["params"] for stage in STAGES)) == KEYS


def test_each_stage_depends_on_what_the_stage_before_it_wrote():
    order = list(STAGES)
    for before, after in itertools.pairwise(order):
        assert declared(before, "outs", "metrics", "plots") & declared(after, "deps"), (before, after)


def test_lists_are_sorted_so_that_a_diff_shows_one_line():
    for stage in STAGES.values():
        assert stage["deps"] == sorted(stage["deps"])
        assert stage["params"] == sorted(stage["params"])


def test_every_out_is_ignored_by_git_and_every_metric_is_not():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for stage in STAGES:
        assert all(f"/{out}" in ignored for out in declared(stage, "outs"))
        assert not any(f"/{out}" in ignored for out in declared(stage, "metrics", "plots"))


def test_imports_point_one_way():
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    commands = (ROOT / "colintern" / "commands").glob("[!_]*.py")
    for file in (*(ROOT / "colintern").glob("[!_]*.py"), *commands, *(ROOT / "stages").glob("[!_]*.py")):
        name = file.parent.name if file.parent.name in ("stages", "commands") else file.stem
        assert name in level, f"{file.name}: give it a place in LEVELS"
        for target in imports(file):
            if target.parent.name == "colintern" and target.name != "__init__.py" and target.stem != "params":
                assert level[target.stem] > level[name], f"{file.name} imports {target.name}"


def test_scripts_are_thin():
    for file in (ROOT / "stages").glob("[!_]*.py"):
        code = [line for line in file.read_text().split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) <= 50, f"{file.name}: {len(code)} lines"
