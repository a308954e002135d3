"""`colintern verify`, run as a program; and of the hub, that one file is all it takes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT
from forked_python import UNHUBBED, run_server
from hub import running
from processes import Place

from colintern.core.recipes import render_recipe
from colintern.params import load_recipe

pytestmark = pytest.mark.integration
RECIPE = load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")
CONFIG = (ROOT / "tests" / "internvl3_5-1b.json").read_bytes()


@pytest.fixture
def workspace(tmp_path):
    """A folder with the 1B recipe as params.yaml, the demo's base, and an empty cache."""
    (tmp_path / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml"))
    (tmp_path / "demo").mkdir()
    shutil.copytree(BASE, tmp_path / "demo" / "base")
    (tmp_path / "demo" / "base" / "model.safetensors").unlink()  # nobody reads weights
    return tmp_path


def verify(python, folder, *arguments: str, **env: str) -> "subprocess.CompletedProcess[str]":
    known = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return subprocess.run(
        [python, "-m", "colintern", "verify", *arguments],
        cwd=folder,
        env=known | {"PYTHONPATH": str(ROOT), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"} | env,
        capture_output=True,
        text=True,
    )


def work(*arguments: str) -> None:
    from colintern.__main__ import main

    main(["verify", *arguments])


def refused(folder, *arguments: str) -> Place:
    """The same where no hub is asked, in a forked process."""
    place = Place(folder, work)
    assert place.run(command=" ".join(arguments)) == 2, place.log
    assert "Traceback" not in place.err
    return place


def test_the_report_of_a_preset(workspace):
    done = verify(sys.executable, workspace, "--base", "internvl3_5-2b")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "LORA TARGET MODULE VERIFICATION FOR internvl3_5-2b" in done.stdout
    assert done.stdout.count("28 found layers 0-27") == 7 and "Linear(2048 -> 128)" in done.stdout
    assert "A4 page, tiling stock: 1 x 2 + thumbnail, 3 tiles, 768 visual tokens\n" in done.stdout


def test_json_has_the_counts_and_nothing_else_on_stdout(workspace, forked):
    done = verify(forked / "python", workspace, "--base", "demo/base", "--json")
    report = json.loads(done.stdout)
    assert {key: report[key] for key in ("lora_modules", "trainable_parameters", "total_parameters")} == {
        "lora_modules": 15,
        "trainable_parameters": 163_840,
        "total_parameters": 1_028_224,
    }
    assert (report["frozen_vision_modules"], report["frozen_projector_modules"], report["faults"]) == (18, 2, [])
    assert report["optimizer_bytes"] == 8 * 163_840


def test_of_a_hub_repository_config_json_is_fetched_once_and_nothing_more(workspace):
    with (
        running() as hub,
        run_server(UNHUBBED, HF_HUB_OFFLINE="", HF_ENDPOINT=hub.url, HF_HOME=str(workspace / "hf")) as forked,
    ):
        files = {"config.json": CONFIG, "model.safetensors": b"weights", "tokenizer.json": b"{}"}
        hub.add("model", RECIPE.base, RECIPE.base_revision, files)
        online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        python = forked / "python"
        done = verify(python, workspace, "--json", **online)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["lora_modules"] == 197
        assert {r.path.rpartition("/")[2] for r in hub.asked("GET", "/resolve/")} == {"config.json"}
        hub.requests.clear()
        assert verify(python, workspace, **online).returncode == 0
        assert hub.requests == [], "all of it is from the cache, with the hub or without"
        other = "0123456789" * 4
        hub.add("model", "someone/other", other, {"config.json": CONFIG})
        assert verify(python, workspace, "--base", f"someone/other@{other}", **online).returncode == 0
        hub.add("model", "someone/empty", other, {"tokenizer.json": b"{}"})
        done = verify(python, workspace, "--base", f"someone/empty@{other}", **online)
        assert done.returncode == 2 and "holds no config.json" in done.stderr


def test_without_hub_and_cache_the_shipped_config_is_offered(workspace, forked):
    done = verify(forked / "python", workspace)
    assert done.returncode == 7
    assert "hf download" in done.stderr and "--base internvl3_5-1b" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("someone/else", "needs its commit: write someone/else@<40 hex digits>"),
        ("someone/else@main", "needs its commit"),
        ("nowhere", "nowhere/config.json cannot be used: No such file"),
        ("qwen", "is that of a qwen3, not of an internvl"),
        ("broken", "config.json cannot be used"),
    ],
)
def test_a_base_that_cannot_be_used_is_named(workspace, base, words):
    for name, text in (("qwen", '{"model_type": "qwen3"}'), ("broken", "{")):
        (workspace / name).mkdir()
        (workspace / name / "config.json").write_text(text)
    assert words in refused(workspace, "--base", base).err


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("layers.*.self_attn.q_proj", r"write language_model\.layers\.\d+\.self_attn\.q_proj"),
        ("'*.self_attn.q_proj'", "any text is .* in it, not *"),
        (r".*\.q_proj", "vision tower or projector"),
    ],
)
def test_wrong_targets_exit_with_2_and_say_what_to_write(workspace, target, words):
    text = (workspace / "params.yaml").read_text()
    other = workspace / "other.yaml"
    other.write_text(text.replace(r"- language_model\.layers\.\d+\.self_attn\.q_proj", f"- {target}"))
    done = refused(workspace, "--base", "internvl3_5-1b", "--params", "other.yaml", "--json")
    assert words in done.err
    if done.out:  # a file that is refused as a whole has no counts
        assert json.loads(done.out)["faults"]
