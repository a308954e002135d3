"""Log a run to W&B, TensorBoard or Trackio without risk for the run.

transformers' callback for the Trainer's `report_to` does the logging. If W&B cannot be reached or has no key, the run
is logged offline; any other failure of a tracker costs one warning and the tracker. Curves for `dvc plots` are written
from the checkpoints' history, without a tracker.
"""

import dataclasses
import importlib.util
import logging
import os
import re
import secrets
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.params import Params

logger = logging.getLogger(__name__)

# Seconds for W&B to start a run, and to send the rest at its end: a preempted machine has 30.
INIT_TIMEOUT, FINISH_TIMEOUT = "20", 20
RUN_ID_FILE = "wandb-id"  # beside the checkpoints
URL_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
MAX_ERROR_CHARACTERS = 200


def check_tracker(name: str) -> None:
    """Raise UserError if a tracker's package is not installed, or W&B is configured to upload a file with a token."""
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


class TrackerCallback(TrainerCallback):
    """Forwards events to the callback of `params.tracker`, which must not be "none".

    A W&B run has one id however often it is interrupted. Rows between the last checkpoint and a kill are logged twice,
    with the same values.
    """

    def __init__(self, params: Params):
        self.params = params
        self.callback: TrainerCallback | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Start the tracker."""
        checkpoints = Path(str(args.output_dir)).parent
        try:
            if self.params.tracker == "wandb":
                logger.info(f"W&B: {self._start_wandb(checkpoints)}")
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(root() / "logs" / "tensorboard" / checkpoints.name))
            self.callback = get_reporting_integration_callbacks(self.params.tracker)[0]()
        except Exception as error:
            self._disable_tracker(error)
        self._forward("on_train_begin", args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Log a row."""
        self._forward("on_log", args, state, control, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """End the tracker's run; an interrupted one has exit code 1."""
        self._forward("on_train_end", args, state, control, **kwargs)
        if self.callback and self.params.tracker == "wandb":
            import wandb

            try:
                wandb.finish(exit_code=int(state.global_step < state.max_steps))
            except Exception as error:
                self._disable_tracker(error)

    def _forward(self, event: str, *args, **kwargs) -> None:
        if self.callback is None:
            return
        try:
            getattr(self.callback, event)(*args, **kwargs)
        except Exception as error:
            self._disable_tracker(error)

    def _disable_tracker(self, error: Exception) -> None:
        if isinstance(error, UserError):  # of a second signal, which may arrive anywhere
            raise error
        self.callback = None
        logger.warning(f"tracker {self.params.tracker} ends, training continues: {format_error(error)}")

    def _start_wandb(self, checkpoints: Path) -> str:
        """Start or resume the run; return where it can be seen.

        W&B must not prompt for a key: the run may be unattended.
        """
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_INIT_TIMEOUT", INIT_TIMEOUT)
        import wandb

        id_file = checkpoints / RUN_ID_FILE
        if not id_file.is_file():
            id_file.write_text(secrets.token_hex(4))
        options: dict[str, Any] = {
            "id": id_file.read_text(),
            "resume": "allow",
            "dir": os.environ.get("WANDB_DIR") or str(root().absolute()),
            "config": dataclasses.asdict(self.params),
            "project": os.environ.get("WANDB_PROJECT", "huggingface"),
            "name": os.environ.get("WANDB_NAME") or os.environ.get("DVC_EXP_NAME"),
            "settings": wandb.Settings(finish_timeout=FINISH_TIMEOUT, finish_timeout_raises=True),
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
                folder = wandb.init(**options, mode="offline").settings.sync_dir
                logger.warning(f"W&B cannot be used, the run is kept offline: {format_error(error)}")
                return f"send it later with `wandb sync {folder}`"
        run = wandb.init(**options)
        return mode if mode == "disabled" else f"{mode}, `wandb sync {run.settings.sync_dir}` sends it"


def format_error(error: Exception) -> str:
    """Format an error in one line, without the credentials of a URL."""
    text = " ".join((str(error) or type(error).__name__).split())
    return URL_CREDENTIALS.sub("", text)[:MAX_ERROR_CHARACTERS]
