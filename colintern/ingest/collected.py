"""What a folder of the user's own documents gives, whatever kind of folder it is: pages, questions, and bad rows."""

import codecs
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

from colintern.core.errors import UserError

SPLITS = ("train", "dev", "test")
# Characters of a query that are kept, 16 for each of the 4,096 tokens that max_query_tokens may be at most. A text of
# 16 MB would be tokenized for minutes in every epoch.
MAX_QUERY_CHARACTERS = 2**16


class Stored(NamedTuple):
    """A page's image on disk; `key` is the sha256 of its bytes, so equal pages have one."""

    path: Path
    key: str


class Ask(NamedTuple):
    """`query` is answered by the page of that name; `kind`: given, or how a pseudo-query was made."""

    query: str
    page: str
    kind: str


class Bad(NamedTuple):
    """What is left out: where it stands in the folder, why, and which of `Collected.rows` it is."""

    where: str
    reason: str
    kind: str = "rows"


@dataclass
class Collected:
    """All of a folder. `fixed`: the splits that rows name for a page, each with the place of the row."""

    pages: dict[str, Stored] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    fixed: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    unknown: set[str] = field(default_factory=set)  # keys of rows that have no effect
    read: set[str] = field(default_factory=set)  # paths of the files below the folder that were looked into
    rows: Counter[str] = field(default_factory=Counter)  # rows; of a folder of PDFs pages and, apart, questions
    cut_queries: int = 0  # longer than MAX_QUERY_CHARACTERS

    def add_query(self, query: str, page: str, kind: str) -> None:
        """Add a query of a page; of a long one the first `MAX_QUERY_CHARACTERS`, counted."""
        self.cut_queries += len(query) > MAX_QUERY_CHARACTERS
        self.asks.append(Ask(query[:MAX_QUERY_CHARACTERS], page, kind))


class Shelf(NamedTuple):
    """A folder in which page images wait, equal ones once, until they are written as parquet.

    `rendered`: where rendered pages are kept for the next time, None if they are not.
    """

    folder: Path
    rendered: Path | None = None

    def put(self, data: bytes) -> Stored:
        key = hashlib.sha256(data).hexdigest()
        path = self.folder / key
        if not path.exists():
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_bytes(data)
            os.replace(partial, path)
        return Stored(path, key)


def json_lines(file: Path, found: Collected, kind: str = "rows") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of each line that is a JSON object; the others go to `found.bad`, blank ones are no rows.

    Raises:
        UserError: the file is in another encoding than UTF-8.
    """
    lines = read_utf8(file).splitlines()
    wrong = [number for number, line in enumerate(lines, start=1) if not _is_utf8(line)]
    if len(wrong) > max(1, sum(not line.isascii() for line in lines) - len(wrong)):
        raise UserError(
            f"{file}: is not UTF-8: {len(wrong)} of {len(lines)} lines are not, the first is line {wrong[0]}; save it "
            f"as UTF-8"
        )
    for number, line in enumerate(lines, start=1):
        where = f"{file.name}:{number}"
        if not line.strip():
            continue
        found.rows[kind] += 1
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: JSON and UTF-8
            found.bad.append(Bad(where, f"not JSON: {error}", kind))
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            found.bad.append(Bad(where, f"not a JSON object: {line[:40]!r}", kind))


def read_utf8(file: Path) -> bytes:
    """Read a text file that should be UTF-8; a byte order mark, which spreadsheets write, is left out.

    Raises:
        UserError: it is UTF-16, or holds zero bytes.
    """
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # with which those of UTF-32 begin, too
        raise UserError(f"{file}: is UTF-16, not UTF-8; save it as UTF-8")
    if (place := data.find(0)) >= 0:
        line = data.count(b"\n", 0, place) + 1
        raise UserError(f"{file}: holds zero bytes, the first in line {line}: UTF-16, or damaged; save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def inside(folder: Path, name: Any) -> tuple[Path, str]:
    """Return the file that a row names, and what is wrong with that ("" if nothing).

    A row may name what `folder` lists: its files and links to files, whatever these point at. A name that leads out of
    the folder, and files of linked folders, which are not listed, are refused.
    """
    if not isinstance(name, str) or not name.strip():
        return folder, f"names no file: {name!r}"
    if re.match(r"[a-zA-Z][\w+.-]*:", name):
        return folder, f"refused: {name!r} is a URL; give a file of this folder"
    if torn(name):
        return folder, f"{name[:80]!r} is no file name: it holds half a character"
    if Path(name).is_absolute() or os.path.normpath(name).split(os.sep)[0] == os.pardir:
        return folder, f"refused: {name!r} points outside the folder"
    # macOS writes the ü of a file's name as u and two dots, spreadsheets as one character: both look the same.
    for spelling in (name, normalize("NFC", name), normalize("NFD", name)):
        path = folder / os.path.normpath(spelling)
        try:
            links = [above for above in path.parents if above.is_relative_to(folder) and above != folder]
            if link := next((above for above in links if above.is_symlink()), None):
                return folder, f"refused: {name!r} is below {link.name!r}, a linked folder, which is not read"
            path.stat()  # raises what is_file would hide
            if path.is_file():  # a link to a file is the user's own: `dvc add` may have put it there
                return path, ""
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RuntimeError) as error:  # too long, with a zero byte, a loop of links
            return folder, f"{name[:80]!r} is no file name: {error}"
    return folder, f"{name!r} is missing"


def query_fault(query: Any) -> str:
    """Why a query cannot be used, "" if it can. A long one is no fault: the model reads its beginning."""
    if not isinstance(query, str):
        return f"query is not text: {query!r:.80}"
    if torn(query):
        return f"query holds half a character: {query!r:.80}"
    return "" if query.strip() else f"query is empty: {query!r:.80}"


def normalize_query(query: str) -> str:
    """Return what two spellings of one query share: Unicode form, case and white space are evened out.

    Punctuation, signs and vowel signs stay, since they tell queries apart: "C" and "C++", "section 1.12" and "11.2".
    """
    return " ".join(normalize("NFC", query).casefold().split())


def torn(text: str) -> bool:
    """Whether a text holds half of a pair of surrogates, as JSON can say it: no tokenizer takes it. In the name of a
    file it stands for a byte that is not UTF-8."""
    return re.search("[\ud800-\udfff]", text) is not None


def split_fault(split: Any) -> str:
    """Why a row's split cannot be used, "" if it can; an empty one means that the page's content decides."""
    return "" if split in ("", None, *SPLITS) else f"split is {split!r:.80}; it must be one of {', '.join(SPLITS)}"
