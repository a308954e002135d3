"""`colintern doctor`: every rule on made facts, the facts of this machine for real, and the program."""

import contextlib
import dataclasses
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import BASE, ROOT
from hub import Fault, running

from colintern.commands.doctor import _colour_status
from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.modeling.base_config import load_cached_or_preset_config, make_preset_config
from colintern.params import load_recipe
from colintern.preflight.checks import (
    ENVIRONMENT_CHECKS,
    FAIL,
    PASS,
    RUN_CHECKS,
    WARN,
    RunFacts,
    collect_run_facts,
    run_checks,
    run_preflight,
)
from colintern.preflight.environment import (
    Environment,
    Machine,
    get_available_memory,
    has_cpu_bf16,
    list_hub_repos,
    probe_environment,
    probe_hub,
    probe_machine,
)

pytestmark = pytest.mark.integration
DEMO, RECIPE = (load_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("demo", "internvl3_5-1b"))
GPU = Machine(1, "580.95.05", "2.13.0", "13.0", "NVIDIA A100", 80 << 30, False, True, True, 60 << 30, 10**12, 0)
CPU = dataclasses.replace(GPU, num_cards=0, driver="", gpu="", gpu_bytes=0, has_flash_attn=False)
ENVIRONMENT_1B = Environment(False, "", "abc1234", 0, True, ("store",), "store", ("a/b",), (), "", True, (), False, "")


@pytest.fixture(scope="module")
def counted():
    """`RunFacts` of params, on the real counts of their base; `size` is that of another preset."""
    known = {}

    def facts(params, machine=GPU, size="internvl3_5-1b", **changes) -> RunFacts:
        key = (params.base, size, params.lora_targets)
        if key not in known:
            config = str(BASE) if params.base == "demo/base" else make_preset_config(size)
            known[key] = collect_run_facts(params, config, None).counts
        return RunFacts(dataclasses.replace(params, **changes), known[key], machine)

    return facts


def of(facts: RunFacts, name: str):
    [finding] = [finding for finding in run_checks(facts, RUN_CHECKS) if finding.name == name]
    return finding


def test_both_recipes_pass_every_check_on_a_machine_that_fits(counted):
    for facts in (counted(DEMO), counted(DEMO, CPU), counted(RECIPE)):
        assert [f for f in run_checks(facts, RUN_CHECKS) if f.status != PASS] == []


def test_the_checklist_of_the_guide_is_all_there():
    assert list(RUN_CHECKS) + list(ENVIRONMENT_CHECKS) == [
        *(
            "base",
            "epochs",
            "effective batch",
            "learning rate",
            "LoRA on",
            "target modules",
            "head included",
            "vision frozen",
        ),
        *("bf16", "attention kernel", "disk", "memory", "driver and CUDA", "git", "path", "DVC remote"),
        *("hub access", "W&B"),
    ]


@pytest.mark.parametrize(
    ("recipe", "name", "changes", "words"),
    [
        (RECIPE, "epochs", {"epochs": 1}, ("below 5", "not measured here")),
        (RECIPE, "effective batch", {"batch_size": 2, "micro_batch_size": 2}, ("below 64", "16 x 4 compares with 16")),
        (DEMO, "effective batch", {"batch_size": 8, "micro_batch_size": 8}, ("below 32", "collapses")),
        (RECIPE, "learning rate", {"lr": 6e-3}, ("not within 2e-05 to 0.0001",)),
        (DEMO, "learning rate", {"lr": 5e-5}, ("not within 0.003 to 0.01", "6e-3 gives 82.7")),
        (RECIPE, "bf16", {"dtype": "float32"}, ("twice the memory",)),
    ],
)
def test_settings_that_are_known_to_do_badly_are_warned_of(counted, recipe, name, changes, words):
    found = of(counted(recipe, **changes), name)
    assert found.status == WARN and found.remedy
    assert all(word in found.found for word in words), found


@pytest.mark.parametrize(
    ("size", "good", "bad"),
    [("internvl3_5-2b", 3e-5, 2e-4), ("internvl3_5-4b", 3e-5, 1e-4), ("internvl3_5-8b", 1e-5, 1e-4)],
)
def test_the_learning_rate_is_judged_by_the_size(counted, size, good, bad):
    assert of(counted(RECIPE, size=size, lr=good), "learning rate").status == PASS
    assert of(counted(RECIPE, size=size, lr=bad), "learning rate").status == WARN


@pytest.mark.parametrize(
    ("targets", "failing"),
    [
        (("custom_text_prj",), ["LoRA on", "target modules", "head included"]),
        (RECIPE.lora_targets[:-1], ["target modules", "head included"]),
        ((*RECIPE.lora_targets, r"vision_tower\..*\.q_proj"), ["target modules", "vision frozen"]),
        ((*RECIPE.lora_targets, "layers.*.mlp.up_proj"), ["target modules"]),
    ],
)
def test_targets_that_are_wrong_fail(counted, targets, failing):
    facts = counted(dataclasses.replace(RECIPE, lora_targets=targets))
    assert [finding.name for finding in run_checks(facts, RUN_CHECKS) if finding.status == FAIL] == failing


def test_only_the_head_is_warned_of(counted):
    found = of(counted(dataclasses.replace(RECIPE, lora_targets=("custom_text_proj",))), "target modules")
    assert found.status == WARN and "1 modules of 197" in found.found


@pytest.mark.parametrize(
    ("name", "machine", "changes", "status", "words"),
    [
        ("bf16", {"has_bf16": False}, {}, WARN, "emulated by NVIDIA A100"),
        ("attention kernel", {"has_flash_attn": False}, {}, WARN, "sdpa; the guide: flash attention"),
        ("attention kernel", {"has_flash_attn": False}, {"attention": "flash_attention_2"}, FAIL, "needs flash-attn"),
        ("attention kernel", {"gpu": ""}, {}, PASS, "sdpa; flash attention is for GPUs"),
        ("attention kernel", {"gpu": ""}, {"attention": "flash_attention_2"}, FAIL, "needs a GPU"),
        ("attention kernel", {}, {"attention": "flash_attention_2", "dtype": "float32"}, FAIL, "needs dtype: bfloat16"),
        ("disk", {"disk_bytes": 10**8}, {}, FAIL, "need 1.0 GB"),
        ("disk", {"disk_bytes": 10**11}, {}, WARN, "not for all of feature_cache_gb 230"),
        ("disk", {"disk_bytes": 10**11, "features_bytes": 15 * 10**10}, {}, PASS, "100.0 GB free"),
        ("memory", {"gpu_bytes": 2 * 10**9}, {}, FAIL, "weights and optimizer 2.1 GB"),
        ("memory", {"gpu_bytes": 8 << 30}, {}, WARN, "16 GB at least"),
        ("memory", {"memory_bytes": 1 << 30}, {}, FAIL, "main memory; weights of 1.8 GB"),
        ("memory", {"gpu": "", "memory_bytes": 1 << 30}, {}, FAIL, "1.1 GB of main memory"),
        ("driver and CUDA", {"gpu": "", "num_cards": 0}, {}, WARN, "no NVIDIA GPU"),
        ("driver and CUDA", {"gpu": "", "driver": "535.1"}, {}, FAIL, "driver 535.1, torch 2.13.0 for CUDA 13.0"),
        ("driver and CUDA", {"gpu": "", "driver": ""}, {}, FAIL, "driver missing"),
        ("driver and CUDA", {"gpu": "", "is_gpu_hidden": True}, {}, FAIL, "CUDA_VISIBLE_DEVICES hides"),
        ("driver and CUDA", {"gpu": "", "torch_cuda": ""}, {}, FAIL, "for the CPU"),
    ],
)
def test_what_the_machine_lacks(counted, name, machine, changes, status, words):
    found = of(counted(RECIPE, dataclasses.replace(GPU, **machine), **changes), name)
    assert (found.status, bool(found.remedy)) == (status, status != PASS)
    assert words in found.found, found


def test_the_demo_trains_on_the_cpu_of_a_machine_whose_gpu_torch_cannot_use(counted):
    assert of(counted(DEMO, dataclasses.replace(CPU, num_cards=1)), "driver and CUDA").status == PASS
    assert "580.65.06" in of(counted(RECIPE, dataclasses.replace(CPU, num_cards=1)), "driver and CUDA").remedy


@pytest.mark.parametrize(
    ("name", "changes", "status", "words"),
    [
        ("git", {}, PASS, "commit abc1234"),
        ("git", {"git_error": "git is not installed"}, FAIL, "not installed"),
        ("git", {"git_error": "fatal: detected dubious ownership in repository"}, FAIL, "dubious"),
        ("git", {"num_changed": 2}, WARN, "2 changed files"),
        ("git", {"has_committer": False}, WARN, "no committer"),
        ("path", {}, PASS, "DVC can copy"),
        ("path", {"unsupported_characters": "ü#"}, WARN, "has 'ü#'"),
        ("DVC remote", {}, PASS, "store"),
        ("DVC remote", {"default_remote": ""}, WARN, "none the default"),
        ("DVC remote", {"default_remote": "", "remotes": ()}, WARN, "nobody else"),
        ("DVC remote", {"default_remote": "", "remotes": (), "is_demo": True}, PASS, "the demo"),
        ("hub access", {}, PASS, "all files of 1 repositories"),
        ("hub access", {"repos": ()}, PASS, "nothing of this run"),
        ("hub access", {"incomplete_repos": ("a/b",)}, PASS, "will give"),
        (
            "hub access",
            {"incomplete_repos": ("a/b",), "hub_error": "is gated: open"},
            FAIL,
            "lacks files of a/b; a token is set",
        ),
        ("W&B", {}, PASS, "not used"),
        ("W&B", {"wandb_variables": ("WANDB_PROJECT",)}, WARN, "sends nothing"),
        ("W&B", {"wandb_variables": ("WANDB_PROJECT",), "uses_wandb": True}, PASS, "tracker: wandb"),
    ],
)
def test_what_is_around_a_run(name, changes, status, words):
    [found] = [
        f for f in run_checks(dataclasses.replace(ENVIRONMENT_1B, **changes), ENVIRONMENT_CHECKS) if f.name == name
    ]
    assert (found.status, bool(found.remedy)) == (status, status != PASS)
    assert words in found.found


def test_this_machine_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / ".features").mkdir(parents=True)
    (tmp_path / "data" / ".features" / "shard").write_bytes(b"x" * 1000)
    found = probe_machine()
    assert found.torch == torch.__version__ and found.features_bytes == 1000
    assert bool(found.gpu) == torch.cuda.is_available() and found.num_cards >= torch.cuda.device_count() * bool(
        found.gpu
    )
    assert 0 < found.disk_bytes <= shutil.disk_usage(tmp_path).total
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < get_available_memory() <= total and abs(found.memory_bytes - get_available_memory()) < 0.5 * total


def test_bfloat16_of_a_cpu(tmp_path):
    for text, known in (("flags : avx2 avx512_bf16", True), ("Features : bf16 sve", True), ("flags : avx2", False)):
        (tmp_path / "cpuinfo").write_text(f"processor : 0\n{text}\n")
        assert has_cpu_bf16(tmp_path / "cpuinfo") == known
    assert not has_cpu_bf16(tmp_path / "none")


@pytest.fixture
def repo(tmp_path):
    """A git repository with the demo's base and recipe, in which nothing is changed."""
    (tmp_path / "demo").mkdir()
    shutil.copytree(BASE, tmp_path / "demo" / "base")
    (tmp_path / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    for command in ("git init -q -b main", "git add .", "git commit -qm x"):
        subprocess.run(command.split(), cwd=tmp_path, env=environment(tmp_path), check=True)
    return tmp_path


def environment(folder: Path, **env: str) -> dict[str, str]:
    who = {f"GIT_{role}_{what}": "t@localhost" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "DVC_", "NO_COLOR"))}
    return kept | who | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / ".git" / "hf"), "HOME": str(folder)} | env


@pytest.fixture
def doctor(repo, forked):
    def run(*arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
        command = [forked / "python", "-m", "colintern", "doctor", *arguments]
        return subprocess.run(command, cwd=repo, env=environment(repo, **env), capture_output=True, text=True)

    return run


def test_the_demo_is_well_and_fits_the_terminal(doctor):
    done = doctor()
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80 and "\033" not in done.stdout
    assert [line[:4] for line in done.stdout.splitlines() if line[:1] in "pwf" and line[4:6] == "  "] == ["pass"] * 18


def test_what_fails_is_the_exit_code_and_no_secret_is_told(repo, doctor):
    text = (repo / "params.yaml").read_text()
    (repo / "params.yaml").write_text(
        text.replace("- custom_text_proj", "- custom_proj")
        .replace("lr: 0.006", "lr: 0.02")
        .replace("base: demo/base", f"base: {repo / 'demo' / 'base'}")
    )
    (repo / ".dvc").mkdir()
    (repo / ".dvc" / "config").write_text(
        "['remote \"store\"']\n    url = s3://user:s3cret@host/bucket\n    secret_access_key = s3cret\n"
    )
    done = doctor("--json", HF_TOKEN="hf_s3cret", WANDB_API_KEY="s3cret")
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    status = {check["name"]: check["status"] for check in report["checks"]}
    assert {name for name, word in status.items() if word == FAIL} == {"target modules", "head included"}
    assert {name for name, word in status.items() if word == WARN} == {"learning rate", "git", "DVC remote", "W&B"}
    assert (report["pass"], report["warn"], report["fail"]) == (12, 4, 2)
    assert "s3cret" not in done.stdout + done.stderr


@pytest.mark.parametrize("base", ["./demo/base", "demo/base/", "demo//base", str(BASE)])
def test_a_base_may_be_any_path_of_a_folder(base, repo, monkeypatch):
    monkeypatch.chdir(repo)
    assert load_cached_or_preset_config(dataclasses.replace(DEMO, base=base)).model_type == "internvl"
    with pytest.raises(UserError, match=r"nowhere/config\.json cannot be used: No such file"):
        load_cached_or_preset_config(dataclasses.replace(DEMO, base=f"{base}/nowhere"))


def test_colour_only_on_a_terminal_that_wants_it(repo, forked, monkeypatch):
    parent, child = pty.openpty()
    command = [forked / "python", "-m", "colintern", "doctor"]
    subprocess.run(command, cwd=repo, env=environment(repo, TERM="xterm"), stdout=child, check=True)
    os.close(child)
    text = b""
    with os.fdopen(parent, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # the end, as Linux tells it
        while part := terminal.read(65536):
            text += part
    assert b"\033[32mpass\033[0m" in text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for variables, shown in (
        ({"TERM": "xterm", "NO_COLOR": ""}, "\033[32mpass\033[0m"),
        ({"TERM": "xterm", "NO_COLOR": "1"}, "pass"),
        ({"TERM": "dumb", "NO_COLOR": ""}, "pass"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert _colour_status("pass") == shown


def test_the_hub_is_asked_only_for_what_the_cache_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text('{"base": {}, "train": {"files": {}}}')  # of an older version
    assert [(repo.name, files) for repo, files in list_hub_repos(RECIPE).items()] == [
        (RECIPE.base, None),
        (RECIPE.train_data, None),
    ]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
        hub.add("model", RECIPE.base, RECIPE.base_revision, {"config.json": b"{}"})
        hub.add("dataset", RECIPE.train_data, RECIPE.train_revision, {"a.parquet": b""})
        found = probe_environment(RECIPE, is_demo=False)
        assert found.incomplete_repos == found.repos == (RECIPE.base, RECIPE.train_data) and found.hub_error == ""
        hub.faults.append(Fault(where="/api/models/", status=503))
        assert "cannot be reached (HTTP 503)" in probe_environment(RECIPE, is_demo=False).hub_error
        del hub.repos["dataset", RECIPE.train_data, RECIPE.train_revision]
        assert (
            f"{RECIPE.train_data!r} is not a dataset on the hub" in probe_environment(RECIPE, is_demo=False).hub_error
        )
        for repo in list_hub_repos(RECIPE):
            (tmp_path / "cache").mkdir(exist_ok=True)
            folder = tmp_path / "cache" / f"{repo.kind}s--{repo.name.replace('/', '--')}" / "snapshots" / repo.revision
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
        entry = {"folder": RECIPE.base, "revision": RECIPE.base_revision, "files": {"config.json": {}}}
        train = {"folder": RECIPE.train_data, "revision": RECIPE.train_revision, "files": {"config.json": {}}}
        (tmp_path / "data" / "manifest.json").write_text(
            json.dumps({"base": entry, "train": [train], "train_corpus": None, "evaluation": {}})
        )
        hub.requests.clear()
        assert probe_environment(RECIPE, is_demo=False).incomplete_repos == () and hub.requests == []


def test_training_stops_before_it_loads_a_model_where_a_check_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    shutil.copy(BASE / "config.json", tmp_path / "base")  # no weights: whoever loads them fails in another way
    run_preflight(dataclasses.replace(DEMO, lr=0.02), "base")
    assert "warning: learning rate: 0.02, not within" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"head included: .*\n?.*custom_text_proj") as stopped:
        run_preflight(dataclasses.replace(DEMO, lora_targets=DEMO.lora_targets[:-1]), "base")
    assert stopped.value.exit_code == 2
    with pytest.raises(UserError, match="flash_attention_2 needs a GPU"):
        run_preflight(dataclasses.replace(DEMO, attention="flash_attention_2"), "base")


def test_pages_by_number_come_from_a_repository_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = dataclasses.replace(RECIPE, train_corpus="someone/pages", train_corpus_revision="c" * 40)
    assert [repo.key for repo in list_hub_repos(params)] == ["base", "train_data", "train_corpus"]


def test_a_kernel_of_the_hub_is_among_what_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "base").mkdir()
    params = dataclasses.replace(DEMO, base="base", attention=f"someone/kernel@{'c' * 40}")
    [(repo, files)] = list_hub_repos(params).items()
    assert (repo, files) == (("attention", "someone/kernel", "c" * 40, "kernel"), ["build"])
    with running() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", hub.url)
        assert "'someone/kernel' is not a kernel on the hub" in probe_hub(repo)
        hub.add("kernel", "someone/kernel", "c" * 40, {})
        assert probe_hub(repo) == ""
