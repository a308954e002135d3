"""List and render what can be searched: the pages of PDFs and images, named, and hashed by the file they come from."""

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

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif")
SEARCHED_SUFFIXES = (".pdf", *IMAGE_SUFFIXES)
MAX_REASONS = 3  # named in an error


class PageSource(NamedTuple):
    """A page to search."""

    file: str  # path below the folder that is searched, such that it can be printed
    path: Path
    page: int | None  # in a PDF, from 0; None for an image
    key: str  # of the file's content, the page and what renders it: where it is known the page need not be rendered

    @property
    def page_number(self) -> int | None:
        """Return the number in a PDF, from 1; None for an image."""
        return None if self.page is None else self.page + 1

    @property
    def name(self) -> str:
        """Return the file and the page number."""
        return self.file if self.page is None else f"{self.file}, page {self.page_number}"

    @property
    def link(self) -> str:
        """Return the URL of the page's file, with #page=N in a PDF."""
        return get_file_url(self.path, self.page_number)


def list_sources(place: Path) -> tuple[list[PageSource], list[InvalidRow]]:
    """List every page of a PDF, an image, or a folder of them (hidden files left out), and the unreadable files.

    Raises:
        UserError: `place` does not exist, is neither a regular file nor a folder, or no page is in it.
    """
    is_folder = os.path.isdir(place)
    if not is_folder and (kind := irregular_type(place)):
        state = "does not exist" if kind == MISSING else f"is {kind}; it must be a folder or a regular file"
        raise UserError(f"SOURCE: {decode_name(place)!r} {state}")
    files, refused = list_files(place, SEARCHED_SUFFIXES) if is_folder else ([place], {})
    pdfs = [path for path in files if path.suffix.lower() == ".pdf"]
    with IsolatedPool(LIMITS) as pool:
        page_counts = dict(zip(pdfs, pool.map(count_pages, [[path] for path in pdfs]), strict=True))
    sources: list[PageSource] = []
    irregular = {decode_name(name): kind for name, kind in refused.items() if kind != LINKED_FOLDER}
    bad = [InvalidRow(name, f"is {kind}, not a regular file") for name, kind in irregular.items()]
    for path in files:
        name = decode_name(path.relative_to(place) if is_folder else path.name)
        try:
            content = content_hash(path)
        except OSError as error:  # somebody else's, or gone by now
            bad.append(InvalidRow(name, f"cannot be read: {error.strerror}"))
            continue
        num_pages = page_counts.get(path)
        if isinstance(num_pages, Failure):
            bad.append(InvalidRow(name, f"not a readable PDF: {num_pages.reason}"))
        elif num_pages is None:
            sources.append(PageSource(name, path, None, content))
        else:
            key = f"{content} {DPI} dpi pypdfium2 {version('pypdfium2')}"
            for page in range(num_pages):
                sources.append(PageSource(name, path, page, f"{key} page {page}"))
    if not sources:
        searched = f"PDFs and {', '.join(IMAGE_SUFFIXES)} are searched"
        raise UserError(f"SOURCE: {place} holds no page; {searched}{format_reasons(bad)}")
    return sources, bad


def decode_name(name: str | os.PathLike[str]) -> str:
    """Return a name that can be printed; one that is not UTF-8 cannot."""
    return os.fsencode(name).decode("utf-8", "replace")


def format_reasons(bad: Sequence[InvalidRow]) -> str:
    """Format the first reasons, to append to an error message."""
    return "".join(f"; {page.where}: {page.reason}" for page in bad[:MAX_REASONS])


def summarize_unsearched(place: Path) -> str:
    """Count the kinds of files in a folder that are not searched, the most frequent first; "" if there are none."""
    files, refused = list_files(place) if os.path.isdir(place) else ([], {})
    others = [*files, *(Path(name) for name in refused if not name.endswith("/"))]
    suffixes = [path.suffix.lower() for path in others]
    counts = Counter(
        decode_name(suffix) or "without a suffix" for suffix in suffixes if suffix not in SEARCHED_SUFFIXES
    )
    counts += Counter("linked folder" for kind in refused.values() if kind == LINKED_FOLDER)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def render_sources(sources: Sequence[PageSource], bad: list[InvalidRow]) -> Iterator[tuple[PageSource, Image.Image]]:
    """Yield the pages rendered, in their order; `bad` gets those that cannot be."""
    groups = group_pages(PageRef(source.path, source.page) for source in sources if source.page is not None)
    with IsolatedPool(LIMITS, processes=1) as pool:  # one: each rendered page takes megabytes
        rendered = pool.map(render_pages, groups)
        for source in sources:
            try:
                page = decode_image(source.path.read_bytes()) if source.page is None else next(rendered)
            except (InvalidImageError, OSError) as error:
                page = Failure(str(error))
            if isinstance(page, Failure):
                bad.append(InvalidRow(source.name, page.reason))
            else:
                yield source, page
