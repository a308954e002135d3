"""What can be searched: the pages of PDFs and images, named, and hashed by the file they come from."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from colintern.core.errors import UserError
from colintern.core.page_labels import get_file_url
from colintern.data.images import InvalidImageError, decode_image
from colintern.ingest.documents import InvalidRow
from colintern.ingest.pdf_rendering import DPI, LIMITS, PageRef, count_pages, group_pages, render_pages
from colintern.storage.files import LINKED_FOLDER, MISSING, irregular_type, list_files
from colintern.storage.identity import content_hash
from colintern.storage.isolation import Failure, IsolatedPool

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
SEARCHED = (".pdf", *IMAGES)


class Source(NamedTuple):
    """A page: its name for people, its file, its place in a PDF from 0 (None for an image).

    `key` is of the file's content, the page and what renders it: where it is known the page need not be rendered.
    """

    name: str
    path: Path
    page: int | None
    key: str

    @property
    def link(self) -> str:
        """Return the URL of the page's file, with #page=N in a PDF."""
        return get_file_url(self.path, None if self.page is None else self.page + 1)


def sources(place: Path) -> tuple[list[Source], list[InvalidRow]]:
    """Every page of a PDF, an image, or a folder of them (hidden files left out), and the files that cannot be read.

    Raises:
        UserError: there is no such place, it is neither a regular file nor a folder, or no page is in it.
    """
    is_folder = os.path.isdir(place)
    if not is_folder and (kind := irregular_type(place)):
        state = "does not exist" if kind == MISSING else f"is {kind}; it must be a folder or a regular file"
        raise UserError(f"FOLDER_OR_PDF: {shown(place)!r} {state}")
    files, refused = list_files(place, SEARCHED) if is_folder else ([place], {})
    pdfs = [path for path in files if path.suffix.lower() == ".pdf"]
    with IsolatedPool(LIMITS) as pool:
        counts = dict(zip(pdfs, pool.map(count_pages, [[path] for path in pdfs]), strict=True))
    found: list[Source] = []
    bad = [
        InvalidRow(shown(name), f"is {kind}, not a regular file")
        for name, kind in refused.items()
        if kind != LINKED_FOLDER
    ]
    for path in files:
        name = shown(path.relative_to(place) if is_folder else path.name)
        try:
            content = content_hash(path)
        except OSError as error:  # somebody else's, or gone by now
            bad.append(InvalidRow(name, f"cannot be read: {error.strerror}"))
            continue
        pages = counts.get(path)
        if isinstance(pages, Failure):
            bad.append(InvalidRow(name, f"not a readable PDF: {pages.reason}"))
        elif pages is None:
            found.append(Source(name, path, None, content))
        else:
            made = f"{content} {DPI} dpi pypdfium2 {version('pypdfium2')}"
            found += [Source(f"{name}, page {page + 1}", path, page, f"{made} page {page}") for page in range(pages)]
    if not found:
        what = f"PDFs and {', '.join(IMAGES)} are searched{reasons(bad)}"
        raise UserError(f"FOLDER_OR_PDF: {place} holds no page; {what}")
    return found, bad


def shown(name: str | os.PathLike[str]) -> str:
    """A name that can be printed; one that is not UTF-8 cannot."""
    return os.fsencode(name).decode("utf-8", "replace")


def reasons(bad: Sequence[InvalidRow]) -> str:
    """The first of them, to go on with an error."""
    return "".join(f"; {one.where}: {one.reason}" for one in bad[:3])


def skipped(place: Path) -> str:
    """What lies in a folder and is not searched, counted, the most frequent first; "" if there is nothing."""
    files, refused = list_files(place) if os.path.isdir(place) else ([], {})
    linked = [kind for kind in refused.values() if kind == LINKED_FOLDER]
    others = [*files, *(Path(name) for name in refused if not name.endswith("/"))]
    kinds = Counter(shown(p.suffix.lower()) or "without a suffix" for p in others if p.suffix.lower() not in SEARCHED)
    kinds |= Counter({"linked folder": len(linked)} if linked else {})
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda of: (-of[1], of[0])))


def images(wanted: list[Source], bad: list[InvalidRow]) -> Iterator[tuple[Source, Image.Image]]:
    """The pages rendered, in their order; those that cannot be go to `bad`."""
    groups = group_pages(PageRef(source.path, source.page) for source in wanted if source.page is not None)
    with IsolatedPool(LIMITS, processes=1) as pool:  # one: each rendered page takes megabytes
        drawn = pool.map(render_pages, groups)
        for source in wanted:
            try:
                page = decode_image(source.path.read_bytes()) if source.page is None else next(drawn)
            except (InvalidImageError, OSError) as error:
                page = Failure(str(error))
            if isinstance(page, Failure):
                bad.append(InvalidRow(source.name, page.reason))
            else:
                yield source, page
