import pytest
from conftest import BASE
from test_model import TARGETS

from colintern.lora import add_lora, count, faults, meta_model, table


def counts(targets):
    return count(add_lora(meta_model(str(BASE), None), targets, 32, 32, 0.0), targets)


def test_the_demo_base_has_fifteen_modules():
    found = counts(TARGETS)
    assert found["lora_modules"] == 15
    assert faults(found) == []
    text = table("demo/base", found)
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
    assert any(message in fault for fault in faults(counts(targets)))
