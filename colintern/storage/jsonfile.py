"""JSON files that two runs write alike, and JSON files from elsewhere."""

import json
import reprlib
from pathlib import Path
from typing import Any

from colintern.core.errors import UserError
from colintern.storage.regular import require_regular_file

MAX_BYTES = 16 * 2**20


def dumps(value: Any) -> str:
    """Sorted keys, two spaces, a newline at the end: readable for people, quiet in git."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: it is not a regular file, is too large, is not JSON, or holds something else.
    """
    require_regular_file(file)
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise UserError(f"{file}: has {size} bytes; expected at most {MAX_BYTES}")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: holds {reprlib.repr(content)}; expected a JSON object")
    return content
