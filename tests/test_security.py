"""What `make check` refuses beside style, tried on planted faults; and that a package with another hash is not
installed. The other rows: test_image.py, test_pr.py (workflows), test_remotes.py (secrets in what a run leaves)."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from transformers.utils import is_kernels_available

MAKEFILE = (ROOT / "Makefile").read_text()
UV = shutil.which("uv", path=f"{ROOT}/.tools/bin{os.pathsep}{os.environ['PATH']}") or ""
needs_uv = pytest.mark.skipif(not UV, reason="no uv; `make test` brings it")
PLANTED = "".join(("AKIA", "Z7Q3K5W2N8R4T6Y1"))  # looks like a key of AWS; in two parts, else our own check finds it


def checked(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """The lines of `make check` that run a program, in a folder with other code."""
    text = MAKEFILE.replace("$(CURDIR)/.venv/bin", str(Path(sys.executable).parent))
    [lines] = re.findall(rf"^\t((?:[^\n]*\\\n)*?[^\n]*\b{program}(?:[^\n]*\\\n)*[^\n]*\n)", text, re.M)
    heads = "\n".join(re.findall(r"^(?:SHELL|\.SHELLFLAGS|\.ONESHELL|RUN|SCANNED)\b.*$", text, re.M))
    (folder / "Makefile").write_text(f"{heads}\ncheck:\n\t{lines}")
    for name in ("colintern", "stages", "bench", ".github/scripts"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "pyproject.toml", folder)
    subprocess.run("git init -q && git add --all", shell=True, cwd=folder, check=True)
    return subprocess.run(["make", "-s", "check"], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle\npickle.load(open('x', 'rb'))", "B301"),
        ("import torch\ntorch.load('x')", "B614"),
        ("import subprocess\nsubprocess.run('ls ' + x, shell=True)", "B602"),
        ("import yaml\nyaml.load(x)", "B506"),
        ("from transformers import AutoModel\nAutoModel.from_pretrained('me/model')", "B615"),
        ("import torch\ntorch.load('x', weights_only=True)", ""),
    ],
)
def test_bandit_refuses_what_it_is_there_for(tmp_path, code, rule):
    (tmp_path / "colintern").mkdir()
    (tmp_path / "colintern" / "new.py").write_text(code + "\n")
    done = checked(tmp_path, "bandit")
    assert bool(done.returncode) == bool(rule) and rule in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("planted", [f'key = "{PLANTED}"\n', "base_revision: " + "0123456789abcdef" * 2 + "01234567\n"])
def test_detect_secrets_refuses_a_key_and_takes_a_revision(tmp_path, planted):
    (tmp_path / "new.yaml").write_text(planted)
    done = checked(tmp_path, "detect-secrets-hook")
    assert bool(done.returncode) == ("key" in planted), done.stdout + done.stderr
    assert ("new.yaml:1" in done.stdout) == ("key" in planted)


def test_code_of_a_hub_repository_is_never_run_except_a_kernel_of_params_yaml():
    asked = [
        f"{file.name}: {ast.unparse(node)}"
        for folder in ("colintern", "stages", "bench")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")
        or (isinstance(node, ast.Constant) and node.value == "trust_remote_code")
    ]
    # The second is a word of the ModelMeta that a submission gives to mteb.
    assert sorted(asked) == ["kernels.py: trust_remote_code=[repo.name]", "submission.py: 'trust_remote_code'"]


def test_kernels_of_the_hub_are_loaded_by_commit_alone():
    files = [file for folder in ("colintern", "stages", "bench") for file in (ROOT / folder).rglob("*.py")]
    using = [file for file in files if re.search(r"(?m)^\s*(from|import) kernels\b", file.read_text())]
    assert using == [ROOT / "colintern" / "modeling" / "kernels.py"]
    words = set(re.findall(r"\w+", using[0].read_text()))
    assert not words & {"get_kernel", "get_locked_kernel", "load_kernel", "has_kernel"}
    [call] = re.findall(r" install_kernel\(([^)]*)\)", using[0].read_text())
    assert "revision=repo.revision" in call
    assert not is_kernels_available(), "transformers would load kernels that no commit pins"


def test_hooks_of_pre_commit_are_the_parts_of_make_check():
    config = YAML(typ="safe").load(ROOT / ".pre-commit-config.yaml")
    [parts] = re.findall(r"^check: (.+?)  ##", MAKEFILE, re.M)
    [repository] = config["repos"]
    assert repository["repo"] == "local", "a remote repository would bring tools that no hash covers"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert list(hooks) == parts.split()
    for name, hook in hooks.items():
        assert hook["entry"] == f"make {name}" and hook["language"] == "system" and not hook["pass_filenames"]


# --- The lock ---


def wheel(folder: Path) -> str:
    """A small package in `folder`; its sha256."""
    record = "tiny.py,,\ntiny-1.dist-info/METADATA,,\ntiny-1.dist-info/WHEEL,,\ntiny-1.dist-info/RECORD,,\n"
    with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as file:
        file.writestr("tiny.py", "")
        file.writestr("tiny-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1\n")
        file.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("tiny-1.dist-info/RECORD", record)
    return hashlib.sha256((folder / "tiny-1-py3-none-any.whl").read_bytes()).hexdigest()


@needs_uv
@pytest.mark.parametrize("lock", ["requirements.txt", "requirements-dev.txt"])
@pytest.mark.parametrize("hashed", ["right", "wrong", "none"])
def test_make_installs_by_hash_alone(tmp_path, hashed, lock):
    (tmp_path / ".tools" / "bin").mkdir(parents=True)
    (tmp_path / ".tools" / "bin" / "uv").symlink_to(UV)
    shutil.copy(ROOT / "Makefile", tmp_path)
    digest = wheel(tmp_path)
    line = {"right": f" --hash=sha256:{digest}", "wrong": f" --hash=sha256:{digest[::-1]}", "none": ""}[hashed]
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "requirements-dev.txt").touch()
    (tmp_path / lock).write_text(f"tiny==1{line}\n")
    env = os.environ | {"UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path), "UV_NO_CACHE": "1"}
    done = subprocess.run(
        ["make", ".venv/.installed", f"PYTHON={sys.executable}"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (tmp_path / ".venv" / "bin" / "python").exists(), done.stderr
    assert len(list(tmp_path.glob(".venv/lib/*/site-packages/tiny.py"))) == (hashed == "right"), done.stderr
    said = {"right": "", "wrong": "Hash mismatch", "none": "--require-hashes"}[hashed]
    assert said in done.stderr and not (tmp_path / ".venv" / ".installed").exists(), "this folder is no package"


def read_lock(name: str) -> list[str]:
    """Read the entries of a lock, a line each."""
    lines = re.sub(r"\\\n", " ", (ROOT / name).read_text()).splitlines()
    return [line for line in lines if line and line.lstrip()[0] != "#"]


@pytest.mark.parametrize(("lock", "least"), [("requirements.txt", 200), ("requirements-dev.txt", 40)])
def test_every_requirement_has_hashes_and_every_install_asks_for_them(lock, least):
    entries = read_lock(lock)
    assert len(entries) > least and "://" not in "".join(entries)
    for entry in entries:
        assert re.match(r"[\w.\[\],-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    installs = [line for line in MAKEFILE.splitlines() if "pip install" in line]
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes -r" not in line] == [
        line for line in installs if line.endswith("--no-deps -e .")
    ]


def pin_versions(*locks: str) -> dict[str, str]:
    """Map each package that locks install on this machine to its version."""
    entries = [Requirement(line.partition(" --hash")[0]) for lock in locks for line in read_lock(lock)]
    used = [entry for entry in entries if entry.marker is None or entry.marker.evaluate()]
    return {canonicalize_name(entry.name): str(entry.specifier).removeprefix("==") for entry in used}


def resolve_versions(declared: list[str]) -> dict[str, str]:
    """Map all packages that requirements need, in this environment, to the versions that are installed."""
    found, seen, waiting = {}, set(), [(line, "") for line in declared]
    while waiting:
        line, extra = waiting.pop()
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        new = {(requirement.name, wanted) for wanted in ("", *requirement.extras)} - seen
        if new:
            package = distribution(requirement.name)
            found[canonicalize_name(requirement.name)] = package.version
            waiting += [(line, wanted) for _, wanted in new for line in package.requires or ()]
            seen |= new
    return found


def test_each_lock_has_all_that_its_packages_need():
    """The image installs the first lock alone; the second leaves out what the first has, on this system too."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime, dev = project["project"]["dependencies"], list(project["dependency-groups"]["dev"])
    for extra in ("serve", "stores"):
        dev += project["project"]["optional-dependencies"][extra]
    first, both = pin_versions("requirements.txt"), pin_versions("requirements.txt", "requirements-dev.txt")
    needed, needed_dev = resolve_versions(runtime), resolve_versions(runtime + dev)
    assert {name: first.get(name) for name in needed} == needed
    assert both == needed_dev, "and nothing else"
    assert not {"mypy", "pytest", "ruff", "cyclonedx-bom"} & set(first), "development tools are not in the image"


@needs_uv
def test_a_wheel_has_the_one_version_the_types_and_nothing_beside_the_library(tmp_path):
    [pinned] = re.findall(r"^uv==(\S+)", (ROOT / "docker" / "uv.txt").read_text(), re.M)
    [backend] = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    assert pinned in Requirement(backend).specifier, "otherwise uv downloads the backend, and no hash covers it"
    subprocess.run([UV, "build", "--offline", "--wheel", "-q", "-o", tmp_path, ROOT], check=True)
    [file] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    assert file.name == f"colintern-{version('colintern')}-py3-none-any.whl"
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"colintern"}
    assert {"colintern/py.typed", "colintern/reporting/templates/report.html"} <= set(names)
