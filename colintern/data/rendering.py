"""Pages of PDFs as images, and what a PDF says of itself: pdfium, called in processes of `IsolatedPool`.

pdfium crashes, hangs or takes all memory on some files, and pypdfium2 raises what comes: each costs a page, an outline
entry or a file, with its reason.
"""

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c
from PIL import Image

from colintern.data.collected import Shelf, Stored
from colintern.data.images import BadImage, check_size, png_bytes
from colintern.files.isolation import Limits, Lost, attempt

# Pixels an inch: an A4 page is 1,191 x 1,684, more than InternVL3.5 takes in at 12 tiles.
DPI = 144
CHUNK = 8  # pages a group: a document is opened again for each
# An honest page takes a tenth of a second, a map or a scan of 89 megapixels some ten seconds and 1.5 GB.
LIMITS = Limits(seconds=30, memory=4 * 2**30)
MAX_TEXT = 100_000  # characters of a page's text that are read; a newspaper page has 30,000
REMOTE = (pdfium_c.PDFACTION_REMOTEGOTO, pdfium_c.PDFACTION_EMBEDDEDGOTO)


class PageRef(NamedTuple):
    """A page of a PDF, from 0, and where its image goes if it is to be stored."""

    path: Path
    page: int
    shelf: Shelf | None = None


class Bitmap(NamedTuple):
    """Pixels as pdfium leaves them, which go to another process faster than an image of Pillow."""

    size: tuple[int, int]
    data: bytes
    mode: str
    stride: int

    def to_image(self) -> Image.Image:
        return Image.frombuffer("RGB", self.size, self.data, "raw", self.mode, self.stride, 1)


class Rendered(NamedTuple):
    """A page's image or the reason why there is none, its text, and what is wrong with that ("" if nothing)."""

    image: Stored | Lost
    text: str
    text_fault: str


class Outline(NamedTuple):
    """Entries that point at pages of their file, as (title, page from 0), and (number, reason) of those at fault."""

    entries: list[tuple[str, int]]
    faults: list[tuple[int, str]]


def open_pdf(path: Path) -> pdfium.PdfDocument:
    """The document with its forms: without them, and before a page is taken, a field is drawn empty.

    Raises:
        pdfium.PdfiumError: damaged, or locked with a password.
    """
    pdf = pdfium.PdfDocument(path)
    pdf.init_forms()
    return pdf


def group_pages(pages: Iterable[PageRef]) -> list[list[PageRef]]:
    """Group pages of one file that follow each other."""
    return [list(group) for _, group in groupby(pages, lambda page: (page.path, page.page // CHUNK))]


def count_pages(paths: Sequence[Path]) -> Iterator[int | Lost]:
    """Count the pages of each PDF."""
    for path in paths:
        yield attempt(_count_pages, path)


def read_outlines(paths: Sequence[Path]) -> Iterator[Outline | Lost]:
    """Read the outline of each PDF."""
    for path in paths:
        yield attempt(_read_outline, path)


def render_pages(pages: Sequence[PageRef]) -> Iterator[Rendered]:
    """Store the images of pages of one PDF, and read their texts."""
    pdf = attempt(open_pdf, pages[0].path)
    for _, index, shelf in pages:
        assert shelf
        page = pdf if isinstance(pdf, Lost) else attempt(pdf.get_page, index)
        text, text_fault = "", ""
        if not isinstance(page, Lost):
            read = attempt(_read_text, page)
            text, text_fault = ("", read.reason) if isinstance(read, Lost) else read
            page = attempt(lambda page: png_bytes(_render(page).to_image()), page)
        # Outside of `attempt`: a full disk is no fault of the page.
        yield Rendered(page if isinstance(page, Lost) else shelf.put(page), text, text_fault)


def draw_pages(pages: Sequence[PageRef]) -> Iterator[Bitmap | Lost]:
    """Draw pages of one PDF."""
    pdf = attempt(open_pdf, pages[0].path)
    for page in pages:
        yield pdf if isinstance(pdf, Lost) else attempt(lambda page: _render(pdf.get_page(page.page)), page)


def _render(page: pdfium.PdfPage) -> Bitmap:
    """Render a page at `DPI`.

    Raises:
        BadImage: it has no visible area, or would be too large.
        pdfium.PdfiumError: it cannot be rendered.
    """
    width, height = page.get_size()
    if not (width > 0 and height > 0):
        raise BadImage(f"its visible area is {width:g} x {height:g} points; is its CropBox outside its MediaBox?")
    check_size(round(width * DPI / 72), round(height * DPI / 72))
    bitmap = page.render(scale=DPI / 72)
    return Bitmap((bitmap.width, bitmap.height), bytes(bitmap.buffer), bitmap.mode, bitmap.stride)


def _read_text(page: pdfium.PdfPage) -> tuple[str, str]:
    """The text of a page, and what is wrong with it."""
    text = page.get_textpage()
    characters = text.count_chars()
    cut = f"its text has {characters:,} characters, of which {MAX_TEXT:,} are read" if characters > MAX_TEXT else ""
    return text.get_text_range(0, min(characters, MAX_TEXT)), cut


def _count_pages(path: Path) -> int:
    with open_pdf(path) as pdf:
        pages, size = len(pdf), path.stat().st_size
    if pages > size:  # the number is what the file says
        raise ValueError(f"{pages:,} pages in {size:,} bytes")
    return pages


def _read_outline(path: Path) -> Outline:
    found = Outline([], [])
    with open_pdf(path) as pdf:
        pages = len(pdf)
        for number, entry in enumerate(_walk_outline(pdf), start=1):
            target = attempt(_read_target, entry, pages)
            if isinstance(target, Lost):
                found.faults.append((number, target.reason))
            elif target:
                found.entries.append(target)
    return found


def _walk_outline(pdf: pdfium.PdfDocument) -> Iterator[pdfium.PdfBookmark | None]:
    """Yield the entries of an outline from top to bottom; None for one that is there before.

    pypdfium2's `get_toc` leaves out what is nested deeply, with a warning that names no file.
    """
    seen = set()
    todo = [pdfium_c.FPDFBookmark_GetFirstChild(pdf, None)]
    while todo:
        entry = todo.pop()
        if entry and (address := ctypes.addressof(entry.contents)) not in seen:
            seen.add(address)
            yield pdfium.PdfBookmark(entry, pdf, level=0)
            todo.append(pdfium_c.FPDFBookmark_GetNextSibling(pdf, entry))
            todo.append(pdfium_c.FPDFBookmark_GetFirstChild(pdf, entry))
        elif entry:
            yield None


def _read_target(entry: pdfium.PdfBookmark | None, pages: int) -> tuple[str, int] | None:
    """The title and page of an outline entry; None for one that points at no place, such as a URL.

    Raises:
        ValueError: it points at what is no page of its file, its title is no text, or it stands in a circle.
    """
    if entry is None:
        raise ValueError("leads back to an entry before it")
    target = entry.get_dest()
    if target is None:
        return None
    action = pdfium_c.FPDFBookmark_GetAction(entry)
    if action and pdfium_c.FPDFAction_GetType(action) in REMOTE:
        raise ValueError("points into another file")
    index = target.get_index()
    if index is None:
        raise ValueError("points at no page of its file")
    if not 0 <= index < pages:
        raise ValueError(f"points at page {index + 1}; the file has {pages}")
    try:
        return entry.get_title(), index
    except UnicodeDecodeError as error:
        raise ValueError(f"its title is no text: {error}") from error
