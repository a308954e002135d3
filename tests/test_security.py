"""What `make check` refuses beside style, tried on planted faults; and that a package with another hash is not
installed. The other rows: test_image.py, test_pr.py (workflows), test_remotes.py (secrets in what a run leaves)."""

import ast
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from transformers.utils import is_kernels_available

MAKEFILE = (ROOT / "Makefile").read_text()
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


def test_code_of_a_hub_repository_is_never_run():
    asked = [
        f"{file}:{node.lineno}"
        for folder in ("colintern", "stages", "bench")
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (isinstance(node, ast.keyword) and node.arg == "trust_remote_code")
        or (isinstance(node, ast.Constant) and node.value == "trust_remote_code")
    ]
    assert not asked


def test_kernels_of_the_hub_come_from_checked_folders_alone():
    files = [file for folder in ("colintern", "stages", "bench") for file in (ROOT / folder).rglob("*.py")]
    using = [file for file in files if re.search(r"(?m)^\s*(from|import) kernels\b", file.read_text())]
    assert using == [ROOT / "colintern" / "modeling" / "kernels.py"]
    words = set(re.findall(r"\w+", using[0].read_text()))
    assert "get_local_kernel" in words
    assert not words & {"get_kernel", "get_locked_kernel", "load_kernel", "install_kernel", "has_kernel"}
    assert not is_kernels_available(), "transformers would load kernels that no commit pins"


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


@pytest.mark.parametrize("hashed", ["right", "wrong", "none"])
def test_make_installs_by_hash_alone(tmp_path, hashed):
    uv = shutil.which("uv", path=f"{ROOT}/.tools/bin{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("no uv; `make test` brings it")
    (tmp_path / ".tools" / "bin").mkdir(parents=True)
    (tmp_path / ".tools" / "bin" / "uv").symlink_to(uv)
    shutil.copy(ROOT / "Makefile", tmp_path)
    digest = wheel(tmp_path)
    line = {"right": f" --hash=sha256:{digest}", "wrong": f" --hash=sha256:{digest[::-1]}", "none": ""}[hashed]
    (tmp_path / "requirements.txt").write_text(f"tiny==1{line}\n")
    env = os.environ | {"UV_OFFLINE": "1", "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(tmp_path), "UV_NO_CACHE": "1"}
    done = subprocess.run(
        ["make", ".venv/.installed", f"PYTHON={sys.executable}"], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (tmp_path / ".venv" / "bin" / "python").exists(), done.stderr
    assert len(list(tmp_path.glob(".venv/lib/*/site-packages/tiny.py"))) == (hashed == "right"), done.stderr
    said = {"right": "", "wrong": "Hash mismatch", "none": "--require-hashes"}[hashed]
    assert said in done.stderr and not (tmp_path / ".venv" / ".installed").exists(), "this folder is no package"


def test_every_requirement_has_hashes_and_every_install_asks_for_them():
    entries = re.sub(r"\\\n", " ", (ROOT / "requirements.txt").read_text()).splitlines()
    entries = [line for line in entries if line and line.lstrip()[0] != "#"]
    assert len(entries) > 100
    for entry in entries:
        assert re.match(r"[\w.\[\],-]+==\S+ .*--hash=sha256:[0-9a-f]{64}", entry), entry
    installs = [line for line in MAKEFILE.splitlines() if "pip install" in line]
    assert len(installs) == 3
    assert [line for line in installs if "--require-hashes -r" not in line] == [
        line for line in installs if line.endswith("--no-deps --no-build-isolation -e .")
    ]
