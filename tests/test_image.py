"""What can be held against the Dockerfile without a container engine; `docker/prove.sh` runs its lines for real."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = sorted(ROOT.glob("docker/*.txt"))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, rest) pairs: comments dropped, continued lines joined by one space."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


def all_of(name: str) -> list[str]:
    return [rest for word, rest in instructions() if word == name]


def copied_from_context() -> set[str]:
    """Sources of every COPY that reads the build context."""
    sources: set[str] = set()
    for rest in all_of("COPY"):
        if "--from=" not in rest:
            words = [word for word in rest.split() if not word.startswith("--")]
            sources.update(words[:-1])
    return sources


def linter(name: str) -> str:
    """A program of the dev extra, beside this Python."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (it comes with the dev extra)")
    return found


def test_hadolint_finds_nothing() -> None:
    found = subprocess.run([linter("hadolint"), "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_only_foreign_image_is_pinned_by_digest() -> None:
    arguments = dict(rest.partition("=")[::2] for rest in all_of("ARG"))
    stages: set[str] = set()
    foreign: set[str] = set()
    for rest in all_of("FROM"):
        image, *alias = rest.split()
        if image not in stages and not image.startswith("env${"):
            foreign.add(image)
        stages.update(alias[1:])
    assert foreign == {"${PYTHON_IMAGE}"}
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}", arguments["PYTHON_IMAGE"])


def test_conditional_stage_exists_with_and_without_flash_attn() -> None:
    stages = {rest.split()[-1] for rest in all_of("FROM")}
    assert "env${FLASH_ATTN:+-flash} AS env-chosen" in all_of("FROM")
    assert {"env", "env-flash", "env-chosen"} <= stages


def test_runs_as_a_numbered_user_other_than_root() -> None:
    last_stage = instructions()[max(i for i, (word, _) in enumerate(instructions()) if word == "FROM") :]
    users = [rest for word, rest in last_stage if word == "USER"]
    assert users and re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert "RUN" not in [word for word, _ in last_stage[last_stage.index(("USER", users[-1])) :]]


@pytest.mark.parametrize("instruction", ["ARG", "ENV", "LABEL"])
def test_no_secret_is_baked_in(instruction: str) -> None:
    names = re.findall(r"(\w+)=", " ".join(f"{rest}=" if "=" not in rest else rest for rest in all_of(instruction)))
    secret = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY", re.IGNORECASE)
    assert [name for name in names if secret.search(name)] == []


def test_every_python_package_is_installed_by_hash() -> None:
    installs = [part for run in all_of("RUN") for part in re.split(r"&&|;", run) if "pip install" in part]
    assert len(installs) >= 4
    for command in installs:
        assert "--require-hashes" in command and " -r " in command, command
    assert any(command.rstrip().endswith("/build/requirements.txt") for command in installs)


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_lock_files_of_the_image_have_one_version_and_hashes_each(lock: Path) -> None:
    entries = [line for line in re.sub(r"\\\n", " ", lock.read_text()).splitlines() if line and line[0] not in "# "]
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.]+ .*--hash=sha256:[0-9a-f]{64}", entry), entry


def test_flash_attn_lock_is_named_by_its_version() -> None:
    locks = list(ROOT.glob("docker/flash-attn-*.txt"))
    assert locks
    for lock in locks:
        assert f"flash-attn=={lock.stem.removeprefix('flash-attn-')} " in lock.read_text()


def test_nvcc_has_the_cuda_version_of_torch() -> None:
    minor = {
        name: re.search(rf"^{name}==(\d+\.\d+)\.", text, re.MULTILINE)
        for name, text in (
            ("nvidia-cuda-runtime", (ROOT / "requirements.txt").read_text()),
            ("nvidia-cuda-nvcc", (ROOT / "docker/flash-build.txt").read_text()),
        )
    }
    versions = {found.group(1) for found in minor.values() if found}
    assert all(minor.values()) and len(versions) == 1, "after a new torch, renew docker/flash-build.txt"


def test_build_context_is_exactly_what_is_copied() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything (.git, .venv, data, .env) is left out first"
    assert all(line.startswith("!") for line in lines[1:])
    copied = {re.sub(r"\$\{\w+\}", "*", source) for source in copied_from_context()}
    assert {line[1:] for line in lines[1:]} == copied
    for pattern in copied:
        assert list(ROOT.glob(pattern)), f"{pattern} matches no file"


def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [ROOT / "docker/prove.sh", ROOT / "docker/colintern", ROOT / ".ci/run"]
    found = subprocess.run([linter("shellcheck"), *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
