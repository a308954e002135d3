"""dvc.yaml held against the code: what a stage declares is what it reaches and reads, no more and no less."""

import ast
import itertools
import os
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pipeline_facts import ALL_KEYS, KEYS, ROOT, facts, imports
from ruamel.yaml import YAML

import colintern
from colintern.core.errors import UserError
from colintern.storage.identity import content_hash

STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
READERS = [name for name, stage in STAGES.items() if stage["params"] != ALL_KEYS]
# The packages, top down: a module imports from lower ones and from its own, never in a circle.
ROOMS = [
    {"stages", "__main__", "commands"},
    {"tuning"},
    {"reporting"},
    {"planning", "preflight"},
    {"training", "evaluation", "search"},
    {"data", "encoding", "monitoring"},
    {"modeling"},
    {"storage", "scoring"},
    {"params"},
    {"core"},
]


def script(stage: str):
    module = re.fullmatch(r"python -m (stages\.\w+)", STAGES[stage]["cmd"])
    assert module, STAGES[stage]["cmd"]
    return ROOT / (module[1].replace(".", "/") + ".py")


def declared(stage: str, *kinds: str) -> set[str]:
    entries = (entry for kind in kinds for entry in STAGES[stage].get(kind, []))
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def test_the_stages_are_the_guides():
    assert list(STAGES) == ["check-params", "fetch-data", "verify", "train", "eval"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_modules_the_script_reaches(stage):
    assert {d for d in declared(stage, "deps") if d.endswith(".py")} == facts(script(stage))["deps"]


def test_what_no_import_shows_is_among_the_deps():
    assert all("requirements.txt" in declared(stage, "deps") for stage in STAGES), "versions decide results"
    assert "Dockerfile" in declared("train", "deps")
    assert "demo/base" in declared("fetch-data", "deps")
    assert all("data/manifest.json" in declared(stage, "deps") for stage in ("verify", "train", "eval"))


@pytest.mark.parametrize("stage", READERS)
def test_params_are_those_the_code_reads(stage):
    assert set(STAGES[stage]["params"]) == facts(script(stage))["params"]


def test_every_key_is_read_by_a_stage():
    assert set().union(*(STAGES[stage]["params"] for stage in READERS)) == KEYS


def test_each_stage_depends_on_what_the_stage_before_it_wrote():
    order = list(STAGES)
    for before, after in itertools.pairwise(order):
        assert declared(before, "outs", "metrics", "plots") & declared(after, "deps"), (before, after)


def test_lists_are_sorted_so_that_a_diff_shows_one_line():
    for stage in STAGES.values():
        assert stage["deps"] == sorted(stage["deps"])
        assert stage["params"] in (ALL_KEYS, sorted(map(str, stage["params"])))


def test_every_out_is_ignored_by_git_and_every_metric_is_not():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for stage in STAGES:
        assert all(f"/{out}" in ignored for out in declared(stage, "outs"))
        assert not any(f"/{out}" in ignored for out in declared(stage, "metrics", "plots"))


def room(file: Path) -> str:
    """The folder of a module; of those that lie in colintern/ itself, the module."""
    return file.stem if file.parent.name == "colintern" else file.parent.name


def test_imports_point_one_way():
    level = {name: depth for depth, names in enumerate(ROOMS) for name in names}
    files = [*(ROOT / "colintern").rglob("[!_]*.py"), *(ROOT / "stages").glob("[!_]*.py")]
    ours = {file: {target for target in imports(file) if target.name != "__init__.py"} for file in files}
    for file, targets in ours.items():
        assert room(file) in level, f"{file}: give {room(file)} a place in ROOMS"
        for target in targets:
            inside = room(file) == room(target)
            assert inside or level[room(target)] > level[room(file)], f"{file.name} imports {target.name}"
    list(TopologicalSorter(ours).static_order())  # raises where modules import each other in a ring


def test_the_map_of_the_house_is_complete():
    rooms = {file.parent.name for file in (ROOT / "colintern").glob("*/__init__.py")}
    alone = {file.stem for file in (ROOT / "colintern").glob("*.py") if file.stem != "__init__"}
    assert set(re.findall(r"^(\w+)/? {2,}\S", colintern.__doc__, re.M)) == rooms | alone
    for name in rooms:
        assert len(ast.get_docstring(ast.parse((ROOT / "colintern" / name / "__init__.py").read_text()))) > 20


def test_scripts_are_thin():
    for file in (ROOT / "stages").glob("[!_]*.py"):
        code = [line for line in file.read_text().split('"""', 2)[2].splitlines() if line.strip()]
        assert len(code) <= 50, f"{file.name}: {len(code)} lines"


def test_the_hash_of_nothing_is_refused(tmp_path):
    (tmp_path / "empty" / "__pycache__").mkdir(parents=True)
    (tmp_path / "empty" / "__pycache__" / "old.pyc").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, why in (("gone.py", "no such file"), ("empty", "holds no file"), ("pipe", "no such file")):
        with pytest.raises(UserError, match=f"{tmp_path / name}: {why}"):
            content_hash(tmp_path / name)


def test_every_imported_package_is_declared():
    """Installed as a dependency of another package alone, it may be missing after an update of that package."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime, dev = pyproject["project"]["dependencies"], pyproject["dependency-groups"]["dev"]
    installed = packages_distributions()
    own = {"colintern", "stages", "bench", "cluster", *(path.stem for path in (ROOT / "tests").glob("*.py"))}

    def find_undeclared(declared: list[str], *tops: str) -> set[str]:
        names = {canonicalize_name(Requirement(line).name) for line in declared}
        modules = {module for top in tops for path in (ROOT / top).rglob("*.py") for module in _imported(path)}
        return {
            module
            for module in modules - own - sys.stdlib_module_names
            if not names & {canonicalize_name(name) for name in installed.get(module, [_namespace(module)])}
        }

    assert find_undeclared(runtime, "colintern", "stages", "cluster", ".github/scripts") == set()
    assert find_undeclared(runtime + dev, "bench", "tests") == set()


def _imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level]
    return {name.partition(".")[0] for name in names}


def _namespace(module: str) -> str:
    """The distribution of a namespace package, which its metadata may not name."""
    return {"ruamel": "ruamel-yaml"}.get(module, module)


# Names that libraries call private, and so may change with any release: pyproject.toml bounds those libraries.
PRIVATE = {
    "_attn_implementation": "transformers",
    "_contains": "optuna",
    "_int_mm": "torch",
    "_is_accelerate_prepared": "accelerate",
    "_load_from_checkpoint": "transformers",
    "_n_gpu": "transformers",
    "_name_or_path": "transformers",
    "_on_queue_feeder_error": "python",  # multiprocessing
    "_overloadpacket": "torch",
    "_python_dispatch": "torch",
    "_pytree": "torch",
    "_scaled_dot_product_flash_attention": "torch",
    "_scaled_dot_product_flash_attention_backward": "torch",
    "_softmax_backward_data": "torch",
    "_tree_cache": "huggingface-hub",
    "_trial_id": "optuna",
    "_unsafe_view": "torch",
}
PUBLIC = {"_asdict", "_exit", "_fields", "_replace"}  # of named tuples and os, documented


def test_private_names_of_libraries_are_listed_and_their_libraries_bounded():
    nodes = [n for path in (ROOT / "colintern").rglob("*.py") for n in ast.walk(ast.parse(path.read_text("utf-8")))]
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    read = {n.attr for n in nodes if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") not in ("self", "cls")}
    read |= {part for n in nodes if isinstance(n, ast.ImportFrom) and n.module for part in n.module.split(".")}
    assert {name for name in read - own - PUBLIC if re.match(r"_[a-z]", name)} == set(PRIVATE)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {canonicalize_name(one.name): str(one.specifier) for one in map(Requirement, project["dependencies"])}
    assert [library for library in {*PRIVATE.values(), "mteb"} - {"python"} if "<" not in bounds[library]] == []
