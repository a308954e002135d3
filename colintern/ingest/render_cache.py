"""Keep rendered pages on disk by the content of their PDF: what was rendered once is read from there.

The cache is a folder. `<sha256 of a PDF>.json` holds page count, outline and pages of that file; `images/<sha256>`
holds page images. Pages that failed are not kept, since the reason may be a machine short of memory or time.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from colintern.ingest.documents import ImageStore, StoredImage
from colintern.ingest.pdf_rendering import Outline, RenderedPage
from colintern.storage.identity import code_hashes, content_hash, fingerprint
from colintern.storage.isolation import Failure

LIBRARIES = ("pypdfium2", "pillow")

K = TypeVar("K")
V = TypeVar("V")


@dataclass
class RenderedPdf:
    """Page count, outline and rendered pages, by number from 0, of a PDF; None for what was not read yet."""

    count: int | None = None
    outline: Outline | None = None
    pages: dict[int, RenderedPage] = field(default_factory=dict)

    def get_text(self, number: int) -> str:
        """Return the text of a page, "" where it could not be rendered."""
        return self.pages[number].text if number in self.pages else ""


class RenderCache:
    """The rendered pages below `folder`, which one process at a time may use."""

    def __init__(self, folder: Path):
        self.folder, self.images = folder, ImageStore(folder / "images")
        self.images.folder.mkdir(parents=True, exist_ok=True)
        versions = {name: version(name) for name in LIBRARIES}
        self.renderer = fingerprint({"code": code_hashes(__name__), "versions": versions})

    def load(self, sha256: str) -> RenderedPdf:
        """Load what is kept of a PDF; nothing of another renderer's, and no image that is missing or damaged."""
        try:
            content = json.loads((self.folder / f"{sha256}.json").read_text(encoding="utf-8"))
            if content["renderer"] != self.renderer:
                return RenderedPdf()
            outline = content["outline"]
            if outline is not None:
                outline = Outline([(title, page) for title, page in outline[0]], dict(outline[1]))
            pages = {
                number: RenderedPage(StoredImage(path, key), text, characters)
                for number, key, text, characters in content["pages"]
                if (path := self.images.folder / key).is_file() and content_hash(path) == key
            }
            return RenderedPdf(content["count"], outline, pages)
        except (OSError, ValueError, LookupError, TypeError):  # not kept, or damaged
            return RenderedPdf()

    def save(self, sha256: str, pdf: RenderedPdf) -> None:
        """Write the entry of a PDF."""
        content = {
            "renderer": self.renderer,
            "count": pdf.count,
            "outline": pdf.outline and [pdf.outline.entries, list(pdf.outline.errors.items())],
            "pages": [(n, page.image.key, page.text, page.characters) for n, page in pdf.pages.items()],
        }
        partial = self.folder / f"{sha256}.partial"
        partial.write_text(json.dumps(content), encoding="utf-8")
        os.replace(partial, self.folder / f"{sha256}.json")

    def prune(self, hashes: Collection[str], pdfs: Iterable[RenderedPdf]) -> None:
        """Delete the entries of PDFs with other sha256 than these, and the images of other PDFs than these."""
        keys = {page.image.key for pdf in pdfs for page in pdf.pages.values()}
        for folder, names in ((self.folder, {f"{sha256}.json" for sha256 in hashes}), (self.images.folder, keys)):
            for path in folder.iterdir():
                if path.name not in names and not path.is_dir():
                    with suppress(OSError):
                        path.unlink()


def fill_missing(
    known: Mapping[K, V | None], compute: Callable[[Sequence[K]], Iterable[V | Failure]]
) -> Iterator[tuple[K, V | Failure]]:
    """Yield every key with its value, in order; call `compute` once for the keys whose value is None."""
    values = iter(compute([key for key, value in known.items() if value is None]))
    for key, value in known.items():
        yield key, next(values) if value is None else value
    if next(values, None) is not None:  # asked for, so that a progress bar around them ends
        raise ValueError("compute returned more values than keys")
