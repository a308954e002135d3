"""Training: transformers' Trainer with a contrastive step of our own.

Each query is compared with the pages of all `batch_size` rows and with the hard negatives of all of them.
`micro_batch_size` only says how many pages or queries are in the model at once: with a smaller one each part is
embedded without a graph, the loss and the gradient of every embedding are computed over the whole batch, and each part
is embedded again to send its gradient on (gradient caching, Gao et al. 2021, arXiv 2101.06983). The gradient is the
same.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

from colintern.core.errors import OutOfMemory, UserError
from colintern.encoding.embed import embed_features, embed_queries
from colintern.encoding.fp8 import rounded
from colintern.encoding.page_features import PageFeatures
from colintern.encoding.workers import seed_and_init_worker
from colintern.modeling.dropout import Masks
from colintern.modeling.layers import checkpoint_layers, compile_layers
from colintern.modeling.lora import count
from colintern.modeling.processing_colintern import ColIntern3_5Processor
from colintern.monitoring.guide import bounds_for
from colintern.monitoring.health import suggest_lower_lr
from colintern.monitoring.progress import Progress
from colintern.monitoring.watch import Pace, Watch
from colintern.params import Params
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.training.checkpoints import SAVING, Checkpoints
from colintern.training.loss import contrastive_loss, false_negatives, maxsim_matrix
from colintern.training.pairs import Collator, Pair
from colintern.training.parts import places, restored, take
from colintern.training.processes import ALONE, SIDES, Processes, share

Batch = dict[str, Any]


class NonFiniteError(UserError):
    """The loss, a gradient or a weight is NaN or infinite; nothing of that run is kept. The process exits with 5."""

    exit_code = 5


class Tally(TrainerCallback, ExportableState):
    """What a logged row sums up since the row before it; kept in the checkpoints, so that a resumed run logs the same.

    `total`: false negatives of the whole run.
    """

    FIELDS = ("loss", "steps", "masked", "total")

    def __init__(self) -> None:
        self.loss, self.steps, self.masked, self.total = 0.0, 0, 0, 0

    def add(self, loss: float, masked: int) -> None:
        self.loss, self.steps = self.loss + loss, self.steps + 1
        self.masked, self.total = self.masked + masked, self.total + masked

    def row(self) -> dict[str, float]:
        """The mean loss of the steps since the last row, and how many pairs they left out."""
        row = {"loss": self.loss / self.steps, "masked_pairs": self.masked}
        self.loss, self.steps, self.masked = 0.0, 0, 0
        return row

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {name: getattr(self, name) for name in self.FIELDS}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, value in state.stateful_callbacks[type(self).__name__]["attributes"].items():
            setattr(self, name, value)


class ContrastiveTrainer(Trainer):
    """transformers' Trainer; a batch is what `Collator` makes, the dev set is measured as retrieval."""

    def __init__(
        self,
        params: Params,
        processor: ColIntern3_5Processor,
        dev: "DevSet",
        callbacks: Sequence[TrainerCallback] = (),
        processes: Processes = ALONE,
        **kwargs: Any,
    ):
        self.processes = processes
        self.params, self.dev, self.processor, self.tally = params, dev, processor, Tally()
        self.bounds = bounds_for(count(kwargs["model"], params.lora_targets)["total_parameters"])
        self.remedy = f"try {suggest_lower_lr(params, self.bounds)}"
        self.micro, self.low_precision = params.micro_batch_size, params.dtype == "bfloat16"
        self.masks = Masks(kwargs["model"], params.seed, torch.bfloat16 if self.low_precision else torch.float32)
        self.pace = Pace()
        checkpoint_layers(kwargs["model"], params.gradient_checkpointing)
        checkpoints = Checkpoints(Path(kwargs["args"].output_dir).parent, processor, self.processes)
        kwargs["model"]._is_accelerate_prepared = True  # `Processes` sums gradients; accelerate would take their mean
        own = [self.tally, checkpoints, Watch(params, dev.chance, self.bounds), self.pace, *callbacks]
        super().__init__(data_collator=Collator(processor), eval_dataset=dev, callbacks=own, **kwargs)
        for stock in (PrinterCallback, ProgressCallback):
            self.remove_callback(stock)
        self.add_callback(Progress(params, quiet=bool(self.args.disable_tqdm)))
        if params.compile:
            compile_layers(kwargs["model"])

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        inner: Any = getattr(loader, "base_dataloader", loader)  # of accelerate's wrapper
        inner.worker_init_fn = partial(seed_and_init_worker, inner.worker_init_fn)
        return loader

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """One forward and backward pass over a whole batch; returns its loss, a detached scalar.

        Raises:
            NonFiniteError: the loss or the gradient is not finite.
            OutOfMemory: not even one page at a time fits, in the tower or in the language model.
        """
        model.train()
        batch: Batch = self._prepare_inputs(inputs)
        try:
            rounds = self.params.feature_cache_format == "fp8"
            batch["page"]["image_features"] = self.processes.together(lambda: page_features(model, batch, rounds))
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(
                f"out of memory in the tower, which takes one page at a time, at step {self.state.global_step + 1}; "
                f"lower max_visual_tokens, {self.params.max_visual_tokens}, or batch_size, {self.params.batch_size}"
            ) from error
        self.masks.draw(self.state.global_step, model.device)
        # PEFT would cast every adapter's input to float32, only for `_embed` to cast it back.
        with disable_input_dtype_casting(model, active=self.low_precision):
            loss = self._fitting_step(model, batch)
        norm = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if not value.isfinite():
                step = self.state.global_step + 1
                raise NonFiniteError(f"{name} is {value.item()} at step {step}; {self.remedy}")
        ids = batch["share"].query_ids, batch["share"].page_ids
        self.tally.add(loss.item(), int(false_negatives(*ids).sum()))
        return loss.detach()

    def _fitting_step(self, model: Any, batch: Batch) -> Tensor:
        """The loss, with its gradient in the model; where the memory does not hold it, with half the micro-batch."""
        batch["share"] = self.processes.shares(batch)
        while True:
            try:
                return self._step(model, batch)
            except torch.OutOfMemoryError as error:
                size = min(self.micro, len(batch["page_ids"]))
                if size == 1:
                    raise OutOfMemory(
                        f"out of memory with one page at a time, at step {self.state.global_step + 1}; set "
                        f"gradient_checkpointing: true, or lower max_visual_tokens, {self.params.max_visual_tokens}"
                    ) from error
                self.micro = (size + 1) // 2
            # The error, gone here, held what the step had made. Again, from an empty gradient.
            model.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"out of memory: micro_batch_size is now {self.micro}; batch and gradient stay as they are")

    def _step(self, model: Any, batch: Batch) -> Tensor:
        """Embeddings, the loss of all of them with the gradient of each, and that gradient sent on, part by part. Only
        where the whole batch is one part does its graph wait for the gradient; else parts are embedded again."""
        rows = {side: places(batch[side], self.micro) for side in SIDES}
        parts = [(side, part) for side, found in rows.items() for part in found]
        whole = self.micro >= len(batch["page_ids"])

        def embed() -> list[Tensor]:
            with torch.set_grad_enabled(whole):
                return [self._embed(model, batch, *part) for part in parts]

        # What takes memory is in `together`: a process that started anew alone would wait for the others for ever.
        def room() -> list[list[Tensor]]:
            sides = restored(rows["query"], leaves[:ends]), restored(rows["page"], leaves[ends:])
            return [self.processes.room(batch["share"], *side) for side in zip(SIDES, sides, strict=True)]

        def backward() -> Tensor:
            loss = self._loss(batch, rooms)
            rooms.clear()
            loss.backward()
            for part, embedded, leaf in zip(parts, made, leaves, strict=True):
                self._embed(model, batch, *part, embedded if whole else None, leaf.grad)
            return loss

        made = self.processes.together(embed)
        leaves = [embedded.detach().requires_grad_() for embedded in made]
        ends = len(rows["query"])
        rooms = self.processes.together(room)
        self.processes.exchange(rooms)
        loss: Tensor = self.processes.together(backward)
        self.processes.sum_gradients(model)
        return loss

    def _embed(
        self, model: Any, batch: Batch, side: str, rows: list[int], made: Tensor | None = None, grad: Any = None
    ) -> Tensor:
        """Embeddings of a part; with `grad`, which is theirs, that goes back to the adapters, through the graph of
        `made` if given."""
        inputs = take(batch[side], rows, self.processor)
        length = inputs["input_ids"].shape[1]
        # The adapters' weights are float32, and would else be computed in it beside a bfloat16 base.
        cast = torch.autocast(model.device.type, torch.bfloat16) if self.low_precision else nullcontext()
        # Around the backward pass too: checkpointing computes anew in it, and must draw the same dropout.
        numbers = torch.tensor([batch["share"].numbers[side][row] for row in rows])
        with self.masks.rows(side, numbers.to(inputs["input_ids"].device), length):
            if made is None:
                with cast:
                    made = model(**inputs)
            if grad is not None:
                made = (made * grad).sum()  # what backward needs, without the embeddings
                made.backward()
        return made

    def _loss(self, batch: Batch, rooms: Sequence[list[Tensor]]) -> Tensor:
        """Of all queries against all pages, those of other processes too."""
        own, sides = batch["share"], list[Tensor]()
        for side, room in zip(SIDES, rooms, strict=True):
            sides += self.processes.gathered(own, side, room, batch[side]["attention_mask"])
        left_out = false_negatives(own.query_ids, own.page_ids)
        scores = maxsim_matrix(*sides)
        return contrastive_loss(scores, left_out, self.params.temperature, self.params.symmetric_loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A row of the training curve takes loss and masked pairs from the tally."""
        super().log(logs | self.tally.row() if "loss" in logs else logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """NDCG@5 on the dev set.

        Raises:
            NonFiniteError: a trained weight is not finite.
        """
        model: Any = self.model
        trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
        if broken := [name for name, p in trained if not p.isfinite().all()]:
            raise NonFiniteError(f"{broken[0]} is not finite after step {self.state.global_step}; {self.remedy}")
        metrics = {f"{metric_key_prefix}_ndcg_at_5": self.dev.ndcg(self.model, self.processor, self.params)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def page_features(model: Any, batch: Batch, rounds: bool) -> Tensor:
    """The features of a batch's pages, (tiles, tokens of a tile, hidden size): once a step and without a graph, also
    where the pages go through the language model twice. `rounds`: those that no cache has rounded are rounded here."""
    counts, known = batch["counts"], batch["known"].tolist()
    sides = {
        kind: iter(batch[kind].split(counts[batch["known"] == (kind == "features")].tolist()))
        for kind in ("features", "tiles")
        if kind in batch
    }
    with torch.no_grad():
        form = rounded if rounds else torch.Tensor.detach
        pages = [next(sides["features"]) if k else form(model.page_features(next(sides["tiles"]))) for k in known]
    return torch.cat(pages)


class DevSet(Dataset):
    """Dev queries and the pages they ask for, each page once however many rows show it."""

    def __init__(self, rows: Sequence[Pair], features: PageFeatures):
        distinct = {row.page.key: row.page for row in rows}
        places = {key: place for place, key in enumerate(distinct)}
        self.queries, self.pages, self.features = [row.query for row in rows], list(distinct.values()), features
        self.relevant = [{places[row.page.key]} for row in rows]

    def __len__(self) -> int:
        return len(self.queries)

    def ndcg(self, model: Any, processor: ColIntern3_5Processor, params: Params) -> float:
        """NDCG@5 of the dev queries over the dev pages."""
        size = params.eval_batch_size
        pages = embed_features(model, processor, map(self.features, self.pages), size)
        return ndcg_at_k(maxsim_scores(embed_queries(model, processor, self.queries, size), pages), self.relevant, 5)

    @property
    def chance(self) -> float:
        """NDCG@5 of a random ranking: one right page among all."""
        pages = len(self.pages)
        return sum(1 / math.log2(rank + 1) for rank in range(1, min(5, pages) + 1)) / pages


def arguments(params: Params, folder: Path, quiet: bool, size: int = 1) -> TrainingArguments:
    """The Trainer's arguments in each of `size` processes; checkpoints end up in `folder`, see `Checkpoints`. The dev
    set is measured with each logged row unless `eval_steps` is set."""
    args = TrainingArguments(
        output_dir=str(folder / SAVING),
        per_device_train_batch_size=share(params, size),
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,  # each step compares with batch_size pages, the last one too
        num_train_epochs=params.epochs,
        learning_rate=params.lr,
        lr_scheduler_type=params.lr_scheduler,
        warmup_steps=params.warmup_steps,
        weight_decay=params.weight_decay,
        max_grad_norm=params.max_grad_norm,
        logging_steps=params.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        save_strategy="steps",
        save_steps=params.save_steps,
        seed=params.seed,
        data_seed=params.seed,
        dataloader_num_workers=params.workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        disable_tqdm=quiet,
        report_to="none",  # see `Tracker`
        run_name=folder.name,
    )
    # Which GPU is this process's is known with its device; that others can be seen is none of the Trainer's business,
    # which would split each batch over all of them.
    if args.device.type == "cuda":
        args._n_gpu = 1
    return args
