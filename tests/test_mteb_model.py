"""Models as mteb takes them, outside the pipeline: loading, names, and what is refused, with its reason.

That the scores are those of `colintern evaluate` is in test_evaluate.py.
"""

import contextlib
import json
import shutil
from pathlib import Path

import mteb
import pytest
import torch
from conftest import BASE
from mteb.models.model_implementations import MODEL_REGISTRY
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_model import adapter  # noqa: F401  (a fixture)

from colintern.core.errors import UserError
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder, load_encoder, register_encoder
from colintern.modeling.attention import choose_attn_implementation
from colintern.modeling.retriever import ColIntern3_5
from colintern.storage.identity import content_hash


@pytest.fixture
def folder(adapter, processor, tmp_path, monkeypatch) -> Path:  # noqa: F811
    """An adapter with its processor; the working folder is another, without a params.yaml."""
    processor.save_pretrained(adapter[0])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return adapter[0]


@pytest.fixture
def registry():
    """mteb's, as it was before."""
    before = dict(MODEL_REGISTRY)
    yield MODEL_REGISTRY
    MODEL_REGISTRY.clear()
    MODEL_REGISTRY.update(before)


def test_on_the_cpu_of_a_machine_with_a_gpu_its_attention_is_the_cpus(folder, monkeypatch):
    """flash-attn, which computes on CUDA alone, is installed there."""

    def on_that_machine(*asked):
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr("colintern.modeling.attention.find_spec", lambda name: name)
            return choose_attn_implementation(*asked)

    monkeypatch.setattr("colintern.modeling.loading.choose_attn_implementation", on_that_machine)
    assert load_encoder(folder, dtype="bfloat16", device="cpu").model.config._attn_implementation == "sdpa"


def test_an_adapter_merged_by_whomever_embeds_as_it_does(folder, processor, pages, tmp_path):
    plain = load_encoder(folder, dtype="float32")
    want = plain.embed_images(pages)
    base = ColIntern3_5.from_pretrained(BASE, dtype=torch.float32)
    base.load_head(folder)
    wrapped = PeftModel.from_pretrained(base, str(folder))
    encoders = {"in PEFT": ColIntern3_5Encoder(wrapped, processor, "colintern/here", "1")}
    assert all(torch.equal(a, b) for a, b in zip(encoders["in PEFT"].embed_images(pages), want, strict=True))
    merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    processor.save_pretrained(tmp_path / "merged")
    encoders = {"merged": ColIntern3_5Encoder(merged, processor, "colintern/here", "1")}
    encoders |= {"merged on loading": load_encoder(folder, dtype="float32", merge=True)}
    encoders |= {"merged folder": load_encoder(tmp_path / "merged", dtype="float32")}
    [parameters] = {encoder.mteb_model_meta.n_parameters for encoder in (plain, *encoders.values())}
    assert parameters == sum(p.numel() for p in merged.parameters())
    for name, encoder in encoders.items():
        assert not any("lora" in key for key, _ in encoder.model.named_parameters()), name
        for a, b in zip(encoder.embed_images(pages), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0, msg=name)
    assert plain.mteb_model_meta.revision == content_hash(folder / "adapter_model.safetensors")[:40]
    assert encoders["merged folder"].mteb_model_meta.name == "colintern/merged"


def test_bounds_and_dtype_are_those_it_was_trained_with_or_those_asked_for(folder):
    (folder / "identity.json").write_text(json.dumps({"params": {"dtype": "bfloat16"}}))
    encoder = load_encoder(folder)
    assert encoder.model.dtype == torch.bfloat16
    assert (encoder.processor.max_visual_tokens, encoder.processor.max_query_tokens) == (96, 64)
    encoder = load_encoder(folder, dtype="float32", max_visual_tokens=32, max_query_tokens=20)
    assert encoder.model.dtype == torch.float32
    assert (encoder.processor.max_visual_tokens, encoder.processor.max_query_tokens) == (32, 20)


def test_a_base_that_is_named_from_the_repository_is_found_around_the_adapter(folder, tmp_path):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
    with pytest.raises(UserError, match=r"base: 'some/base', the base of .*adapter, is no model's folder here"):
        load_encoder(folder)
    shutil.copytree(BASE, tmp_path / "some" / "base")
    assert load_encoder(folder).mteb_model_meta.name == "colintern/adapter"
    want = {"model.safetensors": {"size": 1, "sha256": "0" * 64}}
    (folder / "identity.json").write_text(json.dumps({"base": {"files": want}}))
    with pytest.raises(UserError, match=r"some/base/model.safetensors is not the file that .*adapter was trained on"):
        load_encoder(folder)


def edit(file: Path, which: str, value: float) -> None:
    weights = load_file(file)
    for name, weight in weights.items():
        if which in name:
            weight.fill_(value)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda at: edit(at / "adapter_model.safetensors", "lora_B", 0.0), "every lora_B is zero, as before the first"),
        (lambda at: edit(at / "adapter_model.safetensors", "custom_text_proj.lora_B", 0.0), "1 of 15 lora_B, such as"),
        (lambda at: edit(at / "adapter_model.safetensors", "q_proj.lora_A", float("nan")), "has NaN or infinite"),
        (lambda at: (at / "head.safetensors").unlink(), r"head.safetensors: missing. It contains the base weights"),
        (lambda at: (at / "head.safetensors").write_bytes(b"torn"), r"head.safetensors: cannot be read"),
        (lambda at: (at / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
        (lambda at: (at / "adapter_model.safetensors").write_bytes(b"torn"), "adapter_model.safetensors: cannot be"),
        (lambda at: (at / "processor_config.json").unlink(), "processor_config.json: is missing"),
    ],
)
def test_what_cannot_be_right_is_refused_and_named(folder, fault, reason):
    fault(folder)
    with pytest.raises(UserError, match=reason):
        load_encoder(folder)


def test_what_is_no_model_and_settings_that_are_none_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"its weights have no custom_text_proj.weight, so it is a base before"):
        load_encoder(BASE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds no adapter_model.safetensors"):
        load_encoder(tmp_path / "empty")
    with pytest.raises(UserError, match=r"model: 'someone/model' is no folder here, and a hub id needs its commit"):
        load_encoder("someone/model")
    (tmp_path / "torn").mkdir()
    shutil.copy(BASE / "config.json", tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"torn/model\.safetensors: cannot be read"):
        load_encoder(tmp_path / "torn")
    for key, value in {
        "pool_factor": 0,
        "dim": 129,
        "precision": "int4",
        "rescore_top_k": -1,
        "dtype": "float8",
        "max_visual_tokens": 3,
    }.items():
        with pytest.raises(UserError, match=f"{key}[:=]"):
            load_encoder(folder, **{key: value})


def test_mteb_knows_a_registered_model_by_its_name(folder, registry):
    meta = register_encoder(folder, "colintern/mine", dtype="float32")
    assert mteb.get_model_meta("colintern/mine") is meta and meta.model_type == ["late-interaction"]
    assert [m.name for m in mteb.get_model_metas(model_types=["late-interaction"]) if m.name == meta.name]
    with contextlib.chdir("/"):
        model = mteb.get_model("colintern/mine", revision=meta.revision, pool_factor=2)
    assert model.pool_factor == 2
    assert model.mteb_model_meta.experiment_kwargs == {"dtype": "float32", "pool_factor": 2}
    assert mteb.get_model("colintern/mine", embed_dim=64).dim == 64
    assert str(folder) not in json.dumps(model.mteb_model_meta.to_dict())
    with pytest.raises(UserError, match=r"dim: 256 is not valid; it must be 1 to 128"):
        mteb.get_model("colintern/mine", embed_dim=256)


def test_mteb_never_takes_the_results_of_another_setting(folder, registry):
    """Its cache finds a result by name, revision and `experiment_name` alone."""
    sizes = [{}, {"pool_factor": 8}, {"pool_factor": 8, "dim": 32}, {"merge": True}, {"max_visual_tokens": 32}]
    sizes += [{"precision": "int8"}, {"precision": "int8", "rescore_top_k": 20}]
    loaded = [load_encoder(folder, **size).mteb_model_meta for size in sizes]
    assert loaded[0].experiment_name is None and load_encoder(folder, dim=128).mteb_model_meta == loaded[0]
    assert [meta.experiment_kwargs or {} for meta in loaded] == sizes
    for size, meta in zip(sizes, loaded, strict=True):
        registered = register_encoder(folder, "colintern/mine", base=BASE, **size)
        assert registered.experiment_name == meta.experiment_name
    register_encoder(folder, "colintern/mine", base=BASE, pool_factor=8, dim=32)
    model = mteb.get_model("colintern/mine", dim=64)
    assert (model.pool_factor, model.dim) == (8, 64)
    assert model.mteb_model_meta.experiment_kwargs == {"pool_factor": 8, "dim": 64}


def test_names_and_weights_are_held_apart(folder, registry):
    with pytest.raises(UserError, match=r"'vidore/colpali-v1\.3' is a model of mteb's own"):
        register_encoder(folder, "vidore/colpali-v1.3")
    with pytest.raises(UserError, match="'mine' is not valid; it must be organisation/model"):
        register_encoder(folder, "mine")
    meta = register_encoder(folder)
    assert meta.name == "colintern/adapter"
    edit(folder / "adapter_model.safetensors", "lora_B", 0.01)
    with pytest.raises(UserError, match="its weights have changed since it was registered as colintern/adapter"):
        mteb.get_model("colintern/adapter")
    assert register_encoder(folder).revision != meta.revision
    assert mteb.get_model("colintern/adapter")
    edit(folder / "adapter_model.safetensors", "lora_B", 0.0)
    with pytest.raises(UserError, match="every lora_B is zero"):
        register_encoder(folder)
