"""Attention kernels of the hub, over a hub on loopback: what is fetched, what is refused, and that nothing else is run.

The kernel is pure Python, a "universal" build, so that it runs on a CPU; it computes by torch's own attention and
counts its calls. No kernel for CUDA was ever run here.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from forked_python import UNHUBBED, run_server
from hub import Hub, running, sha256
from huggingface_hub import constants
from small_run import params
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from colintern.core.errors import UserError
from colintern.modeling.attention import resolve_attn_implementation
from colintern.modeling.kernels import select_build_files
from colintern.params import load_recipe
from colintern.preflight.checks import FAIL, PASS, RUN_CHECKS, WARN, RunFacts
from colintern.preflight.environment import probe_machine
from colintern.storage.hub import Repo
from colintern.storage.identity import fingerprint, stage_identity
from colintern.storage.manifest import Files, hash_source_files

pytestmark = pytest.mark.integration
NAME, REVISION = "kernels-test/sdpa", "b" * 40
KERNEL = f"{NAME}@{REVISION}"
INIT = """
from .counted import flash_attn_func, flash_attn_varlen_func
"""
COUNTED = """
import atexit, json, os
from torch.nn.functional import scaled_dot_product_attention

calls = {"causal": 0, "both ways": 0, "with gradient": 0}

def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    calls["causal" if causal else "both ways"] += 1
    calls["with gradient"] += q.requires_grad
    assert q.dtype == k.dtype == v.dtype, "as kernels for CUDA want it"
    parts = (part.transpose(1, 2) for part in (q, k, v))
    return scaled_dot_product_attention(
        *parts, dropout_p=dropout_p, scale=softmax_scale, is_causal=causal, enable_gqa=True).transpose(1, 2)

def flash_attn_varlen_func(*args, **kwargs):
    raise AssertionError("batches are not packed")

@atexit.register
def tell():
    with open(os.environ.get("CALLS", os.devnull), "w") as file:
        json.dump(calls, file)
"""
METADATA = {
    "id": "_sdpa_1", "name": "sdpa-counted", "version": 1, "license": "Apache-2.0", "python-depends": [],
    "backend": {"type": "cpu"},
}  # fmt: skip
HERE = "build/torch-universal"
IDS = itertools.count(2)  # of kernels in one process: Python imports a name once
FILES = {"__init__.py": INIT, "counted.py": COUNTED, "metadata.json": json.dumps(METADATA)}


class Workspace(NamedTuple):
    """A repository whose fetch-data and verify have run, and a hub that has a kernel."""

    path: Path
    hub: Hub
    commands: Path

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.hub.requests.clear()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "DVC_"))}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.path / "hf"), "PYTHONPATH": str(ROOT)}
        own |= {"CALLS": str(self.path / "calls.json"), "PYTHONDONTWRITEBYTECODE": ""}
        # What the environment changes is read by libraries when they are imported.
        python = sys.executable if env else str(self.commands / "python")
        return subprocess.run([python, *command], cwd=self.path, env=kept | own | env, capture_output=True, text=True)

    def stage(self, name: str, **env: str) -> None:
        done = self.run("-m", f"stages.{name}", **env)
        assert done.returncode == 0, done.stdout + done.stderr

    def json(self, name: str) -> dict:
        return json.loads((self.path / name).read_text())

    @property
    def cached(self) -> Path:
        return self.path / f"hf/hub/kernels--kernels-test--sdpa/snapshots/{REVISION}"

    @property
    def ran(self) -> bool:
        return (self.path / "calls.json").exists()


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    message = ("\n" + done.stderr).rpartition("\nerror: ")[2]
    for word in words:
        assert word in message, f"{word!r} not in {message}"


@pytest.fixture(scope="module")
def workspace(fetched, tmp_path_factory):
    path = tmp_path_factory.mktemp("kernel") / "repo"
    shutil.copytree(fetched, path, symlinks=True, ignore=shutil.ignore_patterns(".scratch", "experiments"))
    with contextlib.chdir(path):
        params(attention=KERNEL, epochs=1)
    with (
        running() as hub,
        run_server(UNHUBBED, HF_HUB_OFFLINE="", HF_ENDPOINT=hub.url, HF_HOME=str(path / "hf")) as commands,
    ):
        workspace = Workspace(path, hub, commands)
        served = {f"{HERE}/{name}": text.encode() for name, text in FILES.items()}
        other = "build/torch29-cxx11-cu126-x86_64-linux/_sdpa.abi3.so"
        more = {"README.md": b"a card", f"{HERE}/__pycache__/counted.pyc": b"unseen", other: b"of another torch"}
        hub.add("kernel", NAME, REVISION, served | more)
        workspace.stage("fetch_data")
        yield workspace


def test_the_builds_that_fit_are_fetched_and_named_and_no_more(workspace):
    entry = workspace.json("data/manifest.json")["kernel"]
    assert (entry["folder"], entry["revision"]) == (NAME, REVISION)
    want = {f"{HERE}/{name}": text.encode() for name, text in FILES.items()}
    assert entry["files"] == {name: {"size": len(data), "sha256": sha256(data)} for name, data in want.items()}
    asked = {request.path.partition(f"{REVISION}/")[2] for request in workspace.hub.asked("GET", "/resolve/")}
    assert asked == set(want)
    assert not workspace.ran, "fetching imports nothing"
    workspace.stage("fetch_data", HF_HUB_OFFLINE="1")
    assert workspace.json("data/manifest.json")["kernel"] == entry


def params_of(workspace: Workspace, attention: str) -> None:
    with contextlib.chdir(workspace.path):
        params(attention=attention, epochs=1)


def scores(metrics: dict) -> dict[str, float]:
    """Every number of nested metrics, by its path."""
    found = {}
    for key, value in metrics.items():
        nested = scores(value) if isinstance(value, dict) else {"": value}
        found |= {f"{key}/{name}": number for name, number in nested.items() if isinstance(number, float)}
    return found


def test_the_kernel_trains_and_evaluates_as_sdpa_does_without_a_word_to_the_hub(workspace):
    planted = workspace.cached / HERE / "counted/__init__.py"  # a package goes before a module of its name
    planted.parent.mkdir()
    planted.write_text("raise SystemExit('a file that no manifest names was run')")
    results = {}
    for chosen in (KERNEL, "sdpa"):
        params_of(workspace, chosen)
        for stage in ("train", "evaluate"):
            (workspace.path / "calls.json").unlink(missing_ok=True)
            workspace.stage(stage)
            assert workspace.hub.requests == []
            assert workspace.ran == (chosen == KERNEL)
            if workspace.ran:
                calls = workspace.json("calls.json")  # one or two of each by our own check
                assert calls["causal"] > 5 and calls["both ways"] > 5
                assert (calls["with gradient"] > 5) == (stage == "train")
        identity = workspace.json("experiments/colintern/identity.json")
        manifest = workspace.json("data/manifest.json")
        assert identity["kernel"] == (manifest["kernel"] if chosen == KERNEL else None)
        assert identity["params"]["attention"] == chosen
        results[chosen] = (workspace.json("metrics/train.json"), workspace.json("results/mteb_evaluation/eval.json"))
    (own, own_scores), (sdpa, sdpa_scores) = results.values()
    assert own["loss"] == pytest.approx(sdpa["loss"], rel=1e-4)
    assert scores(own_scores) == pytest.approx(scores(sdpa_scores), abs=1e-4)
    shutil.rmtree(planted.parent)
    assert not list(workspace.cached.rglob("__pycache__")), "nothing is written where others look"


def test_offline_with_an_empty_cache_the_command_that_fetches_it_is_printed(workspace, tmp_path):
    params_of(workspace, KERNEL)
    done = workspace.run("-m", "stages.fetch_data", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    command = f"hf download {NAME} --revision {REVISION} --repo-type kernel"
    refused(done, 7, command)
    refused(workspace.run("-m", "stages.verify", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "other")), 7, command)
    workspace.stage("verify", HF_HOME=str(tmp_path / "other"))  # a reader fetches what the manifest names
    hf = str(Path(sys.executable).with_name("hf"))
    env = os.environ | {"HF_ENDPOINT": workspace.hub.url, "HF_HOME": str(tmp_path)}
    subprocess.run([hf, *command.split()[1:]], env=env, check=True, capture_output=True)
    workspace.stage("fetch_data", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))


def test_a_revision_that_the_hub_has_not_and_a_kernel_that_was_not_fetched_are_named(workspace):
    params_of(workspace, f"{NAME}@{'c' * 40}")
    refused(workspace.run("-m", "stages.fetch_data"), 2, f"attention: '{'c' * 40}' is no commit of {NAME}")
    done = workspace.run("-m", "stages.train")
    refused(done, 2, f"is not the kernel in data/manifest.json, {KERNEL}; run: dvc repro fetch-data")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Puts a kernel into the cache and names its files in the manifest, as fetch-data does."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(build: str = HERE, metadata: dict | None = None, **files: str) -> Path:
        folder = Repo("attention", NAME, REVISION, "kernel").snapshot_folder
        facts = METADATA | {"id": f"_sdpa_{next(IDS)}"} | (metadata or {})
        named = FILES | {"metadata.json": json.dumps(facts)} | {f"{name}.py": text for name, text in files.items()}
        for name, text in named.items():
            (folder / build / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / build / name).write_text(text)
        entry = Files(NAME, REVISION, hash_source_files(str(folder)))
        Path("data").mkdir(exist_ok=True)
        Path("data/manifest.json").write_text(json.dumps({"kernel": entry._asdict()}))
        return folder / build

    return put


def wrong(words: str, training: bool = False) -> None:
    with pytest.raises(UserError) as caught:
        resolve_attn_implementation(KERNEL, "float32", training)
    assert words in str(caught.value), caught.value


def test_a_flipped_byte_is_found_before_anything_is_imported(place):
    marker = "open('ran', 'w')\n"
    file = place(counted=marker + COUNTED) / "counted.py"
    before = file.stat()
    file.write_text(file.read_text().replace("False", "fALSE", 1))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that flips a bit does not touch the clock
    wrong(f"{file}: {before.st_size} bytes with sha256")
    assert not Path("ran").exists()
    place(counted=marker + COUNTED)
    assert resolve_attn_implementation(KERNEL, "float32", training=True).startswith("kernel-")
    assert Path("ran").exists()


def test_another_byte_is_another_identity(place, monkeypatch):
    params = dataclasses.replace(DEMO, attention=KERNEL)
    Path("dvc.yaml").write_text("stages: {train: {params: [attention], deps: [data/manifest.json]}}")
    names, runs = [], []
    for more in ("", "# more\n"):
        place(counted=COUNTED + more)
        names.append(resolve_attn_implementation(KERNEL, "float32"))
        runs.append(fingerprint(stage_identity("train", params)))
    other = dataclasses.replace(params, attention=f"{NAME}@{'c' * 40}")
    runs.append(fingerprint(stage_identity("train", other)))
    assert len(set(names)) == 2 and len(set(runs)) == 3
    assert not any("/" in name or "flash" in name for name in names), "transformers would ask the hub"


@pytest.mark.parametrize(
    ("build", "metadata", "files", "words"),
    [
        ("build/torch29-cxx11-cu126-x86_64-linux", {}, {}, "torch29-cxx11-cu126-x86_64-linux"),
        ("build/torch-cuda", {"backend": {"type": "cuda"}}, {}, "its build torch-cuda needs a GPU"),
        (HERE, {"python-depends": ["einops"]}, {}, "requires Python dependency `einops`"),
        (HERE, {"kernels-minver": "99.0.0"}, {}, "requires kernels>=99.0.0"),
        (HERE, {"kernel-depends": [{"repo-id": "a/b", "version": 1}]}, {}, "needs others, a/b, which no revision"),
        (HERE, {"backend": {"type": "cpx"}}, {}, "the kernel cannot be used: "),
        (HERE, {}, {"counted": "import nothing_here"}, "ModuleNotFoundError: No module named 'nothing_here'"),
        (HERE, {}, {"__init__": "from .counted import flash_attn_varlen_func as f"}, "no flash_attn_func, and only"),
        (HERE, {}, {"counted": COUNTED.replace("is_causal=causal", "is_causal=False")}, "(causal=True) is "),
        (HERE, {}, {"counted": COUNTED.replace("softmax_scale=None", "scale=None")}, "flash_attn_func fails on cpu"),
    ],
)
def test_a_kernel_that_cannot_work_is_refused(place, build, metadata, files, words):
    place(build, metadata, **files)
    wrong(words)


def test_a_kernel_without_gradient_evaluates_and_does_not_train(place):
    place(counted=COUNTED.replace("enable_gqa=True).transpose(1, 2)", "enable_gqa=True).transpose(1, 2).detach()"))
    assert resolve_attn_implementation(KERNEL, "float32")
    wrong("flash_attn_func has no gradient; it can evaluate, but not train", training=True)


def test_a_kernel_that_is_not_deterministic_is_refused_where_that_is_asked_for(place, monkeypatch):
    place(counted=COUNTED.replace(", deterministic=False", ""))
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: True)
    wrong("deterministic: true is not possible")


def test_under_autocast_a_kernel_gets_what_torchs_own_attention_would(place):
    place()
    attend = ALL_ATTENTION_FUNCTIONS[resolve_attn_implementation(KERNEL, "bfloat16", training=True)]
    parts = [torch.randn(1, 2, 5, 8, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = attend(nn.Module(), *parts, None, scaling=0.5, is_causal=True)
    assert (result.shape, result.dtype) == ((1, 5, 2, 8), torch.bfloat16)


def test_without_flash_attn_nothing_else_takes_its_place():
    with pytest.raises(UserError, match="needs the package flash-attn"):
        resolve_attn_implementation("flash_attention_2", "bfloat16")


DEMO = load_recipe(ROOT / "recipes" / "demo.yaml")
REPO = Repo("attention", "a/b", "c" * 40, "kernel")


def built(*names: str) -> list[str]:
    return [f"build/{name}/metadata.json" for name in names]


def test_the_best_build_for_this_machine_is_chosen_without_bytecode(monkeypatch):
    monkeypatch.setattr("torch.__version__", "2.13.0+cu130")
    monkeypatch.setattr("torch.version.cuda", "13.0")
    cpu = platform.machine()
    here, stable = f"torch213-cxx11-cu130-{cpu}-linux", f"torch-stable-abi210-cu130-{cpu}-linux"
    old, others = (
        f"torch212-cxx11-cu130-{cpu}-linux",
        (f"torch213-cxx11-cu126-{cpu}-linux", "torch213-cxx11-cu130-m68k-linux"),
    )
    more = [f"build/{here}/__init__.pyc", "build/README.md", "README.md"]
    assert select_build_files(REPO, [*built(old, *others, here), *more]) == built(here)
    assert select_build_files(REPO, built(stable, here)) == built(stable), "the better one of two"
    with pytest.raises(UserError, match=rf"has no build for this machine: {old}: Torch version"):
        select_build_files(REPO, built("tvm-unheard-of", old))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("colintern.modeling.kernels.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package kernels, which is in requirements"):
        select_build_files(REPO, built("torch-universal"))


def test_the_doctor_says_what_a_kernel_needs(place):
    facts = RunFacts(dataclasses.replace(DEMO, attention=KERNEL), {}, probe_machine())
    assert RUN_CHECKS["attention kernel"](facts)[::2] == (WARN, "dvc repro fetch-data")
    place()
    assert RUN_CHECKS["attention kernel"](facts) == (PASS, f"{KERNEL}, every file by its hash")
    place("build/torch-cuda", {"backend": {"type": "cuda"}})
    status, found, remedy = RUN_CHECKS["attention kernel"](facts)
    assert (status, found, remedy) == (FAIL, f"{KERNEL} needs a GPU", "attention: auto")
