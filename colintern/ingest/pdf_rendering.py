"""Render PDF pages and read their text and outlines with pdfium, in the worker processes of an `IsolatedPool`.

pdfium crashes, hangs or exhausts memory on some files, and pypdfium2 raises many types of errors. Each failure skips
one page, outline entry or file, and reports the reason.
"""

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeVar

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image

from colintern.data.images import InvalidImageError, check_pixel_count, encode_png
from colintern.ingest.documents import ImageStore, StoredImage
from colintern.storage.isolation import CallLimits, Failure, try_call

# Pixels per inch: an A4 page is 1,191 x 1,684, more than InternVL3.5 takes in at 12 tiles.
DPI = 144
# A large file gets about 64 groups. Each group opens the file again, and pdfium walks the page tree to its first page.
MIN_PAGES_PER_GROUP = 8
# A typical page takes 0.1 s; a map or an 89-megapixel scan takes about 10 s and 1.5 GB.
LIMITS = CallLimits(seconds=30, memory=4 * 2**30)
MAX_TEXT_CHARACTERS = 100_000  # per page; a newspaper page has 30,000
REMOTE_ACTIONS = (pdfium_c.PDFACTION_REMOTEGOTO, pdfium_c.PDFACTION_EMBEDDEDGOTO)


class PageRef(NamedTuple):
    """A page of a PDF, from 0."""

    path: Path
    page: int


class RenderedPage(NamedTuple):
    """A page's image, its text, and the number of characters of the text before it was cut."""

    image: StoredImage
    text: str
    characters: int


class Outline(NamedTuple):
    """Entries that point at pages of their file, as (title, page from 0), and the errors of others by their number."""

    entries: list[tuple[str, int]]
    errors: dict[int, str]


def group_pages(pages: Iterable[PageRef]) -> list[list[PageRef]]:
    """Group the pages of each file, which follow each other."""
    groups = []
    for _, file_pages in groupby(pages, lambda page: page.path):
        rest = list(file_pages)
        size = max(MIN_PAGES_PER_GROUP, len(rest) // 64)
        groups += [rest[start : start + size] for start in range(0, len(rest), size)]
    return groups


def count_pages(paths: Sequence[Path]) -> Iterator[int | Failure]:
    """Count the pages of each PDF."""
    return (try_call(_count_pages, path) for path in paths)


def read_outlines(paths: Sequence[Path]) -> Iterator[Outline | Failure]:
    """Read the outline of each PDF."""
    return (try_call(_read_outline, path) for path in paths)


def render_pages(pages: Sequence[PageRef]) -> Iterator[Image.Image | Failure]:
    """Render pages of one PDF."""
    return _map_pages(_render_page, pages)


def render_and_store_pages(store: ImageStore, pages: Sequence[PageRef]) -> Iterator[RenderedPage | Failure]:
    """Render pages of one PDF, store their images, and read their texts."""
    for page in _map_pages(_render_and_read_text, pages):
        # Outside of `try_call`: a full disk is not a fault of the page.
        yield page if isinstance(page, Failure) else RenderedPage(store.put(page[0]), *page[1:])


T = TypeVar("T")


def _map_pages(function: Callable[[pdfium.PdfPage], T], pages: Sequence[PageRef]) -> Iterator[T | Failure]:
    pdf = try_call(_open_pdf, pages[0].path)
    for _, index in pages:
        page = pdf if isinstance(pdf, Failure) else try_call(pdf.get_page, index)
        yield page if isinstance(page, Failure) else try_call(function, page)


def _open_pdf(path: Path) -> pdfium.PdfDocument:
    """Open a document with its forms: without them, and before a page is loaded, a field is drawn empty."""
    pdf = pdfium.PdfDocument(path)
    pdf.init_forms()
    return pdf


def _render_page(page: pdfium.PdfPage) -> Image.Image:
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        area = f"{width:g} x {height:g} points"
        raise InvalidImageError(f"its visible area is {area}; its CropBox may be outside its MediaBox")
    check_pixel_count(round(width * DPI / 72), round(height * DPI / 72))
    return page.render(scale=DPI / 72).to_pil()


def _render_and_read_text(page: pdfium.PdfPage) -> tuple[bytes, str, int]:
    text = page.get_textpage()
    characters = text.count_chars()
    return encode_png(_render_page(page)), text.get_text_range(0, min(characters, MAX_TEXT_CHARACTERS)), characters


def _count_pages(path: Path) -> int:
    with _open_pdf(path) as pdf:
        pages, size = len(pdf), path.stat().st_size
    if pages > size:  # the page count is read from the file and may be false
        raise ValueError(f"it declares {pages:,} pages in {size:,} bytes")
    return pages


def _read_outline(path: Path) -> Outline:
    outline = Outline([], {})
    with _open_pdf(path) as pdf:
        pages = len(pdf)
        for number, entry in enumerate(_walk_outline(pdf), start=1):
            target = try_call(_read_target, entry, pages)
            if isinstance(target, Failure):
                outline.errors[number] = target.reason
            elif target:
                outline.entries.append(target)
    return outline


def _walk_outline(pdf: pdfium.PdfDocument) -> Iterator[pdfium.PdfBookmark | None]:
    """Yield the entries of an outline from top to bottom; None for a link to an entry before.

    pypdfium2's `get_toc` leaves out deeply nested entries, with a warning that names no file.
    """
    addresses = set()
    stack = [pdfium_c.FPDFBookmark_GetFirstChild(pdf, None)]
    while stack:
        entry = stack.pop()
        if entry and (address := ctypes.addressof(entry.contents)) not in addresses:
            addresses.add(address)
            yield pdfium.PdfBookmark(entry, pdf, level=0)
            stack.append(pdfium_c.FPDFBookmark_GetNextSibling(pdf, entry))
            stack.append(pdfium_c.FPDFBookmark_GetFirstChild(pdf, entry))
        elif entry:
            yield None


def _read_target(entry: pdfium.PdfBookmark | None, pages: int) -> tuple[str, int] | None:
    """Return title and page of an outline entry, None for one that points at no page, such as a URL."""
    if entry is None:
        raise ValueError("links back to an earlier entry")
    target = entry.get_dest()
    if target is None:
        return None
    action = pdfium_c.FPDFBookmark_GetAction(entry)
    if action and pdfium_c.FPDFAction_GetType(action) in REMOTE_ACTIONS:
        raise ValueError("points into another file")
    index = target.get_index()
    if index is None:
        raise ValueError("points at no page of its file")
    if not 0 <= index < pages:
        raise ValueError(f"points at page {index + 1}; the file has {pages}")
    try:
        return entry.get_title(), index
    except UnicodeDecodeError as error:
        raise ValueError(f"its title is not text: {error}") from error
