"""dvc.yaml and the code agree: a stage declares what decides its result, no more and no less."""

import ast
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import documented, words
from pipeline_facts import (
    ALL_KEYS,
    KEYS,
    ROOT,
    VERSIONS,
    get_script,
    list_folder_deps,
    list_libraries,
    list_params,
    read_locked_versions,
)
from ruamel.yaml import YAML

import colintern
from colintern.core.errors import UserError
from colintern.core.imports import OBSERVERS, find_module, get_package, list_imports
from colintern.encoding import page_features
from colintern.ingest import user_documents
from colintern.search import index as search_index
from colintern.storage.identity import code_hashes, content_hash, stage_code

STAGES = YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]
READERS = [name for name, stage in STAGES.items() if stage["params"] != ALL_KEYS]
# The packages, top down: a module imports from lower ones and from its own, never in a circle.
LEVELS = [
    {"stages", "__main__", "commands"},
    {"search", "tuning"},
    {"reporting"},
    {"planning", "preflight"},
    {"analysis", "monitoring"},
    {"training", "evaluation", "statistics", "demo"},
    {"ingest", "stores"},
    {"data", "encoding"},
    {"modeling"},
    {"storage", "scoring"},
    {"params"},
    {"core"},
]
MAX_PIPELINE_LINES = 160  # of dvc.yaml, entries of `params:` not counted


def declared(stage: str, *kinds: str) -> set[str]:
    entries = (entry for kind in kinds for entry in STAGES[stage].get(kind, []))
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def test_the_stages_are_the_guides():
    assert list(STAGES) == ["check-params", "fetch-data", "verify", "train", "eval"]


@pytest.mark.parametrize("stage", STAGES)
def test_deps_are_the_folders_of_the_modules_that_decide_the_result(stage):
    code = {dep for dep in declared(stage, "deps") if dep.startswith(("colintern/", "stages/", "demo/"))}
    code |= {"demo"} & declared(stage, "deps")
    assert code == list_folder_deps(get_script(STAGES[stage]))


def test_what_no_import_shows_is_among_the_deps():
    assert "demo" in declared("fetch-data", "deps")
    assert all("data/manifest.json" in declared(stage, "deps") for stage in ("verify", "train", "eval"))


@pytest.mark.parametrize("stage", READERS)
def test_params_are_those_the_code_reads(stage):
    assert {key for key in STAGES[stage]["params"] if isinstance(key, str)} == list_params(get_script(STAGES[stage]))


@pytest.mark.parametrize("stage", READERS)
def test_versions_are_those_of_the_libraries_that_compute(stage):
    [versions] = [entry[VERSIONS] for entry in STAGES[stage]["params"] if isinstance(entry, dict)]
    assert versions == sorted(list_libraries(get_script(STAGES[stage])))
    if stage == "train":
        assert {"torch", "transformers", "peft", "accelerate"} <= {*versions}
        assert not {"matplotlib", "mteb", "optuna", "pypdfium2"} & {*versions}


def test_versions_are_those_of_the_lock():
    assert YAML(typ="safe").load(ROOT / VERSIONS) == read_locked_versions()


@pytest.mark.integration
def test_an_edit_of_an_observer_changes_no_stage_and_no_fingerprint(tmp_path, monkeypatch):
    """A comment is appended to each module in turn, and the identities of the stages are compared."""
    repo = tmp_path / "repo"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (repo / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, repo / name)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q", "-f"]):
        subprocess.run(command, cwd=repo, check=True)
    monkeypatch.chdir(repo)

    def get_status() -> str:
        done = subprocess.run(
            [*words(documented("dvc status")), "--json"], cwd=repo, capture_output=True, text=True, check=True
        )
        return done.stdout

    def get_code_hashes() -> dict[str, dict[str, str]]:
        return {stage: stage_code(stage) for stage in STAGES}

    def append_comment(file: Path) -> str:
        text = file.read_text()
        file.write_text(f"{text}# a comment\n")
        return text

    before, status = get_code_hashes(), get_status()
    modules = [*(repo / "colintern").rglob("*.py")]
    deciding = {folder for stage in STAGES for folder in list_folder_deps(get_script(STAGES[stage]))}
    observers = [file for file in modules if file.parent.relative_to(repo).as_posix() not in deciding]
    packages = {get_package(ROOT / file.relative_to(repo)) for file in observers}
    assert packages == OBSERVERS | {"search", "__init__", "__main__"}
    texts = {file: append_comment(file) for file in [*observers, repo / "Dockerfile", repo / "Makefile"]}
    assert (get_code_hashes(), get_status()) == (before, status)
    for file, text in texts.items():
        file.write_text(text)
    for file in [file for file in modules if file not in texts]:
        text = append_comment(file)
        changed = {stage for stage, hashes in get_code_hashes().items() if hashes != before[stage]}
        folder = file.parent.relative_to(repo).as_posix()
        assert changed == {stage for stage in STAGES if folder in STAGES[stage]["deps"]} != set(), file
        file.write_text(text)
    append_comment(repo / "colintern/training/loss.py")
    append_comment(repo / "colintern/data/images.py")
    changed = json.loads(get_status())
    assert "colintern/training" in str(changed["train"])
    assert all("colintern/data" in str(changed[stage]) for stage in ("fetch-data", "train", "eval"))


def test_a_module_that_does_not_exist_is_refused():
    with pytest.raises(ModuleNotFoundError, match=r"colintern\.modeling\.gone: no module"):
        code_hashes("colintern.modeling.gone")


@pytest.mark.parametrize(
    ("module", "reached", "not_reached"),
    [
        (
            page_features,
            {"encoding/fp8", "modeling/processing_colintern", "data/images"},
            {"scoring/maxsim", "training/loss"},
        ),
        (user_documents, {"ingest/pdfs", "ingest/jsonl", "ingest/pdf_rendering", "data/formats"}, {"storage/hub"}),
        (search_index, {"modeling/modeling_colintern", "encoding/embed", "ingest/pdf_rendering"}, {"training/loss"}),
    ],
)
def test_a_cache_depends_on_the_code_that_made_its_entries(module, reached, not_reached):
    names = code_hashes(*module.CODE, without={"scoring"})
    code = {name.removeprefix("colintern/").removesuffix(".py") for name in names}
    assert reached <= code
    assert not not_reached & code


def test_the_pipeline_is_short():
    lines = (ROOT / "dvc.yaml").read_text().splitlines()
    entries = [STAGES[stage]["params"] for stage in READERS]
    params = sum(len(keys) + sum(map(len, keys[-1].values())) for keys in entries)
    assert len(lines) - params <= MAX_PIPELINE_LINES


def test_every_key_is_read_by_a_stage():
    assert {key for stage in READERS for key in STAGES[stage]["params"] if isinstance(key, str)} == KEYS


def test_each_stage_depends_on_what_the_stage_before_it_wrote():
    order = list(STAGES)
    for before, after in itertools.pairwise(order):
        assert declared(before, "outs", "metrics", "plots") & declared(after, "deps"), (before, after)


def test_lists_are_sorted_so_that_a_diff_shows_one_line():
    for stage in STAGES.values():
        assert stage["deps"] == sorted(stage["deps"])
        keys = [key for key in stage["params"] if isinstance(key, str)]
        assert keys == sorted(keys)


def test_every_out_is_ignored_by_git_and_every_metric_is_not():
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for stage in STAGES:
        assert all(f"/{out}" in ignored for out in declared(stage, "outs"))
        assert not any(f"/{out}" in ignored for out in declared(stage, "metrics", "plots"))


def test_imports_point_one_way():
    level = {name: depth for depth, names in enumerate(LEVELS) for name in names}
    files = [file for top in ("colintern", "stages", "demo") for file in (ROOT / top).rglob("[!_]*.py")]
    targets = {file: {t for name in list_imports(file) if (t := find_module(name))} for file in files}
    targets = {file: {target for target in found if target.name != "__init__.py"} for file, found in targets.items()}
    for file, found in targets.items():
        package = get_package(file)
        assert package in level, f"{file}: give {package} a place in LEVELS"
        for target in found:
            inside = package == get_package(target)
            assert inside or level[get_package(target)] > level[package], f"{file.name} imports {target.name}"
    list(TopologicalSorter(targets).static_order())  # raises where modules import each other in a ring


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
    project, dev = pyproject["project"], pyproject["dependency-groups"]["dev"]
    runtime = project["dependencies"] + [line for lines in project["optional-dependencies"].values() for line in lines]
    installed = packages_distributions()
    own = {"colintern", "stages", "demo", "bench", "cluster", *(path.stem for path in (ROOT / "tests").glob("*.py"))}

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
    "_is_accelerate_prepared": "accelerate",
    "_n_gpu": "transformers",
    "_on_queue_feeder_error": "python",  # multiprocessing
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
