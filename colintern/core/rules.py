"""What a value of params.yaml must satisfy beyond its type, and what two kinds of text in it mean."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must satisfy beyond its type: in words, for the message, and as a test."""

    words: str
    holds: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    return Rule(f"at least {low}", lambda value: value >= low)


def between(low: int, high: int) -> Rule:
    return Rule(f"{low} to {high}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    return Rule("one of " + ", ".join(choices), lambda value: value in choices)


def unsupported_path_characters(path: str) -> str:
    """Return the characters of a project's path with which DVC cannot copy the project, as it does for `--temp`,
    `--queue` and each trial of `colintern tune`: it writes the path into an ASCII file and into a file:// address.

    >>> unsupported_path_characters("/home/jürgen/c#/retriever")
    'ü#'
    """
    return "".join(dict.fromkeys(char for char in path if not char.isascii() or char in "#?"))


def mixture(train_data: str) -> list[tuple[str, int]]:
    """The sets of `train_data` with their weights: "a*2 + b" is [("a", 2), ("b", 1)]; [] if it says no such thing."""
    found = [re.fullmatch(r"\s*(\S.*?)(?:\*([1-9]\d{0,2}))?\s*", part) for part in re.split(r"\s\+\s", train_data)]
    parts = [(part[1], int(part[2] or 1)) for part in found if part and "*" not in part[1]]
    return parts if len({name for name, _ in parts}) == len(found) else []


def is_hub_id(text: str) -> bool:
    """Check for OWNER/NAME as huggingface_hub's validate_repo_id accepts it: `./base` and `../base` are paths."""
    pattern = r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b"
    return re.fullmatch(pattern, text, re.ASCII) is not None


def split_kernel(attention: str) -> tuple[str, str] | None:
    """Hub id and commit of the kernel repository that `attention` names; None where it names none."""
    name, _, commit = attention.partition("@")
    return (name, commit) if is_hub_id(name) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):  # ((((... and a{99999999999}
        return False
    return bool(pattern)


POSITIVE = Rule("above 0", lambda value: value > 0)
FILLED = Rule("not empty", lambda value: bool(value.strip()))
REVISION = Rule('40 hex digits, or ""', lambda value: re.fullmatch(r"([0-9a-f]{40})?", value) is not None)
MIXTURE = Rule("a data set, or several different ones as `a*2 + b`, weights 1 to 999", lambda text: bool(mixture(text)))
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
KERNEL = Rule(
    f"one of {', '.join(ATTENTION)}, or a kernel repository of the hub at a commit, OWNER/NAME@<40 hex digits>",
    lambda value: value in ATTENTION or split_kernel(value) is not None,
)
LAYERS = Rule("1 to 1000 where it is a number of layers", lambda value: isinstance(value, bool) or 0 < value <= 1000)
LAUNCH = Rule(
    "1 to 4096 where it is a number", lambda value: value == "auto" if isinstance(value, str) else 0 < value <= 4096
)
PATTERN = Rule("a regular expression that compiles (any text is .* in it, not *)", _compiles)
