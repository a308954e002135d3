"""What the tuner and the run of a trial both know of the study: variables, attributes, storage, pruner.

`colintern tune` names the study in environment variables, which are no part of the run's identity. Nothing here
imports torch, which the tuner does not need.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import RDBStorage

STORAGE, STUDY, TRIAL, OWNER = (f"COLINTERN_{name}" for name in ("STUDY_STORAGE", "STUDY", "TRIAL", "TUNER"))
SETTINGS, STARTED, STOPPED = "settings", "started", "stopped"  # attributes of the study, and of its trials
SIZE = "size"  # of a trial: [pool_factor, dim] at which its dev score is measured as well
MEASURED = "measured"  # of a trial: {training_seconds, and at that size dev_ndcg_at_5, vectors_per_page}
SQLITE_TIMEOUT = 100  # seconds to wait while another process writes


def open_storage(url: str, **options: Any) -> "RDBStorage":
    """Open Optuna's storage at an SQLAlchemy URL; several processes may use one SQLite file."""
    from optuna.storages import RDBStorage

    engine = {"connect_args": {"timeout": SQLITE_TIMEOUT}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(url, engine_kwargs=engine, **options)


def make_pruner(settings: Mapping[str, Any]) -> "BasePruner":
    """Construct the pruner that a study's settings name, see tune.yaml."""
    from optuna import pruners

    if settings["pruner"] == "median":
        return pruners.MedianPruner(settings["startup_trials"], n_warmup_steps=settings["warmup_evaluations"])
    if settings["pruner"] == "hyperband":
        return pruners.HyperbandPruner(min_resource=max(1, settings["warmup_evaluations"]))
    return pruners.NopPruner()


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
