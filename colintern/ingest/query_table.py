"""The questions of `queries.csv`, as spreadsheets and people write it."""

import csv
import io
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.ingest.collected import Bad, Collected, read_utf8

COLUMNS = ("query", "file", "page", "split")
REQUIRED = COLUMNS[:3]
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}  # Excel writes semicolons where numbers have decimal commas


def csv_rows(file: Path, pdfs: Container[str], found: Collected) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place, row) of each row of a CSV file; one whose cells are not those of the header goes to `found.bad`.

    Raises:
        UserError: the file is not UTF-8, lacks a column or has one twice, or its quotes do not match.
    """
    try:
        text = read_utf8(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8: {error}; from Excel, save it as CSV UTF-8") from error
    header: list[str] = []
    for number, line, cells in _filled_rows(file, text, delimiter := _find_delimiter(text), pdfs):
        if not header:
            header = [] if _separator(delimiter.join(cells)) else _read_header(file, cells)
            continue
        found.rows["questions"] += 1
        row = {key: cell if key == "query" else cell.strip() for key, cell in zip(header, cells, strict=False)}
        if fault := _shift_fault(number, cells, header, row, pdfs, delimiter):
            found.bad.append(Bad(f"{file.name}:{line}", fault, "questions"))
        else:
            yield f"{file.name}:{line}", row
    if not header:
        _read_header(file, [])


def _find_delimiter(text: str) -> str:
    """The one that Excel's `sep=;` names in the first line, or the one that splits the header into the most columns."""
    lines = [line for line in text[:10_000].splitlines() if line.strip()]
    if not lines:
        return ","
    if named := _separator(lines[0]):
        return named
    split = {delimiter: next(csv.reader(lines[:1], delimiter=delimiter)) for delimiter in DELIMITERS}
    return max(split, key=lambda one: (len({*REQUIRED} & {*map(_column, split[one])}), len(split[one])))


def _separator(line: str) -> str:
    """The delimiter of a line `sep=;`, "" of any other."""
    found = re.fullmatch(r'"?sep=([^"\r\n])"?\s*', line, re.IGNORECASE)
    return found[1] if found else ""


def _filled_rows(file: Path, text: str, delimiter: str, pdfs: Container[str]) -> Iterator[tuple[int, int, list[str]]]:
    """(number, last line, cells) of each row that is not what a spreadsheet writes for an empty one."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first = 1
    try:
        for number, cells in enumerate(reader, start=1):
            # A stray quote takes in the rows up to the next one, without an error where a comma follows that.
            if any(cell in pdfs for line in _further_lines(cells, delimiter) for cell in line):
                raise csv.Error("one of its cells holds whole rows")
            if any(cell.strip() for cell in cells):
                yield number, reader.line_num, cells
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}: the row that begins in line {first}: {error}; a quote in a quoted cell must be doubled, and one "
            f"that begins a cell must be closed"
        ) from error


def _further_lines(cells: Sequence[str], delimiter: str) -> Iterator[list[str]]:
    """The lines of the cells that have several, read as rows."""
    for cell in cells:
        if len(lines := cell.splitlines()) > 1:
            yield from csv.reader(lines, delimiter=delimiter)


def _column(cell: str) -> str:
    """The name of a column; capitals and spaces around those that are known do not count."""
    name = cell.strip()
    return name.casefold() if name.casefold() in COLUMNS else name


def _read_header(file: Path, cells: Sequence[str]) -> list[str]:
    header = [_column(cell) for cell in cells]
    if lacking := [name for name in REQUIRED if name not in header]:
        raise UserError(
            f"{file}: has no column {', '.join(lacking)}; its first line is {list(cells)!r:.200}, it must name "
            f"{', '.join(COLUMNS)}"
        )
    if twice := [name for name in COLUMNS if header.count(name) > 1]:
        raise UserError(f"{file}: has the column {twice[0]} {header.count(twice[0])} times; it must have it once")
    return header


def _shift_fault(
    number: int, cells: Sequence[str], header: Sequence[str], row: dict[str, str], pdfs: Container[str], delimiter: str
) -> str:
    """Say that the cells of a row do not fit the header, as where a query holds the delimiter; "" if they fit."""
    remedy = f"quote a query that contains a {DELIMITERS.get(delimiter, delimiter)}"
    if any(cell.strip() for cell in cells[len(header) :]):
        return f"row {number} has {len(cells)} fields, header has {len(header)}: {remedy}"
    if row.get("page") in pdfs:  # one cell further than the file should be
        return f"row {number} names the file {row['page']!r} where its page should be: {remedy}"
    if any(name not in row for name in REQUIRED):
        return f"row {number} has {len(cells)} fields, header has {len(header)}: each needs {', '.join(REQUIRED)}"
    return ""
