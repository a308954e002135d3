"""Where a study is stored: an SQLite file beside its report, or a database server that several machines reach."""

import logging
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import unquote

import optuna
from optuna.storages import RetryHeartbeatStaleTrialCallback
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.storage.lock import hold_lock
from colintern.tuning.trial_context import open_storage

STUDIES = Path("studies")
DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg"}  # that come with the environment
ADVISORY_LOCK = 0x636F6C696E7465  # PostgreSQL's key of the lock: "colinte"
EXAMPLES = "sqlite:///studies/NAME.db or postgresql://USER:PASSWORD@HOST/DATABASE"
MAX_MESSAGE_LENGTH = 200


def silence_optuna() -> None:
    """Turn off Optuna's own messages: `colintern tune` prints what there is to report."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", "Heartbeat of storage")  # `record_heartbeat` records it, without Study.optimize


class StudyStorage:
    """Optuna's storage `rdb` at an SQLAlchemy address; `shown_url` is the address without its password.

    After twice `heartbeat_seconds` without a heartbeat a worker counts as killed, and its trial is retried once.

    Raises:
        UserError: The address is neither SQLite nor PostgreSQL, names another driver, or cannot be reached.
    """

    def __init__(self, url: str, study_name: str, heartbeat_seconds: int):
        self.study_name, self.heartbeat_seconds, self._last_heartbeat = study_name, heartbeat_seconds, 0.0
        self.url = given_url = url or f"sqlite:///{root() / STUDIES / study_name}.db"
        dialect, _, driver = given_url.partition(":")[0].partition("+")
        if dialect not in DRIVERS:
            raise UserError(f"--storage: {dialect!r} is not valid; such as {EXAMPLES}")
        if driver not in ("", DRIVERS[dialect]):
            raise UserError(
                f"--storage: {dialect}+{driver}: write {dialect}://..., the driver here is {DRIVERS[dialect]}"
            )
        self._lock_file = root() / ".scratch" / f"{study_name}.lock" if dialect == "sqlite" else None
        try:
            address = make_url(given_url)
            if dialect == "postgresql":  # SQLAlchemy's own choice is psycopg2
                address = address.set(drivername=f"{dialect}+{DRIVERS[dialect]}")
            elif address.database:  # absolute, because trials run in another folder
                file = Path(address.database).absolute()
                file.parent.mkdir(parents=True, exist_ok=True)
                self._lock_file = file.with_suffix(".lock")
                address = address.set(database=str(file))
            self.url, self.shown_url = address.render_as_string(hide_password=False), address.render_as_string()
            # Two workers would both make the tables of an SQLite file; PostgreSQL makes them once.
            with hold_lock(self._lock_file) if self._lock_file else nullcontext():
                self.rdb = open_storage(
                    self.url,
                    heartbeat_interval=heartbeat_seconds,
                    heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=1),
                )
        except Exception as error:
            message = redact_address(self.redact_address(str(error)), given_url)
            raise UserError(
                f"--storage: cannot be used: {type(error).__name__}: {_first_line(message)}"
            ) from None  # a cause would show the address

    def redact_address(self, message: str) -> str:
        """Replace this address and its password in a text by ***."""
        return redact_address(message, self.url)

    @contextmanager
    def hold_exclusive_lock(self) -> Iterator[None]:
        """Exclude the other workers, on all machines; the lock of a worker that dies is released."""
        if self._lock_file:
            with hold_lock(self._lock_file):
                yield
        else:
            with self.rdb.engine.begin() as connection:
                connection.execute(text("select pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
                yield

    @contextmanager
    def storage_errors(self) -> Iterator[None]:
        """Turn errors of a storage that fails later, such as a full disk or a stopped server, into a UserError."""
        try:
            yield
        except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
            message = _first_line(self.redact_address(str(error.__cause__ or error)))
            raise UserError(
                f"--storage: {self.shown_url} failed: {message}; once that is fixed, the same command resumes the study"
            ) from None

    def get_trial_id(self, number: int) -> int:
        """Return the id by which the storage knows a trial of the study."""
        study_id = self.rdb.get_study_id_from_name(self.study_name)
        return self.rdb.get_trial_id_from_study_id_trial_number(study_id, number)

    def record_heartbeat(self, trial_id: int) -> None:
        """Record that the worker of a trial is alive."""
        self.rdb.record_heartbeat(trial_id)
        self._last_heartbeat = time.monotonic()

    def sleep(self, seconds: float, trial_id: int) -> None:
        """Sleep while a trial is running, and record a heartbeat if one is due."""
        if time.monotonic() - self._last_heartbeat > self.heartbeat_seconds / 2:
            self.record_heartbeat(trial_id)
        time.sleep(seconds)


def redact_address(message: str, url: str) -> str:
    """Replace an address, and its password as written and as decoded, by ***."""
    match = re.match(r"[^/]*//[^:/@]*:(.*)@", url)
    password = match[1] if match else ""
    for secret in filter(None, (url, password, unquote(password))):
        message = message.replace(secret, "***")
    return message


def _first_line(message: str) -> str:
    return message.partition("\n")[0][:MAX_MESSAGE_LENGTH]
