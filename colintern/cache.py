"""A store of tensors on disk that may be deleted at any time: what is lost is computed again, and is the same.

A shard is a safetensors file, written under another name and then renamed, so that a reader sees whole files only.
Readers map shards into memory; several processes may read and write at once.
"""

import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colintern.lock import locked

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
FREE_BYTES = 2 * 2**30  # left free on the disk, whatever the limit


class TensorCache:
    """Tensors by key, in `top`/`name`; all folders below `top` share one limit.

    Args:
        top: folder of all caches.
        name: tells apart tensors that were made in different ways under one key.
        limit: bytes below `top`; where it is reached, shards that this process has not used and that were used
            longest ago go first, and after them nothing more is kept. 0 keeps nothing.
    """

    def __init__(self, top: Path, name: str, limit: int):
        self.top, self.folder, self.limit = top, top / name, limit
        self.pending: dict[str, torch.Tensor] = {}
        self.full = limit == 0
        self.places: dict[str, Path] = {}
        self.open: dict[Path, Any] = {}
        self.used: set[Path] = set()
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"open": {}}  # a data loader's process opens its own

    def __contains__(self, key: str) -> bool:
        return key in self.places or key in self.pending

    def refresh(self) -> None:
        """Find the shards other processes have written; one that cannot be read is deleted."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.used:
                try:
                    with safe_open(shard, "pt") as file:
                        self.places |= dict.fromkeys(file.keys(), shard)
                    self.used.add(shard)
                except (SafetensorError, OSError) as error:
                    self._drop(shard, str(error))

    def get(self, key: str) -> torch.Tensor | None:
        """The tensor of `key`, None where it is not stored (any more) or its checksum does not fit."""
        if key in self.pending:
            return self.pending[key]
        shard = self.places.get(key)
        if shard is None:
            return None
        try:
            if shard not in self.open:
                self.open[shard] = safe_open(shard, "pt")
                os.utime(shard)  # last used now
            value = self.open[shard].get_tensor(key)
            known = self.open[shard].metadata()[key]
        except (SafetensorError, OSError) as error:
            self._drop(shard, str(error))
            return None
        if checksum(value) != known:
            self._drop(shard, f"the checksum of {key} does not fit")
            return None
        return value

    def put(self, key: str, value: torch.Tensor) -> None:
        """Store a tensor; on disk at the latest after `flush`."""
        if self.full or key in self:
            return
        self.pending[key] = value.detach().cpu().contiguous()
        if size_of(self.pending) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is pending; where there is no room, say so once and keep nothing more."""
        if not self.pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.top / "write.lock"):
            self.refresh()
            fresh = {key: value for key, value in self.pending.items() if key not in self.places}
            self.pending = {}
            for left in self.folder.glob("*.partial"):  # of a writer that was killed: the lock is ours
                left.unlink()
            if fresh:
                self._write(fresh)

    def _write(self, fresh: dict[str, torch.Tensor]) -> None:
        shard = self.folder / f"{next(iter(fresh))[:16]}-{len(fresh)}-{os.getpid()}.safetensors"
        partial = shard.with_suffix(".partial")
        try:
            if not self._make_room(size_of(fresh)):
                raise OSError(f"{size_of(fresh) / 1e9:.1f} GB more do not fit into {self.limit / 1e9:.1f} GB")
            save_file(fresh, partial, metadata={key: checksum(value) for key, value in fresh.items()})
            os.replace(partial, shard)
        except (OSError, SafetensorError) as error:  # also a full disk
            partial.unlink(missing_ok=True)
            self.full = True
            logger.warning("%s: no room for more, the rest is computed each time: %s", self.top, error)
            return
        self.used.add(shard)
        self.places |= dict.fromkeys(fresh, shard)

    def _make_room(self, size: int) -> bool:
        shards = sorted(self.top.glob("*/*.safetensors"), key=lambda shard: shard.stat().st_mtime)
        taken = sum(shard.stat().st_size for shard in shards)
        free = shutil.disk_usage(self.folder).free - FREE_BYTES
        for shard in shards:
            if taken + size <= self.limit and size <= free:
                break
            if shard not in self.used:
                taken, free = taken - shard.stat().st_size, free + shard.stat().st_size
                shard.unlink()
        return taken + size <= self.limit and size <= free

    def _drop(self, shard: Path, why: str) -> None:
        logger.warning("%s: deleted, its tensors are computed again: %s", shard, why)
        shard.unlink(missing_ok=True)
        self.open.pop(shard, None)
        self.places = {key: place for key, place in self.places.items() if place != shard}


def checksum(value: torch.Tensor) -> str:
    return f"{zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data):08x}"


def size_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
