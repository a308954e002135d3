"""Read the questions of `queries.csv`, as spreadsheets and people write it."""

import csv
import io
import re
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

from colintern.core.errors import UserError
from colintern.ingest.documents import RawDocuments, read_utf8_bytes

COLUMNS = ("query", "file", "page", "split")
REQUIRED = COLUMNS[:3]
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}  # Excel writes semicolons where numbers have decimal commas


def read_query_csv(file: Path, pdfs: Container[str], documents: RawDocuments) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield (place, row) of each row of a CSV file; one whose cells do not fit the header becomes an invalid row.

    Shifted cells are recognized by the names of the folder's `pdfs`.

    Raises:
        UserError: the file is not UTF-8, lacks a column or has one twice, or its quotes do not match.
    """
    try:
        text = read_utf8_bytes(file).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8: {error}; from Excel, save it as CSV UTF-8") from error
    header: list[str] = []
    for number, line, cells in _iter_filled_rows(file, text, delimiter := _find_delimiter(text), pdfs):
        if not header:
            header = [] if _match_separator(delimiter.join(cells)) else _read_header(file, cells)
            continue
        documents.row_counts["questions"] += 1
        row = {key: cell if key == "query" else cell.strip() for key, cell in zip(header, cells, strict=False)}
        if reason := _find_cell_error(number, cells, header, row, pdfs, delimiter):
            documents.reject_row(f"{file.name}:{line}", reason, "questions")
        else:
            yield f"{file.name}:{line}", row
    if not header:
        _read_header(file, [])


def _find_delimiter(text: str) -> str:
    """Return the delimiter that Excel's `sep=;` names in the first line, or the one that finds the most columns."""
    lines = [line for line in text[:10_000].splitlines() if line.strip()]
    if not lines:
        return ","
    if named := _match_separator(lines[0]):
        return named
    split = {delimiter: next(csv.reader(lines[:1], delimiter=delimiter)) for delimiter in DELIMITERS}
    return max(split, key=lambda key: (len({*REQUIRED} & {*map(_normalize_column, split[key])}), len(split[key])))


def _match_separator(line: str) -> str:
    """Return the delimiter of a line `sep=;`, "" for any other line."""
    match = re.fullmatch(r'"?sep=([^"\r\n])"?\s*', line, re.IGNORECASE)
    return match[1] if match else ""


def _iter_filled_rows(
    file: Path, text: str, delimiter: str, pdfs: Container[str]
) -> Iterator[tuple[int, int, list[str]]]:
    """Yield (number, last line, cells) of each row that is not what a spreadsheet writes for an empty one."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first_line = 1
    try:
        for number, cells in enumerate(reader, start=1):
            # An unclosed quote takes in the rows up to the next one, without an error where a comma follows that.
            texts = [lines for cell in cells if len(lines := cell.splitlines()) > 1]
            if any(cell in pdfs for lines in texts for row in csv.reader(lines, delimiter=delimiter) for cell in row):
                raise csv.Error("one of its cells holds whole rows")
            if any(cell.strip() for cell in cells):
                yield number, reader.line_num, cells
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{file}: the row that begins in line {first_line}: {error}; a quote in a quoted cell must be doubled, and "
            f"one that begins a cell must be closed"
        ) from error


def _normalize_column(cell: str) -> str:
    """Return the name of a column; case and spaces around the known ones do not count."""
    name = cell.strip()
    return name.casefold() if name.casefold() in COLUMNS else name


def _read_header(file: Path, cells: Sequence[str]) -> list[str]:
    header = [_normalize_column(cell) for cell in cells]
    if missing := [name for name in REQUIRED if name not in header]:
        raise UserError(
            f"{file}: has no column {', '.join(missing)}; its first line is {list(cells)!r:.200}, it must name "
            f"{', '.join(COLUMNS)}"
        )
    if repeated := [name for name in COLUMNS if header.count(name) > 1]:
        raise UserError(f"{file}: has the column {repeated[0]} {header.count(repeated[0])} times; it must have it once")
    return header


def _find_cell_error(
    number: int, cells: Sequence[str], header: Sequence[str], row: dict[str, str], pdfs: Container[str], delimiter: str
) -> str:
    """Return why the cells of a row do not fit the header, such as an unquoted delimiter; "" if they fit."""
    remedy = f"quote a query that contains a {DELIMITERS.get(delimiter, delimiter)}"
    if any(cell.strip() for cell in cells[len(header) :]):
        return f"row {number} has {len(cells)} fields, header has {len(header)}: {remedy}"
    if row.get("page") in pdfs:  # one cell to the right of where it should be
        return f"row {number} names the file {row['page']!r} where its page should be: {remedy}"
    if any(name not in row for name in REQUIRED):
        return f"row {number} has {len(cells)} fields, header has {len(header)}: each needs {', '.join(REQUIRED)}"
    return ""
