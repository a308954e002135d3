"""The predicted cost of a step against the operations of a real step on the CPU, and against a measured peak."""

import sys
from dataclasses import replace

import pytest
import torch
from conftest import BASE, ROOT
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLConfig

from colintern.modeling.retriever import ColIntern3_5
from colintern.params import load_recipe
from colintern.planning.costs import ATTENTION_BACKWARD, CostModel, StepSettings, count_parameters
from colintern.planning.gpus import GPUS
from colintern.planning.probe import build_probe_trainer, probe_step
from colintern.planning.recommend import PROMPT_TOKENS, USABLE_SHARE, plan_step, recommend_settings

PARAMS = load_recipe(ROOT / "recipes" / "demo.yaml")
DEMO = StepSettings(32, 8, False, tiles=6, page_tokens=108, query_tokens=24)
SECOND_LAYER = (r"language_model\.layers\.1\.self_attn\.q_proj", "custom_text_proj")


def demo_config(layers=2):
    config = InternVLConfig.from_pretrained(BASE)
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    return config


def demo_costs(layers=2, dropout=0.0):
    return CostModel(demo_config(layers), replace(PARAMS, lora_dropout=dropout, max_query_tokens=64))


@pytest.fixture(scope="module")
def costs():
    return demo_costs()


def test_weights_adapters_and_optimizer_to_the_byte(costs, model):
    attention, mlp = (128 + 128) + 2 * (128 + 64) + (128 + 128), 3 * (128 + 384)
    trained = 32 * (2 * (attention + mlp) + (128 + 128))
    assert costs.num_trained == trained == 163_840
    assert costs.static_memory == {
        "base weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "adapters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "dropout": 0,
    }
    assert costs.feature_bytes(6) == 6 * 16 * 128 * 4
    assert costs.num_parameters == sum(p.numel() for p in model.parameters()) == count_parameters(costs.config)


def test_dropout_takes_its_masks_and_a_copy_of_the_input_of_each_adapter(costs):
    """q, k and v, and gate and up, share an input without dropout: three further copies of it in each of two layers,
    and two widths of the masked inputs that a layer keeps anyway."""
    dropout = demo_costs(dropout=0.1)
    assert dropout.static_memory["dropout"] == 4096 * (128 + 384) * 4
    assert 3 * 128 * 4 <= dropout.layer_bytes - costs.layer_bytes <= (7 * 128 + 384) * 4


@pytest.mark.parametrize(
    ("layers", "micro", "negatives", "checkpointing", "dtype", "targets"),
    [
        (2, 8, 0, False, "float32", PARAMS.lora_targets),
        (2, 4, 1, True, "bfloat16", PARAMS.lora_targets),
        (5, 8, 1, 3, "float32", PARAMS.lora_targets),  # extrapolated from two layers
        (2, 16, 1, False, "float32", SECOND_LAYER),  # run with all layers, because they differ
    ],
)
def test_operations_are_those_of_a_real_step(
    processor, tmp_path, layers, micro, negatives, checkpointing, dtype, targets
):
    """torch has no formula for its fused attention on the CPU, so that its operations are added by hand."""
    changes = {"micro_batch_size": micro, "negatives": negatives, "gradient_checkpointing": checkpointing}
    params = replace(PARAMS, batch_size=8, dtype=dtype, lora_targets=targets, **changes)
    model = ColIntern3_5._from_config(demo_config(layers), dtype=getattr(torch, dtype), attn_implementation="sdpa")
    trainer, costs = build_probe_trainer(params, model, processor, str(tmp_path))
    with FlopCounterMode(display=False) as counter:
        step = probe_step(params, trainer, costs, 8)
    assert step.settings.micro_batch_size == micro
    queries, pages = 8 * step.settings.query_tokens**2, 8 * (1 + negatives) * step.settings.page_tokens**2
    forwards = 1 + (micro < 8 * (1 + negatives)) + checkpointing / (1 if checkpointing is True else layers)
    attention = 2 * (queries + pages) * 4 * 32 * layers * (forwards + ATTENTION_BACKWARD)
    tolerance = 0.01 if checkpointing else 1e-5  # recomputation stops before a layer's last product, of an adapter
    assert step.predicted.operations == pytest.approx(counter.get_total_flops() + attention, rel=tolerance)


def test_more_at_once_takes_more_memory_and_checkpointing_less(costs):
    steps = [costs.predict_step(DEMO._replace(micro_batch_size=micro)) for micro in (1, 2, 4, 8, 16, 32)]
    peaks = [step.peak_bytes for step in steps]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    assert steps[-1].operations < steps[0].operations and steps[-1].traffic_bytes < steps[0].traffic_bytes
    step = costs.predict_step(DEMO)
    assert costs.predict_step(DEMO._replace(batch_size=64)).peak_bytes > step.peak_bytes
    assert costs.predict_step(DEMO._replace(page_tokens=92, tiles=5)).peak_bytes < step.peak_bytes


def test_on_a_large_card_only_as_many_layers_are_recomputed_as_must_be():
    """Seven layers of the demo base; a card that holds the whole batch with three of them kept."""
    costs = demo_costs(layers=7)
    whole = StepSettings(32, 32, True, 6, 6 * 16 + PROMPT_TOKENS, 64)
    steps = [costs.predict_step(whole._replace(checkpointing=layers)) for layers in range(1, 7)]
    peaks = [step.peak_bytes for step in steps]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 6
    assert [step.operations for step in steps] == sorted(step.operations for step in steps)
    gib = peaks[3] / 2**30 / USABLE_SHARE * 1.0001
    plan = plan_step(costs, gib, GPUS["L4"])
    assert plan.settings == whole._replace(checkpointing=4) and plan.cost.peak_bytes == peaks[3]
    assert {other.settings.checkpointing for other in plan.others} == {True, False}
    values = {value.key: value for value in recommend_settings(costs, plan, gib, 3600, 1900)}
    assert values["gradient_checkpointing"].value == 4
    assert "the first 4 layers; a step takes 1." in values["gradient_checkpointing"].reason
    plan = plan_step(costs, peaks[5] / 2**30 / USABLE_SHARE * 1.0001, GPUS["L4"])
    assert plan.settings.checkpointing is True, "one layer of seven saves less than MIN_TIME_SAVED"
    assert 6 in [other.settings.checkpointing for other in plan.others]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.integration
@pytest.mark.parametrize("row", [(32, 8, False, 0.1), pytest.param((32, 32, True, 0.0), marks=pytest.mark.slow)])
def test_a_measured_peak_is_the_predicted_one(row):
    from bench.memory import in_process

    step = in_process(("demo", *row), "cpu")
    assert step["predicted"] == pytest.approx(step["measured"], rel=0.15)
