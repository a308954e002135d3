"""JSON files that two runs write alike."""

import json
from typing import Any


def dumps(value: Any) -> str:
    """Sorted keys, two spaces, a newline at the end: readable for people, quiet in git."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"
