"""The study that a run is a trial of, as the tuner and the run both know it: addresses, names, storage, pruner.

`colintern tune` names the study in environment variables, which are no part of the run's identity. Nothing here
imports torch: the tuner computes nothing.
"""

from pathlib import Path
from typing import Any

STORAGE, STUDY, TRIAL, OWNER = (f"COLINTERN_{name}" for name in ("STUDY_STORAGE", "STUDY", "TRIAL", "TUNER"))
SETTINGS, STARTED, STOPPED = "settings", "started", "stopped"  # attributes of the study, and of its trials
SIZE = "size"  # of a trial: [pool_factor, dim] at which its dev score is to be measured as well
MEASURED = "measured"  # of a trial: {training_seconds, and at that size dev_ndcg_at_5, vectors_per_page}


def storage(url: str, **options: Any) -> Any:
    """Optuna's storage at an SQLAlchemy address; several processes may write to one SQLite file, in turn."""
    from optuna.storages import RDBStorage

    engine = {"connect_args": {"timeout": 100}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    return RDBStorage(url, engine_kwargs=engine, **options)


def pruner(settings: dict[str, Any]) -> Any:
    """The pruner that a study's settings name, see tune.yaml."""
    from optuna import pruners

    if settings["pruner"] == "median":
        return pruners.MedianPruner(settings["startup_trials"], n_warmup_steps=settings["warmup_evaluations"])
    if settings["pruner"] == "hyperband":
        return pruners.HyperbandPruner(min_resource=max(1, settings["warmup_evaluations"]))
    return pruners.NopPruner()


def alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that was killed and whose parent has not looked yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
