import dataclasses
import functools
import time

import pytest
import torch
from conftest import BASE, ROOT
from test_model import TARGETS, load

from colintern.modeling.base_config import PRESET_SIZES, make_preset_config
from colintern.modeling.lora import (
    add_lora,
    find_lora_errors,
    find_lora_warnings,
    format_lora_report,
    format_ranges,
    report_lora,
    report_lora_on_meta,
)
from colintern.modeling.retriever import build_meta_model
from colintern.params import load_recipe

RECIPE = load_recipe(ROOT / "recipes" / "internvl3_5-1b.yaml")
Q_PROJ = r"language_model\.layers\.\d+\.self_attn\.q_proj"
# Qwen3's published parameter counts, of the files of Qwen/Qwen3-*B without an output layer of its own.
QWEN3 = {"1b": 596_049_920, "2b": 1_720_574_976, "4b": 4_022_468_096, "8b": 8_190_735_360 - 151_936 * 4096}


def counts(targets):
    return report_lora(add_lora(build_meta_model(str(BASE), None), targets, 32, 32, 0.0), targets)


@functools.cache
def of_1b(*targets):
    return report_lora_on_meta(
        build_meta_model(make_preset_config("internvl3_5-1b"), None), dataclasses.replace(RECIPE, lora_targets=targets)
    )


def test_the_demo_base_has_fifteen_modules():
    found = counts(TARGETS)
    assert found.lora_modules == 15
    assert find_lora_errors(found) == find_lora_warnings(found) == []
    text = format_lora_report("demo/base", found)
    assert max(map(len, text.splitlines())) <= 80
    assert "Linear(128 -> 128)" in text
    assert "layers 0-1" in text


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([*TARGETS, r"layers\.\d+\.self_attn\.q_proj"], "matches no module"),
        ([*TARGETS, r"language_model\.layers\.{0..1}\.self_attn\.q_proj"], "matches no module"),
        (TARGETS[:-1], "custom_text_proj is not adapted"),
        ([*TARGETS, r"vision_tower\..*\.q_proj"], "vision tower or projector"),
        ([*TARGETS, r"multi_modal_projector\.linear_1"], "vision tower or projector"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    assert any(message in fault for fault in find_lora_errors(counts(targets)))


@pytest.mark.parametrize("size", PRESET_SIZES)
def test_each_size_verifies_in_seconds_and_has_the_published_language_model(size):
    start = time.process_time()  # of this process alone: others may be busy
    model = build_meta_model(make_preset_config(size), None)
    found = report_lora_on_meta(model, RECIPE)
    assert time.process_time() - start < 5
    assert all(p.device.type == "meta" for p in model.parameters()), "nothing is allocated, so nothing can be read"
    hidden, _, layers, _ = PRESET_SIZES[size]
    assert found.parts["language_model"].parameters == QWEN3[size[-2:]]
    assert found.lora_modules == 7 * layers + 1
    assert [row.layers for row in found.patterns.values()][:7] == [list(range(layers))] * 7
    assert (found.frozen_vision_modules, found.frozen_projector_modules) == (144, 2)
    assert found.head == [hidden, 128]
    assert find_lora_errors(found) == find_lora_warnings(found) == []
    text = format_lora_report(size, found)
    assert max(map(len, text.splitlines())) <= 80
    assert f"Linear({hidden} -> 128)" in text and f"{layers} found layers 0-{layers - 1}" in text


def test_the_shipped_1b_is_that_of_the_hub():
    hub = report_lora_on_meta(build_meta_model(str(ROOT / "tests" / "internvl3_5-1b.json"), None), RECIPE)
    assert hub == report_lora_on_meta(build_meta_model(make_preset_config("internvl3_5-1b"), None), RECIPE)
    assert hub.trainable_parameters == 20_221_952 and round(hub.total_parameters / 1e6, 1) == 905.4


@pytest.mark.parametrize(
    ("target", "instead"),
    [
        ("layers.*.self_attn.q_proj", Q_PROJ),
        (r"layers\.\d+\.self_attn\.q_proj", Q_PROJ),
        ("model.layers.*.mlp.up_proj", r"language_model\.layers\.\d+\.mlp\.up_proj"),
        ("language_model.layers.{0..27}.self_attn.q_proj", Q_PROJ),
        (r"language_model\.layers\.{0..27}\.self_attn\.q_proj", Q_PROJ),
        ("layers.{0..27}.self_attn.q_proj", Q_PROJ),
        ("language_model.layers*self_attn.q_proj", Q_PROJ),
        ("language_model.layers.*.self_atn.q_proj", Q_PROJ),
        ("q_proj", Q_PROJ),
        ("custom_proj", "custom_text_proj"),
    ],
)
def test_a_pattern_that_matches_nothing_is_answered_with_one_that_does(target, instead):
    found = of_1b(*TARGETS, target)
    assert find_lora_errors(found) == [
        f"lora_targets: {target} matches no module; whole names are matched: write {instead}"
    ]
    again = of_1b(*TARGETS, instead) if instead not in TARGETS else of_1b(*TARGETS)
    assert find_lora_errors(again) == [], "the answer is right itself"


def test_the_guides_globs_happen_to_be_right_as_regular_expressions_and_get_a_note():
    globs = [target.replace("\\.", ".").replace(r"\d+", "*") for target in TARGETS]
    assert globs[0] == "language_model.layers.*.self_attn.q_proj"
    found = of_1b(*globs)
    assert found.trainable_parameters == 20_221_952 and find_lora_errors(found) == []
    assert len(find_lora_warnings(found)) == 7 and all(Q_PROJ in note for note in find_lora_warnings(found)[:1])
    assert max(map(len, format_lora_report("1b", found).splitlines())) <= 80


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("language_model.layers.1*.self_attn.q_proj", "matches 2 modules and would match others"),  # a shell: 1, 10-19
        ("language_model.layers.*", "language_model.layers, which is no linear layer"),
        (r"language_model\.embed_tokens", "which is no linear layer"),
        (r".*\.q_proj", "hits 24 modules of the vision tower or projector"),
    ],
)
def test_a_pattern_that_matches_something_else_is_refused(target, words):
    assert any(words in fault for fault in find_lora_errors(of_1b(*TARGETS, target)))


def test_nothing_trained_is_refused_and_part_of_the_layers_is_noted():
    nothing = of_1b("nothing")
    assert [fault.split()[1] for fault in find_lora_errors(nothing)] == ["nothing", "custom_text_proj", "nothing"]
    assert nothing.trainable_parameters == nothing.lora_modules == 0
    some = of_1b(r"language_model\.layers\.[0-27]\.self_attn\.q_proj", "custom_text_proj")
    assert find_lora_errors(some) == [] and "only layers 0-2, 7 of 0-27" in find_lora_warnings(some)[0]
    assert "only the head" in find_lora_warnings(of_1b("custom_text_proj"))[0], "what the guide's list does in PEFT"


def test_the_bytes_are_those_that_are_written_and_held(tmp_path):
    wrapped = add_lora(load(BASE), TARGETS, rank=4, alpha=4, dropout=0.0)
    found = report_lora(wrapped, TARGETS)
    wrapped.save_pretrained(tmp_path)
    wrapped.base_model.model.save_head(tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert found.adapter_bytes <= written < found.adapter_bytes + 8192, "safetensors has a header"
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for p in trained:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [v for state in optimizer.state.values() for v in state.values() if v.dim()]
    assert found.optimizer_bytes == sum(v.numel() * v.element_size() for v in held)


def test_ranges():
    assert [format_ranges(n) for n in ([], [3], [0, 1, 2, 7], [1, 3, 4])] == ["", "3", "0-2, 7", "1, 3-4"]
