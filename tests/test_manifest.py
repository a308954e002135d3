"""What is missing or was changed on disk is found before it is used, and named."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import IRREGULAR, ROOT
from huggingface_hub import constants

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.recipes import render_recipe
from colintern.data.training_set import ROW_INDEX, get_training_data_params, load_training_data, read_row_index
from colintern.params import load_params
from colintern.storage import hub
from colintern.storage.digests import Digests
from colintern.storage.hub import Repo
from colintern.storage.manifest import (
    MANIFEST,
    QUARANTINE,
    SURVEY,
    ensure_base,
    ensure_benchmark,
    hash_local_files,
    read_data_file,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """A folder with a params.yaml, the demo base, and a manifest of it and two small files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    shutil.copytree(ROOT / "demo" / "base", "demo/base")
    Path("params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    for name in ("data/demo/train/data/train-0.parquet", "data/demo/beir/corpus/test-0.parquet"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(b"pages")
    manifest = {
        "base": hash_local_files("demo/base", (".json", ".safetensors"))._asdict(),
        "made_for": get_training_data_params(load_params()),
        "train": [hash_local_files("data/demo/train", (".parquet",))._asdict()],
        "train_corpus": None,
        "negatives": None,
        "evaluation": {"demo": hash_local_files("data/demo/beir", (".parquet",))._asdict()},
    }
    Path("data/manifest.json").write_text(json.dumps(manifest))
    return manifest


def test_what_is_whole_is_found(fetched):
    assert ensure_base(load_params().base, load_params().base_revision) == "demo/base"
    found = ("demo", Path("data/demo/train"), ["data/train-0.parquet"], 1)
    assert load_training_data(load_params()) == ([found], None, None)
    assert ensure_benchmark("demo") == Path("data/demo/beir")


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_cached_file_that_is_no_regular_file_is_never_opened_and_named(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = hub.HubFile(Repo("base", "owner/name", "a" * 40, "model"), "config.json", 1, "b" * 64)
    file.cached.parent.mkdir(parents=True)
    IRREGULAR[kind](file.cached)
    # What the link of a cached file leads to may be deleted: then the file is missing, and fetched again.
    message = (
        "HF_HUB_OFFLINE" if kind == "a dangling link" else f"config.json: is {kind}, not a regular file; delete it"
    )
    with pytest.raises(UserError, match=message):
        hub.ensure_downloaded([file], Digests(tmp_path / "digests.json"))


def test_a_missing_page_file_is_named(fetched):
    Path("data/demo/train/data/train-0.parquet").unlink()
    with pytest.raises(UserError, match=r"train-0\.parquet: missing.*dvc repro -f fetch-data"):
        load_training_data(load_params())


def test_one_flipped_bit_is_found(fetched):
    Path("data/demo/beir/corpus/test-0.parquet").write_bytes(b"qages")
    with pytest.raises(UserError, match=r"test-0\.parquet: 5 bytes.*changed after it was fetched"):
        ensure_benchmark("demo")


def test_a_changed_base_is_found(fetched):
    with open("demo/base/model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(UserError, match=r"model\.safetensors.*changed"):
        ensure_base(load_params().base, load_params().base_revision)


@pytest.mark.parametrize("key", ["train_data", "train_corpus", "negatives_file"])
def test_a_manifest_of_other_training_data_is_refused(fetched, key):
    params = replace(load_params(), **{key: "data/own/docs"})
    with pytest.raises(UserError, match=rf"{key}: 'data/own/docs' is not the one in .*; run: dvc repro"):
        load_training_data(params)


def test_an_untracked_base_is_found_from_the_copy_dvc_makes_for_an_experiment(fetched, tmp_path, monkeypatch):
    Path("own").mkdir()
    Path("demo/base").rename("own/base")
    fetched["base"]["folder"] = "own/base"
    text = Path("params.yaml").read_text().replace("base: demo/base", "base: own/base")
    for name in ("queued", "standalone/temp"):
        copy = tmp_path / ".dvc" / "tmp" / "exps" / name
        (copy / "data").mkdir(parents=True)
        (copy / "data" / "manifest.json").write_text(json.dumps(fetched))
        (copy / "params.yaml").write_text(text)
        monkeypatch.chdir(copy)
        assert ensure_base(load_params().base, load_params().base_revision) == f"{tmp_path}/own/base"


def test_the_project_is_found_in_a_sub_folder_and_from_a_stage_of_another_one(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "outer"))
    pipeline = tmp_path / "pipeline"
    copied, copied_below = (pipeline / f".dvc/tmp/exps/{name}/pipeline" for name in ("a", "standalone/b"))
    for folder in (tmp_path / "outer", pipeline, pipeline / "below", copied, copied_below / "below"):
        folder.mkdir(parents=True)
    (pipeline / "below" / "dvc.yaml").touch()
    for here, found in ((pipeline, "."), (copied, str(pipeline)), (copied_below.parent / "below", str(pipeline))):
        here.mkdir(exist_ok=True)
        monkeypatch.chdir(here)
        assert str(root()) == (f"{pipeline}/below" if here.name == "below" else found)


@pytest.mark.parametrize("name", ["../outside.parquet", "/etc/passwd"])
def test_an_entry_that_points_outside_is_refused(fetched, name):
    [entry] = fetched["train"]
    entry["files"] = {name: next(iter(entry["files"].values()))}
    Path("data/manifest.json").write_text(json.dumps(fetched))
    with pytest.raises(UserError, match="points outside"):
        load_training_data(load_params())


def test_an_unknown_local_benchmark_is_refused(fetched):
    with pytest.raises(UserError, match="data/own/nothing"):
        ensure_benchmark("data/own/nothing")


@pytest.mark.parametrize("stage", ["verify", "train", "evaluate"])
def test_a_stage_run_by_hand_without_its_inputs_says_what_to_run(fetched, stage):
    Path("data/manifest.json").unlink()
    shutil.copy(ROOT / "dvc.yaml", "dvc.yaml")
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "error:" in done.stderr
    assert "dvc repro" in done.stderr


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", '{"base": 1}', "[" * 100_000, "\0", '{"demo": 3}'])
@pytest.mark.parametrize("name", [MANIFEST, QUARANTINE, SURVEY, ROW_INDEX])
def test_a_damaged_file_of_fetch_data_names_the_stage_that_makes_it_again(fetched, name, text):
    if (name, text) == (SURVEY, "{}"):
        return  # of no data sets
    Path(name).write_text(text)
    with pytest.raises(UserError, match=f"{name}: damaged: .*; make it again: dvc repro -f fetch-data"):
        read_row_index() if name == ROW_INDEX else read_data_file(name)
