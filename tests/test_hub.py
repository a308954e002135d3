"""fetch-data and the readers against a hub on loopback, through the real client: what arrives, and how it may not."""

import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from hub import Fault, Hub, running, sha256
from PIL import Image

from colintern.core.recipes import render_recipe
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.modeling.lora import add_lora
from colintern.params import load_recipe
from colintern.storage.digests import Digests

pytestmark = pytest.mark.integration
RECIPE = load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")
BASE, TRAIN = RECIPE.base, RECIPE.train_data
# What fetch-data does before it looks at rows: these files hold none.
FETCH = """
from pathlib import Path
from colintern.storage.files import format_json
from colintern.core.errors import exit_on_user_error
from colintern.params import load_params
from colintern.ingest.sources import DemoWriters, fetch_inputs
from demo.dataset import write_evaluation_set, write_training_set
with exit_on_user_error():
    manifest = fetch_inputs(load_params(), {}, DemoWriters(write_training_set, write_evaluation_set)).manifest
    Path("data").mkdir(exist_ok=True)
    Path("data/manifest.json").write_text(format_json(manifest))
"""
READ = """
from colintern.storage.manifest import ensure_inputs
from colintern.core.errors import exit_on_user_error
from colintern.params import load_params
from colintern.data.training_set import load_training_data
with exit_on_user_error():
    params = load_params()
    load_training_data(params, force={force})
    ensure_inputs(params, force={force})
"""


def some(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


BASE_FILES = {
    "config.json": b'{"model_type": "internvl"}',
    "model.safetensors": some(1, 200_000),
    "pytorch_model.bin": b"a pickle",
    "chat_template.jinja": b"{{ messages }}",
}
TRAIN_FILES = {
    "README.md": b"# pages",
    "data/test-00000-of-00001.parquet": some(2, 50_000),
    "data/train-00000-of-00002.parquet": some(3, 100_000),
    "data/train-00001-of-00002.parquet": some(4, 100_000),
}
WANTED = {"base": ("config.json", "model.safetensors", "chat_template.jinja"), "train": [*TRAIN_FILES][1:]}
LARGE = some(5, 24_000_000)  # the client keeps what a cut transfer has brought in steps of 10 MiB


class Workspace(NamedTuple):
    """A folder with the 1B recipe, an empty cache, and a hub that has what the recipe names."""

    path: Path
    hub: Hub

    def env(self, **env: str) -> dict[str, str]:
        dropped = ("HF_", "DVC_", "HUGGING")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
        own = {"HF_ENDPOINT": self.hub.url, "HF_HOME": str(self.path / "hf"), "PYTHONPATH": str(ROOT)}
        return kept | own | env

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
        self.hub.requests.clear()
        return subprocess.run(
            [sys.executable, *command], cwd=self.path, env=self.env(**env), capture_output=True, text=True
        )

    def fetch(self, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", FETCH, **env)

    def read(self, force: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        return self.run("-c", READ.format(force=force), **env)

    def cached(self, kind: str, name: str) -> Path:
        [path] = (self.path / "hf/hub").glob(f"{kind}s--*/snapshots/*/{name}")
        return path

    @property
    def manifest(self) -> dict:
        return json.loads((self.path / "data/manifest.json").read_text())


@pytest.fixture
def workspace(tmp_path):
    page = encode_png(Image.new("RGB", (8, 8)))
    write_beir(tmp_path / "own", [CorpusPage(0, page, "0.png")], [Query(0, "a")], [Qrel(0, 0)])
    recipe = render_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")
    recipe, changed = re.subn(r"(?m)^benchmarks:\n(- .*\n)+", "benchmarks:\n- own\n", recipe)
    assert changed == 1
    (tmp_path / "params.yaml").write_text(recipe)
    with running() as hub:
        hub.add("model", BASE, RECIPE.base_revision, dict(BASE_FILES))
        hub.add("dataset", TRAIN, RECIPE.train_revision, dict(TRAIN_FILES))
        yield Workspace(tmp_path, hub)


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    message = ("\n" + done.stderr).rpartition("\nerror: ")[2]
    for word in words:
        assert word in message, f"{word!r} not in {message}"


def right(workspace: Workspace) -> None:
    """The manifest names exactly the files a run needs, by the hashes of the bytes that the hub has."""
    for part, source in (("base", BASE_FILES), ("train", TRAIN_FILES)):
        entry = workspace.manifest[part]
        found = (entry if part == "base" else entry[0])["files"]
        assert found == {name: {"size": len(source[name]), "sha256": sha256(source[name])} for name in WANTED[part]}


def test_what_the_recipe_names_arrives_and_no_more(workspace):
    done = workspace.fetch(HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    right(workspace)
    assert (workspace.manifest["base"]["folder"], workspace.manifest["base"]["revision"]) == (
        BASE,
        RECIPE.base_revision,
    )
    asked = {request.path.rpartition("/")[2] for request in workspace.hub.asked("GET", "/resolve/")}
    assert not asked & {"pytorch_model.bin", "README.md"}
    # The token is for the hub, not for where it redirects to.
    assert {request.token for request in workspace.hub.asked("HEAD", "/resolve/")} == {"hf_secret"}
    assert {request.token for request in workspace.hub.asked("GET", "/cdn/")} == {""}
    assert "hf_secret" not in done.stdout + done.stderr


def test_what_is_there_is_not_asked_for_again(workspace):
    assert workspace.fetch().returncode == 0
    for env in ({}, {"HF_HUB_OFFLINE": "1"}):
        assert workspace.fetch(**env).returncode == 0
        assert not workspace.hub.asked("GET|HEAD", BASE + "|" + TRAIN)
        right(workspace)


def test_rows_and_the_corpus_they_name_come_from_two_repositories_each_at_its_commit(workspace):
    corpus, revision = "manu/colpali-corpus", "c" * 40
    shard = "data/train-00000-of-00001.parquet"
    workspace.hub.add("dataset", corpus, revision, {shard: some(6, 50_000), "README.md": b"pages"})
    params = workspace.path / "params.yaml"
    text = params.read_text().replace("train_corpus: ''", f"train_corpus: {corpus}")
    params.write_text(text)
    refused(workspace.fetch(), 2, f"train_corpus_revision: '' (str) is not valid; train_corpus '{corpus}'", "40-hex")
    params.write_text(text.replace("train_corpus_revision: ''", f"train_corpus_revision: {'d' * 40}"))
    refused(workspace.fetch(), 2, f"train_corpus_revision: '{'d' * 40}' is no commit of {corpus}")
    params.write_text(text.replace("train_corpus_revision: ''", f"train_corpus_revision: {revision}"))
    assert workspace.fetch().returncode == 0
    right(workspace)
    entry = workspace.manifest["train_corpus"]
    assert (entry["folder"], entry["revision"], [*entry["files"]]) == (corpus, revision, [shard])
    workspace.cached("dataset", shard).unlink()
    assert workspace.read().returncode == 0, "fetched again"


def test_a_repository_that_has_moved_is_followed(workspace):
    new = "vidore/colpali_train_set_2"
    workspace.hub.add(
        "dataset", new, RECIPE.train_revision, workspace.hub.repos.pop(("dataset", TRAIN, RECIPE.train_revision))
    )
    workspace.hub.moved[TRAIN] = new
    done = workspace.fetch(HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    right(workspace)
    assert workspace.manifest["train"][0]["folder"] == TRAIN


PASSING = {
    "cut": Fault("/cdn/", cut=30_000),
    "reset": Fault("/cdn/", cut=30_000, reset=True),
    "503": Fault("/cdn/", status=503),
    "429": Fault("/cdn/", status=429, headers={"Retry-After": "1"}),
    "wrong bytes": Fault("/cdn/", wrong=True),
    "wrong bytes outside LFS": Fault("/config.json", wrong=True),
    "wrong length": Fault("/cdn/", longer=True),
    "503 for metadata": Fault("/resolve/", method="HEAD", status=503),
    "503 for the listing": Fault("/tree/", status=503),
}


FURTHER = {"reset", "wrong length", "503", "503 for the listing"}


@pytest.mark.parametrize(
    "fault",
    [pytest.param(fault, marks=[pytest.mark.slow] * (name in FURTHER)) for name, fault in PASSING.items()],
    ids=PASSING,
)
def test_a_passing_fault_is_waited_out(workspace, fault):
    workspace.hub.faults.append(fault)
    done = workspace.fetch()
    assert done.returncode == 0, done.stderr
    assert fault.times == 0, "the fault was met"
    right(workspace)


def test_a_cut_transfer_goes_on_where_it_broke_off(workspace):
    workspace.hub.add("model", BASE, RECIPE.base_revision, BASE_FILES | {"model.safetensors": LARGE})
    workspace.hub.faults.append(Fault(sha256(LARGE), cut=15_000_000))
    assert workspace.fetch().returncode == 0
    first, second = workspace.hub.asked("GET", sha256(LARGE))
    assert (first.range, second.range) == ("", f"bytes={10 * 2**20}-")
    assert workspace.manifest["base"]["files"]["model.safetensors"]["sha256"] == sha256(LARGE)


def test_bytes_that_arrive_wrong_twice_are_refused_and_not_kept(workspace):
    shard = "data/train-00001-of-00002.parquet"
    workspace.hub.faults.append(Fault(sha256(TRAIN_FILES[shard]), times=2, wrong=True))
    refused(workspace.fetch(), 2, "train_data", shard, "twice with other bytes")
    assert not (workspace.path / "data/manifest.json").exists()
    assert not list((workspace.path / "hf").rglob(f"blobs/{sha256(TRAIN_FILES[shard])}"))
    assert not list((workspace.path / "hf").rglob("train-00001*"))
    assert workspace.fetch().returncode == 0
    right(workspace)


def test_a_hub_that_stays_in_trouble_ends_with_the_commands_to_fetch_it_elsewhere(workspace):
    workspace.hub.faults.append(Fault("/cdn/", times=10**6, status=503))
    refused(workspace.fetch(), 7, "HTTP 503", "dvc repro -f fetch-data")
    assert workspace.hub.faults[0].times < 10**6 - 4


@pytest.mark.parametrize("token", ["", "hf_others"])
def test_a_gated_repository_is_named_with_what_to_do(workspace, token):
    workspace.hub.gated[BASE] = "hf_mine"
    done = workspace.fetch(**({"HF_TOKEN": token} if token else {}))
    refused(done, 2, "base:", f"{BASE!r} is gated", f"{workspace.hub.url}/{BASE}", "accept its terms", "HF_TOKEN")
    assert "hf_others" not in done.stdout + done.stderr
    assert workspace.fetch(HF_TOKEN="hf_mine").returncode == 0


@pytest.mark.parametrize("token", ["", "hf_mine"])
def test_an_unknown_or_private_repository_is_named(workspace, token):
    for key in list(workspace.hub.repos):
        if key[1] == TRAIN:
            del workspace.hub.repos[key]
    done = workspace.fetch(**({"HF_TOKEN": token} if token else {}))
    refused(done, 2, "train_data:", f"{TRAIN!r} is not a dataset on the hub, or is private", f"/datasets/{TRAIN}")
    assert "hf_mine" not in done.stdout + done.stderr


@pytest.mark.parametrize(("kind", "name", "key"), [("model", BASE, "base"), ("dataset", TRAIN, "train")])
def test_an_unknown_revision_is_named(workspace, kind, name, key):
    revision = getattr(RECIPE, f"{key}_revision")
    workspace.hub.add(kind, name, "0" * 40, workspace.hub.repos.pop((kind, name, revision)))
    refused(workspace.fetch(), 2, f"{key}_revision: '{revision}'", f"no commit of {name}")


def test_what_does_not_fit_the_disk_is_refused_before_the_first_byte(workspace):
    workspace.hub.sizes["data/train-00000-of-00002.parquet"] = 10**15
    refused(workspace.fetch(), 2, "need 1000000.0 GB, have", f"GB at {workspace.path}/hf/hub", "HF_HOME")
    assert not workspace.hub.asked("GET|HEAD", "/resolve/|/cdn/")


def test_a_listing_that_points_outside_is_refused(workspace):
    workspace.hub.repos["dataset", TRAIN, RECIPE.train_revision]["../../escape.parquet"] = b"x"
    refused(workspace.fetch(), 2, "train_data", "names a file outside itself, '../../escape.parquet'")
    assert not list(workspace.path.rglob("escape.parquet"))


def test_offline_the_commands_that_are_printed_are_what_is_needed(workspace):
    done = workspace.fetch(HF_HUB_OFFLINE="1")
    refused(done, 7, "dvc repro -f fetch-data", BASE, TRAIN)
    commands = re.findall(r"hf download .*", done.stderr)
    assert commands == [
        f"hf download {BASE} --revision {RECIPE.base_revision}",
        f"hf download {TRAIN} --revision {RECIPE.train_revision} --repo-type dataset",
    ]
    for command in commands:
        program = str(Path(sys.executable).with_name("hf"))
        subprocess.run([program, *shlex.split(command)[1:]], env=workspace.env(), check=True, capture_output=True)
    assert workspace.fetch(HF_HUB_OFFLINE="1").returncode == 0
    right(workspace)


def test_no_network_is_exit_7_too(workspace):
    with running() as gone:
        pass
    refused(workspace.fetch(HF_ENDPOINT=gone.url), 7, gone.url, "cannot be reached", "hf download")


def test_an_unreachable_xet_storage_is_exit_7_too(workspace):
    """The real hub's large files come by Xet, whose client speaks of all that goes wrong as RuntimeError."""
    with running() as gone:
        workspace.hub.xet = gone.url
    done = workspace.fetch(HF_XET_CLIENT_RETRY_MAX_ATTEMPTS="1", HF_TOKEN="hf_secret")
    refused(done, 7, gone.url, "cannot be reached", "hf download")
    assert "secret" not in done.stdout + done.stderr


def test_a_disk_that_fills_up_is_named(workspace):
    (workspace.path / "hf").mkdir()
    disk = workspace.path / "hf"
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        workspace.hub.sizes |= dict.fromkeys(TRAIN_FILES, 10)  # else it is refused before the first byte
        refused(workspace.fetch(), 2, f"the disk of {disk}/hub is full")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_ctrl_c_does_not_wait_for_transfers_under_way(workspace):
    workspace.hub.faults.append(Fault("/cdn/", times=9, pause=60))
    command = [sys.executable, "-c", FETCH]
    process = subprocess.Popen(command, cwd=workspace.path, env=workspace.env(), stderr=subprocess.DEVNULL)
    while not workspace.hub.asked("GET", "/cdn/"):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=8) != 0


def test_a_killed_fetch_goes_on_with_what_it_had_not_finished(workspace):
    shard = TRAIN_FILES["data/train-00000-of-00002.parquet"]
    workspace.hub.faults.append(Fault(sha256(shard), pause=60))
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH], cwd=workspace.path, env=workspace.env(), stderr=subprocess.DEVNULL
    )
    blobs = workspace.path / "hf/hub"
    done = lambda: [path.name for path in blobs.glob("*/blobs/*") if len(path.name) in (40, 64)]  # noqa: E731
    end = time.monotonic() + 60
    while len(done()) < 5 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(done()) == 5
    partial = list(blobs.rglob("*.incomplete"))
    assert partial
    for file in partial:
        os.utime(file, (0, 0))  # as if it had been left long ago
    assert workspace.fetch().returncode == 0
    assert [request.path for request in workspace.hub.asked("GET", "/cdn/|/resolve/")] == [f"/cdn/{sha256(shard)}"]
    assert not any(file.exists() for file in partial)
    right(workspace)


def test_bars_show_files_with_the_time_left_and_bytes(workspace):
    workspace.hub.add("model", BASE, RECIPE.base_revision, BASE_FILES | {"model.safetensors": LARGE})
    workspace.hub.faults.append(Fault(sha256(LARGE), pause=0.002))
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    command = [sys.executable, "-c", FETCH]
    process = subprocess.Popen(command, cwd=workspace.path, env=workspace.env(), stdout=end, stderr=end)
    os.close(end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # how a pseudo terminal says that nobody writes to it any more
            break
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"Fetching 3 files: +\d+%\|[^|]*\| \d/3 \[\d\d:\d\d<\S+,", text), text
    assert any(0 < int(percent) < 100 for percent in re.findall(r": +(\d+)%\|[^|]*\| +\S+ / 24\.\dMB", text)), text


def test_a_reader_fetches_what_the_cache_has_lost(workspace):
    assert workspace.fetch().returncode == 0
    shutil.rmtree(workspace.path / "hf")
    refused(workspace.read(HF_HUB_OFFLINE="1"), 7, "lacks files", f"hf download {TRAIN}")
    done = workspace.read()
    assert done.returncode == 0, done.stderr
    assert (
        workspace.cached("dataset", "data/train-00000-of-00002.parquet").read_bytes()
        == TRAIN_FILES["data/train-00000-of-00002.parquet"]
    )
    assert workspace.read(HF_HUB_OFFLINE="1").returncode == 0


def test_what_a_reader_fetches_must_be_what_the_manifest_names(workspace):
    """Even where the hub vouches for it: a commit's files do not change, so something else is wrong."""
    assert workspace.fetch().returncode == 0
    shutil.rmtree(workspace.path / "hf")
    workspace.hub.add("model", BASE, RECIPE.base_revision, BASE_FILES | {"model.safetensors": some(9, 200_000)})
    refused(workspace.read(), 2, "base:", "model.safetensors", "other bytes than its hash")


def test_a_flipped_byte_is_found_before_training_and_mended_by_fetch_data(workspace):
    assert workspace.fetch().returncode == 0
    shard = workspace.cached("dataset", "data/train-00000-of-00002.parquet")
    before = shard.stat()
    with shard.open("r+b") as file:
        file.seek(77_777)
        file.write(bytes([255 - TRAIN_FILES["data/train-00000-of-00002.parquet"][77_777]]))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # a disk that flips a bit does not touch the clock
    assert workspace.read(force=False).returncode == 0, "stages that do not train believe the record"
    refused(
        workspace.read(), 2, "train-00000-of-00002.parquet", "changed after it was fetched", "dvc repro -f fetch-data"
    )
    refused(workspace.read(force=False), 2, shard.name)
    done = workspace.fetch()
    assert done.returncode == 0, done.stderr
    assert "not the bytes the hub names" in done.stdout + done.stderr
    right(workspace)
    assert workspace.read().returncode == 0


def test_digests_are_remembered_until_a_file_changes(tmp_path):
    file, record = tmp_path / "file", tmp_path / "data" / "record.json"
    file.write_bytes(b"one")
    [one] = Digests(record).hash_files([file])
    assert one == {"size": 3, "sha256": sha256(b"one")}
    known = json.loads(record.read_text())
    assert known == {str(file): [3, file.stat().st_mtime_ns, file.stat().st_ino, one["sha256"]]}
    record.write_text(json.dumps({str(file): [*known[str(file)][:3], "remembered"]}))
    assert Digests(record)(file)["sha256"] == "remembered"
    assert Digests(record)(file, force=True) == one
    os.utime(file)
    assert Digests(record)(file) == one
    for damaged in ('{"', "[]", "null", '{"a": 1}', json.dumps({str(file): ["x", 1, 2, 3]}), "[" * 100_000, "\0"):
        record.write_text(damaged)
        assert Digests(record).hash_files([file]) == [one], damaged
        assert json.loads(record.read_text()).keys() == {str(file)}, "the record is whole again"
    record.unlink()
    (record / "folder").mkdir(parents=True)
    assert Digests(record).hash_files([file]) == [one] and record.is_file()


LOAD = """
import sys, torch
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
model = ColIntern3_5.from_pretrained(sys.argv[1], revision=sys.argv[2] or None, dtype=torch.float32)
processor = ColIntern3_5Processor.from_pretrained(sys.argv[1], revision=sys.argv[2] or "main")
with torch.no_grad():
    print(model(**processor.process_queries(["from Oslo"])).sum((0, 1)).tolist())
"""


def test_an_adapter_on_the_hub_loads_with_its_head_and_its_base_at_its_commit(workspace, model, processor, monkeypatch):
    """The base's `main` is another one by then."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # PEFT looks the base up when it saves
    folder = workspace.path / "adapter"
    model.config._name_or_path = model.name_or_path = BASE
    wrapped = add_lora(model, RECIPE.lora_targets, 4, 4, 0.0, RECIPE.base_revision)
    for name, weights in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.05, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(folder)
    model.save_head(folder)
    processor.save_pretrained(folder)
    workspace.hub.add_folder("model", BASE, RECIPE.base_revision, ROOT / "demo" / "base")
    workspace.hub.add("model", BASE, "main", BASE_FILES)
    workspace.hub.add_folder("model", "me/colintern", "a" * 40, folder)
    with torch.no_grad():
        want = wrapped.eval()(**processor.process_queries(["from Oslo"])).sum((0, 1)).tolist()
    for name, revision in ((str(folder), ""), ("me/colintern", "a" * 40)):
        done = workspace.run("-c", LOAD, name, revision)
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout) == want
