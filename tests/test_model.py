import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import BASE, ROOT
from peft import AutoPeftModel, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from colintern.core.errors import UserError
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.modeling.adapter_files import HEAD_FILE
from colintern.modeling.attention import choose_attn_implementation
from colintern.modeling.lora import add_lora, find_lora_errors, report_lora
from colintern.modeling.retriever import ColIntern3_5, build_meta_model

TARGETS = [
    *(rf"language_model\.layers\.\d+\.self_attn\.{m}_proj" for m in "qkvo"),
    *(rf"language_model\.layers\.\d+\.mlp\.{m}_proj" for m in ("gate", "up", "down")),
    "custom_text_proj",
]


def load(*path, **kwargs) -> ColIntern3_5:
    return ColIntern3_5.from_pretrained(*path, **({"dtype": torch.float32} | kwargs))


def embed(model, processor, pages) -> torch.Tensor:
    return torch.cat(embed_pages(model, processor, pages, 4) + embed_queries(model, processor, ["from Oslo", "a"], 2))


@pytest.fixture
def adapter(model, processor, tmp_path):
    """An adapter whose LoRA weights are not at their start."""
    wrapped = add_lora(model, TARGETS, rank=4, alpha=4, dropout=0.0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    folder = tmp_path / "adapter"
    wrapped.save_pretrained(folder)
    model.save_head(folder)
    return folder, wrapped


def test_embeddings_are_unit_vectors_and_padding_is_zero(model, processor, pages):
    batch = processor.process_images(pages)
    with torch.no_grad():
        norms = model(**batch).norm(dim=-1)
    torch.testing.assert_close(norms, batch["attention_mask"].float(), atol=1e-5, rtol=0)


def test_embeddings_do_not_depend_on_the_pages_beside(model, processor, pages):
    together = embed_pages(model, processor, pages, 4)
    alone = embed_pages(model, processor, pages, 1)
    assert max((a - b).abs().max() for a, b in zip(together, alone, strict=True)) <= 1e-5


def test_left_padding_is_refused(model, processor):
    batch = processor.process_queries(["a", "a longer query"])
    with pytest.raises(ValueError, match="right-padded"):
        model(**{k: v.flip(1) for k, v in batch.items()})


@pytest.mark.integration
def test_the_same_bytes_in_a_new_process(adapter, processor, pages, tmp_path):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages[:2])
    code = (
        "import torch, sys; sys.path.insert(0, 'tests'); from test_model import *; import PIL.Image as I\n"
        "from colintern.modeling.processor import ColIntern3_5Processor as P\n"
        f"p = P.from_pretrained({str(BASE)!r}, max_visual_tokens=96, max_query_tokens=64)\n"
        f"pages = [I.open({str(tmp_path)!r} + f'/{{i}}.png') for i in range(2)]\n"
        f"save_file({{'e': embed(load({str(folder)!r}), p, pages)}}, {str(tmp_path / 'e')!r})"
    )
    for i, page in enumerate(pages[:2]):
        page.save(tmp_path / f"{i}.png")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert torch.equal(load_file(tmp_path / "e")["e"], here)


def test_plain_peft_and_merged_rank_alike(adapter, processor, pages):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages)
    base = load(BASE)
    base.load_head(folder)
    plain = embed(PeftModel.from_pretrained(base, folder).eval(), processor, pages)
    assert torch.equal(plain, here)
    merged = load(folder, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(embed(merged, processor, pages), here, atol=1e-4, rtol=0)


def test_a_merged_model_is_a_checkpoint_again(adapter, processor, pages, tmp_path):
    merged = load(adapter[0], merge=True)
    merged.save_pretrained(tmp_path / "merged")
    again = load(tmp_path / "merged")
    assert torch.equal(embed(again, processor, pages), embed(merged, processor, pages))


def test_plain_peft_takes_the_head_from_the_adapter_over_a_base_of_another_seed(adapter, processor, pages):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages)
    base = load(BASE, seed=5)
    assert not torch.equal(base.custom_text_proj.weight, load_file(folder / HEAD_FILE)["custom_text_proj.weight"])
    plain = PeftModel.from_pretrained(base, folder).eval()
    assert torch.equal(embed(plain, processor, pages), here)
    assert torch.equal(embed(load(folder, seed=5), processor, pages), here)


def test_peft_finds_the_class_by_the_path_in_an_adapter_of_any_age(adapter, processor, pages):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages[:2])
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["auto_mapping"] == {"base_model_class": "ColIntern3_5", "parent_library": "colintern"}
    for path in ("colintern", "colintern.model", "colintern.modeling.modeling_colintern"):
        config["auto_mapping"]["parent_library"] = path
        file.write_text(json.dumps(config))
        assert torch.equal(embed(load(folder), processor, pages[:2]), here)
        auto = AutoPeftModel.from_pretrained(folder, import_allowlist=["colintern"], dtype=torch.float32).eval()
        assert torch.equal(embed(auto, processor, pages[:2]), here)


def edit_weights(folder, edit) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})


def test_an_adapter_from_before_the_copy_of_the_head_loads_as_it_did(adapter, processor, pages):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages)
    edit_weights(folder, lambda state: {k: v for k, v in state.items() if "lora_" in k})
    assert torch.equal(embed(load(folder), processor, pages), here)


@pytest.mark.parametrize("targets", [["gate_proj", "o_proj"], r"language_model\..*\.(?:up_proj|q_proj)"])
def test_a_complete_adapter_from_elsewhere_has_the_vectors_that_it_has_in_peft(targets, processor, pages, tmp_path):
    config = LoraConfig(
        r=4, target_modules=targets, modules_to_save=["custom_text_proj"], task_type="FEATURE_EXTRACTION",
    )  # fmt: skip
    theirs = PeftModel(load(BASE, seed=9), config)
    torch.manual_seed(4)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.normal_(std=0.05)
    theirs.save_pretrained(tmp_path / "theirs")
    want = embed(theirs.eval(), processor, pages)
    for merge in (False, True):
        ours = embed(load(tmp_path / "theirs", merge=merge), processor, pages)
        torch.testing.assert_close(ours, want, atol=1e-4 if merge else 0, rtol=0)
    edit_weights(tmp_path / "theirs", lambda state: {k: v for k, v in state.items() if "custom_text_proj" not in k})
    with pytest.raises(UserError, match=r"head\.safetensors: missing.*custom_text_proj"):
        load(tmp_path / "theirs")


UP = "base_model.model.language_model.layers.1.mlp.up_proj.lora_"
COPY = "base_model.model.custom_text_proj.base_layer."
WRONG_WEIGHTS = {
    "no tensors": (lambda state: {}, "contains no weights, but adapter_config.json implies 30"),
    "half": (lambda state: dict(list(state.items())[:16]), r"lacks base_model\.model\..* and \d+ more"),
    "integers": (lambda state: {k: v.int() for k, v in state.items()}, "is int32; expected float32"),
    "one integer": (lambda state: state | {f"{UP}A.weight": state[f"{UP}A.weight"].long()}, "up_proj.lora_A.* int64"),
    "fp8": (lambda state: {k: v.to(torch.float8_e4m3fn) for k, v in state.items()}, "is float8_e4m3fn; expected"),
    "zeros": (lambda state: {k: v * (COPY in k) for k, v in state.items()}, "every lora_B is zero, as before the"),
    "zero A": (lambda state: {k: v * ("lora_A" not in k) for k, v in state.items()}, "every lora_A is zero, so the"),
    "renamed": (lambda state: {k.replace("layers.1", "layers.7"): v for k, v in state.items()}, r"unexpected .*\.7"),
    "rank": (lambda state: {k: v[:2] if "lora_A" in k else v for k, v in state.items()}, r"the shape \(2, .*\(4, "),
    "extra": (lambda state: state | {"base_model.model.other": torch.ones(1)}, "has unexpected base_model.model.other"),
    "beyond float32": (lambda state: {k: v.double() * 1e300 for k, v in state.items()}, "has NaN or infinite values"),
    "other head": (lambda state: state | {f"{COPY}weight": state[f"{COPY}weight"] * 1.01}, "differs from its copy in"),
    "half a head": (lambda state: {k: v for k, v in state.items() if k != f"{COPY}bias"}, r"lacks .*\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG_WEIGHTS)
def test_weights_that_are_not_those_of_the_configuration_are_refused(adapter, fault):
    edit, words = WRONG_WEIGHTS[fault]
    edit_weights(adapter[0], edit)
    with pytest.raises(UserError, match=rf"(adapter_model|head)\.safetensors: .*{words}"):
        load(adapter[0])


def test_weights_in_other_floating_types_load(adapter, processor, pages):
    folder, wrapped = adapter
    here = embed(wrapped.eval(), processor, pages)
    edit_weights(folder, lambda state: {k: v.double() for k, v in state.items()})
    assert torch.equal(embed(load(folder), processor, pages), here)
    edit_weights(folder, lambda state: {k: v if "base_layer" in k else v.half() for k, v in state.items()})
    torch.testing.assert_close(embed(load(folder), processor, pages), here, atol=1e-3, rtol=0)


WRONG_OPTIONS = {
    "r": [0, True, "4", 10**30, 8],
    "lora_alpha": [0, -1, float("nan"), 1e308, "4", None],
    "alpha_pattern": [[], {"up_proj": float("nan")}],
    "alora_invocation_tokens": [[1]],
    "target_modules": [None, "", [], [1], "nothing", "language_model.layers.(", "language_model.layers", 7],
    "peft_type": ["LOHA", None, []],
    "base_model_name_or_path": [None, 3, ""],
    "bias": ["some", ["none"]],
    "modules_to_save": [3, [3]],
    "rank_pattern": [[], {"up_proj": "2"}, {"up_proj": 2}],
    "init_lora_weights": ["nonsense", 3],
    "megatron_config": [{"a": 1}],
    "use_dora": [True, "yes"],
}


@pytest.mark.parametrize("key", WRONG_OPTIONS)
def test_a_configuration_with_an_odd_value_is_refused(adapter, key):
    file = adapter[0] / "adapter_config.json"
    content = json.loads(file.read_text())
    for value in WRONG_OPTIONS[key]:
        file.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=r"adapter_config\.json|safetensors: "):
            load(adapter[0])


@pytest.mark.parametrize(
    "option",
    [
        {"target_modules": r"(?:[a-z_.0-9]+)+!"},
        {"target_modules": "(?:.|.)" * 40 + "!"},
        {"rank_pattern": {r"(?:[a-z_.0-9]+)+!": 2}},
        {"exclude_modules": ".*" * 10 + "!"},
    ],
)
def test_a_pattern_that_would_be_matched_for_ever_is_refused(adapter, option, monkeypatch):
    monkeypatch.setattr("colintern.modeling.adapter_files.MAX_CPU_SECONDS", 0.6)
    file = adapter[0] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | option))
    with pytest.raises(UserError, match=r"adapter_config\.json: PEFT needs more than 0\.6 s to match its patterns"):
        load(adapter[0])


def test_an_adapter_without_its_head_is_refused(adapter):
    folder, _ = adapter
    (folder / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors: missing.*custom_text_proj"):
        load(folder)


@pytest.mark.parametrize("damage", ["half", "torn", "other key"])
def test_a_damaged_head_is_refused_and_named(adapter, damage):
    file = adapter[0] / "head.safetensors"
    state = load_file(file)
    if damage == "torn":
        file.write_bytes(file.read_bytes()[:100])
    else:
        bias = state.pop("custom_text_proj.bias")
        save_file(state | ({"bias": bias} if damage == "other key" else {}), file)
    with pytest.raises(ValueError, match=r"head\.safetensors: (cannot be read|contains .* expected custom_text_proj)"):
        load(adapter[0])


def test_a_head_that_is_not_finite_is_refused(adapter):
    file = adapter[0] / "head.safetensors"
    save_file({k: v * float("nan") for k, v in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="finite"):
        load(adapter[0])


def relayout(target, rename) -> None:
    shutil.copytree(BASE, target)
    weights = {rename(k): v for k, v in load_file(BASE / "model.safetensors").items()}
    save_file({k: v for k, v in weights.items() if k}, target / "model.safetensors", metadata={"format": "pt"})


LAYOUTS = {
    "hub": lambda k: re.sub(r"^model\.", "", k) if "language_model" not in k else k.replace(
        "model.language_model.", "language_model.model."),
    "transformers": lambda k: k if k.startswith("model.") else re.sub(
        r"^language_model\.model\.", "model.language_model.", k).replace("vision_tower", "model.vision_tower").replace(
        "multi_modal", "model.multi_modal"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_key_layouts_load_whole(layout, model, processor, pages, tmp_path):
    def canonical(key: str) -> str:
        key = re.sub(r"^(language_model\.model|model\.language_model)\.", "model.language_model.", key)
        return key if key.startswith(("model.", "lm_head")) else f"model.{key}"

    relayout(tmp_path / "base", lambda k: LAYOUTS[layout](canonical(k)))
    keys = list(load_file(tmp_path / "base" / "model.safetensors"))
    want = "language_model.model.layers" if layout == "hub" else "model.language_model.layers"
    assert any(k.startswith(want) for k in keys)
    again = load(tmp_path / "base")
    assert torch.equal(embed(again, processor, pages), embed(model, processor, pages))


def test_a_hub_checkpoint_may_carry_its_own_lm_head(tmp_path, processor):
    relayout(tmp_path / "base", lambda k: k)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["language_model.lm_head.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path / "base")


def test_a_missing_weight_is_an_error_that_names_it(tmp_path):
    relayout(tmp_path / "base", lambda k: "" if k.endswith("layers.1.mlp.up_proj.weight") else k)
    with pytest.raises(ValueError, match=r"missing language_model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path / "base")


def test_a_left_over_weight_is_an_error_that_names_it(tmp_path):
    relayout(tmp_path / "base", lambda k: k.replace("layers.1.mlp.up_proj", "layers.1.mlp.upp_proj"))
    with pytest.raises(ValueError, match=r"unexpected .*upp_proj"):
        load(tmp_path / "base")


def test_the_head_depends_on_the_seed_alone(processor):
    torch.manual_seed(1)
    a = load(BASE, seed=5).custom_text_proj.weight
    torch.manual_seed(2)
    b = load(BASE, seed=5).custom_text_proj.weight
    assert torch.equal(a, b)
    assert not torch.equal(a, load(BASE, seed=6).custom_text_proj.weight)


def test_the_frozen_tower_stays_out_of_the_graph(model, processor, pages):
    wrapped = add_lora(model, TARGETS, rank=4, alpha=4, dropout=0.0)
    wrapped.enable_input_require_grads()  # what PEFT and gradient checkpointing do; it hooks the tower's inputs too
    ran = {"forward": 0, "backward": 0}
    tower = model.vision_tower.encoder.layer[0]
    tower.register_forward_hook(lambda *_: ran.update(forward=ran["forward"] + 1))
    tower.register_full_backward_hook(lambda *_: ran.update(backward=ran["backward"] + 1))
    wrapped(**processor.process_images(pages)).sum().backward()
    assert ran == {"forward": len(pages), "backward": 0}


def test_colpali_engines_trainers_train_it(processor, pages, tmp_path):
    from colpali_engine.data.dataset import ColPaliEngineDataset
    from colpali_engine.trainer.colmodel_training import ColModelTraining, ColModelTrainingConfig
    from transformers import TrainingArguments

    rows = [{"query": f"which page is number {i}", "pos_target": page} for i, page in enumerate(pages)]
    data = ColPaliEngineDataset(rows)
    training = ColModelTraining(
        ColModelTrainingConfig(
            model=load(BASE),
            processor=processor,
            train_dataset=data,
            eval_dataset=data,
            output_dir=str(tmp_path),
            tr_args=TrainingArguments(
                str(tmp_path), use_cpu=True, max_steps=1, eval_strategy="steps", eval_steps=1, save_strategy="no",
                per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True,
            ),
            peft_config=LoraConfig(r=2, target_modules="|".join(TARGETS), task_type="FEATURE_EXTRACTION"),
        )
    )  # fmt: skip
    queries = training.collator([data[0]])["query_input_ids"]
    assert torch.equal(queries, processor.process_queries([rows[0]["query"]])["input_ids"])
    training.train()
    training.save()
    training.model.save_head(tmp_path)
    here = embed(training.model.eval(), processor, pages)
    assert not torch.equal(here, embed(load(BASE), processor, pages)), "it learned"
    assert torch.equal(embed(load(tmp_path), processor, pages), here)


def test_tiles_that_are_not_those_of_the_rows_are_refused(model, processor, pages):
    batch = processor.process_images(pages[:2])
    with pytest.raises(ValueError, match=r"2 tiles, but input_ids holds image tokens for 7 \(\[6, 1\] by row\)"):
        model(**{key: value[:2] for key, value in batch.items()})  # as a batch of colpali-engine's is sliced


def test_a_page_beside_rows_of_text(model, processor, pages):
    texts = ["from Oslo", "a longer text about milk"]
    batch = processor(text=[texts[0], processor.visual_prompt_prefix, texts[1]], images=pages[:1])
    with torch.no_grad():
        rows = model(**batch)
        alone = [*model(**processor.process_texts(texts)), model(**processor.process_images(pages[:1]))[0]]
    for row, other in zip((rows[0], rows[2], rows[1]), alone, strict=True):
        torch.testing.assert_close(row[: len(other)], other, atol=1e-5, rtol=0)


def test_a_page_without_its_prompt(model, processor, pages):
    batch = processor(text=["from Oslo", processor.visual_prompt_prefix], images=pages[0])
    masked = load(BASE, mask_non_image_embeddings=True)
    with torch.no_grad():
        whole, part = model(**batch), masked(**batch)
    visual = processor.get_image_mask(batch)
    assert visual.sum(1).tolist() == [0, 96]
    assert torch.equal(part[0], whole[0]), "a text has no image to keep"
    assert torch.equal(part[1], whole[1] * visual[1][:, None]) and not torch.equal(part[1], whole[1])
    assert not model.mask_non_image_embeddings


def test_the_names_of_colpali_engines_models(model, adapter):
    folder, wrapped = adapter
    for one in (model, wrapped, load(pretrained_model_name_or_path=folder, mask_non_image_embeddings=True)):
        assert (one.dim, one.padding_side, one.patch_size, one.spatial_merge_size) == (128, "right", 14, 2)
    assert one.mask_non_image_embeddings
    with pytest.raises(TypeError, match="max_pixels"):
        load(BASE, max_pixels=1)
    same = ColIntern3_5.from_pretrained(
        BASE, torch_dtype=torch.float32, device_map="cpu", attn_implementation=None, trust_remote_code=True
    )
    assert torch.equal(same.custom_text_proj.weight, model.custom_text_proj.weight)


def test_attention_auto_takes_flash_attention_only_where_it_works(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("colintern.modeling.attention.find_spec", lambda name: name == "flash_attn" or None)
    assert choose_attn_implementation("auto", "bfloat16") == "flash_attention_2"
    assert choose_attn_implementation("auto", "float32") == "sdpa"


def test_the_1b_architecture_has_the_published_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(json.loads((ROOT / "tests/internvl3_5-1b.json").read_text())))
    model = build_meta_model(str(tmp_path), None)
    head = model.custom_text_proj
    own = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in head.parameters())
    assert round(own / 1e6, 1) == 905.3
    counts = report_lora(add_lora(model, TARGETS, rank=32, alpha=32, dropout=0.1), TARGETS)
    assert [row.matches for row in counts.patterns.values()] == [28] * 7 + [1]
    assert all(row.layers == list(range(28)) for row in list(counts.patterns.values())[:7])
    assert counts.lora_modules == 196 + 1
    assert counts.trainable_parameters == 20_221_952
    assert (counts.frozen_vision_modules, counts.frozen_projector_modules) == (144, 2)
    assert counts.adapted_vision_modules == 0
    assert counts.head == [1024, 128]
    assert find_lora_errors(counts) == []
