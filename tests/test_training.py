import dataclasses
import math
import os
import shutil
import time
from itertools import pairwise

import pytest
import torch
from conftest import BASE, ROOT
from test_model import TARGETS, load

from colintern.core.errors import UserError
from colintern.encoding.page_features import Page, PageFeatures
from colintern.modeling import dropout
from colintern.modeling.lora import add_lora
from colintern.monitoring.monitors import LossCurveMonitor, ThroughputMonitor, check_throughput
from colintern.params import load_recipe
from colintern.training.mini_batching import plan_mini_batches, scatter_to_batch_order, slice_mini_batch
from colintern.training.pairs import TrainingDataset, TrainingPair
from colintern.training.run import assemble_trainer, build_trainer, build_training_arguments, set_deterministic
from colintern.training.trainer import NonFiniteError, RetrievalEvaluator

pytestmark = pytest.mark.integration
QUERIES = ["from Oslo", "sent to Rome by Halde", "Halde", "the milk"]


@pytest.fixture
def make(processor, pages, tmp_path):
    """A trainer on ragged pages, any key of params replaced; their features are cached if `cache_gb`.

    `shown`, `negatives`: the page of each row, and its hard negatives, by number.
    """

    def build(cache_gb=0.0, queries=QUERIES, shown=(0, 1, 2, 3), negatives=((),) * 4, **changes):
        params = dataclasses.replace(
            load_recipe(ROOT / "recipes" / "demo.yaml"),
            **{"batch_size": len(queries), "logging_steps": 1, "epochs": 1} | changes,
        )
        torch.manual_seed(0)
        base = load(BASE).to(getattr(torch, params.dtype))
        wrapped = add_lora(base, TARGETS, rank=4, alpha=4, dropout=params.lora_dropout)
        args = build_training_arguments(params, tmp_path / "run", quiet=True)
        features = PageFeatures(wrapped, processor, tmp_path / "features", cache_gb, params.feature_cache_format)
        keyed = [Page.from_image(page) for page in pages]
        features.precompute(keyed, workers=0)
        rows = [
            TrainingPair(query, keyed[number], tuple(keyed[n] for n in wrong))
            for query, number, wrong in zip(queries, shown, negatives, strict=True)
        ]
        dev = RetrievalEvaluator(list(map(TrainingPair, QUERIES, keyed)), features, params.eval_batch_size)
        monitors = [LossCurveMonitor(params), ThroughputMonitor(params)]
        return assemble_trainer(params, wrapped, processor, args, dev, TrainingDataset(rows, features), monitors)

    return build


EIGHT = [*QUERIES, "to Oslo", "a long query about freight from Rome to Oslo", "milk of March", "Rome"]


def gradients(trainer, processor, pages) -> dict[str, torch.Tensor]:
    batch = trainer.data_collator(list(trainer.train_dataset))
    torch.manual_seed(7)
    # One step leaves no gradient in lora_A, whose partner starts at zero: move lora_B off it.
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    torch.manual_seed(9)
    trainer.training_step(trainer.model, batch)
    return {name: p.grad.double() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_the_gradient_does_not_depend_on_the_micro_batch(make, processor, pages, checkpointing):
    """With dropout: eight ragged rows in parts of 8, 4, 2 and 1, in float32. Another step draws other elements."""

    def run(micro, step=0):
        trainer = make(
            1.0, EIGHT, (0, 1, 2, 3) * 2, ((),) * 8,
            micro_batch_size=micro, batch_size=8, lora_dropout=0.1, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.state.global_step = step
        return gradients(trainer, processor, pages)

    whole = run(8)
    assert max(apart(whole, run(micro)) for micro in (4, 2, 1)) < 1e-6
    assert apart(whole, run(8)) == 0 and apart(whole, run(8, step=1)) > 1e-2


def apart(one, other) -> float:
    """Distance of two gradients, as a share of the first."""
    assert one.keys() == other.keys()
    scale = math.sqrt(sum((g**2).sum().item() for g in one.values()))
    return math.sqrt(sum(((one[n] - other[n]) ** 2).sum().item() for n in one)) / scale


@pytest.mark.parametrize("checkpointing", [False, True])
def test_beside_a_bfloat16_base_adapters_are_float32_and_computed_in_bfloat16(make, processor, pages, checkpointing):
    trainer = make(micro_batch_size=2, dtype="bfloat16", gradient_checkpointing=checkpointing)
    seen, layer = set(), trainer.model.base_model.model.language_model.layers[1].mlp.down_proj.lora_A["default"]
    layer.register_forward_hook(lambda module, inputs, output: seen.update({inputs[0].dtype, output.dtype}))
    low = gradients(trainer, processor, pages)
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.is_low_precision = False
    trainer.model.zero_grad()
    high = gradients(trainer, processor, pages)
    assert torch.float32 in seen, "the control computed in float32"
    assert apart(high, low) < 0.1


def test_the_loss_curve_in_bfloat16_stays_with_that_of_float32_adapters(make):
    def curve(low_precision):
        trainer = make(micro_batch_size=4, dtype="bfloat16", warmup_steps=0, lr=2e-3)
        trainer.is_low_precision = low_precision
        trainer.args.num_train_epochs = 12
        trainer.evaluate = lambda *args, **kwargs: {}
        trainer.train()
        return torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row])

    low, high = curve(True), curve(False)
    assert high[-1] < high[0] / 4, "it learned"
    assert (low - high).abs().max() < 0.05 * high[0]


@pytest.mark.slow
def test_compiled_layers_give_the_same_gradient_and_keep_less_for_it(make, processor, pages, monkeypatch):
    for name, value in {
        "MASK_BITS": 4,
        "NUM_MASKS": 16,
    }.items():  # else these take more than what a few small pages keep
        monkeypatch.setattr(dropout, name, value)

    def run(compiled):
        trainer = make(micro_batch_size=4, lora_dropout=0.1, compile=compiled)
        layers = trainer.model.base_model.model.language_model.layers
        assert all((layer._compiled_call_impl is not None) == compiled for layer in layers)
        kept: dict[int, int] = {}

        def note(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            made = gradients(trainer, processor, pages)
        masks = {mask.untyped_storage().data_ptr() for mask in trainer.dropout_masks.masks.values()}
        return made, sum(size for place, size in kept.items() if place not in masks)

    (eager, whole), (compiled, less) = run(False), run(True)
    assert apart(eager, compiled) < 1e-4
    assert less < 0.95 * whole


def test_no_variant_of_a_compiled_layer_runs_as_if_it_were_not(make, processor, pages, monkeypatch):
    """What goes beyond a limit of eight torch runs uncompiled, and says so in a log alone."""
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: whole(self, backend="eager", **options))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for micro in (3, 1):
            trainer = make(
                1.0, EIGHT, (0, 1, 2, 3) * 2, ((),) * 8,
                micro_batch_size=micro, batch_size=8, lora_dropout=0.1, gradient_checkpointing=1, compile=True,
            )  # fmt: skip
            gradients(trainer, processor, pages)
            trainer.evaluate()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 8, "more than torch's limit"


def test_chance_among_fewer_pages_than_ranks_is_a_rank_of_each():
    pages = [Page(str(n), None) for n in range(6)]
    chance = [
        RetrievalEvaluator([TrainingPair("q", page) for page in pages[:n]], None, 1).random_ndcg for n in (1, 2, 6)
    ]
    assert chance == pytest.approx([1, (1 + 1 / math.log2(3)) / 2, 2.9485 / 6], abs=1e-4)


def test_compile_without_a_compiler_is_refused_before_anything_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr("colintern.training.run.load_training_data", lambda params: None)
    monkeypatch.setattr("colintern.training.run.load_training_pairs", lambda *_: {"train": [None] * 400, "test": []})
    monkeypatch.setenv("PATH", str(tmp_path))
    params = dataclasses.replace(load_recipe(ROOT / "recipes" / "demo.yaml"), compile=True)
    with pytest.raises(UserError, match=r"compile: true needs a C\+\+ compiler, g\+\+ or clang\+\+"):
        build_trainer(params, "a base that does not exist", tmp_path)


NEGATIVES = ((3, 2), (), (1,), (0, 1))


@pytest.mark.parametrize(("micro", "dropout"), [(1, 0.0), (2, 0.0), (2, 0.5), (3, 0.5)])
def test_the_order_of_a_batch_in_parts_does_not_change_the_gradient(
    make, processor, pages, monkeypatch, micro, dropout
):
    """Ragged pages and negatives, in float64 up to the embeddings, against parts of rows as they come, padded to the
    batch's longest."""

    def run(order, cut):
        trainer = make(micro_batch_size=micro, negatives=NEGATIVES, lora_dropout=dropout)
        trainer.model.double()
        monkeypatch.setattr("colintern.training.trainer.plan_mini_batches", order)
        monkeypatch.setattr("colintern.training.trainer.slice_mini_batch", cut)
        return gradients(trainer, processor, pages)

    def as_it_comes(inputs, size):
        return [part.tolist() for part in torch.arange(len(inputs["input_ids"])).split(size)]

    def uncut(inputs, rows, processor):
        return slice_mini_batch(inputs, rows, processor) | {
            key: inputs[key][rows] for key in ("input_ids", "attention_mask")
        }

    assert apart(run(as_it_comes, uncut), run(plan_mini_batches, slice_mini_batch)) < 1e-6


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_hard_negatives_change_the_gradient_and_the_micro_batch_does_not(make, processor, pages, micro):
    """Ragged pages, rows with other numbers of negatives: tiles and features go with their pages."""
    whole = gradients(make(micro_batch_size=32, negatives=NEGATIVES), processor, pages)
    parts = gradients(make(1.0, micro_batch_size=micro, negatives=NEGATIVES), processor, pages)
    without = gradients(make(micro_batch_size=32), processor, pages)

    assert apart(whole, parts) < 1e-5
    assert apart(whole, without) > 0.01


def test_a_batch_with_negatives_holds_the_rows_pages_first(make, processor, pages):
    trainer = make(negatives=NEGATIVES)
    batch = trainer.data_collator(list(trainer.train_dataset))
    keys = [page.key for page in (row.page for row in trainer.train_dataset.pairs)]
    wanted = [*keys, keys[3], keys[2], keys[1], keys[0], keys[1]]
    assert batch["page_ids"].tolist() == [int(key[:14], 16) for key in wanted]
    assert len(batch["query_ids"]) == 4 and len(batch["page"]["input_ids"]) == 9
    one = dict(processor.process_images([pages[3]]))
    visual = (batch["page"]["input_ids"][4] == processor.image_token_id).sum()
    assert visual == (one["input_ids"] == processor.image_token_id).sum()


def test_masked_pairs_are_counted_also_across_a_resume(make, tmp_path):
    """Rows 0 and 1 show one page, rows 2 and 3 ask one query: four pairs a step are no negatives."""
    changes = {"queries": ["a", "b", "c  d", "c d"], "shown": (0, 0, 1, 2), "save_steps": 3, "micro_batch_size": 32}
    whole = make(**changes)
    whole.args.num_train_epochs, whole.args.logging_steps = 5, 2
    whole.train()
    curve = [row for row in whole.state.log_history if "loss" in row]
    assert [row["masked_pairs"] for row in curve] == [8, 8] and whole.metric_accumulator.total_false_negatives == 20
    again = make(**changes)
    again.args.num_train_epochs, again.args.logging_steps = 5, 2
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert [
        row for row in again.state.log_history if "loss" in row
    ] == curve and again.metric_accumulator.total_false_negatives == 20


def test_dropout_is_the_same_in_both_passes_of_a_micro_batch(make, processor, pages):
    trainer = make(micro_batch_size=2, lora_dropout=0.5)
    embeddings = []
    trainer.model.register_forward_hook(lambda module, inputs, output: embeddings.append(output.detach()))
    gradients(trainer, processor, pages)
    half = len(embeddings) // 2
    assert half == 4, "two parts of queries, two of pages"
    for first, second in zip(embeddings[:half], embeddings[half:], strict=True):
        torch.testing.assert_close(first, second)
    with torch.no_grad():
        trainer.model.eval()
        assert not torch.equal(embeddings[0], trainer.model(**first_queries(trainer))), "there is dropout"


def first_queries(trainer):
    query = trainer.data_collator(list(trainer.train_dataset))["query"]
    return slice_mini_batch(query, plan_mini_batches(query, 2)[0], trainer.processor)


def test_a_deterministic_step_refuses_kernels_that_are_not_and_changes_no_bit_on_a_cpu(make, processor, pages):
    plain = gradients(make(micro_batch_size=2, lora_dropout=0.1), processor, pages)
    try:
        set_deterministic(True)
        assert apart(plain, gradients(make(micro_batch_size=2, lora_dropout=0.1), processor, pages)) == 0
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.nn.functional.max_unpool1d(torch.ones(1, 1, 2), torch.tensor([[[0, 2]]]), 2)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.backends.cudnn.deterministic
    finally:
        set_deterministic(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and not torch.are_deterministic_algorithms_enabled()


def test_dropout_is_that_of_its_share_and_other_for_each_row_module_step_and_side(make):
    trainer = make(lora_dropout=0.25)
    layer = trainer.model.base_model.model.language_model.layers[1]
    up, gate = (getattr(layer.mlp, name).lora_dropout["default"] for name in ("up_proj", "gate_proj"))
    ones = torch.ones(4, 50, 128)

    def draw(module, side="page", step=3):
        trainer.dropout_masks.draw_masks(step, torch.device("cpu"))
        with trainer.dropout_masks.assign_rows(side, torch.arange(4), 50):
            return module(ones)

    trainer.model.train()
    first = draw(up)
    assert torch.equal(first, draw(up)) and set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    others = [draw(gate), draw(up, "query"), draw(up, step=4), first.flip(0), first.roll(1, 1)]
    for other in others:  # independent ones agree in 0.25^2 + 0.75^2 of their elements
        assert (first == other).float().mean().item() == pytest.approx(0.625, abs=0.03)
    with trainer.dropout_masks.assign_rows("page", torch.arange(4), 49), pytest.raises(ValueError, match="49"):
        up(ones)
    assert not [name for name in trainer.model.state_dict() if "dropout" in name], "PEFT would save it"


def test_every_lora_module_and_nothing_else_gets_a_gradient(make, processor, pages):
    trainer = make(micro_batch_size=4)
    names = set(gradients(trainer, processor, pages))
    assert names == {n for n, p in trainer.model.named_parameters() if ".lora_" in n}


def test_parts_of_a_batch_are_rows_of_like_length_with_their_own_tiles(processor, pages):
    batch = dict(processor.process_images(pages))
    batch["image_features"] = batch.pop("pixel_values")
    tiles = (batch["input_ids"] == processor.image_token_id).sum(1) // processor.image_seq_length
    own = batch["image_features"].split(tiles.tolist())
    assert len(set(tiles.tolist())) > 2, "ragged pages"
    lengths = batch["attention_mask"].sum(1)
    for size in (1, 2, 3, 4):
        rows = plan_mini_batches(batch, size)
        flat = [row for part in rows for row in part]
        assert sorted(flat) == [0, 1, 2, 3] and (size == 4 or flat != [0, 1, 2, 3])
        assert max(map(len, rows)) <= size
        assert size == 4 or [lengths[row] for row in flat] == sorted(lengths, reverse=True)
        parts = [slice_mini_batch(batch, part, processor) for part in rows]
        for part, taken in zip(rows, parts, strict=True):
            assert taken["input_ids"].shape == (len(part), lengths[part].max())
            assert torch.equal(taken["image_features"], torch.cat([own[row] for row in part]))
        for key in ("input_ids", "attention_mask"):
            cut = scatter_to_batch_order(rows, (part[key][..., None] for part in parts))[..., 0]
            assert torch.equal(cut * batch["attention_mask"], batch[key] * batch["attention_mask"])


@pytest.mark.parametrize(
    ("lengths", "size", "wanted"),
    [
        ([100, 100, 100], 3, [[0, 1, 2]]),
        ([10, 20, 30], 3, [[0, 1, 2]]),  # 30 tokens of padding: less than a further part costs
        ([500, 900, 500, 900], 4, [[1, 3], [0, 2]]),  # 800 tokens: more
        ([500, 900, 500, 900], 1, [[1], [3], [0], [2]]),
        ([900, 890, 300, 290, 280], 4, [[0, 1], [2, 3, 4]]),
        ([900, 890, 300, 290, 200], 2, [[0, 1], [2, 3], [4]]),
    ],
)
def test_rows_are_cut_into_parts_where_the_padding_would_cost_more(lengths, size, wanted):
    mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for row, length in zip(mask, lengths, strict=True):
        row[:length] = 1
    assert plan_mini_batches({"input_ids": mask, "attention_mask": mask}, size) == wanted


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_no_other_cut_of_the_sorted_rows_costs_less(size):
    """Held against all 128 cuts of eight rows, for random lengths."""
    generator = torch.Generator().manual_seed(size)
    for _ in range(10):
        lengths = torch.randint(1, 800, (8,), generator=generator)
        mask = (torch.arange(800) < lengths[:, None]).long()
        cost = lambda parts: sum(128 + len(part) * max(part) for part in parts)  # noqa: E731
        ordered = sorted(lengths.tolist(), reverse=True)
        cuts = (
            [ordered[i:j] for i, j in pairwise([0, *(k for k in range(1, 8) if number >> (k - 1) & 1), 8])]
            for number in range(128)
        )
        best = min(cost(cut) for cut in cuts if max(map(len, cut)) <= size)
        found = plan_mini_batches({"input_ids": mask, "attention_mask": mask}, size)
        assert cost([lengths[part].tolist() for part in found]) == best


def test_a_loss_that_is_not_finite_stops_the_step(make, processor, pages):
    trainer = make(micro_batch_size=4)
    with torch.no_grad():
        trainer.model.base_model.model.custom_text_proj.base_layer.bias.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"step 1\b.*; try lr: 0\.003, the lowest for a base of this size"):
        trainer.train()


def test_a_gradient_or_a_weight_that_is_not_finite_stops_the_run(make, processor, pages):
    trainer = make(micro_batch_size=4)
    down = trainer.model.base_model.model.language_model.layers[1].mlp.down_proj
    down.lora_B["default"].weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFiniteError, match=r"gradient norm is .* at step 1"):
        trainer.train()
    with torch.no_grad():
        down.lora_A["default"].weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"down_proj\.lora_A\.default\.weight is not finite"):
        trainer.evaluate()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, "batch_size: 64 is more than the 40 training pairs"),
        ({"batch_size": 20, "epochs": 2, "logging_steps": 5}, "logging_steps: 5 is more than the 4 steps of this run"),
    ],
)
def test_a_run_that_could_not_be_reported_is_refused_before_anything_is_loaded(monkeypatch, tmp_path, changes, message):
    monkeypatch.setattr("colintern.training.run.load_training_data", lambda params: None)
    monkeypatch.setattr("colintern.training.run.load_training_pairs", lambda *_: {"train": [None] * 40, "test": []})
    params = dataclasses.replace(load_recipe(ROOT / "recipes" / "demo.yaml"), **changes)
    with pytest.raises(UserError, match=message):
        build_trainer(params, "a base that does not exist", tmp_path)


def test_more_layers_than_there_are_cannot_be_computed_again(make, monkeypatch, tmp_path):
    said = "gradient_checkpointing: 3 is more than the 2 layers of the language model"
    with pytest.raises(UserError, match=said):
        make(gradient_checkpointing=3, logging_steps=1)
    monkeypatch.setattr("colintern.training.run.load_training_data", lambda params: None)
    monkeypatch.setattr("colintern.training.run.load_training_pairs", lambda *_: {"train": [None] * 40, "test": []})
    params = dataclasses.replace(load_recipe(ROOT / "recipes" / "demo.yaml"), gradient_checkpointing=3, logging_steps=1)
    with pytest.raises(UserError, match=said):  # before it looks at a page, of which there are none here
        build_trainer(params, str(BASE), tmp_path)


@pytest.mark.parametrize(("wanted", "calls"), [(False, [1, 1]), (1, [2, 1]), (2, [2, 2]), (True, [2, 2])])
def test_the_first_layers_are_computed_again(make, processor, pages, wanted, calls):
    trainer, seen = make(gradient_checkpointing=wanted), [0, 0]
    batch = trainer.data_collator(list(trainer.train_dataset))

    def count(number):
        def hook(*_):
            seen[number] += 1

        return hook

    for number, layer in enumerate(trainer.model.base_model.model.language_model.layers):
        layer.self_attn.register_forward_hook(count(number))
    trainer.training_step(trainer.model, batch)
    passes = seen[1] // calls[1]  # queries in one, pages in as many as their lengths make parts
    assert passes >= 2 and seen == [passes * n for n in calls]


def test_a_run_that_was_cut_off_ends_on_the_same_weights(make, tmp_path):
    def weights(trainer):
        return {n: p.clone() for n, p in trainer.model.named_parameters() if ".lora_" in n}

    changes = {"micro_batch_size": 4, "save_steps": 2, "lora_dropout": 0.1, "warmup_steps": 2}
    whole = make(**changes)
    whole.args.num_train_epochs = 5
    whole.train()
    want = weights(whole)
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    shutil.rmtree(tmp_path / "run" / "checkpoint-5", ignore_errors=True)
    again = make(**changes)
    again.args.num_train_epochs = 5
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    for name, value in weights(again).items():
        assert torch.equal(value, want[name]), name


@pytest.mark.parametrize(("micro", "form"), [(4, "exact"), (2, "exact"), (4, "fp8")])
def test_losses_and_weights_are_the_same_to_the_bit_with_and_without_the_cache(make, micro, form):
    def run(cache_gb, workers):
        trainer = make(cache_gb, micro_batch_size=micro, lora_dropout=0.1, warmup_steps=0, workers=workers,
                       feature_cache_format=form)  # fmt: skip
        assert len(trainer.train_dataset.cache.shard_of_key) == (4 if cache_gb else 0)
        trainer.args.num_train_epochs = 3
        trainer.train()
        curve = [{k: row[k] for k in ("loss", "eval_ndcg_at_5") if k in row} for row in trainer.state.log_history]
        return curve, {n: p for n, p in trainer.model.named_parameters() if ".lora_" in n}

    (without, plain), (cold, kept), (warm, found) = run(0.0, 0), run(1.0, 0), run(1.0, 1)
    assert without == cold == warm
    for name, value in plain.items():
        assert torch.equal(value, kept[name]) and torch.equal(value, found[name]), name


@pytest.mark.parametrize(("cache_gb", "micro", "runs"), [(0.0, 4, 4), (0.0, 2, 4), (1.0, 2, 0)])
def test_the_tower_sees_a_page_once_a_step_or_never_and_is_never_differentiated(
    make, processor, pages, cache_gb, micro, runs
):
    trainer = make(cache_gb, micro_batch_size=micro)
    trainer.model.enable_input_require_grads()
    ran = {"forward": 0, "backward": 0}
    layer = trainer.model.base_model.model.vision_tower.encoder.layer[0]
    layer.register_forward_hook(lambda *_: ran.update(forward=ran["forward"] + 1))
    layer.register_full_backward_hook(lambda *_: ran.update(backward=ran["backward"] + 1))
    gradients(trainer, processor, pages)
    assert ran == {"forward": runs, "backward": 0}


def test_the_time_spent_waiting_for_data_is_told_from_the_time_of_a_step(make, monkeypatch):
    """With rows that take their time; evaluation, which lies between steps too, is not counted as waiting."""
    item, wait, score = TrainingDataset.__getitem__, 1.0, RetrievalEvaluator.compute_ndcg

    def slow(self, index):
        time.sleep(wait / 4)
        return item(self, index)

    def slow_score(self, *args):
        time.sleep(2.0)
        return score(self, *args)

    monkeypatch.setattr(TrainingDataset, "__getitem__", slow)
    monkeypatch.setattr(RetrievalEvaluator, "compute_ndcg", slow_score)
    trainer = make(1.0, workers=0, warmup_steps=0)
    trainer.args.num_train_epochs = 3
    trainer.train()
    monitor = trainer.run_callbacks[1]
    pace, spent = monitor.summarize_steps(), sum(monitor.step_seconds)
    assert len(monitor.step_seconds) == 3 and 3 * wait <= monitor.wait_seconds < 3 * wait + 2.0
    assert pace["data_wait_share"] == pytest.approx(monitor.wait_seconds / (monitor.wait_seconds + spent))
    assert 0 < pace["step_seconds"] <= pace["slowest_tenth_seconds"] and 0 < pace["memory_share"] < 1
    assert ("gpu_memory_share" in pace) == torch.cuda.is_available()
    judged = {finding.name: finding.verdict for finding in check_throughput(pace, monitor.params)}
    assert judged["data wait"] != "ok"


def test_the_watch_speaks_while_the_trainer_runs(make, capsys):
    """A head whose output no longer depends on its input: every page scores alike, and training can not help it."""
    trainer = make(1.0, workers=0, warmup_steps=0)
    with torch.no_grad():
        for name, p in trainer.model.named_parameters():
            if "custom_text_proj" in name:
                p.zero_()
                p.requires_grad_(False)
        bias = trainer.model.base_model.model.custom_text_proj.base_layer.bias
        bias.requires_grad_(False).fill_(1.0)
    trainer.args.num_train_epochs = 8
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("loss now") == 1 and "1.00 of log(4)" in said
