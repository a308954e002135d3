"""Collect the pages and queries of a folder of the user's documents, and validate the fields of its rows.

The readers of folders (`jsonl.py`, `pdfs.py`) return `RawDocuments`; a row that cannot be used becomes an `InvalidRow`.
"""

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from colintern.core.errors import UserError

SPLITS = ("train", "dev", "test")
GIVEN = "given"  # kind of a query that no program made
# Characters of a query that are kept, 16 for each of the 4,096 tokens that max_query_tokens may be at most. A text of
# 16 MB would be tokenized for minutes in every epoch.
MAX_QUERY_CHARACTERS = 2**16


class StoredImage(NamedTuple):
    """A page's image on disk; `key` is the sha256 of its bytes, so equal pages have one."""

    path: Path
    key: str


class QueryPagePair(NamedTuple):
    """A query and the name of the page that answers it; `kind`: `GIVEN`, or how a pseudo-query was made."""

    query: str
    page: str
    kind: str


class InvalidRow(NamedTuple):
    """A row that is left out: its place in the folder, the reason, and which of `RawDocuments.row_counts` it is."""

    where: str
    reason: str
    kind: str = "rows"


@dataclass
class RawDocuments:
    """Pages, queries and invalid rows of a folder."""

    pages: dict[str, StoredImage] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)  # of pages that have a text layer
    pairs: list[QueryPagePair] = field(default_factory=list)
    named_splits: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # page -> (split, place of the row)
    invalid_rows: list[InvalidRow] = field(default_factory=list)
    unknown_keys: set[str] = field(default_factory=set)  # of rows; they have no effect
    read_files: set[str] = field(default_factory=set)  # paths below the folder
    row_counts: Counter[str] = field(default_factory=Counter)  # by kind: rows; of PDFs pages and, apart, questions
    num_cut_queries: int = 0  # longer than MAX_QUERY_CHARACTERS
    document_of: dict[str, str] = field(default_factory=dict)  # page -> its PDF; other pages are documents themselves
    has_pseudo_queries: bool = False  # if so, given queries are those of the test set

    def reject_row(self, where: str, reason: str, kind: str = "rows") -> None:
        """Add an invalid row."""
        self.invalid_rows.append(InvalidRow(where, reason, kind))

    def add_query(self, query: str, page: str, kind: str) -> None:
        """Add a query of a page, cut to `MAX_QUERY_CHARACTERS`."""
        self.num_cut_queries += len(query) > MAX_QUERY_CHARACTERS
        self.pairs.append(QueryPagePair(query[:MAX_QUERY_CHARACTERS], page, kind))


class ImageStore(NamedTuple):
    """A folder of page images, equal ones once, until they are written as parquet.

    `render_cache`: where rendered pages are kept for the next time, None if they are not.
    """

    folder: Path
    render_cache: Path | None = None

    def put(self, data: bytes) -> StoredImage:
        """Write an image; a damaged one of the same key is replaced."""
        key = hashlib.sha256(data).hexdigest()
        path = self.folder / key
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(data)
        os.replace(partial, path)
        return StoredImage(path, key)


def read_json_lines(file: Path, documents: RawDocuments, kind: str = "rows") -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, row) of each line that is a JSON object; other lines become invalid rows, blank ones are ignored.

    Raises:
        UserError: the file is in another encoding than UTF-8.
    """
    lines = read_utf8_bytes(file).splitlines()
    wrong = [number for number, line in enumerate(lines, 1) if line.decode(errors="ignore").encode() != line]
    if len(wrong) > max(1, sum(not line.isascii() for line in lines) - len(wrong)):
        raise UserError(
            f"{file}: is not UTF-8: {len(wrong)} of {len(lines)} lines are not, the first is line {wrong[0]}; save it "
            f"as UTF-8"
        )
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name}:{number}"
        documents.row_counts[kind] += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8
            documents.reject_row(where, f"not JSON: {error}", kind)
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            documents.reject_row(where, f"not a JSON object: {line[:40]!r}", kind)


def read_utf8_bytes(file: Path) -> bytes:
    """Read a text file that should be UTF-8, without the byte order mark that spreadsheets write.

    Raises:
        UserError: it is UTF-16, or holds zero bytes.
    """
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # with which those of UTF-32 begin, too
        raise UserError(f"{file}: is UTF-16, not UTF-8; save it as UTF-8")
    if (start := data.find(0)) >= 0:
        line = data.count(b"\n", 0, start) + 1
        raise UserError(f"{file}: holds zero bytes, the first in line {line}: UTF-16, or damaged; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def resolve_within(folder: Path, name: object) -> Path:
    """Return the file that a row names.

    A row may name what `folder` lists: its files and links to files, whatever these point at. A name that leads out of
    the folder, and files of linked folders, which are not listed, are refused.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"names no file: {name!r}")
    if re.match(r"[a-zA-Z][\w+.-]*:", name):
        raise ValueError(f"refused: {name!r} is a URL; give a file of this folder")
    if has_lone_surrogate(name):
        raise ValueError(f"{name[:80]!r} is no file name: it holds half a character")
    if Path(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"refused: {name!r} points outside the folder")
    # macOS writes the ü of a file's name as u and two dots, spreadsheets as one character: both look the same.
    for spelling in (name, normalize("NFC", name), normalize("NFD", name)):
        path = folder / os.path.normpath(spelling)
        is_file = False
        try:
            parents = [parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder]
            links = [parent.name for parent in parents if parent.is_symlink()]
            with suppress(FileNotFoundError):
                path.stat()  # raises what is_file would hide
                is_file = path.is_file()  # a link to a file is the user's own: `dvc add` may have put it there
        except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, a loop of links
            raise ValueError(f"{name[:80]!r} is no file name: {error}") from error
        if links:
            raise ValueError(f"refused: {name!r} is below {links[0]!r}, a linked folder, which is not read")
        if is_file:
            return path
    raise ValueError(f"{name!r} is missing")


def find_query_error(query: object) -> str:
    """Return why a query cannot be used, "" if it can. A long one can: the model reads its beginning."""
    if not isinstance(query, str):
        return f"query is not text: {query!r:.80}"
    if has_lone_surrogate(query):
        return f"query holds half a character: {query!r:.80}"
    return "" if query.strip() else f"query is empty: {query!r:.80}"


def find_split_error(split: object) -> str:
    """Return why a row's split cannot be used, "" if it can; an empty one means that the page's content decides."""
    return "" if split in ("", None, *SPLITS) else f"split is {split!r:.80}; it must be one of {', '.join(SPLITS)}"


def normalize_query(query: str) -> str:
    """Normalize Unicode form, case and white space, so that two spellings of one query are equal.

    Punctuation, signs and vowel signs stay, because they distinguish queries: "C" and "C++", "section 1.12" and "11.2".
    """
    return " ".join(normalize("NFC", query).casefold().split())


def has_lone_surrogate(text: str) -> bool:
    """Check for half of a surrogate pair, which JSON can hold and no tokenizer takes.

    In a file name it represents a byte that is not UTF-8.
    """
    return re.search("[\ud800-\udfff]", text) is not None
