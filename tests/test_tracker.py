"""Trackers beside a run: the same adapter with each, one warning where W&B cannot be used (fault T13), one run id.

The real wandb package, offline or against a port of this machine, each run in a separate process.
"""

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from processes import kill, signal_self
from small_run import STEPS, at_step, params

from colintern.core.errors import UserError
from colintern.monitoring.tracker import check_tracker, format_error
from colintern.params import load_params

pytestmark = pytest.mark.integration
KEY = "0123456789abcdef" * 2 + "f" * 8
TOKEN = "hf_" + "SeCrEt" * 6


def surroundings(home: str, changes: dict[str, str], step: int = 0, do=None) -> None:
    """Run with nothing of W&B's in the environment but `changes`; do something in a step."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        del os.environ[key]
    os.environ |= {"HOME": home, "NETRC": f"{home}/netrc", "HF_TOKEN": TOKEN} | changes
    if step:
        at_step(step, do)


@pytest.fixture
def tracked(place, tmp_path):
    """(environment of W&B, step, what to do in it) -> exit code, with `tracker: wandb`."""
    with contextlib.chdir(place.folder):
        params(lr="2e-3", tracker="wandb")
    (tmp_path / "home").mkdir()
    return lambda changes, *more: place.run(surroundings, str(tmp_path / "home"), changes, *more)


def history(file: Path) -> Iterator[dict[str, float]]:
    """The logged rows of a run's file, which is framed as LevelDB's logs are: blocks of 32 KiB, chunks with a header of
    checksum, length and type."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if place % 32768 > 32768 - 7:
            place += 32768 - place % 32768
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # the last chunk of a record
            record = wandb_internal_pb2.Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                yield {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime)


def secrets_in(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    # The checkpoints' training_args.bin is why they are never uploaded.
    return [path for path in files if any(key.encode() in path.read_bytes() for key in (KEY, TOKEN))]


def warnings(log: str) -> list[str]:
    """Lines with a warning, those of the doctor left out, to whom this run is small."""
    return re.findall(r"(?im)^(?!warning: (?:base|effective batch|learning rate):).*warning.*", log)


def test_an_interrupted_run_offline_goes_on_under_its_id_and_logs_each_step_once(place, whole, tracked):
    offline = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY, "WANDB_TAGS": "a,b", "WANDB_PROJECT": "pages"}
    assert tracked(offline, 5, partial(signal_self, signal.SIGTERM)) == 75, place.log
    number = (place.scratch / "wandb-id").read_text()
    assert tracked(offline) == 0, place.log
    assert not warnings(place.log) and "W&B: offline, `wandb sync " in place.log
    files = kept(place.folder)
    assert [file.name for file in files] == [f"run-{number}.wandb"] * 2
    rows = [row for file in files for row in history(file)]
    assert [row["train/global_step"] for row in rows if "train/loss" in row] == [2, 4, 6, 8, 10]
    assert [row["train/global_step"] for row in rows if "eval/ndcg_at_5" in row] == [3, 6, 9, 10]
    assert b"pages" in files[0].read_bytes() and b"temperature" in files[0].read_bytes()
    assert place.result() == whole
    assert not secrets_in(place.folder)


def test_a_killed_run_goes_on_under_its_id(place, whole, tracked):
    assert tracked({"WANDB_MODE": "offline"}, 7, kill) == -signal.SIGKILL
    assert tracked({"WANDB_MODE": "offline"}) == 0, place.log
    assert len({file.name for file in kept(place.folder)}) == 1
    assert [row["train/global_step"] for row in history(kept(place.folder)[-1]) if "train/loss" in row] == [8, 10]
    assert place.result() == whole


def test_t13_without_a_key_the_run_is_kept_with_one_warning(place, whole, tracked):
    assert tracked({}) == 0, place.log
    assert len(warnings(place.log)) == 1, place.log
    assert "warning: W&B cannot be used, the run is kept offline: no API key" in place.log
    assert [row["train/global_step"] for row in history(*kept(place.folder)) if "train/loss" in row][-1] == STEPS
    assert place.result() == whole


@pytest.mark.parametrize("hangs", [False, True])
def test_t13_where_wandb_refuses_or_hangs_the_run_is_kept_with_one_warning(place, whole, tracked, hangs):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hangs:  # takes the connection, and says nothing
            server.listen(50)
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert tracked({"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY, "WANDB_INIT_TIMEOUT": "3"}) == 0, place.log
    assert len(warnings(place.log)) == 1, place.log
    assert "warning: W&B cannot be used, the run is kept offline" in place.log and KEY not in place.log
    assert len(kept(place.folder)) == 1 and place.result() == whole
    assert not secrets_in(place.folder)


def broken() -> None:
    """W&B's own log fails in the middle of a run."""
    import wandb

    def log(*args, **kwargs):
        raise OSError("No space left on device")

    os.environ |= {"WANDB_MODE": "offline"}
    wandb.sdk.wandb_run.Run.log = log


def test_t13_a_tracker_that_fails_later_ends_with_one_warning(place, whole, tracked):
    assert place.run(broken) == 0, place.log
    assert warnings(place.log) == ["warning: tracker wandb ends, training continues: No space left on device"]
    assert place.result() == whole


def test_a_package_that_is_missing_is_named_with_its_installation(place):
    for name in ("tensorboard", "trackio"):
        with contextlib.chdir(place.folder):
            params(tracker=name)
            if importlib.util.find_spec(name):
                check_tracker(load_params().tracker)
                continue
            with pytest.raises(UserError, match=f"tracker: '{name}' .*uv pip install --python .* {name}`"):
                check_tracker(load_params().tracker)


@pytest.mark.parametrize("upload", ["end", "checkpoint"])
def test_what_would_upload_the_hubs_token_is_refused(place, monkeypatch, upload):
    monkeypatch.setenv("WANDB_LOG_MODEL", upload)
    with contextlib.chdir(place.folder):
        params(tracker="none")
        check_tracker(load_params().tracker)
        params(tracker="wandb")
        with pytest.raises(UserError, match=f"WANDB_LOG_MODEL: '{upload}' is not valid"):
            check_tracker(load_params().tracker)


def test_a_password_in_an_address_is_not_printed():
    assert format_error(OSError("get\nhttps://me:secret@host/x failed")) == "get https://host/x failed"
