"""Crash-safe checkpoints, and the signals that request one.

transformers writes a checkpoint below `saving/`. The folder gets its final name only when every file is synced to disk
and listed with its sha256: a named checkpoint is complete, and later corruption is found by its hashes.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.modeling.adapter_files import save_adapter_extras
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.storage.identity import content_hash
from colintern.storage.outs import FINISHED_MARK
from colintern.training.distributed import EXIT_INTERRUPTED, DistributedContext

logger = logging.getLogger(__name__)
SAVING_FOLDER = "saving"
HASHES_FILE = "files.json"  # of a checkpoint: sha256 of each other file
STATE_FILE = "trainer_state.json"
MAX_CHECKPOINTS = 2
BYTES_PER_TRAINED_PARAMETER = 3 * 4  # in float32 with AdamW's two moments
MAX_OTHER_BYTES = 2**20  # of a checkpoint


class TrainingInterruptedError(UserError):
    """A signal ended the training; a rerun resumes from its checkpoint. The process exits with 75 (EX_TEMPFAIL)."""

    exit_code = EXIT_INTERRUPTED


class CheckpointWriter(TrainerCallback):
    """Completes and commits what transformers has saved, and deletes all but the newest checkpoints."""

    def __init__(self, folder: Path, processor: ColIntern3_5Processor, context: DistributedContext):
        self.folder, self.processor, self.context = folder, processor, context

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Commit the checkpoint once every rank has written its file of it."""
        self.context.barrier()
        name, model = f"checkpoint-{state.global_step}", kwargs["model"]
        self.context.run_on_rank0_and_broadcast(lambda: self._commit_saved(name, model))

    def _commit_saved(self, name: str, model: PeftModel) -> None:
        saved = self.folder / SAVING_FOLDER / name
        save_adapter_extras(model, self.processor, saved)
        commit_checkpoint(saved, self.folder / name)
        shutil.copyfile(self.folder / name / STATE_FILE, self.folder / SAVING_FOLDER / STATE_FILE)
        os.replace(self.folder / SAVING_FOLDER / STATE_FILE, self.folder / STATE_FILE)
        for old in _list_checkpoints(self.folder)[MAX_CHECKPOINTS:]:
            _delete_path(old)


class GracefulShutdown(TrainerCallback):
    """On SIGTERM or Ctrl-C, saves a checkpoint after the current step and stops; a second signal stops at once."""

    def __init__(self, context: DistributedContext):
        self.context = context
        self.signal_number, self.is_training, self.pid = 0, False, os.getpid()

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.pid:  # a DataLoader worker: the current step needs it, and it ends with the trainer
            return
        name = signal.Signals(number).name
        if self.signal_number or not self.is_training:
            raise TrainingInterruptedError(
                f"ended by {name}; the same command resumes from the last checkpoint, if there is one"
            )
        self.signal_number = number
        logger.info(f"{name}: a checkpoint after this step, then the end; again to end at once")

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Let signals wait for the end of the step from now on."""
        self.is_training = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_) -> None:
        """Stop all ranks in the same step: a signal may reach them in different ones."""
        should_stop = self.context.all_reduce_any(bool(self.signal_number) or _is_working_folder_deleted())
        if should_stop and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle the signals inside the `with` block."""
        previous = {number: signal.signal(number, self._handle_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _is_working_folder_deleted() -> bool:
    """Return True after `dvc queue stop --kill`: only the checkpoint of such a run can still be used."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


@contextmanager
def link_checkpoints(folder: Path) -> Iterator[None]:
    """Link the checkpoints of a run into experiments/, where the guide's readers look, while it runs."""
    link = root() / "experiments" / folder.name
    folder.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(folder, link.parent))
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # only if it is empty
        for old in link.parent.glob("train-*"):  # of this run, and of others that are over or deleted
            if old.is_symlink() and (not old.exists() or (old / FINISHED_MARK).exists()):
                old.unlink()


def commit_checkpoint(saved: Path, target: Path) -> None:
    """Sync the files of a checkpoint to disk, list their hashes, and rename its folder to `target`."""
    names = sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file())
    hashes = {}
    for name in names:
        with (saved / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with (saved / HASHES_FILE).open("w", encoding="utf-8") as file:
        json.dump(hashes, file)
        file.flush()
        os.fsync(file.fileno())
    if target.exists():
        _delete_path(target)
    os.replace(saved, target)
    parent = os.open(target.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def latest_valid_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint with all files unchanged; report and delete the invalid ones before it."""
    shutil.rmtree(folder / SAVING_FOLDER, ignore_errors=True)
    for checkpoint in _list_checkpoints(folder):
        if not (problem := validate_checkpoint(checkpoint)):
            return checkpoint
        logger.warning(f"{problem}; resuming from an older checkpoint")
        _delete_path(checkpoint)
    return None


def validate_checkpoint(checkpoint: Path) -> str:
    """Compare the files of a checkpoint with their hashes; return the first problem, "" if there is none."""
    try:
        hashes = json.loads((checkpoint / HASHES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{checkpoint / HASHES_FILE}: cannot be read: {error}"
    if not isinstance(hashes, dict):
        return f"{checkpoint / HASHES_FILE}: is no list of files with their hashes"
    for file, sha256 in ((checkpoint / name, sha256) for name, sha256 in hashes.items()):
        if not file.is_file():
            return f"{file}: missing"
        if content_hash(file) != sha256:
            return f"{file}: {file.stat().st_size} bytes that are not those that were saved"
    return ""


def _delete_path(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints, newest first."""
    steps = {path: path.name.partition("-")[2] for path in folder.glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: -int(steps[path]))


def checkpoint_bytes(num_trained: int) -> int:
    """Return the size of a checkpoint of so many trained parameters."""
    return BYTES_PER_TRAINED_PARAMETER * num_trained + MAX_OTHER_BYTES


def required_disk_bytes(num_trained: int) -> int:
    """Return the most that a run needs: the checkpoints that are kept, the one being written, and the adapter."""
    return (MAX_CHECKPOINTS + 2) * checkpoint_bytes(num_trained)


def ensure_free_disk(folder: Path, num_bytes: int, what: str) -> None:
    """Raise UserError if fewer than `num_bytes` are free on the disk of `folder`."""
    required, free = num_bytes / 1e6, shutil.disk_usage(folder).free / 1e6
    if free < required:
        raise UserError(f"{folder}: {what} need {required:.1f} MB, have {free:.1f} MB; make room on this disk")
