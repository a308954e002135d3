"""Where a study is kept: an SQLite file beside what it found, or a database server that several machines see."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.storage.lock import locked
from colintern.tuning.trial_context import open_storage

FOLDER = Path("studies")
DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg"}  # that come with the environment
LOCK = 0x636F6C696E7465  # of PostgreSQL's advisory locks: "colinte"
EXAMPLE = "sqlite:///studies/NAME.db or postgresql://USER:PASSWORD@HOST/DATABASE"


def quiet() -> None:
    """Optuna says nothing of its own: what there is to say is said here."""
    import optuna

    logging.getLogger("alembic").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage")  # `Store.alive` gives it, without Study.optimize


class Store:
    """Studies at an SQLAlchemy address; `url` holds the password and is never printed, `shown` is what may be.

    Args:
        heartbeat: seconds between two signs of life of a worker; after twice that its trial counts as killed.

    Raises:
        UserError: the address is none of SQLite or PostgreSQL, names another driver, or nothing answers there.
    """

    def __init__(self, url: str, study: str, heartbeat: int):
        from optuna.storages import RetryHeartbeatStaleTrialCallback
        from sqlalchemy.engine import make_url

        self.heartbeat, self.study, self.url = heartbeat, study, url or f"sqlite:///{root() / FOLDER / study}.db"
        kind = self.url.partition(":")[0].partition("+")[0]
        if kind not in ("sqlite", "postgresql"):
            raise UserError(f"--storage: {kind!r} is not valid; such as {EXAMPLE}")
        driver = self.url.partition(":")[0].partition("+")[2]
        if driver and driver != DRIVERS[kind]:
            raise UserError(f"--storage: {kind}+{driver}: write {kind}://..., the driver here is {DRIVERS[kind]}")
        try:
            address = make_url(self.url)
            if kind == "postgresql":  # SQLAlchemy's own choice is psycopg2
                address = address.set(drivername=f"{kind}+{DRIVERS[kind]}")
            if address.database and kind == "sqlite":  # trials run in another folder
                file = Path(address.database).absolute()
                file.parent.mkdir(parents=True, exist_ok=True)
                address = address.set(database=str(file))
            self.password = address.password or ""
            self.url, self.shown = address.render_as_string(hide_password=False), address.render_as_string()
            self.file = Path(address.database) if kind == "sqlite" and address.database else None
            with self.alone(made=False):  # two at once would both make its tables
                retry = RetryHeartbeatStaleTrialCallback(max_retry=1)
                self.optuna: Any = open_storage(
                    self.url, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=retry
                )
        except Exception as error:
            words = self.redacted(str(error)).splitlines() or [""]
            raise UserError(f"--storage: cannot be used: {type(error).__name__}: {words[0][:200]}") from None

    def redacted(self, text: str) -> str:
        """Without the address, and without the password, as it is written in the address or as it is."""
        password = getattr(self, "password", "") or _password(self.url)
        for secret in filter(None, (self.url, password, unquote(password))):
            text = text.replace(secret, "***")
        return text

    @contextmanager
    def alone(self, made: bool = True) -> Iterator[None]:
        """One worker at a time, on all machines; a worker that dies lets go of it."""
        if self.url.startswith("sqlite"):
            with locked(self.file.with_suffix(".lock") if self.file else root() / ".scratch" / f"{self.study}.lock"):
                yield
        elif not made:
            yield  # PostgreSQL makes a table once, whoever asks
        else:
            from sqlalchemy import text

            with self.optuna.engine.begin() as connection:
                connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": LOCK})
                yield

    @contextmanager
    def answers(self) -> Iterator[None]:
        """Raises UserError where it stops to answer: a disk that is full, a server that is gone."""
        from optuna.exceptions import StorageInternalError
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (StorageInternalError, SQLAlchemyError) as error:
            words = self.redacted(str(error.__cause__ or error)).splitlines() or [""]
            told = f"--storage: {self.shown} failed: {words[0][:200]}"
            raise UserError(f"{told}; once that is mended, the same command goes on with the study") from None

    def alive(self, trial: int) -> None:
        """A sign of life of the trial with this id."""
        self.optuna.record_heartbeat(trial)


def _password(url: str) -> str:
    found = re.match(r"[^/]*//[^:/@]*:(.*)@", url)
    return found[1] if found else ""
