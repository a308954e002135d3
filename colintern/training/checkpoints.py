"""Checkpoints that are whole or not there, and the signals that ask for one.

transformers writes a checkpoint below `saving/`. Only when every file is on the disk and named with its sha256 is the
folder renamed to its place, so whatever has a name is complete; what has rotted since is found by its hash.
"""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.modeling.saving import save_adapter_extras
from colintern.storage.identity import content_hash
from colintern.storage.outs import FINISHED_MARK
from colintern.training.processes import Processes

SAVING = "saving"
FILES = "files.json"  # of a checkpoint: each other file's sha256
STATE = "trainer_state.json"
KEEP = 2


class Interrupted(UserError):
    """A signal ended the training; it goes on from its checkpoint. The process exits with 75 (EX_TEMPFAIL)."""

    exit_code = 75


class Checkpoints(TrainerCallback):
    """Makes a whole adapter of what transformers has saved, gives it its name, and keeps the newest two."""

    def __init__(self, folder: Path, processor: Any, processes: Processes):
        self.folder, self.processor, self.processes = folder, processor, processes

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.processes.barrier()  # each process has written a file of it
        self.processes.first(lambda: self._seal(f"checkpoint-{state.global_step}", model))

    def _seal(self, name: str, model: Any) -> None:
        made = self.folder / SAVING / name
        save_adapter_extras(model, self.processor, made)
        seal(made, self.folder / name)
        shutil.copyfile(self.folder / name / STATE, self.folder / SAVING / STATE)
        os.replace(self.folder / SAVING / STATE, self.folder / STATE)
        for old in _by_step(self.folder)[KEEP:]:
            _delete(old)


class Signals(TrainerCallback):
    """SIGTERM and Ctrl-C: a checkpoint after the step under way, then the end; a second one ends at once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received, self.stepping, self.owner = 0, False, os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() != self.owner:  # a process that loads data: it is still needed, and ends with its trainer
            return
        name = signal.Signals(number).name
        if self.received or not self.stepping:
            raise Interrupted(f"ended by {name}; the same command goes on from the last checkpoint, if there is one")
        self.received = number
        tqdm.write(f"{name}: a checkpoint after this step, then the end; again to end at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stepping = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The signal may reach the processes in different steps: one that has it stops all of them in this one.
        if self.processes.any(bool(self.received) or _homeless()) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Take the signals inside, and give them back.

        Raises:
            Interrupted: one came, and the training ended before its last step.
        """
        before = {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _homeless() -> bool:
    """Whether the folder that a run was started in is gone, as after `dvc queue stop --kill`: nobody will take what it
    leaves, and the checkpoint is what another run can go on from."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


@contextmanager
def shown(folder: Path) -> Iterator[None]:
    """Link a run's checkpoints and `trainer_state.json` into experiments/, where the guide's readers look for them,
    as long as the run goes on. A link whose run is over, or gone, goes too."""
    link = root() / "experiments" / folder.name
    folder.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(folder, link.parent))
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing was kept
        for old in link.parent.glob("train-*"):
            if old.is_symlink() and (not old.exists() or (old / FINISHED_MARK).exists()):
                old.unlink()


def seal(made: Path, place: Path) -> None:
    """Bring a checkpoint's files to the disk, name them with their hashes, and rename its folder to `place`."""
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    hashes = {}
    for name in names:
        with (made / name).open("rb") as file:
            hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    with (made / FILES).open("w", encoding="utf-8") as file:
        json.dump(hashes, file)
        file.flush()
        os.fsync(file.fileno())
    if place.exists():
        _delete(place)
    os.replace(made, place)
    parent = os.open(place.parent, os.O_RDONLY)
    os.fsync(parent)
    os.close(parent)


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose files are all there and unchanged; a bad one is named, and deleted."""
    shutil.rmtree(folder / SAVING, ignore_errors=True)
    for place in _by_step(folder):
        fault = _fault(place)
        if not fault:
            return place
        print(f"warning: {fault}; going on from an older checkpoint")
        _delete(place)
    return None


def _fault(place: Path) -> str:
    try:
        hashes = json.loads((place / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{place / FILES}: cannot be read: {error}"
    if not isinstance(hashes, dict):
        return f"{place / FILES}: is no list of files with their hashes"
    for name, known in hashes.items():
        if not (place / name).is_file():
            return f"{place / name}: missing"
        if content_hash(place / name) != known:
            return f"{place / name}: {(place / name).stat().st_size} bytes that are not those that were saved"
    return ""


def _delete(place: Path) -> None:
    """Delete a checkpoint, or a file that is in its place."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink()


def _by_step(folder: Path) -> list[Path]:
    """The checkpoints, newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: -int(path.name.partition("-")[2]))


def size(trained: int) -> int:
    """Bytes of one checkpoint of so many trained parameters: each in float32 with AdamW's two moments; a little for
    the rest."""
    return 3 * 4 * trained + 2**20


def room(trained: int) -> int:
    """Bytes that a run needs at most: the checkpoints that are kept, the one that is being written, the adapter."""
    return (KEEP + 2) * size(trained)


def check_room(folder: Path, need: int, what: str) -> None:
    """Raises UserError where the disk of `folder` has less than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise UserError(f"{folder}: {what} need {need / 1e6:.1f} MB, have {free / 1e6:.1f} MB; make room on this disk")
