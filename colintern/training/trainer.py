"""transformers' Trainer with a contrastive step that computes the gradient of the whole batch.

Each query is compared with the pages of all `batch_size` pairs and with their hard negatives. `micro_batch_size` only
bounds how many pages or queries are in the model at once. The step is gradient caching (GradCache, Gao et al. 2021,
arXiv 2101.06983): (1) embed mini-batches without a graph, (2) compute the loss of the full batch and its gradient with
respect to each embedding, (3) embed each mini-batch again with a graph and backpropagate its cached gradient.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from colintern.core.errors import OutOfMemoryError, UserError
from colintern.encoding.embed import embed_features, embed_queries
from colintern.encoding.fp8 import fake_quantize
from colintern.encoding.page_features import PageFeatures
from colintern.encoding.workers import seed_and_init_worker
from colintern.modeling.dropout import DropoutMaskBank
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import MAIN_METRIC, compute_chance, ndcg_at_k
from colintern.training.checkpoints import CheckpointWriter
from colintern.training.distributed import SIDES, SINGLE_PROCESS, Batch, BatchShards, DistributedContext, Side
from colintern.training.loss import Loss, find_false_negatives
from colintern.training.mini_batching import plan_mini_batches, scatter_to_batch_order, slice_mini_batch
from colintern.training.pairs import Collator, TrainingDataset, TrainingPair

logger = logging.getLogger(__name__)


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is NaN or infinite; nothing of that run is kept. The process exits with 5."""

    exit_code = 5


class RunCallback(TrainerCallback):
    """A callback that also gets the trainer, may end the run with an error, and writes artifacts."""

    stop_error: UserError | None = None  # set where it stops the run before its last step; nothing of that run is kept

    def on_run_begin(self) -> None:
        """Run before data and model are loaded."""

    def on_trainer_init(self, trainer: "ContrastiveTrainer") -> None:
        """Run at the end of the trainer's constructor."""

    def save_artifacts(self, trainer: "ContrastiveTrainer", folder: Path) -> dict[str, float | str]:
        """Run on rank 0 after the last step: write files into the adapter's folder; return metrics to report."""
        return {}


class MetricAccumulator(TrainerCallback, ExportableState):
    """Sums up the steps since the last logged row; checkpoints save it, so that a resumed run logs the same."""

    SAVED_FIELDS = ("loss_sum", "num_steps", "num_false_negatives", "total_false_negatives")

    def __init__(self) -> None:
        self.loss_sum, self.num_steps, self.num_false_negatives = 0.0, 0, 0
        self.total_false_negatives = 0  # of the whole run

    def add(self, loss: float, num_false_negatives: int) -> None:
        """Add a step."""
        self.loss_sum, self.num_steps = self.loss_sum + loss, self.num_steps + 1
        self.num_false_negatives += num_false_negatives
        self.total_false_negatives += num_false_negatives

    def pop_averages(self) -> dict[str, float]:
        """Return the mean loss and the number of false negatives since the last call."""
        row = {"loss": self.loss_sum / self.num_steps, "masked_pairs": self.num_false_negatives}
        self.loss_sum, self.num_steps, self.num_false_negatives = 0.0, 0, 0
        return row

    def state(self) -> dict[str, dict[str, float]]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.SAVED_FIELDS}}

    def restore(self, state: TrainerState) -> None:
        """Load what a checkpoint has kept."""
        saved: Any = state.stateful_callbacks
        for name, value in saved[type(self).__name__]["attributes"].items():
            setattr(self, name, value)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Load the sums of the checkpoint."""
        self.restore(state)


class RetrievalEvaluator(Dataset[str]):
    """The dev set: its queries, and the pages that answer them, each page once however many queries it answers."""

    def __init__(self, pairs: Sequence[TrainingPair], features: PageFeatures, batch_size: int):
        distinct = {pair.page.key: pair.page for pair in pairs}
        indices = {key: index for index, key in enumerate(distinct)}
        self.queries, self.pages = [pair.query for pair in pairs], list(distinct.values())
        self.relevant = [{indices[pair.page.key]} for pair in pairs]
        self.features, self.batch_size = features, batch_size

    def __len__(self) -> int:
        return len(self.queries)

    def embed(self, model: PeftModel, processor: ColIntern3_5Processor) -> tuple[list[Tensor], list[Tensor]]:
        """Return the embeddings of the queries and of the pages."""
        pages = embed_features(model, processor, map(self.features, self.pages), self.batch_size)
        return embed_queries(model, processor, self.queries, self.batch_size), pages

    def compute_ndcg(self, queries: list[Tensor], pages: list[Tensor]) -> float:
        """Return NDCG@5 of embeddings of the queries over those of the pages."""
        return ndcg_at_k(maxsim_scores(queries, pages), self.relevant, MAIN_METRIC.cutoff)

    @property
    def random_ndcg(self) -> float:
        """Return the expected NDCG@5 of a random ranking with one relevant page."""
        return compute_chance([1], len(self.pages))[MAIN_METRIC.key]


class ContrastiveTrainer(Trainer):
    """transformers' Trainer with batches of `Collator`, a gradient-caching step and a retrieval dev set.

    `model` is wrapped in LoRA; `loss_function` gets the embeddings of a whole batch; `quantize_features`: features that
    are not in the cache are rounded as the fp8 cache does.
    """

    model: PeftModel  # type: ignore[assignment]

    def __init__(
        self,
        model: PeftModel,
        processor: ColIntern3_5Processor,
        args: TrainingArguments,
        loss_function: Loss,
        evaluator: RetrievalEvaluator,
        micro_batch_size: int,
        quantize_features: bool = False,
        train_dataset: TrainingDataset | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        context: DistributedContext = SINGLE_PROCESS,
    ):
        self.processor, self.loss_function, self.evaluator, self.context = processor, loss_function, evaluator, context
        self.micro_batch_size, self.quantize_features = micro_batch_size, quantize_features
        self.is_low_precision = model.dtype == torch.bfloat16
        self.dropout_masks = DropoutMaskBank(
            model, args.seed, torch.bfloat16 if self.is_low_precision else torch.float32
        )
        self.metric_accumulator = MetricAccumulator()
        self.hint = "lower lr"  # against a loss that is not finite
        checkpoints = CheckpointWriter(Path(str(args.output_dir)).parent, processor, context)
        model._is_accelerate_prepared = True  # type: ignore[assignment]  # accelerate would average gradients, not sum
        collator: Any = Collator(processor)
        first = [self.metric_accumulator, checkpoints]
        super().__init__(model, args, collator, train_dataset, evaluator, callbacks=[*first, *callbacks])
        for default in (PrinterCallback, ProgressCallback):
            self.remove_callback(default)
        self.run_callbacks = [callback for callback in callbacks if isinstance(callback, RunCallback)]
        for callback in self.run_callbacks:
            callback.on_trainer_init(self)

    def get_train_dataloader(self) -> DataLoader:
        """Return the DataLoader, with workers set up by `init_worker`."""
        loader = super().get_train_dataloader()
        inner: Any = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapper
        inner.worker_init_fn = partial(seed_and_init_worker, inner.worker_init_fn)
        return loader

    def training_step(self, model: PeftModel, inputs: Batch, num_items_in_batch: object = None) -> Tensor:  # type: ignore[override]
        """Run the forward and backward pass of a whole batch; return its loss, a detached scalar.

        Raises:
            NonFiniteError: the loss or the gradient is not finite.
            OutOfMemoryError: a single page does not fit, in the vision tower or in the language model.
        """
        model.train()
        batch = cast(Batch, self._prepare_inputs(inputs))  # type: ignore[arg-type]
        step = self.state.global_step + 1
        try:
            compute = partial(compute_image_features, model, batch, self.quantize_features)
            batch["page"]["image_features"] = self.context.run_or_all_oom(compute)
        except torch.OutOfMemoryError as error:
            batch_size = self.args.per_device_train_batch_size * self.context.world_size
            raise OutOfMemoryError(
                f"out of memory in the tower, which takes one page at a time, at step {step}; "
                f"lower max_visual_tokens, {self.processor.max_visual_tokens}, or batch_size, {batch_size}"
            ) from error
        self.dropout_masks.draw_masks(self.state.global_step, model.device)
        shards = self.context.gather_batch_layout(batch)
        # PEFT would cast the input of every adapter to float32, only for autocast to cast it back.
        with disable_input_dtype_casting(model, active=self.is_low_precision):
            loss = self.step_with_oom_backoff(model, batch, shards)
        norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not value.isfinite():
                raise NonFiniteError(f"{name} is {value.item()} at step {step}; {self.hint}")
        self.metric_accumulator.add(loss.item(), int(find_false_negatives(shards.query_ids, shards.page_ids).sum()))
        return loss.detach()

    def step_with_oom_backoff(self, model: PeftModel, batch: Batch, shards: BatchShards) -> Tensor:
        """Compute loss and gradient; halve `micro_batch_size`, which does not change them, until they fit in memory."""
        while True:
            try:
                return self.gradcache_forward_backward(model, batch, shards)
            except torch.OutOfMemoryError as error:
                max_rows = min(self.micro_batch_size, len(batch["page_ids"]))
                if max_rows == 1:
                    raise OutOfMemoryError(
                        f"out of memory with one page at a time, at step {self.state.global_step + 1}; set "
                        f"gradient_checkpointing: true, or lower max_visual_tokens, {self.processor.max_visual_tokens}"
                    ) from error
                self.micro_batch_size = (max_rows + 1) // 2
            # Outside the handler, where the error no longer holds the tensors of the step.
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            size = self.micro_batch_size
            logger.info(f"out of memory: micro_batch_size is now {size}; the batch and its gradient do not change")

    def gradcache_forward_backward(self, model: PeftModel, batch: Batch, shards: BatchShards) -> Tensor:
        """Compute the loss of the whole batch and add its gradient to the adapters; see the top of this module.

        A batch of a single chunk, at most `micro_batch_size` pages, keeps the graph of its first pass instead.
        """
        plans = {side: plan_mini_batches(batch[side], self.micro_batch_size) for side in SIDES}
        mini_batches = [(side, rows) for side, plan in plans.items() for rows in plan]
        is_single_chunk = self.micro_batch_size >= len(batch["page_ids"])
        num_query_chunks = len(plans["query"])

        def embed() -> list[Tensor]:
            with torch.set_grad_enabled(is_single_chunk):
                return [self.embed_mini_batch(model, batch, shards, *mini_batch) for mini_batch in mini_batches]

        def allocate_buffers() -> list[list[Tensor]]:
            queries = scatter_to_batch_order(plans["query"], cached_reps[:num_query_chunks])
            pages = scatter_to_batch_order(plans["page"], cached_reps[num_query_chunks:])
            sides = zip(SIDES, (queries, pages), strict=True)
            return [self.context.allocate_gather_buffers(shards, *side) for side in sides]

        def backward() -> Tensor:
            loss = self._compute_batch_loss(batch, shards, gather_buffers)
            gather_buffers.clear()
            loss.backward()
            for mini_batch, first_pass, cached in zip(mini_batches, embeddings, cached_reps, strict=True):
                kept = first_pass if is_single_chunk else None
                self.backward_mini_batch(model, batch, shards, *mini_batch, cached.grad, kept)
            return loss

        embeddings = self.context.run_or_all_oom(embed)
        cached_reps = [part.detach().requires_grad_() for part in embeddings]
        gather_buffers = self.context.run_or_all_oom(allocate_buffers)
        self.context.all_gather_into(gather_buffers)
        loss = self.context.run_or_all_oom(backward)
        self.context.all_reduce_gradients(model)
        return loss

    def embed_mini_batch(
        self, model: PeftModel, batch: Batch, shards: BatchShards, side: Side, rows: list[int]
    ) -> Tensor:
        """Return the embeddings of some rows of a side."""
        inputs = slice_mini_batch(batch[side], rows, self.processor)
        # The float32 weights of the adapters would be computed in float32 beside a bfloat16 base.
        autocast = torch.autocast(model.device.type, torch.bfloat16) if self.is_low_precision else nullcontext()
        with self._apply_dropout(batch, shards, side, rows, inputs["input_ids"].shape[1]), autocast:
            return model(**inputs)

    def backward_mini_batch(
        self, model: PeftModel, batch: Batch, shards: BatchShards, side: Side, rows: list[int], grad: Any, reps: Any
    ) -> None:
        """Backpropagate the gradient of the embeddings `reps` of some rows; None computes them again."""
        if reps is None:
            reps = self.embed_mini_batch(model, batch, shards, side, rows)
        # Checkpointed layers run their forward pass again in the backward pass, and need the same dropout.
        with self._apply_dropout(batch, shards, side, rows, reps.shape[1]):
            reps = (reps * grad).sum()  # rebound: the backward pass does not need the embeddings
            reps.backward()

    def _apply_dropout(
        self, batch: Batch, shards: BatchShards, side: Side, rows: list[int], length: int
    ) -> AbstractContextManager[None]:
        device = batch[side]["input_ids"].device
        indices = torch.tensor([shards.row_indices[side][row] for row in rows]).to(device)
        return self.dropout_masks.assign_rows(side, indices, length)

    def _compute_batch_loss(self, batch: Batch, shards: BatchShards, buffers_by_side: list[list[Tensor]]) -> Tensor:
        queries, pages = (
            self.context.all_gather_with_local_grad(shards, side, buffers, batch[side]["attention_mask"])
            for side, buffers in zip(SIDES, buffers_by_side, strict=True)
        )
        return self.loss_function(*queries, *pages, find_false_negatives(shards.query_ids, shards.page_ids))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a row; in a row of the training curve, loss and masked pairs are those of `MetricAccumulator`."""
        super().log(logs | self.metric_accumulator.pop_averages() if "loss" in logs else logs, start_time)

    def evaluate(
        self, eval_dataset: object = None, ignore_keys: object = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Compute NDCG@5 on the dev set."""
        trained = ((name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad)
        if non_finite := [name for name, parameter in trained if not parameter.isfinite().all()]:
            raise NonFiniteError(f"{non_finite[0]} is not finite after step {self.state.global_step}; {self.hint}")
        ndcg = self.evaluator.compute_ndcg(*self.evaluator.embed(self.model, self.processor))
        metrics = {f"{metric_key_prefix}_{MAIN_METRIC.key}": ndcg}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def compute_image_features(model: PeftModel, batch: Batch, quantize: bool) -> Tensor:
    """Return the features of a batch's pages, (tiles, tokens of a tile, hidden size), once a step and without a graph.

    `quantize`: features that are computed here, not read from the cache, are rounded as the fp8 cache does.
    """
    is_known, counts = batch["known"], batch["counts"]
    features = iter(batch["features"].split(counts[is_known].tolist()) if "features" in batch else ())
    tiles = iter(batch["tiles"].split(counts[~is_known].tolist()) if "tiles" in batch else ())
    convert = fake_quantize if quantize else torch.Tensor.detach
    with torch.no_grad():
        pages = [
            next(features) if known else convert(model.get_page_features(next(tiles))) for known in is_known.tolist()
        ]
    return torch.cat(pages)
