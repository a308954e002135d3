"""`colintern check-adapter`: adapters that two real steps of training left, and what can be wrong with them."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import BASE, ROOT
from processes import Place
from safetensors.torch import load_file, save_file
from test_model import TARGETS, load

from colintern.core.errors import UserError
from colintern.encoding.embed import embed_pages
from colintern.encoding.page_features import Page, PageFeatures
from colintern.modeling.loading import read_processor
from colintern.modeling.lora import add_lora
from colintern.modeling.retriever import read_checked_adapter
from colintern.params import load_recipe
from colintern.storage.files import format_json
from colintern.storage.identity import read_identity
from colintern.storage.manifest import BASE_SUFFIXES, hash_local_files
from colintern.training.pairs import TrainingDataset, TrainingPair
from colintern.training.run import assemble_trainer, build_training_arguments, get_provenance, save_artifacts
from colintern.training.trainer import RetrievalEvaluator

pytestmark = pytest.mark.integration
QUERIES = ["from Oslo", "sent to Rome by Halde", "Halde", "the milk"]


def trained(top: Path, processor, pages, **changes) -> Path:
    """What `run.train` leaves in `top`, of as many steps as epochs; its base is a copy in top/demo/base."""
    shutil.copytree(BASE, top / "demo" / "base")
    params = dataclasses.replace(
        load_recipe(ROOT / "recipes" / "demo.yaml"), batch_size=4, micro_batch_size=4, logging_steps=1, **changes
    )
    identity = {"params": dataclasses.asdict(params)}
    with contextlib.chdir(top):
        (top / "data").mkdir()
        entry = hash_local_files("demo/base", BASE_SUFFIXES)._asdict()
        (top / "data" / "manifest.json").write_text(format_json({"base": entry, "train": []}))
        torch.manual_seed(0)
        base = load(top / "demo" / "base")
        base.name_or_path = base.config._name_or_path = "demo/base"
        wrapped = add_lora(base, TARGETS, rank=4, alpha=4, dropout=0.0)
        features = PageFeatures(wrapped, processor, top / "features", 0.0, "exact")
        keyed = [Page.from_image(page) for page in pages]
        rows = list(map(TrainingPair, QUERIES, keyed))
        dev, pairs = RetrievalEvaluator(rows, features, params.eval_batch_size), TrainingDataset(rows, features)
        args = build_training_arguments(params, top / "run", quiet=True)
        trainer = assemble_trainer(params, wrapped, processor, args, dev, pairs)
        identity |= get_provenance(trainer.model)
        trainer.train()
        save_artifacts(trainer, identity, top / "adapter")
    return top


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory, processor, pages):
    return trained(tmp_path_factory.mktemp("trained"), processor, pages, epochs=2, warmup_steps=0)


@pytest.fixture
def top(two_steps, tmp_path):
    """A copy of a repository with an adapter of two steps."""
    return shutil.copytree(two_steps, tmp_path / "top", ignore=shutil.ignore_patterns("run", "features"))


def work(*arguments: str) -> None:
    from colintern.__main__ import main

    main(["check-adapter", "adapter", *arguments])


def check(top: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    place = Place(top, work)
    return subprocess.CompletedProcess(arguments, place.run(command=" ".join(arguments)), place.out, place.err)


def refused(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        text = " ".join((done.stdout if code == 1 else done.stderr).split())  # the table is wrapped at 80 columns
        assert word in text, f"{word!r} not in {text}"


def change(file: Path, edit) -> None:
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_an_adapter_of_two_steps_passes_with_a_table_that_fits(top):
    done = check(top)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "verdict: trained" and max(map(len, lines)) <= 80
    assert sum(line.endswith("  changed") for line in lines) == 16, "A and B of seven projections and of the head"
    assert any(line.startswith("head ") and line.endswith("  same") for line in lines)
    report = json.loads(check(top, "--json").stdout)
    assert report["ok"] and [finding["ok"] for finding in report["findings"]] == [True] * 6
    b = "language_model.layers.*.self_attn.q_proj lora_B"
    assert report["start"][b]["std"] == 0 < report["now"][b]["std"]
    kept = load_file(top / "adapter" / "head.safetensors")["custom_text_proj.weight"]
    assert report["now"]["head"]["sha256"] == report["start"]["head"]["sha256"] and kept.std() > 0


def test_its_readme_loads_it_here_and_in_plain_peft(top, processor, pages, monkeypatch):
    monkeypatch.chdir(top)
    text = Path("adapter/README.md").read_text()
    assert "More Information Needed" not in text and "on `demo/base`" in text and "license" in text
    ours, peft = re.findall(r"```python\n(.+?)```", text, re.S)
    found: list[dict] = [{}, {}]
    for code, names in zip((ours, peft), found, strict=True):
        exec(code.replace('"."', '"adapter"'), names)
    pair = [embed_pages(names["model"].float(), processor, pages, 4) for names in found]
    assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))


def test_an_adapter_that_no_step_has_moved_is_refused(tmp_path, processor, pages):
    """One step of a warm-up has a learning rate of 0: the run ends, and everything is as it was."""
    done = check(trained(tmp_path / "top", processor, pages, epochs=1, warmup_steps=30))
    refused(done, 1, "every lora_B is zero, as before the first step", "verdict: refused for trained")
    assert "changed" not in done.stdout


def test_part_of_an_adapter_without_training_is_refused(top):
    def edit(state):
        return {k: torch.zeros_like(v) if "layers.1.mlp.up_proj.lora_B" in k else v for k, v in state.items()}

    change(top / "adapter" / "adapter_model.safetensors", edit)
    refused(check(top), 1, "1 of 15 lora_B, such as", "layers.1.mlp.up_proj.lora_B.weight, is zero")


def test_part_of_an_adapter_missing_is_refused(top):
    def edit(state):
        return {k: v for k, v in state.items() if "layers.1.mlp.up_proj" not in k}

    change(top / "adapter" / "adapter_model.safetensors", edit)
    refused(check(top), 1, "mlp.up_proj lora_A: 1 weights, but training started with 2", "refused for whole")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "head.safetensors"])
def test_a_weight_that_is_not_finite_is_refused_and_named(top, file):
    def edit(state):
        name = sorted(state)[-1]
        return state | {name: torch.full_like(state[name], float("nan"))}

    change(top / "adapter" / file, edit)
    name = sorted(load_file(top / "adapter" / file))[-1]
    refused(check(top), 1, f"{name} has NaN or infinite values (1 such tensors)", "finite")
    told = json.loads(check(top, "--json").stdout, parse_constant=pytest.fail)
    assert not told["ok"] and [row["std"] for row in told["now"].values()].count(None) == 1


def test_the_head_of_another_run_is_refused(top):
    change(top / "adapter" / "head.safetensors", lambda state: {k: v * 1.001 for k, v in state.items()})
    refused(check(top), 1, "head.safetensors is another one", "verdict: refused for head")


@pytest.mark.parametrize("file", ["head.safetensors", "adapter_model.safetensors", "identity.json"])
@pytest.mark.parametrize("damage", ["missing", "torn"])
def test_a_file_that_is_missing_or_torn_is_refused_and_named(top, file, damage):
    path = top / "adapter" / file
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    lacks_weights = (damage, file) == ("missing", "adapter_model.safetensors")  # reported before slow imports
    refused(check(top), 2, f"adapter: holds no {file}; " if lacks_weights else f"adapter/{file}: ")


def test_an_adapter_from_before_the_check_is_refused(top):
    path = top / "adapter" / "identity.json"
    path.write_text(json.dumps({"params": json.loads(path.read_text())["params"]}))
    refused(check(top), 2, "does not say what training started from")


def test_another_base_is_refused_and_the_right_one_found_elsewhere(top):
    shutil.move(top / "demo" / "base", top / "moved")
    refused(check(top), 1, "config.json: missing; give the adapter's base with --base", "refused for base")
    done = check(top, "--base", "moved")
    assert done.returncode == 0, done.stdout
    change(top / "moved" / "model.safetensors", lambda state: {k: v * 1.01 for k, v in state.items()})
    refused(check(top, "--base", "moved"), 1, "moved/model.safetensors: sha256", "another base")


def test_an_adapter_that_does_not_merge_is_refused(top):
    """Two ranks of the head that all but cancel: beside the base float32 rounds them in another place than within."""

    def edit(state):
        a, b = (f"base_model.model.custom_text_proj.lora_{kind}.weight" for kind in "AB")
        torch.manual_seed(0)
        state[a][1] = state[a][0] * (1 + 1e-6 * torch.randn_like(state[a][0]))
        state[b][:, 0] *= 1e7
        state[b][:, 1] = -state[b][:, 0]
        return state

    change(top / "adapter" / "adapter_model.safetensors", edit)
    refused(check(top), 1, "from unmerged over", "verdict: refused for merged")


READ = (
    "adapter_config.json", "adapter_model.safetensors", "head.safetensors", "identity.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json",
)  # fmt: skip
ODD_KEYS = ("peft_type", "params", "base", "start", "version", "model", "image_processor", "image_seq_length",
            "added_tokens", "tokenizer_class", "extra_special_tokens")  # fmt: skip


def replace(make):
    return lambda file: (file.unlink(), make(file))


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:100]),
    "a list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "other values": lambda file: file.write_text(json.dumps({key: [None] for key in ODD_KEYS})),
    "nested": lambda file: file.write_bytes(b"[" * 200_000),
    "a huge number": lambda file: file.write_text('{"params": %s}' % ("9" * 5000)),
    "binary": lambda file: file.write_bytes(bytes(range(256)) * 9),
    "not UTF-8": lambda file: file.write_bytes(b'{"params": "\xff"}'),
    "a folder": replace(Path.mkdir),
    "a link to nothing": replace(lambda file: file.symlink_to("nowhere")),
    "a link to itself": replace(lambda file: file.symlink_to(file.name)),
    "a pipe": replace(os.mkfifo),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_an_adapter_is_refused_and_named(two_steps, damage, tmp_path, monkeypatch):
    monkeypatch.chdir(two_steps)  # where its base is
    for name in READ:
        folder = shutil.copytree("adapter", tmp_path / name)
        DAMAGES[damage](folder / name)
        with pytest.raises(UserError, match=rf"^{re.escape(str(folder / name))}: "):
            read_identity(folder), read_checked_adapter(folder), read_processor(folder)


def test_a_sound_folder_is_read(two_steps, monkeypatch):
    monkeypatch.chdir(two_steps)
    folder = Path("adapter")
    assert read_identity(folder)["params"]["lora_rank"] and read_processor(folder).max_query_tokens == 64
    copies = [name for name in read_checked_adapter(folder).weights if ".base_layer." in name]
    assert len(copies) == 2


def test_no_adapter_at_all_is_named(tmp_path):
    refused(check(tmp_path), 2, "FOLDER: adapter: does not exist, or is no folder here")
