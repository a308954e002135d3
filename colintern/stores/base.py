"""What all stores of page vectors share: their pages, their methods, and the errors of the libraries below them."""

import hashlib
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from colintern.core.errors import DISK_FULL_CODES, UserError

# Keys of an identity that change vectors by more than rounding; the others are informational.
MODEL_KEYS = ("dim", "precision", "pool_factor", "max_visual_tokens", "tiling", "dtype", "base", "revision")
DISK_FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")
MAX_MESSAGE_CHARACTERS = 300


class StoredPage(NamedTuple):
    """A page and where it comes from."""

    id: str  # a UUID, see `make_page_id`
    source: str
    name: str
    page: int  # from 1; 0 for an image
    key: str  # of the file's content and what renders it: a page whose key is stored need not be rendered
    pixels: str = ""  # their sha256: a page is replaced only if they changed


class EmbeddedPage(NamedTuple):
    """A page with its (tokens, dim) float32 vectors."""

    page: StoredPage
    vectors: Tensor


def make_page_id(source: str, file: bytes, page: int) -> str:
    """Return the UUID of a page; `file` is its path below the source, in the bytes of the file system."""
    digest = hashlib.sha256(b"\0".join([source.encode(), file, str(page).encode()])).digest()
    return str(uuid.UUID(bytes=digest[:16], version=5))


class PageStore:
    """Page vectors of one model, ranked by MaxSim; the pages may be those of several sources.

    Args:
        label: names the store in messages, without credentials.
        folder: where it is on this disk; None on a server.
        identity: of the model whose vectors are written, see `commands/embed.py`; None opens the store for reading.

    Raises:
        UserError: of every method, where the store cannot be reached, read or written.
    """

    batch_bytes = 64 * 2**20  # of float32 vectors that are best written at once

    def __init__(self, label: str, folder: Path | None, identity: dict[str, Any] | None):
        self.label, self.folder, self.identity = label, folder, identity

    def get_identity(self) -> dict[str, Any] | None:
        """Return the identity of the model whose vectors are stored, None if nothing is."""
        raise NotImplementedError

    def list_pages(self) -> dict[str, StoredPage]:
        """Return the stored pages by id."""
        raise NotImplementedError

    def upsert(self, rows: Sequence[EmbeddedPage]) -> None:
        """Add pages, and replace those with the same ids."""
        raise NotImplementedError

    def delete(self, ids: Sequence[str]) -> None:
        """Remove pages."""
        raise NotImplementedError

    def finish(self, num_pages: int) -> None:
        """End a run after which all `num_pages` pages of its source are stored."""

    def search(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """Return (id, MaxSim score) of the pages that score highest for a (tokens, dim) query, best first."""
        raise NotImplementedError

    def require_same_model(self, dim: int) -> None:
        """Raise UserError if vectors of another model, dimension, precision or pool factor are stored."""
        if self.identity is None:
            return
        stored = {**(self.get_identity() or self.identity), "dim": dim}
        for key in MODEL_KEYS:
            if stored.get(key) != self.identity[key]:
                models = f" ({stored.get('model')}, {self.identity['model']})" if key == "revision" else ""
                raise UserError(
                    f"{self.label}: {key}: was filled with {stored.get(key)!r}, but this run has "
                    f"{self.identity[key]!r}{models}; use the model and options that filled it, or give another place"
                )

    @contextmanager
    def convert_errors(self) -> Iterator[None]:
        """Convert an error of the library of a store, of whatever type, into a UserError that names the store."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            is_full = getattr(error, "errno", None) in DISK_FULL_CODES
            if self.folder and (is_full or any(message in str(error) for message in DISK_FULL_MESSAGES)):
                self.raise_disk_full()
            reason = self.describe_error(error)[:MAX_MESSAGE_CHARACTERS]
            raise UserError(f"{self.label}: {reason}") from None

    def describe_error(self, error: Exception) -> str:
        """Describe an error of the library, without credentials."""
        return f"{type(error).__name__}: {error}"

    def raise_disk_full(self) -> None:
        """Raise the UserError for a full disk."""
        existing = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())  # type: ignore
        raise UserError(
            f"{self.label}: No space left on device: {shutil.disk_usage(existing).free / 1e6:.1f} MB are free; free "
            "disk space and run the same command again: stored pages are kept"
        ) from None
