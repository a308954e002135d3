"""What can be held against the image's files without a container engine; `docker/prove.sh` runs its lines for real."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from pages import block, documented, stand_in, words
from ruamel.yaml import YAML

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
    """Find a development tool, beside this Python."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (requirements-dev.txt has it)")
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
    scripts = [
        *sorted((ROOT / "docker").glob("*.sh")),
        ROOT / "docker/colintern",
        ROOT / "docker/entrypoint",
        ROOT / ".ci/run",
    ]
    found = subprocess.run([linter("shellcheck"), "-x", *scripts], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def compose() -> dict:
    return YAML(typ="safe").load((ROOT / "compose.yaml").read_text())


def makefile(target: str) -> str:
    """The lines that make runs for a target, as a shell gets them."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert found
    return found[1].replace("$$", "$")


def environment() -> dict[str, str]:
    return dict(re.findall(r"(\w+)=(\S+)", all_of("ENV")[-1]))


def test_entry_point_is_in_the_image_and_executable() -> None:
    assert json.loads(all_of("ENTRYPOINT")[0]) == ["/usr/local/bin/entrypoint"]
    assert "docker/entrypoint" in copied_from_context()
    assert (ROOT / "docker" / "entrypoint").stat().st_mode & 0o111 == 0o111


def test_compose_has_one_image_with_and_without_a_gpu() -> None:
    cpu, gpu = (compose()["services"][name] for name in ("cpu", "gpu"))
    asked = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert asked == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert cpu == gpu and cpu["init"] is True and cpu["user"].startswith("${COLINTERN_USER:?")
    assert cpu["build"]["args"].keys() <= {rest.partition("=")[0] for rest in all_of("ARG")}


def test_compose_mounts_the_repository_at_its_own_path_and_the_image_s_caches() -> None:
    service, image = compose()["services"]["cpu"], environment()
    places = {mount["target"]: mount["source"] for mount in service["volumes"]}
    assert places.pop("${PWD}") == "." and service["working_dir"] == "${PWD}"
    assert list(places) == [image["HF_HOME"], image["DVC_SITE_CACHE_DIR"]]
    # What `make docker-repro` makes where nothing is set is what compose mounts there.
    made = dict(re.findall(r'(\w+)="\$\{\w+:-([^}]+)\}"', makefile("docker-repro")))
    assert [source.replace("~", "$HOME") for source in places.values()] == [
        f"${{{name}:-{made[name]}}}" for name in ("HF_HOME", "DVC_SITE_CACHE_DIR")
    ]


def test_compose_nests_no_variable_in_another() -> None:
    """podman-compose ends a variable at the first brace: the rest stood as part of a folder's name."""
    for used in re.findall(r"\$\{[^}]*\}", (ROOT / "compose.yaml").read_text()):
        assert used.replace("$$", "").count("${") == 1, used


def test_compose_passes_variables_by_name_only() -> None:
    for name in compose()["services"]["cpu"]["environment"]:
        assert re.fullmatch(r"[A-Z_]+", name), f"{name} has a value"


@pytest.mark.parametrize("target", ["image", "docker-repro"])
def test_make_refuses_without_an_engine(target: str, tmp_path: Path) -> None:
    make = shutil.which("make")
    assert make
    done = subprocess.run([make, "-C", ROOT, target], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"make {target}: no running docker or podman here" in done.stderr


@pytest.mark.parametrize(
    ("uid", "apt", "code", "said"),
    [
        (0, "", 0, "cannot install chromium: there is no apt-get here; tests that need them are skipped"),
        (1000, "true", 0, "cannot install chromium: you are not root, and sudo needs a password or is missing; tests "),
        (0, "true", 0, ""),
        (0, 'if [ "$1" = update ]; then exit 100; fi', 2, "Error 100"),
        (0, '[ "$1" = update ]', 2, "Error 1"),
    ],
)
def test_make_test_deps_installs_what_is_missing_and_fails_where_that_fails(uid, apt, code, said, tmp_path: Path):
    folder = tmp_path / "bin"  # all there is on PATH: no browser
    folder.mkdir()
    for name in ("awk", "bash", "env", "true"):
        (folder / name).symlink_to(str(shutil.which(name)))
    stand_in(folder, "id", f"echo {uid}")
    if apt:
        stand_in(folder, "apt-get", f'echo "$@" >>{tmp_path}/asked; {apt}')
    text = re.sub("/usr/lib/postgresql", str(tmp_path), (ROOT / "Makefile").read_text())
    (tmp_path / "15" / "bin").mkdir(parents=True)
    (tmp_path / "15" / "bin" / "initdb").touch()
    (tmp_path / "Makefile").write_text(text)
    command = [str(shutil.which("make")), *words(documented("make test-deps"))[1:]]
    run = lambda: subprocess.run(command, cwd=tmp_path, env={"PATH": str(folder)}, capture_output=True, text=True)  # noqa: E731
    done = run()
    assert done.returncode == code and said in done.stderr, done.stderr
    if not said:
        assert (tmp_path / "asked").read_text().splitlines()[-1].endswith("--no-install-recommends chromium")
        shutil.copy(folder / "true", folder / "google-chrome")
        done = run()
        assert done.stdout + done.stderr == "" and len((tmp_path / "asked").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (documented("make image"), ["build --build-arg FLASH_ATTN= -t colintern .", "run --rm -i --user 0"]),
        (documented("make image FLASH_ATTN=2.8.3.post2"), ["--build-arg FLASH_ATTN=2.8.3.post2 -t colintern ."]),
        (
            documented('make image IMAGE_ARGS="--build-arg PYTHON_IMAGE=mirror.example/python:3.11-slim-bookworm"'),
            ["FLASH_ATTN= --build-arg PYTHON_IMAGE=mirror.example/python:3.11-slim-bookworm -t colintern ."],
        ),
        (
            block("attention-kernels.md", "The build is much faster for one GPU architecture"),
            ["2.8.3.post2 --build-arg FLASH_ATTN_CUDA_ARCHS=90 --build-arg MAX_JOBS=2 --build-arg FLASH_ATTN_WITHOUT="],
        ),
        (documented("make docker-repro"), ["compose version", "compose run --rm -T cpu dvc repro\n"]),
        (documented('make docker-repro CMD="dvc exp run -S lr=0.004"'), ["-T cpu dvc exp run -S lr=0.004\n"]),
        (block("container.md", "By hand, for a shell:"), ["compose run --rm gpu bash\n"]),
    ],
)
def test_what_the_engine_is_asked(command: str, asked: list[str], tmp_path: Path) -> None:
    stand_in(tmp_path / "bin", "docker", f'echo "$@" >> {tmp_path}/asked')
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    subprocess.run(command, shell=True, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, check=True, capture_output=True)
    said = (tmp_path / "asked").read_text().replace("-T gpu", "-T cpu")
    assert all(words in said for words in asked), said
    assert "repro" not in command or (tmp_path / ".cache" / "huggingface").is_dir()


def size_script():
    spec = importlib.util.spec_from_file_location("size", ROOT / "docker" / "size.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_size_counts_what_lies_on_the_disk_once(tmp_path: Path, capsys, monkeypatch) -> None:
    size = size_script()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_bytes(bytes(range(256)) * 12_000)
    (tmp_path / "again").hardlink_to(tmp_path / "sub" / "file")
    (tmp_path / "link").symlink_to(tmp_path / "sub")
    assert size.on_disk(str(tmp_path)) == pytest.approx(3_072_000, abs=20_000)
    assert size.packages()["torch"] > 10e6
    assert size.main(str(tmp_path)) == 0
    assert "3 MB, within the budget of" in capsys.readouterr().out
    monkeypatch.setattr(size, "BUDGET", 2)
    assert size.main(str(tmp_path)) == 1
    assert "error: the image takes 3 MB, its budget is 2 MB" in capsys.readouterr().err


def test_budget_in_the_docs_is_the_one_that_is_held() -> None:
    assert f"{size_script().BUDGET:,} MB" in (ROOT / "docs" / "container.md").read_text()


@pytest.mark.parametrize(
    ("command", "file"), [(documented("make sbom"), "sbom.json"), (documented("make image-sbom"), "sbom-image.json")]
)
def test_make_sbom_names_every_package_and_is_valid(command: str, file: str, tmp_path: Path) -> None:
    """Three packages are enough, since all of them take a minute: docker/prove.sh lists those of the real image."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    place = next((tmp_path / ".venv" / "lib").glob("python*/site-packages"))
    said = {name: distribution(name).locate_file(".") for name in ("dvc", "numpy", "torch")}
    for name, folder in said.items():
        about = Path(str(folder)) / f"{name}-{version(name)}.dist-info"
        shutil.copytree(about, place / about.name)
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "requirements-dev.txt", "docker/sbom.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for name in (".venv/.installed", ".tools/bin/uv"):  # set up already
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    # Runs what the image's shell is given, on the environment made above instead of the image's.
    stand_in(
        tmp_path / "bin",
        "docker",
        f'while [ $# -gt 2 ]; do shift; done; sh -c "$(echo "$2" | sed s,/opt/,{tmp_path}/.,)"',
    )
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(linter("cyclonedx-py")).parent), os.environ["PATH"]))
    assert "--no-validate" not in makefile("sbom") + (ROOT / "docker" / "sbom.sh").read_text()
    subprocess.run(command, shell=True, cwd=tmp_path, env=os.environ | {"PATH": path}, check=True, capture_output=True)
    bom = json.loads((tmp_path / file).read_text())
    assert (bom["bomFormat"], bom["specVersion"], bom["metadata"]["component"]["name"]) == (
        "CycloneDX", "1.6", "colintern",
    )  # fmt: skip
    assert {part["name"]: part["version"] for part in bom["components"]} == {name: version(name) for name in said}


def test_the_proofs_read_from_the_image_what_make_image_sbom_reads() -> None:
    [reads] = re.findall(r"colintern -c '(.+ tar -c .+)'", makefile("image-sbom"))
    for name in ("checks.sh", "engine-checks.sh"):
        assert f"-c '{reads}'" in (ROOT / "docker" / name).read_text()


def test_devcontainer_opens_a_stage_of_the_dockerfile_and_checks() -> None:
    opened = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    build = opened["build"]
    assert (ROOT / ".devcontainer" / build["dockerfile"]).resolve() == ROOT / "Dockerfile"
    assert f"base AS {build['target']}" in all_of("FROM")
    assert any(
        f"useradd --create-home --uid 1000 --shell /bin/bash {opened['remoteUser']}" in run for run in all_of("RUN")
    )
    assert opened["postCreateCommand"] == "make check" and "\ncheck: " in (ROOT / "Makefile").read_text()
