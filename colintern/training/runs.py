"""A training run from params to the adapter folder: resumes where it was cut off, leaves nothing half-written.

Checkpoints live in `.scratch/`, in a folder named by the run's fingerprint, so that a run never resumes from another
run's files; the folder goes away once the adapter is in place and DVC has recorded it.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import TrainerState, set_seed

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.training_set import trains_on_pseudo_queries
from colintern.encoding.page_features import FEATURES, PageFeatures
from colintern.encoding.workers import check_workers, stop_workers_on_exit
from colintern.modeling.attention import implementation
from colintern.modeling.host import settle
from colintern.modeling.layers import recomputed
from colintern.modeling.lora import add_lora, count, faults
from colintern.modeling.modeling_colintern import ColIntern3_5
from colintern.modeling.processing_colintern import ColIntern3_5Processor
from colintern.modeling.saving import save_adapter_extras
from colintern.modeling.weights import statistics
from colintern.monitoring.health import HEALTH, health, line, report, stored
from colintern.monitoring.tracker import Tracker, check_tracker
from colintern.monitoring.watch import pace_findings
from colintern.params import Params
from colintern.storage.csvfile import write_csv
from colintern.storage.identity import fingerprint, stage_identity
from colintern.storage.jsonfile import dumps
from colintern.storage.lock import locked_or_refused
from colintern.storage.manifest import MANIFEST, check_base, kernel_entry, read
from colintern.storage.outs import forget_ended, let_go
from colintern.training.checkpoints import SAVING, Interrupted, Signals, check_room, newest, room, shown, size
from colintern.training.determinism import set_deterministic
from colintern.training.pairs import Pairs, rows
from colintern.training.processes import ALONE, Processes
from colintern.training.trainer import ContrastiveTrainer, DevSet, NonFiniteError, arguments
from colintern.tuning.pruning import Pruned, reporter

CLOCK = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
EVALUATIONS = 4  # of the dev set in a run, at least
COMPILERS = ("g++", "clang++")  # what torch looks for


def train(params: Params, out: Path, own: Processes = ALONE) -> dict[str, Any]:
    """Train and write the adapter to `out`, its curves to plots/, and metrics/train.json; returns what is in the last.

    Raises:
        UserError: data or base are missing or changed, the LoRA targets are wrong, the tracker's package is missing,
            another process trains this very run, the training set is smaller than a batch, or the processes share no
            folder.
        NonFiniteError: the loss is not finite.
        OutOfMemory: one page does not fit the memory, or a process that loads data was killed.
        Interrupted: SIGTERM or SIGINT; a checkpoint is there.
        Pruned: the study that this run is a trial of stopped it.
    """
    check_tracker(params)
    check_workers(params.workers)
    settle(params.threads)
    set_deterministic(params.deterministic)
    base = own.first(lambda: check_base(params))
    identity = stage_identity("train", params)
    scratch = root() / ".scratch" / f"train-{fingerprint(identity)[:16]}"
    signals = Signals(own)
    own.first(lambda: forget_ended(scratch))
    with held(scratch) if own.main else nullcontext(), signals.watch(), stop_workers_on_exit(params.workers):
        own.first(lambda: None)  # the first process holds the lock
        told = reporter(own)
        trainer = prepare(params, base, scratch, own)
        identity |= origin(trainer, params) | {"processes": own.size}
        trainer.add_callback(signals)
        if params.tracker != "none" and own.main:
            trainer.add_callback(Tracker(params, scratch))
        if told:
            trainer.add_callback(told)
        run(trainer, scratch, own.first(lambda: str(newest(scratch) or "")))
        step, last = trainer.state.global_step, trainer.state.max_steps
        if told and told.stopped and not signals.received:
            own.first(lambda: shutil.rmtree(scratch))
            raise Pruned(f"stopped at step {step} of {last}: the study found its dev score too low")
        if step < last:
            raise Interrupted(f"stopped at step {step} of {last}, with a checkpoint; the same command goes on from it")
        if told:
            own.first(lambda: told.finish(trainer))
        metrics = own.first(lambda: finish(trainer, params, identity, out))
        own.first(lambda: let_go(scratch))
    return metrics


def run(trainer: ContrastiveTrainer, scratch: Path, checkpoint: str) -> None:
    """Train to the end, or until a signal, from `checkpoint` or, where that is "", from the start.

    Raises:
        UserError: the disk is full; the last good checkpoint is kept.
        NonFiniteError: see `train`.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    if checkpoint:
        print(f"resuming from {checkpoint}")
        if not Path(checkpoint).is_dir():
            raise UserError(f"{checkpoint}: not here; several machines need one folder that all of them see")
        state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        if state.global_step >= state.max_steps:  # killed after its last step: transformers would make one more
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            trainer.tally.on_train_begin(None, state, None)
            return
    else:
        check_room(scratch, room(trained(trainer)), "checkpoints and adapter")
    try:
        with full_disk_told(scratch / SAVING, trainer, lambda: f"the checkpoint of step {trainer.state.global_step}"):
            trainer.train(resume_from_checkpoint=checkpoint or None)
    except NonFiniteError:
        if trainer.processes.main:
            shutil.rmtree(scratch)  # a rerun would go on to the same end
        raise


def trained(trainer: ContrastiveTrainer) -> int:
    """Parameters that are trained."""
    model: Any = trainer.model
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def full_disk_told(made: Path, trainer: ContrastiveTrainer, what: Callable[[], str]) -> Iterator[None]:
    """Raises UserError for what a full disk makes of torch's and safetensors' writers; `made`, half-written, goes."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError):
        shutil.rmtree(made, ignore_errors=True)
        if made.parent.is_dir():  # else another process has taken it away, which failed first
            check_room(made.parent, size(trained(trainer)), f"{what()} would")
        raise


def origin(trainer: ContrastiveTrainer, params: Params) -> dict[str, Any]:
    """What a trained adapter is held against later: base and kernel by hash, and the weights training starts from."""
    model: Any = trainer.model
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    start = statistics(weights, model.base_model.model.head_state())
    return {"base": read(MANIFEST)["base"], "kernel": kernel_entry(params.attention), "start": start}


def prepare(params: Params, place: str, scratch: Path, processes: Processes = ALONE) -> ContrastiveTrainer:
    """The model, wrapped and counted, and the data, in a trainer; `place` is where `check_base` found the base.

    Raises:
        UserError: see `train`.
    """
    args = arguments(
        params, scratch, quiet=not sys.stderr.isatty() or "CI" in os.environ or not processes.main, size=processes.size
    )
    parts = rows(params)
    train, dev_rows = parts["train"], parts["test"][: params.dev_queries]
    steps = len(train) // params.batch_size * params.epochs
    if not steps:
        raise UserError(f"batch_size: {params.batch_size} is more than the {len(train)} training pairs")
    if params.logging_steps > steps:
        raise UserError(f"logging_steps: {params.logging_steps} is more than the {steps} steps of this run")
    # After each epoch, or each quarter of a run of fewer than four, and after the last step. By steps: "epoch" comes
    # after the step's checkpoint, which then lacks the score.
    args.eval_steps = math.ceil(steps / max(params.epochs, EVALUATIONS))
    if params.compile and not any(map(shutil.which, COMPILERS)):
        raise UserError(f"compile: true needs a C++ compiler, {' or '.join(COMPILERS)}: install one, or write false")
    set_seed(params.seed)
    revision = params.base_revision or None
    kernel = implementation(params.attention, params.dtype, training=True)
    base = ColIntern3_5.from_pretrained(
        place,
        revision=revision,
        seed=params.seed,
        dtype=getattr(torch, params.dtype),
        attn_implementation=kernel,
    )
    # What the adapter and its card will name, wherever this copy of the base lies.
    base.name_or_path = base.config._name_or_path = params.base
    processor = ColIntern3_5Processor.from_pretrained(
        place,
        revision=revision or "main",
        max_visual_tokens=params.max_visual_tokens,
        max_query_tokens=params.max_query_tokens,
    )
    recomputed(len(base.language_model.layers), params.gradient_checkpointing)  # refused before a page is computed
    model = add_lora(base, params.lora_targets, params.lora_rank, params.lora_alpha, params.lora_dropout, revision)
    if wrong := faults(count(model, params.lora_targets)):
        raise UserError("\n  ".join(wrong))
    model.to(args.device)
    features = PageFeatures(model, processor, root() / FEATURES, params.feature_cache_gb, params.feature_cache_format)
    shown = [page for row in train for page in (row.page, *row.negatives)]
    processes.first(lambda: features.fill([*shown, *(row.page for row in dev_rows)], params.workers))
    if not processes.main:
        features.cache.refresh()
    pairs, dev = Pairs(train, features), DevSet(dev_rows, features)
    used = params.attention if kernel_entry(params.attention) else kernel
    print(f"{len(pairs)} training pairs; dev: {len(dev)} queries on {len(dev.pages)} pages; attention: {used}")
    if cut := processor.count_cut([row.query for row in (*train, *dev_rows)]):
        print(f"{cut} of {len(train) + len(dev_rows)} queries are longer than max_query_tokens and are cut")
    return ContrastiveTrainer(params, processor, dev, processes=processes, model=model, args=args, train_dataset=pairs)


def finish(trainer: ContrastiveTrainer, params: Params, identity: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write everything the run leaves behind; `out` appears whole or not at all."""
    log = trainer.state.log_history
    pace = trainer.pace.values()
    paced = pace_findings(pace, params)
    timing = {key: value for row in log for key, value in row.items() if key in CLOCK} | pace
    steps = [row for row in log if "loss" in row]
    dev = [row for row in log if "eval_ndcg_at_5" in row]
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    wrapped: Any = trainer.model
    with full_disk_told(partial, trainer, lambda: "the adapter"):
        wrapped.save_pretrained(partial)
        save_adapter_extras(wrapped, trainer.processor, partial)
    (partial / "identity.json").write_text(dumps(identity))
    # No train_loss or total_flos: the first differs after a resume, and both are of no use to a reader of this file.
    state = {
        "global_step": trainer.state.global_step,
        "max_steps": trainer.state.max_steps,
        "num_train_epochs": params.epochs,
        "log_history": steps + dev,
    }
    (partial / "trainer_state.json").write_text(dumps(state))
    judged = health(log, params, trainer.dev.chance, trainer.bounds)
    found = {"verdict": judged.verdict, "masked_pairs": trainer.tally.total} | stored(judged.findings)
    (partial / HEALTH).write_text(dumps(found))
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    write_csv(Path("plots/train.csv"), steps, ("step", "epoch", "loss", "grad_norm", "learning_rate", "masked_pairs"))
    write_csv(Path("plots/dev.csv"), dev, ("step", "epoch", "eval_ndcg_at_5"))
    (root() / "logs").mkdir(exist_ok=True)
    (root() / "logs" / "train-timing.json").write_text(dumps(timing | {"health": stored(paced)}))
    print("\n".join([*map(line, paced), report(judged)]))
    # Stands beside the dev score, which is of the same kind as the queries.
    pseudo = {"queries": "pseudo"} if trains_on_pseudo_queries() else {}
    rounding = {} if (error := trainer.dev.features.error) is None else {"feature_error": round(error, 6)}
    metrics = {
        "dev_ndcg_at_5": round(dev[-1]["eval_ndcg_at_5"], 6),
        "loss": round(steps[-1]["loss"], 6),
        "verdict": judged.verdict,
        **pseudo,
        **rounding,
    }
    # Here and not in the stage: the checkpoints go once all that DVC asks for is in place.
    path = Path("metrics/train.json")
    path.parent.mkdir(exist_ok=True)
    path.write_text(dumps(metrics))
    return metrics


@contextmanager
def held(scratch: Path) -> Iterator[None]:
    """What the first process alone does: hold the run, and show its checkpoints in experiments/."""
    with locked_or_refused(scratch), shown(scratch):
        yield
