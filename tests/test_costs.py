"""What a step costs: counts against hand-made ones, the real step on meta tensors, and a real peak."""

import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import InternVLConfig

from colintern.modeling.dropout import DropoutMaskBank
from colintern.modeling.lora import add_lora
from colintern.modeling.modeling_colintern import ColIntern3_5
from colintern.modeling.runtime import checkpoint_layers
from colintern.params import load_recipe
from colintern.planning import costs as module
from colintern.planning.costs import Costs, Setting, Side
from colintern.planning.gpus import GPUS
from colintern.planning.meter import Kernel, Meter, measure
from colintern.planning.recommend import PROMPT_TOKENS, USABLE, plan, recommend
from colintern.training.distributed import SINGLE_PROCESS
from colintern.training.loss import make_contrastive_loss
from colintern.training.trainer import ContrastiveTrainer

pytestmark = pytest.mark.integration
PARAMS = load_recipe(ROOT / "recipes" / "demo.yaml")
DEMO = Setting(32, 8, False, tiles=6, page_tokens=108, query_tokens=24)


def demo(layers=2, targets=PARAMS.lora_targets, dropout=0.0, dtype=torch.float32):
    config = InternVLConfig.from_pretrained(BASE)
    config.text_config.num_hidden_layers, config.text_config.layer_types = layers, ["full_attention"] * layers
    return Costs(config, dtype, targets, rank=32, dropout=dropout)


@pytest.fixture(scope="module")
def costs():
    return demo()


def test_a_linear_layer_by_hand():
    """(8, 16) through 16 -> 32: the output is new, weight and bias gradients are made, the input is not counted."""
    with torch.device("meta"):
        layer, rows = nn.Linear(16, 32), torch.empty(8, 16)
    phase = measure(lambda: layer(rows).sum().backward(), [*layer.parameters(), rows])
    assert phase.kernels[Kernel(torch.float32, 2 * 8 * 16 * 32, 4 * (32 + 8 * 16 + 16 * 32 + 8 * 32))] == 1  # forward
    assert sum(k.operations * n for k, n in phase.kernels.items()) == 2 * (2 * 8 * 16 * 32)  # and the weight's gradient
    held = 4 * 8 * 32 + 4 + 4  # output, sum, the sum's gradient (expanding it takes nothing)
    assert held <= phase.peak <= held + 4 * (16 * 32 + 32)


@pytest.mark.parametrize(("frozen", "held"), [(False, 8 * 32 + 8 * 64), (True, 8 * 64)])
def test_what_a_graph_keeps_by_hand(frozen, held):
    """A layer that is trained keeps its input, (8, 32); a frozen one keeps nothing: its weight is there anyway."""
    with torch.device("meta"):
        first, second, rows = nn.Linear(16, 32), nn.Linear(32, 64), torch.empty(8, 16)
    second.requires_grad_(not frozen)
    with Meter([*first.parameters(), *second.parameters(), rows]) as meter:
        out = second(first(rows))
        assert meter.live == 4 * held
        assert meter.peak == 4 * (8 * 32 + 8 * 64)
    del out
    assert meter.live == 0


def test_weights_adapters_and_optimizer_to_the_byte(costs, model):
    attention, mlp = (128 + 128) + 2 * (128 + 64) + (128 + 128), 3 * (128 + 384)
    trained = 32 * (2 * (attention + mlp) + (128 + 128))
    assert costs.trained == trained == 163_840
    assert costs.static() == {
        "base weights": sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        "adapters": 4 * trained,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "dropout": 0,
    }
    assert costs.feature_bytes(6) == 6 * 16 * 128 * 4
    assert costs.parameters == sum(p.numel() for p in model.parameters()) == module.parameters(costs.config)


@pytest.mark.parametrize("checkpointing", [False, True, 1])
@pytest.mark.parametrize(("micro", "negatives"), [(2, 0), (8, 0), (8, 1), (16, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_what_the_trainer_runs(costs, micro, negatives, checkpointing, dtype):
    """The real `gradcache_forward_backward`, whole, on meta tensors, against the phases that `step` adds up."""
    size, costs = 8, costs if dtype is torch.float32 else demo(dtype=dtype)
    pages = size * (1 + negatives)
    trainer = object.__new__(ContrastiveTrainer)
    trainer.loss_function, trainer.micro_batch_size = make_contrastive_loss(0.02, False), micro
    trainer.is_low_precision = dtype is torch.bfloat16
    trainer.processor = costs.config  # `split` asks it for image_token_id and image_seq_length
    batch = {"query": costs._batch(size, 0, 24), "page": costs._batch(pages, 6, 108), "page_ids": torch.arange(pages)}
    batch["query_ids"], trainer.context = torch.arange(size), SINGLE_PROCESS
    shards = SINGLE_PROCESS.gather_batch_layout(batch)
    tensors = [t for side in ("query", "page") for t in batch[side].values()]
    model = costs.model(costs.layers)
    trainer.dropout_masks = model.masks

    step = costs.step(Setting(size, micro, checkpointing, 6, 108, 24, negatives=negatives))
    checkpoint_layers(model, checkpointing)
    known = [
        *model.parameters(),
        *model.buffers(),
        *(p.grad for p in model.parameters() if p.grad is not None),
        *tensors,
    ]
    with disable_input_dtype_casting(model, active=trainer.is_low_precision):
        real = measure(lambda: trainer.gradcache_forward_backward(model, batch, shards), known)
    assert step.memory["activations and loss"] == pytest.approx(real.peak, rel=0.03)
    assert step.operations == sum(k.operations * n for k, n in real.kernels.items())
    assert {k.dtype for k in real.kernels if k.operations and k.bytes} == {torch.float32, dtype}


class Operators(TorchDispatchMode):
    """Which products and casts run, by the formats of what goes in and comes out."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen["product", *(t.dtype for t in args if isinstance(t, torch.Tensor))] += 1
        elif func._overloadpacket is torch.ops.aten._to_copy and args[0].requires_grad and args[0].dim() == 2:
            self.seen["cast", args[0].dtype, out.dtype] += 1
        return out


@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_autocast_on_meta_tensors_casts_what_the_real_one_does(checkpointing):
    """The products of a step and the casts of adapters, on the CPU under torch's autocast and on meta under ours."""
    trainer, costs = object.__new__(ContrastiveTrainer), demo(dtype=torch.bfloat16)
    trainer.is_low_precision, trainer.processor = True, None
    meta = costs.model(costs.layers)
    real = add_lora(ColIntern3_5._from_config(costs.config, dtype=torch.bfloat16), *costs.lora)
    found, shards = [], SimpleNamespace(row_indices={"page": [0, 1]})
    for model in (real, meta):
        checkpoint_layers(model, checkpointing)
        batch = {
            key: torch.zeros_like(t, device=model.device) if t.is_meta else t
            for key, t in costs._batch(2, 6, 108).items()
        }

        def run(model=model, batch=batch):
            trainer.dropout_masks = DropoutMaskBank(model, 0, torch.bfloat16)
            with Operators() as operators:
                trainer.backward_mini_batch(
                    model, {"page": batch}, shards, "page", [0, 1], torch.ones(1, device=model.device), None
                )
            found.append(operators.seen)

        with disable_input_dtype_casting(model):
            run() if model is real else measure(run, [])
    assert found[0] == found[1]
    assert found[0]["cast", torch.float32, torch.bfloat16] >= 2 * 15


def test_operations_are_those_of_torchs_counter(costs):
    tiles = costs._tiles(6)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        costs.model(costs.layers).get_page_features(tiles)
    assert sum(k.operations * n for k, n in costs.features(6).kernels.items()) == counter.get_total_flops() > 0


def test_causal_attention_costs_half():
    query = torch.empty(1, 4, 64, 32, device="meta")
    counts = []
    for causal in (False, True):
        run = lambda causal=causal: nn.functional.scaled_dot_product_attention(query, query, query, is_causal=causal)  # noqa: E731
        counts.append(sum(k.operations * n for k, n in measure(run, [query]).kernels.items()))
    assert counts == [4 * 4 * 64 * 64 * 32, 2 * 4 * 64 * 64 * 32]


def test_more_at_once_takes_more_memory_and_checkpointing_less(costs):
    peaks = [costs.step(DEMO._replace(micro_batch_size=micro)).peak for micro in (1, 2, 4, 8, 16, 32)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1]
    assert costs.step(DEMO._replace(batch_size=64)).peak > costs.step(DEMO).peak
    assert costs.step(DEMO._replace(page_tokens=92, tiles=5)).peak < costs.step(DEMO).peak
    plain, checkpointed = (costs.step(DEMO._replace(checkpointing=on, micro_batch_size=32)) for on in (False, True))
    assert checkpointed.peak < plain.peak and checkpointed.operations > plain.operations
    assert costs.step(DEMO._replace(cached=False)).operations > costs.step(DEMO).operations


def test_a_part_grows_by_as_much_with_each_pair(costs):
    few, more, most = (costs._part(Side(rows, 6, 108), True, 0, 2).peak for rows in (8, 16, 32))
    assert most - more == 2 * (more - few) > 0


def test_dropout_takes_its_masks_and_a_copy_of_what_an_adapter_keeps():
    """Adapters of one input then keep an input each: queries' and pages' tokens, 4 further of 128 wide in 2 layers."""
    none, some = demo(), demo(dropout=0.1)
    assert some.static()["dropout"] == 4096 * (128 + 384) * 4
    whole = DEMO._replace(micro_batch_size=32)
    more = some.step(whole).memory["activations and loss"] - none.step(whole).memory["activations and loss"]
    a_width = 32 * (24 + 108) * 128 * 4
    assert 2 * 4 * a_width <= more <= 2 * 13 * a_width, "at most: q, k, v, o, gate, up, and down with three times 128"


@pytest.mark.parametrize("micro", [8, 32])
def test_a_checkpointed_layer_takes_the_same_dropout_again(micro):
    """As the 1B recipe has it; torch refuses a backward pass that computes something else anew."""
    setting = DEMO._replace(micro_batch_size=micro, checkpointing=True)
    assert demo(dropout=0.1).step(setting).peak > demo().step(setting).peak


@pytest.mark.parametrize(("micro", "checkpointing"), [(8, False), (8, True), (8, 1), (32, 4), (32, 6)])
def test_shallow_models_tell_what_the_deep_one_costs(monkeypatch, micro, checkpointing):
    setting = DEMO._replace(checkpointing=checkpointing, micro_batch_size=micro)
    shallow = demo(layers=7)
    assert shallow.alike
    monkeypatch.setattr(module, "DEEPEST", 99)
    deep = demo(layers=7)
    assert not deep.alike
    assert shallow.step(setting) == deep.step(setting)


def test_on_a_large_card_only_as_many_layers_are_computed_again_as_must_be():
    """Seven layers of the demo base; a card that holds the whole batch with three of them kept."""
    costs, tokens = demo(layers=7), 6 * 16 + PROMPT_TOKENS
    whole = Setting(32, 32, True, 6, tokens, 64)
    peaks = [costs.step(whole._replace(checkpointing=layers)).peak for layers in range(1, 7)]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == 6
    gib = peaks[3] / 2**30 / USABLE * 1.0001
    found = plan(costs, gib, GPUS["L4"], 32, (96,), 64)
    assert found.setting == whole._replace(checkpointing=4) and found.step.peak == peaks[3]
    assert [rival.setting.checkpointing for rival in found.others] == [True, False]
    values = {value.key: value for value in recommend(costs, found, gib, 3600, 1900)}
    assert values["gradient_checkpointing"].value == 4
    assert "the first 4 layers; a step takes 1." in values["gradient_checkpointing"].reason
    little = plan(costs, peaks[5] / 2**30 / USABLE * 1.0001, GPUS["L4"], 32, (96,), 64)
    assert little.setting.checkpointing is True, "one layer of seven saves less than WORTH"
    assert 6 in [rival.setting.checkpointing for rival in little.others]


def test_layers_that_differ_are_run_at_full_depth():
    targets = (r"language_model\.layers\.[45]\.self_attn\.q_proj", "custom_text_proj")
    assert not demo(layers=6, targets=targets).alike


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_real_peak_is_what_was_predicted():
    from bench.memory import in_process

    found = in_process(("demo", 32, 8, False, 0.1), "cpu")
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)
