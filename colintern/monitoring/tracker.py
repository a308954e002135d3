"""A run on W&B, TensorBoard or Trackio, in a way that cannot disturb it.

What is logged is what transformers' callback for the Trainer's `report_to` logs. Here it is kept from harming a run:
where W&B cannot be reached or no key is known the run is kept on the disk instead, and whatever else fails in a tracker
costs one warning and the tracker. Curves for `dvc plots` are written from the checkpoints' history, without a tracker.
"""

import dataclasses
import importlib.util
import os
import re
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params

START, END = "20", 20  # seconds W&B may take to begin a run, and to send the rest at its end: a preemption gives 30
ID = "wandb-id"  # beside the checkpoints
LINKED = re.compile(r"(?<=://)[^/@\s]+@")  # user and password in an address


def check_tracker(params: Params) -> None:
    """Raises UserError where the tracker's package is missing, or W&B is asked to upload what holds a token."""
    name = params.tracker
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(
            f"tracker: {name!r} needs the package {name}, which is not installed here; install it with "
            f"`.tools/bin/uv pip install --python {sys.executable} {name}`, or write tracker: none"
        )
    upload = os.environ.get("WANDB_LOG_MODEL", "false").lower()
    if name == "wandb" and upload not in ("", "false", "0"):
        raise UserError(
            f"WANDB_LOG_MODEL: {upload!r} is not valid with tracker: wandb: it uploads training_args.bin, which holds "
            f"the hub's token; unset it, and upload the adapter after the run: wandb artifact put --type model "
            f"experiments/colintern"
        )


class Tracker(TrainerCallback):
    """Callback for `params.tracker`, which must not be "none"; `folder` is where the run's checkpoints lie.

    A W&B run has one id however often it is interrupted. Rows between the last checkpoint and a kill are logged twice,
    with the same values.
    """

    def __init__(self, params: Params, folder: Path):
        self.params, self.folder, self.inner = params, folder, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        try:
            if self.params.tracker == "wandb":
                print(f"W&B: {self._begin_wandb()}", flush=True)
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(root() / "logs" / "tensorboard" / self.folder.name))
            self.inner = get_reporting_integration_callbacks(self.params.tracker)[0]()
        except Exception as error:
            self._give_up(error)
        self._tell("on_train_begin", args, state, control, kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("on_log", args, state, control, kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._tell("on_train_end", args, state, control, kwargs)
        if self.inner and self.params.tracker == "wandb":
            import wandb

            try:
                wandb.finish(exit_code=int(state.global_step < state.max_steps))
            except Exception as error:
                self._give_up(error)

    def _tell(self, event: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        if not self.inner:
            return
        try:
            getattr(self.inner, event)(args, state, control, **kwargs)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, UserError):  # a second signal, raised wherever it arrives
            raise error
        self.inner = None
        print(f"warning: tracker {self.params.tracker} ends, training goes on: {_said(error)}", flush=True)

    def _begin_wandb(self) -> str:
        """Begin or resume the run; returns where it is to be seen.

        A key is never asked for: nobody may be at the terminal.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", START)
        import wandb

        place = self.folder / ID
        if not place.is_file():
            place.write_text(secrets.token_hex(4))
        settings = wandb.Settings(finish_timeout=END, finish_timeout_raises=True)
        options: dict[str, Any] = {
            "id": place.read_text(),
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR") or str(root().absolute()),
            "config": dataclasses.asdict(self.params),
            "project": os.environ.get("WANDB_PROJECT", "huggingface"),
            "name": os.environ.get("WANDB_NAME") or os.environ.get("DVC_EXP_NAME"),
            "settings": settings,
        }
        mode = wandb.setup().settings.mode
        if mode in ("online", "run"):
            try:
                if not wandb.login(prompt=False, verify=False):
                    raise ConnectionError("no API key: WANDB_API_KEY, or `wandb login`")
                return wandb.init(**options).url or "begun"
            except UserError:
                raise
            except Exception as error:
                with suppress(Exception):
                    wandb.teardown()  # else the id counts as in use
                kept = wandb.init(**options, mode="offline").settings.sync_dir
                print(f"warning: W&B cannot be used, the run is kept offline: {_said(error)}", flush=True)
                return f"send it later with `wandb sync {kept}`"
        run = wandb.init(**options)
        if mode == "disabled":
            return mode
        return f"{mode}, `wandb sync {run.settings.sync_dir}` sends it"


def _said(error: Exception) -> str:
    """An error in one line, without the password of an address in it."""
    return LINKED.sub("", " ".join((str(error) or type(error).__name__).split()))[:200]
