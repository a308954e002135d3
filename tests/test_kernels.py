"""Attention kernels of the hub, over a hub on loopback: what is downloaded, what is refused, and that it computes.

The kernel is pure Python, a "universal" build, so that it runs on a CPU; it computes by torch's own attention and
counts its calls. No kernel for CUDA was ever run here.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from forked_python import UNHUBBED, run_server
from hub import Hub, running
from huggingface_hub import constants
from small_run import params
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from colintern.core.errors import UserError
from colintern.modeling.attention import resolve_attn_implementation
from colintern.params import load_recipe
from colintern.preflight.checks import PASS, RUN_CHECKS, WARN, RunFacts
from colintern.preflight.environment import probe_machine
from colintern.storage.hub import Repo

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
DEMO = load_recipe(ROOT / "recipes" / "demo.yaml")
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


def test_the_build_that_fits_is_downloaded_and_nothing_else(workspace):
    asked = {request.path.partition(f"{REVISION}/")[2] for request in workspace.hub.asked("GET", "/resolve/")}
    assert asked == {f"{HERE}/{name}" for name in FILES}
    assert not workspace.ran, "downloading imports nothing"
    workspace.stage("fetch_data", HF_HUB_OFFLINE="1")
    assert workspace.hub.requests == []


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


def test_the_kernel_trains_and_evaluates_as_sdpa_does_without_a_request_to_the_hub(workspace):
    results = {}
    for chosen in (KERNEL, "sdpa"):
        params_of(workspace, chosen)
        for stage in ("train", "evaluate"):
            (workspace.path / "calls.json").unlink(missing_ok=True)
            workspace.stage(stage)
            assert workspace.hub.requests == []
            assert workspace.ran == (chosen == KERNEL)
            if workspace.ran:
                calls = workspace.json("calls.json")
                assert calls["causal"] > 5 and calls["both ways"] > 5
                assert (calls["with gradient"] > 5) == (stage == "train")
        assert workspace.json("experiments/colintern/identity.json")["params"]["attention"] == chosen
        results[chosen] = (workspace.json("metrics/train.json"), workspace.json("results/mteb_evaluation/eval.json"))
    (own, own_scores), (sdpa, sdpa_scores) = results.values()
    assert own["loss"] == pytest.approx(sdpa["loss"], rel=1e-4)
    assert scores(own_scores) == pytest.approx(scores(sdpa_scores), abs=1e-4)


def test_with_an_empty_cache_the_command_that_downloads_it_is_printed(workspace, tmp_path):
    params_of(workspace, KERNEL)
    command = f"hf download {NAME} --revision {REVISION} --repo-type kernel"
    refused(workspace.run("-m", "stages.fetch_data", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)), 7, command)
    refused(workspace.run("-m", "stages.train", HF_HOME=str(tmp_path)), 7, f"{NAME} is not downloaded", command)
    hf = str(Path(sys.executable).with_name("hf"))
    env = os.environ | {"HF_ENDPOINT": workspace.hub.url, "HF_HOME": str(tmp_path)}
    subprocess.run([hf, *command.split()[1:]], env=env, check=True, capture_output=True)
    workspace.stage("fetch_data", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))


def test_a_revision_that_the_hub_does_not_have_is_named(workspace):
    params_of(workspace, f"{NAME}@{'c' * 40}")
    refused(workspace.run("-m", "stages.fetch_data"), 2, f"attention: '{'c' * 40}' is no commit of {NAME}")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Puts a kernel into the cache of a process without a network, and returns its repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commits = (f"{number:040x}" for number in itertools.count(1))

    def put(build: str = HERE, metadata: dict | None = None, **files: str) -> Repo:
        repo = Repo("attention", NAME, next(commits), "kernel")
        facts = METADATA | {"id": f"_sdpa_{secrets.token_hex(4)}"} | (metadata or {})  # Python imports a name once
        named = FILES | {"metadata.json": json.dumps(facts)} | {f"{name}.py": text for name, text in files.items()}
        for name, text in named.items():
            (repo.snapshot_folder / build / name).parent.mkdir(parents=True, exist_ok=True)
            (repo.snapshot_folder / build / name).write_text(text)
        return repo

    return put


def load(repo: Repo, dtype: str = "float32") -> Callable[..., tuple[torch.Tensor, None]]:
    return ALL_ATTENTION_FUNCTIONS[resolve_attn_implementation(f"{NAME}@{repo.revision}", dtype)]


@pytest.mark.parametrize(
    ("build", "metadata", "files", "words"),
    [
        ("build/torch29-cxx11-cu126-x86_64-linux", {}, {}, "Cannot find a build variant for this system"),
        (HERE, {"python-depends": ["einops"]}, {}, "requires Python dependency `einops`"),
        (HERE, {"kernels-minver": "99.0.0"}, {}, "requires kernels>=99.0.0"),
        (HERE, {"kernel-depends": [{"repo-id": "a/b", "version": 1}]}, {}, "pass an explicit `revision=<commit>`"),
        (HERE, {"backend": {"type": "cpx"}}, {}, "cannot be used: "),
        (HERE, {}, {"counted": "import nothing_here"}, "ModuleNotFoundError: No module named 'nothing_here'"),
        (HERE, {}, {"__init__": "from .counted import flash_attn_varlen_func as f"}, "has no flash_attn_func"),
    ],
)
def test_a_kernel_that_cannot_work_is_refused(place, build, metadata, files, words):
    repo = place(build, metadata, **files)
    with pytest.raises(UserError, match=f"^attention: .*{NAME}") as caught:
        load(repo)
    assert words in str(caught.value), caught.value


def test_a_kernel_without_gradient_evaluates_and_does_not_train(place):
    attend = load(place(counted=COUNTED.replace("enable_gqa=True)", "enable_gqa=True).detach()")))
    parts = [torch.randn(1, 2, 5, 8, requires_grad=True) for _ in range(3)]
    with torch.no_grad():
        attend(nn.Module(), *parts, None, is_causal=True)
    with pytest.raises(UserError, match="has no gradient; it can evaluate, but not train"):
        attend(nn.Module(), *parts, None, is_causal=True)


def test_a_kernel_that_is_not_deterministic_is_refused_where_that_is_asked_for(place, monkeypatch):
    monkeypatch.setattr("torch.are_deterministic_algorithms_enabled", lambda: True)
    load(place())
    with pytest.raises(UserError, match="deterministic: true is not possible"):
        load(place(counted=COUNTED.replace(", deterministic=False", "")))


def test_under_autocast_a_kernel_gets_what_torchs_own_attention_would(place):
    attend = load(place(), "bfloat16")
    parts = [torch.randn(1, 2, 5, 8, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16)]
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = attend(nn.Module(), *parts, None, scaling=0.5, is_causal=True)
    assert (result.shape, result.dtype) == ((1, 5, 2, 8), torch.bfloat16)


def test_without_flash_attn_nothing_else_takes_its_place():
    with pytest.raises(UserError, match="needs the package flash-attn"):
        resolve_attn_implementation("flash_attention_2", "bfloat16")


def test_the_doctor_says_whether_a_kernel_can_be_used(place):
    def check_revision(revision: str) -> tuple[str, str, str]:
        facts = RunFacts(dataclasses.replace(DEMO, attention=f"{NAME}@{revision}"), {}, probe_machine())
        return (*RUN_CHECKS["attention kernel"](facts), "")[:3]

    assert check_revision("c" * 40) == (WARN, f"{NAME} is not downloaded", "dvc repro fetch-data")
    assert check_revision(place().revision)[0] == PASS
