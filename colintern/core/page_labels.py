"""Name pages and queries for people: file and page number, on one line of a terminal, with a link that opens the page.

A page of the user's own documents has its file, below the folder, as its name; a page of a PDF has `file#page=N`, see
`pdfs.py`.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple
from unicodedata import category, east_asian_width

from colintern.core.project import root
from colintern.core.terminal import escape_controls

PDF_PAGE = re.compile(r"(.+\.pdf)#page=(\d+)", re.DOTALL | re.IGNORECASE)


class PageLabel(NamedTuple):
    """Displayed name of a page, and the file:// URL of its file, "" if the file is not on this disk."""

    text: str
    link: str


def label_page(page_id: str, name: str | None, folder: str = "") -> PageLabel:
    """Label a page of an evaluation set by its name in the corpus, else by its id; `folder`: of the documents or ""."""
    if not name:
        return PageLabel(f"page id {escape_controls(page_id)}", "")
    match = PDF_PAGE.fullmatch(name)
    file, page = (match[1], int(match[2])) if match else (name, None)
    text = escape_controls(file if page is None else f"{file}, page {page}")
    path = root() / folder / file
    return PageLabel(text, get_file_url(path, page) if folder and os.path.isfile(path) else "")


def get_file_url(path: Path, page: int | None = None) -> str:
    """Return the percent-encoded URL of a file and, in a PDF, of a page from 1.

    The folder is resolved, the file is not: `dvc add` may have made it a link to a file without a suffix.
    """
    return (path.parent.resolve() / path.name).as_uri() + ("" if page is None else f"#page={page}")


def label_query(query_id: str, text: str | None) -> str:
    """Return the words of a query, or its id where the results were written without them."""
    return " ".join(text.split()) if text else f"query id {query_id}"


def count_columns(text: str) -> int:
    """Count the columns that a terminal takes for a text: two for a Chinese character, none for an accent."""
    return sum(0 if category(char) in ("Mn", "Me", "Cf") else 1 + (east_asian_width(char) in "WF") for char in text)


def fit_columns(text: str, columns: int, keep_end: bool = False) -> str:
    """Put a text on one line of at most `columns`, control characters escaped; a long one loses its end or start."""
    line = escape_controls(re.sub(r"[\t\n]", " ", text))
    if count_columns(line) <= columns:
        return line
    kept = line[-columns:] if keep_end else line[:columns]
    while count_columns(kept) > columns - len("..."):
        kept = kept[1:] if keep_end else kept[:-1]
    return f"...{kept}" if keep_end else f"{kept}..."


def pad_columns(text: str, columns: int) -> str:
    """Fill a text with spaces up to a width."""
    return text + " " * (columns - count_columns(text))
