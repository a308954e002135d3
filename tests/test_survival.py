"""Faults T1-T12 and T14: real kills, signals, torn files and full disks; the run ends on the same bytes, or says why.

Each run is a separate process, see processes.py.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from processes import kill, leave, signal_self
from safetensors.torch import load_file
from small_run import OUT, STEPS, Run, at_step, params, work
from test_processes import free_port, rank_of

pytestmark = pytest.mark.integration
SLOW = pytest.mark.slow  # a further fault of a kind, whose first is in `make test`


def in_write(of: str) -> None:
    """Kill when half of a checkpoint's file is written, or before its folder gets its name."""
    import torch
    from peft import peft_model
    from transformers import TrainerState

    from colintern.training import checkpoints

    def torn(owner, name, place):
        real = getattr(owner, name)

        def write(*args, **kwargs):
            done = real(*args, **kwargs)
            path = Path(place(*args, **kwargs))
            if path.name == of:
                os.truncate(path, path.stat().st_size // 2)
                kill()
            return done

        setattr(owner, name, write)

    torn(torch, "save", lambda value, path, *rest, **more: path)
    torn(peft_model, "safe_save_file", lambda state, path, *rest, **more: path)
    torn(TrainerState, "save_to_json", lambda state, path: path)
    torn(checkpoints.json, "dump", lambda value, file: file.name)
    if of == "rename":
        checkpoints.os.replace = lambda *places: kill()


def before_the_end() -> None:
    from colintern.training import run

    run.save_artifacts = lambda *args: kill()


def no_step() -> None:
    at_step(STEPS + 1, leave)
    for step in range(STEPS + 1):
        at_step(step, leave)


def too_big(rows: int) -> None:
    """No more than so many rows of a side fit in the memory."""
    import torch

    from colintern.modeling.retriever import ColIntern3_5

    forward = ColIntern3_5.forward

    def limited(self, input_ids, *args, **kwargs):
        if len(input_ids) > rows and self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, input_ids, *args, **kwargs)

    ColIntern3_5.forward = limited


def poison() -> None:
    """A weight that becomes infinite in step 4."""
    import torch

    from colintern.training.trainer import ContrastiveTrainer

    whole = ContrastiveTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == 3:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).fill_(float("inf"))
        return whole(self, model, *args, **kwargs)

    ContrastiveTrainer.training_step = training_step


@pytest.mark.parametrize("step", [1, 5, pytest.param(7, marks=SLOW)])
def test_t1_killed_in_a_step(place, whole, step):
    assert place.run(at_step, step, kill) == -signal.SIGKILL
    assert not (place.folder / OUT).exists()
    assert place.run() == 0, place.log
    assert ("resuming from" in place.log) == (step > 3)
    assert place.result() == whole


def test_t2_killed_at_each_file_of_a_save(place, whole):
    for of in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
               "files.json", "rename"):  # fmt: skip
        assert place.run(in_write, of) == -signal.SIGKILL, of
        assert "resuming from" not in place.log, of
        assert [path.name for path in place.scratch.iterdir()] == ["saving"]
    assert place.run() == 0, place.log
    assert place.result() == whole


def test_t3_killed_after_the_last_save_no_step_more_is_made(place, whole):
    assert place.run(before_the_end) == -signal.SIGKILL
    assert place.run(no_step) == 0, place.log
    assert f"checkpoint-{STEPS}" in place.log
    assert place.result() == whole


def test_t3_metrics_that_cannot_be_written_cost_no_step(place, whole):
    metrics = place.folder / "metrics" / "train.json"
    metrics.unlink(missing_ok=True)  # of the run that the fixture may have made
    metrics.mkdir()
    assert place.run() == 1, place.log
    metrics.rmdir()
    assert place.run(no_step) == 0, place.log
    assert place.result() == whole


@pytest.mark.parametrize(
    "fault",
    ["bit", "list", "a file", *(pytest.param(name, marks=SLOW) for name in ("cut", "empty", "missing", "no mapping"))],
)
def test_t4_a_rotten_checkpoint_is_named_and_the_one_before_is_used(place, whole, fault):
    assert place.run(at_step, 8, kill) == -signal.SIGKILL
    names = {"cut": "optimizer.pt", "empty": "trainer_state.json", "missing": "rng_state.pth", "list": "files.json"}
    file = place.scratch / "checkpoint-6" / names.get(fault, "adapter_model.safetensors")
    if fault in ("no mapping", "a file"):
        file = file.with_name("files.json")
    data = bytearray(file.read_bytes())
    if fault == "missing":
        file.unlink()
    elif fault == "no mapping":
        file.write_text("[]")
    elif fault == "a file":
        shutil.rmtree(file.parent)
        file.parent.touch()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes({"cut": data[: len(data) // 2], "empty": b""}.get(fault, bytes(data)))
    assert place.run() == 0, place.log
    # A list with a wrong byte is no JSON, or says of another file that it is not what was saved.
    named = r"\S+" if fault == "list" else re.escape(file.name)
    assert re.search(
        rf"warning: \S+/checkpoint-6/{named}: (missing|cannot be read|is no list|\d+ bytes that are not)", place.log
    )
    assert "resuming from" in place.log and "checkpoint-3\n" in place.log
    assert place.result() == whole


def test_t5_another_runs_checkpoint_is_never_used(place):
    assert place.run(at_step, 5, kill) == -signal.SIGKILL
    with contextlib.chdir(place.folder):
        params(lr="3e-3")
    assert place.run(at_step, 1, kill) == -signal.SIGKILL
    assert "resuming from" not in place.log
    assert len([path for path in (place.folder / ".scratch").iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_t6_a_signal_leaves_a_checkpoint_exit_75_and_no_result(place, whole, number):
    assert place.run(at_step, 5, partial(signal_self, number)) == 75, place.log
    assert f"stopped at step 5 of {STEPS}, with a checkpoint" in place.log
    assert not (place.folder / OUT).exists()
    assert (place.scratch / "checkpoint-5").is_dir()
    assert place.run() == 0, place.log
    assert place.result() == whole


def in_a_group(step: int, number: int) -> None:
    """As at a terminal, or from `timeout`: it goes to the trainer and to the processes that load its data."""
    os.setpgrp()
    at_step(step, lambda: os.killpg(0, number))


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW)])
def test_t6_a_signal_may_reach_the_processes_that_load_data_too(place, whole, number):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", workers=2)
    # Of five steps in an epoch: the last one has no such processes any more.
    assert place.run(in_a_group, 2, number) == 75, place.log
    assert place.log.count(f"{number.name}: a checkpoint after this step, then the end") == 1
    assert "Traceback" not in place.log and (place.scratch / "checkpoint-2").is_dir()
    assert place.run() == 0, place.log
    assert place.result()["adapter_model.safetensors"] == whole["adapter_model.safetensors"]


def test_t6_a_second_signal_ends_at_once(place):
    assert place.run(at_step, 5, partial(signal_self, signal.SIGTERM, signal.SIGTERM)) == 75, place.log
    assert "ended by SIGTERM" in place.log and (place.scratch / "checkpoint-3").is_dir()


def lose_folder(step: int) -> None:
    """As an experiment in a copy of the repository, which is taken away."""
    main, copy = Path.cwd(), Path.cwd() / ".dvc" / "tmp" / "exps" / "copy"
    shutil.copytree(main, copy, symlinks=True, ignore=shutil.ignore_patterns(".dvc"))
    os.environ["DVC_ROOT"] = str(main)
    os.chdir(copy)
    at_step(step, lambda: shutil.rmtree(copy))


def test_t7_a_run_whose_folder_is_gone_ends_with_a_checkpoint(place, whole):
    """`dvc queue stop --kill` ends DVC, not its stage, and takes the folder away."""
    assert place.run(lose_folder, 5) == 75, place.log
    assert "Traceback" not in place.log and (place.scratch / "checkpoint-5").is_dir()
    assert place.run() == 0 and place.result() == whole, place.log


def test_t7_two_at_once_are_refused_by_the_owners_pid(place, whole):
    first = place.start(at_step, 2, partial(signal_self, signal.SIGSTOP))
    while not stopped(first.pid):
        assert first.is_alive(), place.log
        time.sleep(0.05)
    for name in ("out.txt", "err.txt"):
        (place.folder / name).rename(place.folder / f"first-{name}")
    assert place.run() == 2
    assert f"process {first.pid} is training this very run" in place.log
    os.kill(first.pid, signal.SIGCONT)
    first.join(180)
    assert first.exitcode == 0 and place.result() == whole


def stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture
def small_disk(place):
    """`.scratch`, or what `name` says, on a disk of its own: (size in bytes) -> None."""
    mounted = []

    def mount(size: int, name: str = ".scratch") -> None:
        folder = place.folder / name
        folder.mkdir(exist_ok=True)
        mounted.append(str(folder))
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")

    yield mount
    subprocess.run(["umount", "-l", *mounted], capture_output=True)


def test_t8_a_small_disk_is_known_at_the_start(place, small_disk):
    small_disk(3_000_000)
    assert place.run() == 2, place.log
    assert re.search(r"checkpoints and adapter need [\d.]+ MB, have [\d.]+ MB", place.log)


def fill_disk() -> None:
    """The rest of the disk is taken by something else in step 6."""

    def fill() -> None:
        with contextlib.suppress(OSError), open(".scratch/other", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    at_step(6, fill)


def test_t8_a_disk_that_fills_up_costs_no_checkpoint(place, whole, small_disk):
    small_disk(40_000_000)
    assert place.run(fill_disk) == 2, place.log
    assert re.search(r"the checkpoint of step 6 would need [\d.]+ MB, have 0\.0 MB", place.log), place.log
    assert sorted(path.name for path in place.scratch.iterdir()) == ["checkpoint-3", "trainer_state.json"]
    (place.folder / ".scratch" / "other").unlink()
    assert place.run() == 0, place.log
    assert place.result() == whole


def test_t8_a_disk_without_room_for_the_adapter_costs_no_step(place, whole, small_disk):
    small_disk(40_000, "experiments")
    assert place.run() == 2, place.log
    assert re.search(r"experiments: the adapter would need [\d.]+ MB, have 0\.0 MB", place.log), place.log
    subprocess.run(["mount", "-o", "remount,size=40000000", str(place.folder / "experiments")], check=True)
    assert place.run(no_step) == 0, place.log
    assert place.result() == whole


@pytest.mark.parametrize("name", ["plots", pytest.param("logs", marks=SLOW)])
def test_t8_a_full_disk_that_no_file_is_named_for_is_one_sentence(place, whole, small_disk, name):
    small_disk(4096, name)
    (place.folder / name / "filler").write_bytes(bytes(4096))
    assert place.run() == 2, place.log
    assert "No space left on device" in place.err and "Traceback" not in place.log
    (place.folder / name / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=40000000", str(place.folder / name)], check=True)
    assert place.run(no_step) == 0, place.log
    hidden = {"data.csv"} if name == "plots" else set()  # of verify, below the small disk
    assert place.result() == {file: known for file, known in whole.items() if file not in hidden}


def test_t9_a_weight_that_is_not_finite_ends_the_run_within_a_step(place):
    assert place.run(poison) == 5, place.log
    assert "at step 4" in place.log
    assert not (place.folder / OUT).exists() and not [p for p in (place.folder / ".scratch").iterdir() if p.is_dir()]


def test_t10_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(place):
    assert "lora_dropout: 0.1\n" in (place.folder / "params.yaml").read_text()
    assert place.run() == 0, place.log
    had = load_file(place.folder / OUT / "adapter_model.safetensors")
    assert place.run(too_big, 3) == 0, place.log
    assert re.findall(r"out of memory: micro_batch_size is now (\d)", place.log) == ["4", "2"]
    state = json.loads((place.folder / OUT / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS
    has = load_file(place.folder / OUT / "adapter_model.safetensors")
    for name, value in had.items():  # the sums were taken in another order, ten times
        assert (value - has[name]).norm() <= 1e-3 * value.norm(), name


def test_t11_where_one_page_does_not_fit_the_run_ends_with_what_to_change(place):
    assert place.run(too_big, 0) == 6, place.log
    assert "out of memory with one page at a time, at step 1; set gradient_checkpointing: true" in place.log


def no_room_in_the_tower() -> None:
    from colintern.training import trainer

    def compute_image_features(*_):
        raise torch.AcceleratorError("CUDA error: out of memory")  # of a kernel that is loaded; no OutOfMemoryError

    trainer.compute_image_features = compute_image_features


def test_t11_where_the_tower_does_not_fit_either(place):
    assert place.run(no_room_in_the_tower) == 6, place.log
    assert "out of memory in the tower, which takes one page at a time, at step 1; lower max_visual_tok" in place.log


def test_t14_and_t1_with_processes_that_load_data(place, whole):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", workers=2)
    assert place.run(at_step, 5, kill) == -signal.SIGKILL
    assert place.run() == 0, place.log
    assert "resuming from" in place.log
    names = ("adapter_model.safetensors", "train.csv", "dev.csv")
    assert {name: place.result()[name] for name in names} == {name: whole[name] for name in names}


def test_the_train_stage_asks_the_doctor_before_a_model_is_loaded(place):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", dtype="bfloat16", attention="flash_attention_2")
    assert place.run(never_load) == 2, place.log
    assert "flash_attention_2 needs a GPU" in place.log


def never_load() -> None:
    from colintern.modeling.retriever import ColIntern3_5

    ColIntern3_5.from_pretrained = leave


def in_two(place: Run) -> None:
    """A run in two processes, joined as under any launcher."""
    port = free_port()
    ranks = [place.start(rank_of, 2, rank, port) for rank in range(2)]
    for process in ranks:
        process.join(180)
    assert [process.exitcode for process in ranks] == [0, 0], place.log


def test_t12_where_one_rank_dies_all_stop_and_the_next_launch_ends_on_the_same_bytes(place, fetched, whole):
    """`launch: 2` of the real stage, whose rank 1 is killed after a checkpoint; against two that are left alone."""
    with contextlib.chdir(place.folder):
        params(lr="2e-3", launch=2)
    undisturbed = Run(place.folder.parent / "undisturbed", work)
    shutil.copytree(place.folder, undisturbed.folder, symlinks=True)
    in_two(undisturbed)
    stage = launched(place)
    os.kill(rank_one(stage.pid), signal.SIGKILL)
    killed = time.monotonic()
    assert stage.wait(60) == 1, place.log
    assert time.monotonic() - killed < 60 and "1: -9" in place.log
    assert not (place.folder / OUT).exists()
    in_two(place)
    assert "resuming from" in place.log
    assert place.result() == undisturbed.result()
    one, two = (load_file(p.folder / OUT / "adapter_model.safetensors") for p in (Run(fetched, work), undisturbed))
    for name, value in one.items():  # the sums were taken in another order, ten times
        assert (value - two[name]).norm() <= 1e-3 * value.norm(), name


def launched(place: Run) -> subprocess.Popen[bytes]:
    """The real stage, with a checkpoint behind it."""
    with (place.folder / "out.txt").open("w") as log:
        (place.folder / "err.txt").touch()
        stage = subprocess.Popen(
            [sys.executable, "-m", "stages.train"], cwd=place.folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while not list((place.folder / ".scratch").glob("train-*/checkpoint-*")):
        assert stage.poll() is None, place.log
        time.sleep(0.05)
    return stage


def test_t6_a_signal_to_the_stage_stops_all_processes_with_a_checkpoint(place):
    with contextlib.chdir(place.folder):
        params(lr="2e-3", launch=2, epochs=40)
    stage = launched(place)
    stage.terminate()
    assert stage.wait(60) == 75, place.log
    [step] = set(re.findall(r"stopped at step (\d+) of 200, with a checkpoint", place.log))  # each says so
    assert (place.scratch / f"checkpoint-{step}" / "rng_state_1.pth").is_file()
    assert not (place.folder / OUT).exists()


def rank_one(parent: int) -> int:
    """The PID of the second process that `parent` has started to train."""
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    [found] = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    return found
