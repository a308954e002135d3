"""Regular files, the only kind that is opened; JSON and CSV files that two runs write alike.

Reading a named pipe or a device may block or never end.
"""

import csv
import errno
import json
import os
import reprlib
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError

MAX_JSON_BYTES = 16 * 2**20
MISSING = "missing"
DANGLING = "a dangling link"
LINKED_FOLDER = "a linked folder"
_TYPE_NAMES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Listing(NamedTuple):
    """The regular files below a folder, and the entries that are not read: path below the folder -> what it is."""

    files: list[Path]
    refused: dict[str, str]


def irregular_type(path: Path) -> str:
    """Describe what a path leads to, "" for a regular file. Nothing is opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if error.errno == errno.ENOENT:
            return DANGLING if path.is_symlink() else MISSING
        return "a loop of links" if error.errno == errno.ELOOP else f"not accessible ({error.strerror})"
    except ValueError:  # a zero byte in the name
        return MISSING
    return "" if stat.S_ISREG(mode) else _TYPE_NAMES.get(stat.S_IFMT(mode), "no regular file")


def require_regular_file(file: Path) -> None:
    """Raise UserError for a path that is missing or is not a regular file, such as a folder or a named pipe."""
    if kind := irregular_type(file):
        raise UserError(f"{file}: is {kind}; expected a regular file")


def list_files(top: Path, suffixes: Collection[str] = (), recursive: bool = True) -> Listing:
    """List the regular files of a folder in the order of their paths, hidden files and folders left out.

    Links to folders are not followed, since they may lead in a circle.

    Args:
        top: the folder.
        suffixes: in lower case, of the files that are wanted; none means all.
        recursive: also in the folders below it.
    """
    files: list[Path] = []
    folders: list[Path] = []
    refused: dict[str, str] = {}

    def refuse_folder(error: OSError) -> None:
        refused[f"{os.path.relpath(error.filename, top)}/"] = f"not accessible ({error.strerror})"

    for folder, names, leaves in os.walk(top, onerror=refuse_folder):
        names[:] = [name for name in names if not name.startswith(".")]
        paths = [Path(folder, name) for name in names]
        links = [path for path in paths if path.is_symlink()]
        refused |= {f"{path.relative_to(top).as_posix()}/": LINKED_FOLDER for path in links}
        folders += [path for path in paths if path.suffix and (not suffixes or path.suffix.lower() in suffixes)]
        for path in (Path(folder, name) for name in leaves if not name.startswith(".")):
            if suffixes and path.suffix.lower() not in suffixes:
                continue
            if kind := irregular_type(path):
                refused[path.relative_to(top).as_posix()] = kind
            else:
                files.append(path)
        if not recursive:
            break
    # A folder that is called like a file is one that holds such files, unless it holds none.
    with_files = {parent for path in files for parent in path.parents} if folders else set()
    empty = {f"{path.relative_to(top).as_posix()}/": "a folder" for path in folders if path not in with_files}
    return Listing(sorted(files), dict(sorted((empty | refused).items())))


def describe_refused(refused: dict[str, str], most: int = 5) -> str:
    """Name the first of what was refused, with what it is; "" if there is nothing."""
    named = [f"{name} is {kind}" for name, kind in list(refused.items())[:most]]
    return ", ".join(named) + (f" and {len(refused) - most} more" if len(refused) > most else "")


def format_json(value: object) -> str:
    """Format a value as JSON with sorted keys and a newline at the end, so that git shows small differences."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it is not a regular file, is too large, is not JSON, or holds something else.
    """
    require_regular_file(file)
    if (size := file.stat().st_size) > MAX_JSON_BYTES:
        raise UserError(f"{file}: has {size} bytes; expected at most {MAX_JSON_BYTES}")
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {reprlib.repr(content)}; expected a JSON object")
    return content


def write_csv(path: Path, rows: Iterable[Mapping[str, object]], columns: Sequence[str]) -> None:
    """Write the named columns of the rows, with a header; other keys of a row are left out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
