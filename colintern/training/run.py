"""A training run from params to the adapter folder: resumable, and leaves no partial result.

Checkpoints are in `.scratch/`, in a folder named by the run's fingerprint, so that a run never resumes from another
run's files. The folder is deleted once the adapter is in place and DVC has recorded it.
"""

import logging
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from torch.utils import deterministic as torch_deterministic
from transformers import TrainerCallback, TrainerState, TrainingArguments, set_seed

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.training_set import load_training_data, trains_on_pseudo_queries
from colintern.encoding.page_features import FEATURES_DIR, PageFeatures
from colintern.encoding.workers import check_workers, stop_workers_on_exit
from colintern.modeling.adapter_files import adapter_weight_stats, save_adapter_extras
from colintern.modeling.attention import resolve_attn_implementation
from colintern.modeling.lora import add_lora, find_lora_errors, report_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.modeling.runtime import checkpoint_layers, compile_layers, configure_cpu_runtime, num_checkpointed_layers
from colintern.params import Params
from colintern.scoring.metrics import DEV_KEY, EVAL_KEY
from colintern.storage.files import format_json, write_csv
from colintern.storage.identity import fingerprint, stage_identity
from colintern.storage.lock import try_lock
from colintern.storage.manifest import MANIFEST, ensure_base, read_data_file
from colintern.storage.outs import finalize_checkpoints, purge_finished_checkpoints
from colintern.training import checkpoints
from colintern.training.distributed import SINGLE_PROCESS, DistributedContext, per_rank_batch_size
from colintern.training.loss import make_contrastive_loss
from colintern.training.pairs import TrainingDataset, load_training_pairs
from colintern.training.trainer import ContrastiveTrainer, NonFiniteError, RetrievalEvaluator, RunCallback

logger = logging.getLogger(__name__)
Callbacks = Sequence[TrainerCallback]
MIN_EVALUATIONS = 4  # of the dev set in a run
COMPILERS = ("g++", "clang++")  # those that torch.compile looks for
# Read when cuBLAS and flash-attn are first used. NVIDIA: 8 buffers of 4 MiB give the same bits on all streams.
DETERMINISTIC_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}


def train(
    params: Params, out: Path, context: DistributedContext = SINGLE_PROCESS, callbacks: Callbacks = ()
) -> dict[str, float | str]:
    """Train; write the adapter to `out`, its curves to plots/ and the returned metrics to metrics/train.json.

    `callbacks` observe the run; what it computes does not depend on them.

    Raises:
        UserError: data or base are missing or changed, the LoRA targets are wrong, another process trains this very
            run, the training set is smaller than a batch, or the ranks share no folder.
        NonFiniteError: the loss is not finite.
        OutOfMemoryError: one page does not fit in memory, or a DataLoader worker was killed.
        checkpoints.TrainingInterruptedError: SIGTERM or SIGINT; there is a checkpoint.
    """
    check_workers(params.workers)
    configure_cpu_runtime(params.threads)
    set_deterministic(params.deterministic)
    base_path = context.run_on_rank0_and_broadcast(lambda: ensure_base(params.base, params.base_revision))
    identity = stage_identity("train", params)
    folder = root() / ".scratch" / f"train-{fingerprint(identity)[:16]}"
    shutdown = checkpoints.GracefulShutdown(context)
    context.run_on_rank0_and_broadcast(lambda: purge_finished_checkpoints(folder))
    lock = run_lock(folder) if context.is_main_process else nullcontext()
    with lock, shutdown.handle_signals(), stop_workers_on_exit(params.workers):
        context.run_on_rank0_and_broadcast(lambda: None)  # wait until rank 0 holds the lock
        for callback in callbacks:
            if isinstance(callback, RunCallback):
                callback.on_run_begin()
        trainer = build_trainer(params, base_path, folder, context, [*callbacks, shutdown])
        identity |= get_provenance(trainer.model) | {"processes": context.world_size}
        checkpoint = context.run_on_rank0_and_broadcast(lambda: str(checkpoints.latest_valid_checkpoint(folder) or ""))
        run_trainer(trainer, folder, checkpoint)
        step, max_steps = trainer.state.global_step, trainer.state.max_steps
        if step < max_steps:
            stop_error = next((error for callback in trainer.run_callbacks if (error := callback.stop_error)), None)
            if stop_error is None or shutdown.signal_number:
                raise checkpoints.TrainingInterruptedError(
                    f"stopped at step {step} of {max_steps}, with a checkpoint; the same command resumes from it"
                )
            context.run_on_rank0_and_broadcast(lambda: shutil.rmtree(folder))
            raise stop_error
        metrics = context.run_on_rank0_and_broadcast(lambda: save_artifacts(trainer, identity, out))
        context.run_on_rank0_and_broadcast(lambda: finalize_checkpoints(folder))
    return metrics


def set_deterministic(is_enabled: bool) -> None:
    """Use only kernels that give the same bits each time, or the fastest ones; call it before the GPU is used.

    In the first step a kernel without a deterministic implementation raises a RuntimeError that names it.
    """
    for name, value in DETERMINISTIC_ENVIRONMENT.items():
        if is_enabled:
            os.environ[name] = value
        elif os.environ.get(name) == value:
            del os.environ[name]
    torch.use_deterministic_algorithms(is_enabled)
    torch.backends.cudnn.deterministic = is_enabled
    torch.backends.cudnn.benchmark = False
    # For debugging; costs a pass over each new tensor.
    torch_deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the run for this process, and link its checkpoints into experiments/."""
    with try_lock(folder), checkpoints.link_checkpoints(folder):
        yield


def build_trainer(
    params: Params,
    base_path: str,
    folder: Path,
    context: DistributedContext = SINGLE_PROCESS,
    callbacks: Callbacks = (),
) -> ContrastiveTrainer:
    """Load data and model, wrap the model in LoRA, compute the page features, and construct the trainer.

    `base_path` is what `ensure_base` returns; `folder` is that of the checkpoints. Raises UserError, see `train`.
    """
    quiet = not sys.stderr.isatty() or "CI" in os.environ or not context.is_main_process
    args = build_training_arguments(params, folder, quiet, context.world_size)
    splits = load_training_pairs(load_training_data(params), params.negatives)
    train, dev = splits["train"], splits["test"][: params.dev_queries]
    num_steps = len(train) // params.batch_size * params.epochs
    if not num_steps:
        raise UserError(
            f"batch_size: {params.batch_size} is more than the {len(train)} training pairs; write at most "
            f"{len(train)}, or add training data"
        )
    if params.logging_steps > num_steps:
        raise UserError(f"logging_steps: {params.logging_steps} is more than the {num_steps} steps of this run")
    # By steps, not by epoch: "epoch" comes after the checkpoint of the step, which would lack the score.
    args.eval_steps = math.ceil(num_steps / max(params.epochs, MIN_EVALUATIONS))
    if params.compile and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"compile: true needs a C++ compiler, {' or '.join(COMPILERS)}: install one, or write false")
    set_seed(params.seed)
    attention = resolve_attn_implementation(params.attention, params.dtype)
    model, processor = _load_model(params, base_path, attention)
    model.to(args.device)
    features = PageFeatures(
        model, processor, root() / FEATURES_DIR, params.feature_cache_gb, params.feature_cache_format
    )
    pages = [page for pair in train for page in (pair.page, *pair.negatives)] + [pair.page for pair in dev]
    context.run_on_rank0_and_broadcast(lambda: features.precompute(pages, params.workers))
    if not context.is_main_process:
        features.cache.refresh()
    dataset = TrainingDataset(train, features)
    evaluator = RetrievalEvaluator(dev, features, params.eval_batch_size)
    num_pages = len(evaluator.pages)
    logger.info(f"{len(train)} training pairs; dev: {len(dev)} queries on {num_pages} pages; attention: {attention}")
    if num_truncated := processor.count_truncated([pair.query for pair in (*train, *dev)]):
        logger.info(f"{num_truncated} of {len(train) + len(dev)} queries are longer than max_query_tokens and are cut")
    return assemble_trainer(params, model, processor, args, evaluator, dataset, callbacks, context)


def build_training_arguments(params: Params, folder: Path, quiet: bool, world_size: int = 1) -> TrainingArguments:
    """Return the Trainer's arguments of each rank; checkpoints end up in `folder`, see `CheckpointWriter`.

    The dev set is evaluated with each logged row unless `eval_steps` is set.
    """
    args = TrainingArguments(
        output_dir=str(folder / checkpoints.SAVING_FOLDER),
        per_device_train_batch_size=per_rank_batch_size(params.batch_size, world_size),
        use_cpu=not torch.cuda.is_available(),
        dataloader_drop_last=True,  # every step compares with batch_size pages, the last one too
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
        report_to="none",  # trackers are callbacks
        run_name=folder.name,
    )
    # Each rank has one GPU; the Trainer would divide each batch among all visible ones.
    if args.device.type == "cuda":
        args._n_gpu = 1
    return args


def _load_model(params: Params, base_path: str, attention: str) -> tuple[PeftModel, ColIntern3_5Processor]:
    revision = params.base_revision or None
    dtype = getattr(torch, params.dtype)
    base = ColIntern3_5.from_pretrained(
        base_path, revision=revision, seed=params.seed, dtype=dtype, attn_implementation=attention
    )
    # The adapter and its card name the base, wherever this copy of it is stored.
    base.name_or_path = base.config.name_or_path = params.base
    processor = ColIntern3_5Processor.from_pretrained(
        base_path, revision=revision,
        max_visual_tokens=params.max_visual_tokens, max_query_tokens=params.max_query_tokens, tiling=params.tiling,
    )  # fmt: skip
    num_checkpointed_layers(len(base.decoder_layers), params.gradient_checkpointing)  # fail before pages are computed
    model = add_lora(base, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout, revision)
    if problems := find_lora_errors(report_lora(model, params.lora_targets)):
        raise UserError("\n  ".join(problems))
    return model, processor


def assemble_trainer(
    params: Params,
    model: PeftModel,
    processor: ColIntern3_5Processor,
    args: TrainingArguments,
    evaluator: RetrievalEvaluator,
    dataset: TrainingDataset | None = None,
    callbacks: Callbacks = (),
    context: DistributedContext = SINGLE_PROCESS,
) -> ContrastiveTrainer:
    """Configure a model's layers for training, and construct its trainer with the default loss."""
    checkpoint_layers(model, params.gradient_checkpointing)
    if params.compile:
        compile_layers(model)
    loss_function = make_contrastive_loss(params.temperature, params.symmetric_loss)
    is_fp8 = params.feature_cache_format == "fp8"
    return ContrastiveTrainer(
        model, processor, args, loss_function, evaluator, params.micro_batch_size, is_fp8, dataset, callbacks, context
    )


def get_provenance(model: PeftModel) -> dict[str, object]:
    """Return what an adapter is checked against later: the base by hash, and the weights before training."""
    adapter = get_peft_model_state_dict(model, save_embedding_layers=False)
    start = adapter_weight_stats(adapter, model.base_model.model.get_head_state())
    return {"base": read_data_file(MANIFEST)["base"], "start": start}


def run_trainer(trainer: ContrastiveTrainer, folder: Path, checkpoint: str) -> None:
    """Train to the last step or a signal, from `checkpoint`, or from the start if it is ""."""
    folder.mkdir(parents=True, exist_ok=True)
    if checkpoint:
        logger.info(f"resuming from {checkpoint}")
        if not Path(checkpoint).is_dir():
            raise UserError(f"{checkpoint}: not here; several machines need one folder that all of them see")
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:  # killed after its last step: transformers would make one more
            trainer.model.load_adapter(checkpoint, trainer.model.active_adapter, is_trainable=True)
            trainer.state = state
            trainer.metric_accumulator.restore(state)
            return
    else:
        checkpoints.ensure_free_disk(
            folder, checkpoints.required_disk_bytes(trainer.get_num_trainable_parameters()), "checkpoints and adapter"
        )
    try:
        with raise_on_disk_full(
            folder / checkpoints.SAVING_FOLDER, trainer, lambda: f"the checkpoint of step {trainer.state.global_step}"
        ):
            trainer.train(resume_from_checkpoint=checkpoint or None)
    except NonFiniteError:
        if trainer.context.is_main_process:
            shutil.rmtree(folder)  # a rerun would end in the same way
        raise


@contextmanager
def raise_on_disk_full(partial: Path, trainer: ContrastiveTrainer, describe: Callable[[], str]) -> Iterator[None]:
    """Delete `partial` on an error; raise UserError if the disk is full, for which writers have errors of their own."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError):
        shutil.rmtree(partial, ignore_errors=True)
        if partial.parent.is_dir():  # a rank that failed before has deleted it
            required = checkpoints.checkpoint_bytes(trainer.get_num_trainable_parameters())
            checkpoints.ensure_free_disk(partial.parent, required, f"{describe()} would")
        raise


def save_artifacts(trainer: ContrastiveTrainer, identity: Mapping[str, object], out: Path) -> dict[str, float | str]:
    """Write all results of a finished run; `out` appears complete or not at all. Return the metrics."""
    steps = [row for row in trainer.state.log_history if "loss" in row]
    dev = [row for row in trainer.state.log_history if EVAL_KEY in row]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model = trainer.model
    with raise_on_disk_full(partial, trainer, lambda: "the adapter"):
        model.save_pretrained(str(partial))
        save_adapter_extras(model, trainer.processor, partial)
    (partial / "identity.json").write_text(format_json(identity))
    # Without train_loss and total_flos: the first differs after a resume, and readers of this file use neither.
    state = {
        "global_step": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "num_train_epochs": trainer.state.num_train_epochs,
        "log_history": steps + dev,
    }
    (partial / "trainer_state.json").write_text(format_json(state))
    metrics: dict[str, float | str] = {DEV_KEY: round(dev[-1][EVAL_KEY], 6), "loss": round(steps[-1]["loss"], 6)}
    for callback in trainer.run_callbacks:
        metrics |= callback.save_artifacts(trainer, partial)
    if trains_on_pseudo_queries():
        metrics["queries"] = "pseudo"  # qualifies the dev score, whose queries are of the same kind
    if (error := trainer.evaluator.features.relative_error) is not None:
        metrics["feature_error"] = round(error, 6)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    write_csv(Path("plots/train.csv"), steps, ("step", "epoch", "loss", "grad_norm", "learning_rate", "masked_pairs"))
    write_csv(Path("plots/dev.csv"), dev, ("step", "epoch", EVAL_KEY))
    # Here and not in the stage: checkpoints are deleted once everything that DVC expects is in place.
    path = Path("metrics/train.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(format_json(metrics))
    return metrics
