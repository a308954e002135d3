"""Source: a folder of PDFs, each page one image.

The questions stand in `queries.csv` or `queries.jsonl` in the folder: query, file (path below the folder), page (from
1) and, if wanted, split (train, dev or test). A query with several lines is answered by several pages. Without such a
file the PDFs' own text layer is asked: pseudo-queries, named so wherever their numbers appear.
"""

import os
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pypdfium2 as pdfium
from PIL import Image

from colintern.data.collected import Bad, Collected, Shelf, inside, json_lines, query_fault, split_fault, torn
from colintern.data.images import BadImage, check_size, png_bytes
from colintern.data.pseudo import Text, pseudo_queries
from colintern.data.query_table import COLUMNS, csv_rows
from colintern.files.parallel import spread
from colintern.files.regular import irregular_type, list_files
from colintern.params import UserError

# Pixels an inch: an A4 page is 1,191 x 1,684, more than InternVL3.5 takes in at 12 tiles.
DPI = 144
CHUNK = 8  # pages a task, or a 64th of the document: for each it is opened again, and its pages counted up to the first
QUERY_FILES = ("queries.csv", "queries.jsonl")


class Task(NamedTuple):
    """Pages `first` to before `last` of a PDF, and where their images go."""

    path: Path
    name: str
    first: int
    last: int
    shelf: Shelf


class Rendered(NamedTuple):
    """A page: its name, what `Shelf.put` gave for its image, its text; or why there is none."""

    name: str
    page: Any
    text: str
    fault: str


def collect(folder: Path, shelf: Shelf) -> Collected:
    """Every page of the folder's PDFs, and the queries for them."""
    found = Collected()
    files = {path.relative_to(folder).as_posix(): path for path in pdf_files(folder)}
    outlines = {name: outline for name, path in files.items() if (outline := _outline(name, path, found)) is not None}
    counts = {name: pages for name, (pages, _) in outlines.items()}
    texts: dict[str, list[str]] = {name: [] for name in counts}
    tasks = [
        Task(files[name], name, first, min(first + chunk, pages), shelf)
        for name, pages in counts.items()
        for chunk in [max(CHUNK, pages // 64)]
        for first in range(0, pages, chunk)
    ]
    for task, pages in zip(tasks, spread(_render, tasks, "rendering", "block"), strict=True):
        for page in pages:
            texts[task.name].append(page.text)
            if page.fault:
                found.bad.append(Bad(page.name, page.fault, "pages"))
            else:
                found.pages[page.name] = page.page
    found.rows["pages"] += sum(counts.values())
    found.read = set(files)
    if given := _query_file(folder):
        found.read.add(given.name)
        _read_queries(folder, given, counts, found)
    else:
        documents = [Text(texts[name], outlines[name][1]) for name in counts]
        names = list(counts)
        for query in pseudo_queries(documents):
            page_name = _name(names[query.document], query.page)
            if page_name in found.pages:
                found.add_query(query.query, page_name, query.kind)
    return found


def pdf_files(folder: Path) -> list[Path]:
    """The PDFs below the folder, in the order of their paths; hidden files and folders are left out."""
    return list_files(folder, (".pdf",)).files


def is_query_file(path: Path) -> bool:
    """Tell whether a file of a folder of PDFs is the one that holds the questions; its suffix may be in capitals."""
    return path.stem + path.suffix.lower() in QUERY_FILES


def open_pdf(path: Path) -> pdfium.PdfDocument:
    """The document with its forms: without them, and before a page is taken, a field is drawn empty.

    Raises:
        pdfium.PdfiumError: damaged, or locked with a password.
    """
    pdf = pdfium.PdfDocument(path)
    pdf.init_forms()
    return pdf


def _name(file: str, index: int) -> str:
    return f"{file}#page={index + 1}"


def _outline(name: str, path: Path, found: Collected) -> tuple[int, list[tuple[str, int]]] | None:
    """Number of pages, and the outline's entries that point at one; None, and a bad row, if it is no readable PDF."""
    if torn(name):  # no parquet file takes it
        found.rows["pages"] += 1
        where = name.encode(errors="backslashreplace").decode()
        found.bad.append(Bad(where, "its name is not UTF-8; rename it", "pages"))
        return None
    try:
        with open_pdf(path) as pdf:
            entries = [(entry.get_title(), entry.get_dest()) for entry in pdf.get_toc()]
            targets = [(title, dest.get_index()) for title, dest in entries if dest is not None]
            return len(pdf), [(title, index) for title, index in targets if index is not None]
    except pdfium.PdfiumError as error:  # damaged, or locked with a password
        found.rows["pages"] += 1
        found.bad.append(Bad(name, f"not a readable PDF: {error}", "pages"))
        return None


def _render(task: Task) -> list[Rendered]:
    pages = []
    with open_pdf(task.path) as pdf:
        for index in range(task.first, task.last):
            name, text = _name(task.name, index), ""
            try:
                page = pdf[index]
                text = page.get_textpage().get_text_range()
                pages.append(Rendered(name, task.shelf.put(png_bytes(page_image(page))), text, ""))
            except (pdfium.PdfiumError, BadImage) as error:
                pages.append(Rendered(name, None, text, str(error)))
    return pages


def page_image(page: pdfium.PdfPage) -> Image.Image:
    """A page at `DPI`.

    Raises:
        BadImage: it would be too large.
        pdfium.PdfiumError: it cannot be rendered.
    """
    check_size(*(round(side * DPI / 72) for side in page.get_size()))
    return page.render(scale=DPI / 72).to_pil()


def _query_file(folder: Path) -> Path | None:
    found = sorted(filter(is_query_file, folder.iterdir()))
    if len(found) > 1:
        raise UserError(f"{folder}: has {' and '.join(path.name for path in found)}; keep one")
    if found and (kind := irregular_type(found[0])):  # without it, the PDFs' own text would be asked
        raise UserError(f"{found[0]}: is {kind}, not a regular file; replace or delete it")
    return found[0] if found else None


def _read_queries(folder: Path, file: Path, counts: dict[str, int], found: Collected) -> None:
    is_jsonl = file.suffix.lower() == ".jsonl"
    rows = json_lines(file, found, "questions") if is_jsonl else csv_rows(file, counts, found)
    locate = cache(partial(inside, folder))  # many rows name the same file
    for where, row in rows:
        if unknown := row.keys() - set(COLUMNS):
            found.unknown.update(map(str, unknown - {""}))
        file_name = row.get("file")
        path, fault = locate(file_name) if isinstance(file_name, str) else inside(folder, file_name)
        name, fault = ("", fault) if fault else _page(os.path.relpath(path, folder), row.get("page"), counts)
        fault = query_fault(row.get("query")) or fault or split_fault(row.get("split", ""))
        if not fault and name not in found.pages:
            fault = f"page {name} could not be rendered"
        if fault:
            found.bad.append(Bad(where, fault, "questions"))
            continue
        found.add_query(row["query"], name, "given")
        if row.get("split"):
            found.fixed.setdefault(name, []).append((row["split"], where))


def _page(file: str, page: Any, counts: dict[str, int]) -> tuple[str, str]:
    """The name of a row's page, and what is wrong with it ("" if nothing)."""
    page = str(page)
    if file not in counts:
        return "", f"{file} is not a readable PDF of this folder"
    # Python reads no number of more than 4,300 digits.
    if not page.isdecimal() or len(page) > 9 or not 1 <= int(page) <= counts[file]:
        return "", f"page {page!r:.40}: {file} has pages 1 to {counts[file]}"
    return _name(file, int(page) - 1), ""
