"""A cache of tensors on disk that may be deleted at any time: what is lost is computed again, with the same bytes.

A shard is a safetensors file, written under another name and then renamed, so that readers see complete files only.
Readers map shards into memory; several processes may read and write at once.
"""

import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from colintern.storage.files import irregular_type
from colintern.storage.lock import hold_lock

logger = logging.getLogger(__name__)
SHARD_BYTES = 256 * 2**20
MIN_FREE_BYTES = 2 * 2**30  # left free on the disk, whatever the limit


class TensorCache:
    """Tensors by key, in `root`/`name`; all folders below `root` share one limit.

    Args:
        root: folder of all caches.
        name: distinguishes tensors that were computed in different ways under one key.
        limit: bytes below `root`. When it is reached, shards that this process has not read or written are evicted,
            least recently used first, if that frees enough; else nothing more is stored. 0 stores nothing.
        unpack: converts what is stored to what `get` returns; None: no conversion.
    """

    def __init__(self, root: Path, name: str, limit: int, unpack: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.unpack = unpack
        self.root, self.folder, self.limit = root, root / name, limit
        self.pending: dict[str, torch.Tensor] = {}
        self.pending_bytes = 0
        self.is_full = limit == 0
        self.shard_of_key: dict[str, Path] = {}
        self.open_shards: dict[Path, safe_open] = {}
        self.indexed_shards: set[Path] = set()  # shards whose keys are in `shard_of_key`
        self.pinned_shards: set[Path] = set()  # shards that this process has read or written
        self.refresh()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"open_shards": {}}  # a DataLoader worker opens its own

    def __contains__(self, key: str) -> bool:
        return key in self.shard_of_key or key in self.pending

    def refresh(self) -> None:
        """Index the shards that other processes have written; delete those that cannot be read."""
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard not in self.indexed_shards:
                try:
                    with _open_shard(shard) as file:
                        self.shard_of_key |= dict.fromkeys(file.keys(), shard)
                    self.indexed_shards.add(shard)
                except SafetensorError as error:
                    self._delete_shard(shard, error)
                except OSError as error:
                    self._skip_shard(shard, error)
                    if irregular_type(shard):  # warn once
                        self.indexed_shards.add(shard)

    def get(self, key: str) -> torch.Tensor | None:
        """Return the tensor of `key`, unpacked; None if `get_stored` returns None."""
        value = self.get_stored(key)
        return value if value is None or self.unpack is None else self.unpack(value)

    def get_stored(self, key: str) -> torch.Tensor | None:
        """Return the tensor of `key` as it was stored, None if it is not there or its checksum does not match."""
        if key in self.pending:
            return self.pending[key]
        shard = self.shard_of_key.get(key)
        if shard is None:
            return None
        try:
            if shard not in self.open_shards:
                self.open_shards[shard] = _open_shard(shard)
                self._pin_shard(shard)
            value = self.open_shards[shard].get_tensor(key)
            expected = (self.open_shards[shard].metadata() or {}).get(key)
        except SafetensorError as error:
            self._delete_shard(shard, error)
            return None
        except (OSError, RuntimeError) as error:  # the file is gone, or the limit of open files is reached
            self._skip_shard(shard, error)
            return None
        if compute_checksum(value) != expected:
            self._delete_shard(shard, f"the checksum of {key} does not match")
            return None
        return value

    def pin(self, keys: Iterable[str]) -> None:
        """Protect the shards of `keys` from eviction by this process."""
        for shard in {self.shard_of_key[key] for key in keys if key in self.shard_of_key} - self.pinned_shards:
            self._pin_shard(shard)

    def put(self, key: str, value: torch.Tensor) -> None:
        """Store a tensor; it is on disk after `flush` at the latest."""
        if self.is_full or key in self:
            return
        self.pending[key] = value.detach().cpu().contiguous()
        self.pending_bytes += value.nbytes
        if self.pending_bytes >= min(SHARD_BYTES, self.limit // 4):
            self.flush()

    def flush(self) -> None:
        """Write pending tensors; if there is no space, warn once and store nothing more."""
        if not self.pending:
            return
        tensors, self.pending, self.pending_bytes = self.pending, {}, 0
        try:
            with hold_lock(self.root / "write.lock"):
                self.refresh()
                self._write_shard({key: value for key, value in tensors.items() if key not in self.shard_of_key})
        except (OSError, SafetensorError) as error:  # also a full disk, or a folder of another user
            self.disable_writes(error)

    def disable_writes(self, reason: Exception) -> None:
        """Store nothing more; stored tensors are still read."""
        self.is_full = True
        logger.warning("%s: keeps no more, the rest is computed each time: %s", self.root, reason)

    def _pin_shard(self, shard: Path) -> None:
        self.pinned_shards.add(shard)
        with suppress(OSError):
            os.utime(shard)  # eviction is by time of last use

    def _write_shard(self, tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        self.folder.mkdir(exist_ok=True)
        for partial in self.folder.glob("*.partial"):  # of a killed writer: this process has the lock
            with suppress(IsADirectoryError):
                partial.unlink()
        self._evict_for(sum(value.nbytes for value in tensors.values()))
        shard = self.folder / f"{next(iter(tensors))[:16]}-{len(tensors)}-{os.getpid()}.safetensors"
        partial = shard.with_suffix(".partial")
        try:
            partial.touch()
            mode = partial.stat().st_mode  # by the umask; save_file makes a file that only its owner can read
            save_file(tensors, partial, metadata={key: compute_checksum(value) for key, value in tensors.items()})
            partial.chmod(mode)
            os.replace(partial, shard)
        finally:
            partial.unlink(missing_ok=True)
        self.shard_of_key |= dict.fromkeys(tensors, shard)
        self.indexed_shards.add(shard)
        self.pinned_shards.add(shard)

    def _evict_for(self, size: int) -> None:
        """Evict until `size` bytes fit, or raise OSError before anything is evicted."""
        shards = []  # time of last use, bytes, path
        for shard in self.root.glob("*/*.safetensors"):
            with suppress(FileNotFoundError):  # another process has just deleted it
                if not irregular_type(shard):
                    shards.append((shard.stat().st_mtime, shard.stat().st_size, shard))
        used_bytes = sum(shard_bytes for _, shard_bytes, _ in shards)
        free_bytes = shutil.disk_usage(self.folder).free - MIN_FREE_BYTES
        excess = max(used_bytes + size - self.limit, size - free_bytes)
        evictable = sorted(entry for entry in shards if entry[2] not in self.pinned_shards)
        if excess > sum(shard_bytes for _, shard_bytes, _ in evictable):
            raise OSError(
                f"{size / 1e9:.2f} GB more do not fit: {used_bytes / 1e9:.2f} of {self.limit / 1e9:.2f} GB are taken, "
                f"{max(free_bytes, 0) / 1e9:.2f} GB of the disk may be used"
            )
        for _, shard_bytes, shard in evictable:
            if excess <= 0:
                break
            shard.unlink(missing_ok=True)
            self._forget_shard(shard)
            excess -= shard_bytes

    def _delete_shard(self, shard: Path, reason: object) -> None:
        logger.warning("%s: deleted, its tensors are computed again: %s", shard, reason)
        self._forget_shard(shard)
        with suppress(OSError):
            shard.unlink()

    def _skip_shard(self, shard: Path, reason: object) -> None:
        logger.warning("%s: cannot be read, its tensors are computed again: %s", shard, reason)
        self._forget_shard(shard)

    def _forget_shard(self, shard: Path) -> None:
        self.open_shards.pop(shard, None)
        self.indexed_shards.discard(shard)
        self.shard_of_key = {key: path for key, path in self.shard_of_key.items() if path != shard}


def _open_shard(shard: Path) -> safe_open:
    if kind := irregular_type(shard):
        raise OSError(f"it is {kind}, not a regular file")
    return safe_open(shard, "pt")


def compute_checksum(value: torch.Tensor) -> str:
    """Return the CRC-32 of a tensor's bytes, with its type and shape."""
    crc = zlib.crc32(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{crc:08x} {value.dtype} {tuple(value.shape)}"
