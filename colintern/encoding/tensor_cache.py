"""A store of tensors on disk that may be deleted at any time: what is lost is computed again, and is the same.

A shard is a safetensors file, written under another name and then renamed, so that a reader sees whole files only.
Readers map shards into memory; several processes may read and write at once.
"""

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colintern.storage.files import irregular_type
from colintern.storage.lock import locked

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
FREE_BYTES = 2 * 2**30  # left free on the disk, whatever the limit


class TensorCache:
    """Tensors by key, in `top`/`name`; all folders below `top` share one limit.

    Args:
        top: folder of all caches.
        name: tells apart tensors that were made in different ways under one key.
        limit: bytes below `top`. Where it is reached, shards that this process has not read or written go, those
            used longest ago first, as long as that makes room; then nothing more is kept. 0 keeps nothing.
        unpack: makes of what is stored what `get` returns; None: they are the same.
    """

    def __init__(self, top: Path, name: str, limit: int, unpack: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.unpack = unpack
        self.top, self.folder, self.limit = top, top / name, limit
        self.pending: dict[str, torch.Tensor] = {}
        self.waiting = 0  # bytes of `pending`
        self.full = limit == 0
        self.places: dict[str, Path] = {}
        self.open: dict[Path, Any] = {}
        self.known: set[Path] = set()  # shards whose keys are in `places`
        self.used: set[Path] = set()  # those this process has read or written
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": {}}  # a data loader's process opens its own

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.pending

    def refresh(self) -> None:
        """Find the shards other processes have written; one that cannot be read is deleted."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.known:
                try:
                    with _open_shard(shard) as file:
                        self.places |= dict.fromkeys(file.keys(), shard)
                    self.known.add(shard)
                except SafetensorError as error:
                    self._delete(shard, str(error))
                except OSError as error:
                    self._leave(shard, error)
                    if irregular_type(shard):  # said once
                        self.known.add(shard)

    def get(self, key: str) -> torch.Tensor | None:
        """What was stored as `key`, unpacked; None where `stored` is."""
        value = self.stored(key)
        return value if value is None or self.unpack is None else self.unpack(value)

    def stored(self, key: str) -> torch.Tensor | None:
        """The tensor of `key`, None where it is not stored (any more) or its checksum does not fit."""
        if key in self.pending:
            return self.pending[key]
        shard = self.places.get(key)
        if shard is None:
            return None
        try:
            if shard not in self.open:
                self.open[shard] = _open_shard(shard)
                self._use(shard)
            value = self.open[shard].get_tensor(key)
            known = (self.open[shard].metadata() or {}).get(key)
        except SafetensorError as error:
            self._delete(shard, str(error))
            return None
        except (OSError, RuntimeError) as error:  # the file is gone, or this process may open no more
            self._leave(shard, error)
            return None
        if checksum(value) != known:
            self._delete(shard, f"the checksum of {key} does not fit")
            return None
        return value

    def keep(self, keys: Iterable[str]) -> None:
        """Count the shards of `keys` as used by this process: they are not evicted for its own new tensors."""
        for shard in {self.places[key] for key in keys if key in self.places} - self.used:
            self._use(shard)

    def _use(self, shard: Path) -> None:
        self.used.add(shard)
        with suppress(OSError):
            os.utime(shard)  # last used now

    def put(self, key: str, value: torch.Tensor) -> None:
        """Store a tensor; on disk at the latest after `flush`."""
        if self.full or key in self:
            return
        self.pending[key] = value.detach().cpu().contiguous()
        self.waiting += value.nbytes
        if self.waiting >= min(SHARD_BYTES, self.limit // 4):
            self.flush()

    def flush(self) -> None:
        """Write what is pending; where there is no room, say so once and keep nothing more."""
        if not self.pending:
            return
        fresh, self.pending, self.waiting = self.pending, {}, 0
        try:
            with locked(self.top / "write.lock"):
                self.refresh()
                self._write({key: value for key, value in fresh.items() if key not in self.places})
        except (OSError, SafetensorError) as error:  # also a full disk, or a folder of somebody else's
            self.stop(error)

    def stop(self, why: Exception) -> None:
        """Keep nothing more; what is kept is still read."""
        self.full = True
        logger.warning("%s: keeps no more, the rest is computed each time: %s", self.top, why)

    def _write(self, fresh: dict[str, torch.Tensor]) -> None:
        if not fresh:
            return
        self.folder.mkdir(exist_ok=True)
        for left in self.folder.glob("*.partial"):  # of a writer that was killed: the lock is ours
            with suppress(IsADirectoryError):
                left.unlink()
        self._make_room(size_of(fresh))
        shard = self.folder / f"{next(iter(fresh))[:16]}-{len(fresh)}-{os.getpid()}.safetensors"
        partial = shard.with_suffix(".partial")
        try:
            partial.touch()
            mode = partial.stat().st_mode  # what the umask gives; save_file makes a file that is its owner's alone
            save_file(fresh, partial, metadata={key: checksum(value) for key, value in fresh.items()})
            partial.chmod(mode)
            os.replace(partial, shard)
        finally:
            partial.unlink(missing_ok=True)
        self.places |= dict.fromkeys(fresh, shard)
        self.known.add(shard)
        self.used.add(shard)

    def _make_room(self, size: int) -> None:
        """Evict until `size` bytes fit, or raise OSError before anything is evicted."""
        found = []
        for shard in self.top.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another process has just deleted it
                if not irregular_type(shard):
                    found.append((shard.stat().st_mtime, shard.stat().st_size, shard))
        taken = sum(bytes_ for _, bytes_, _ in found)
        disk = shutil.disk_usage(self.folder).free - FREE_BYTES
        short = max(taken + size - self.limit, size - disk)
        evictable = sorted(entry for entry in found if entry[2] not in self.used)
        if short > sum(bytes_ for _, bytes_, _ in evictable):
            raise OSError(
                f"{size / 1e9:.2f} GB more do not fit: {taken / 1e9:.2f} of {self.limit / 1e9:.2f} GB are taken, "
                f"{max(disk, 0) / 1e9:.2f} GB of the disk may be used"
            )
        for _, bytes_, shard in evictable:
            if short <= 0:
                break
            shard.unlink(missing_ok=True)
            self._forget(shard)
            short -= bytes_

    def _delete(self, shard: Path, why: str) -> None:
        logger.warning("%s: deleted, its tensors are computed again: %s", shard, why)
        self._forget(shard)
        with suppress(OSError):
            shard.unlink()

    def _leave(self, shard: Path, why: Exception) -> None:
        logger.warning("%s: cannot be read, its tensors are computed again: %s", shard, why)
        self._forget(shard)

    def _forget(self, shard: Path) -> None:
        self.open.pop(shard, None)
        self.known.discard(shard)
        self.places = {key: place for key, place in self.places.items() if place != shard}


def _open_shard(shard: Path) -> Any:
    """Open a shard; OSError for what is no regular file."""
    if kind := irregular_type(shard):
        raise OSError(f"it is {kind}, not a regular file")
    return safe_open(shard, "pt")


def checksum(value: torch.Tensor) -> str:
    """CRC-32 of a tensor's bytes, with its type and shape."""
    crc = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{crc:08x} {value.dtype} {tuple(value.shape)}"


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
