"""sha256 of files, remembered on disk: what has not changed since it was hashed is not hashed again.

Unchanged means the same size, mtime in nanoseconds and inode. A disk that flips a bit changes none of the three, so
training asks for every file to be hashed anew (`anew`): two minutes for 100 GB on two slow cores, before hours on a
GPU.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from colintern.core.progress import ProgressBar

RECORD = "data/.digests.json"  # below the repository's root; deleting it costs the time to hash again
WORKERS = 8  # hashing leaves the interpreter alone, so threads use as many cores


class Digests:
    """Callable: a file to {"size": bytes, "sha256": hex digits}. Use `digests_at`, so that a process has one a record.

    Args:
        record: JSON file, {absolute path of a file: [size, mtime_ns, inode, sha256]}.
    """

    def __init__(self, record: Path):
        self.record = record
        self.hashed: set[str] = set()  # by this process
        self.known: dict[str, list[Any]] = {}
        try:
            known = json.loads(record.read_text())
        except (OSError, ValueError, RecursionError):  # no record yet, or a damaged one: it is written again
            known = {}
        for name, row in known.items() if isinstance(known, dict) else ():
            if isinstance(row, list) and [type(value) for value in row] == [int, int, int, str]:
                self.known[name] = row

    def __call__(self, file: Path, anew: bool = False) -> dict[str, Any]:
        key, stat = str(file.absolute()), file.stat()
        mark = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self.known.get(key)
        if not known or known[:3] != mark or (anew and key not in self.hashed):
            with file.open("rb") as opened:
                known = [*mark, hashlib.file_digest(opened, "sha256").hexdigest()]
            self.known[key] = known
            self.hashed.add(key)
        return {"size": known[0], "sha256": known[3]}

    def many(self, files: Sequence[Path], anew: bool = False) -> list[dict[str, Any]]:
        """The digests of several files, hashed in parallel; a bar shows where that takes more than two seconds."""
        total = sum(file.stat().st_size for file in files)
        found = []
        with (
            ProgressBar(total=total, unit="B", unit_scale=True, desc="checking", delay=2) as bar,
            ThreadPoolExecutor(WORKERS) as pool,
        ):
            for digest in pool.map(partial(self, anew=anew), files):
                bar.update(digest["size"])
                found.append(digest)
        self.save()
        return found

    def forget(self, *files: Path) -> None:
        """Have files hashed the next time, by whichever process."""
        for file in files:
            self.known.pop(str(file.absolute()), None)
        self.save()

    def save(self) -> None:
        """Write the record without files that are gone. Where it cannot be written, files are hashed again later."""
        partial_record = self.record.with_name(f"{self.record.name}.{os.getpid()}")
        try:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            partial_record.write_text(json.dumps({key: row for key, row in self.known.items() if os.path.exists(key)}))
            if self.record.is_dir() and not self.record.is_symlink():
                shutil.rmtree(self.record)
            os.replace(partial_record, self.record)
        except OSError as error:
            print(f"warning: {self.record}: cannot be written: {error.strerror}; files will be hashed again")
            with suppress(OSError):
                partial_record.unlink(missing_ok=True)


@cache
def digests_at(root: Path) -> Digests:
    """The digests remembered below the repository at the absolute path `root`."""
    return Digests(root / RECORD)
