"""What can be searched: the pages of PDFs and images, named, and hashed by the file they come from."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from colintern.data.collected import Bad
from colintern.data.images import decode
from colintern.data.pdfs import pdf_files
from colintern.data.rendering import DPI, LIMITS, PageRef, count_pages, draw_pages, group_pages
from colintern.files.identity import content_hash
from colintern.files.isolation import IsolatedPool, Lost, attempt
from colintern.params import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")


class Source(NamedTuple):
    """A page: its name for people, its file, its place in a PDF from 0 (None for an image).

    `key` is of the file's content, the page and what renders it: where it is known the page need not be rendered.
    """

    name: str
    path: Path
    page: int | None
    key: str


def sources(place: Path) -> tuple[list[Source], list[Bad]]:
    """Every page of a PDF, an image, or a folder of them (hidden files left out), and the files that cannot be read.

    Raises:
        UserError: there is no such place, or no page in it.
    """
    if not place.exists():
        raise UserError(f"FOLDER_OR_PDF: {str(place)!r} does not exist")
    files = _files(place) if place.is_dir() else [place]
    pdfs = [path for path in files if path.suffix.lower() == ".pdf"]
    with IsolatedPool(LIMITS) as pool:
        counts = dict(zip(pdfs, pool.map(count_pages, [[path] for path in pdfs]), strict=True))
    found, bad = [], []
    for path in files:
        name = shown(path.relative_to(place) if place.is_dir() else path.name)
        try:
            content = content_hash(path)
        except OSError as error:  # somebody else's, or gone by now
            bad.append(Bad(name, f"cannot be read: {error.strerror}"))
            continue
        pages = counts.get(path)
        if isinstance(pages, Lost):
            bad.append(Bad(name, f"not a readable PDF: {pages.reason}"))
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


def reasons(bad: Sequence[Bad]) -> str:
    """The first of them, to go on with an error."""
    return "".join(f"; {one.where}: {one.reason}" for one in bad[:3])


def skipped(place: Path) -> str:
    """What lies in a folder and is not searched, counted, the most frequent first; "" if there is nothing."""
    others = (p for p in _seen(place) if p.suffix.lower() not in (*IMAGES, ".pdf") or p.is_dir())
    kinds = Counter(
        "linked folder" if p.is_dir() else shown(p.suffix.lower()) or "without a suffix"
        for p in others
        if p.is_file() or p.is_symlink()
    )
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda of: (-of[1], of[0])))


def _files(folder: Path) -> list[Path]:
    images = (p for p in _seen(folder) if p.suffix.lower() in IMAGES and p.is_file())
    return sorted([*pdf_files(folder), *images])


def _seen(folder: Path) -> Iterator[Path]:
    """All below the folder but what is hidden; links to folders are not followed, because they may lead in a circle."""
    return (p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def images(wanted: list[Source], bad: list[Bad]) -> Iterator[tuple[Source, Image.Image]]:
    """The pages rendered, in their order; those that cannot be go to `bad`."""
    groups = group_pages(PageRef(source.path, source.page) for source in wanted if source.page is not None)
    with IsolatedPool(LIMITS, processes=1) as pool:  # one: of pages that wait, each takes megabytes
        drawn = pool.map(draw_pages, groups)
        for source in wanted:
            page = attempt(lambda path: decode(path.read_bytes()), source.path) if source.page is None else next(drawn)
            if isinstance(page, Lost):
                bad.append(Bad(source.name, page.reason))
            else:
                yield source, page if source.page is None else page.to_image()
