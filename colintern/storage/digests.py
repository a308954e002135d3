"""Record the sha256 of files on disk, so that an unchanged file is not hashed again.

Unchanged means the same size, mtime in nanoseconds and inode. A disk that flips a bit changes none of the three, so
training hashes every file with `force`: two minutes for 100 GB on two slow cores, before hours on a GPU.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import TypedDict

from colintern.core.progress import ProgressBar

logger = logging.getLogger(__name__)
RECORD = "data/.digests.json"  # below the repository's root; without it files are hashed again
MAX_THREADS = 8  # hashing releases the GIL


class FileHash(TypedDict):
    """Size in bytes and hex digits of the hash of a file."""

    size: int
    sha256: str


class Digests:
    """A callable from a file to its `FileHash`. Use `load_digests`: one instance a record.

    Args:
        record: JSON file, {absolute path of a file: [size, mtime_ns, inode, sha256]}.
    """

    def __init__(self, record: Path):
        self.record = record
        self.hashed: set[str] = set()  # by this process
        self.known: dict[str, tuple[int, int, int, str]] = {}
        try:
            known = json.loads(record.read_text())
        except (OSError, ValueError, RecursionError):  # missing or damaged: it is written again
            known = {}
        for name, row in known.items() if isinstance(known, dict) else ():
            if isinstance(row, list) and [type(value) for value in row] == [int, int, int, str]:
                self.known[name] = tuple(row)

    def __call__(self, file: Path, force: bool = False) -> FileHash:
        """Return size and hash of a file; with `force`, of bytes that this process has read."""
        key, stat = str(file.absolute()), file.stat()
        mark = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
        known = self.known.get(key)
        if not known or known[:3] != mark or (force and key not in self.hashed):
            with file.open("rb") as opened:
                known = (*mark, hashlib.file_digest(opened, "sha256").hexdigest())
            self.known[key] = known
            self.hashed.add(key)
        return {"size": known[0], "sha256": known[3]}

    def hash_files(self, files: Sequence[Path], force: bool = False) -> list[FileHash]:
        """Hash files in parallel, with a progress bar after two seconds."""
        digests = []
        with (
            ProgressBar(
                total=sum(file.stat().st_size for file in files), unit="B", unit_scale=True, desc="checking", delay=2
            ) as bar,
            ThreadPoolExecutor(MAX_THREADS) as pool,
        ):
            for digest in pool.map(partial(self, force=force), files):
                bar.update(digest["size"])
                digests.append(digest)
        self.save()
        return digests

    def invalidate(self, *files: Path) -> None:
        """Make every process hash these files again."""
        for file in files:
            self.known.pop(str(file.absolute()), None)
        self.save()

    def save(self) -> None:
        """Write the record of the files that exist. If it cannot be written, files are hashed again later."""
        partial_record = self.record.with_name(f"{self.record.name}.{os.getpid()}")
        try:
            self.record.parent.mkdir(parents=True, exist_ok=True)
            partial_record.write_text(json.dumps({key: row for key, row in self.known.items() if os.path.exists(key)}))
            if self.record.is_dir() and not self.record.is_symlink():
                shutil.rmtree(self.record)
            os.replace(partial_record, self.record)
        except OSError as error:
            logger.warning(f"{self.record}: cannot be written: {error.strerror}; files will be hashed again")
            with suppress(OSError):
                partial_record.unlink(missing_ok=True)


@cache
def load_digests(root: Path) -> Digests:
    """Return the hashes recorded below the repository at the absolute path `root`."""
    return Digests(root / RECORD)
