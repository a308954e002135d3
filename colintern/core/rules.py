"""Rules for values of params.yaml, and parsers of those that have a syntax of their own."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """What a value must satisfy beyond its type: a description for messages, and a test."""

    description: str
    is_valid: Callable[[Any], bool]


def at_least(low: int) -> Rule:
    """Make a rule for a lower bound."""
    return Rule(f"at least {low}", lambda value: value >= low)


def between(low: int, high: int) -> Rule:
    """Make a rule for an inclusive range."""
    return Rule(f"{low} to {high}", lambda value: low <= value <= high)


def one_of(*choices: str) -> Rule:
    """Make a rule for a list of choices."""
    return Rule("one of " + ", ".join(choices), lambda value: value in choices)


def unsupported_path_characters(path: str) -> str:
    """Return the characters of a project's path with which DVC cannot copy the project.

    DVC copies it for `--temp`, `--queue` and each trial of `colintern tune`, and writes the path into an ASCII file and
    into a file:// address.

    >>> unsupported_path_characters("/home/jürgen/c#/retriever")
    'ü#'
    """
    return "".join(dict.fromkeys(char for char in path if not char.isascii() or char in "#?"))


def parse_mixture(train_data: str) -> list[tuple[str, int]]:
    """Split `train_data` into data sets and weights: "a*2 + b" is [("a", 2), ("b", 1)]; [] if it is invalid."""
    pattern = r"\s*(\S.*?)(?:\*([1-9]\d{0,2}))?\s*"
    matches = [re.fullmatch(pattern, part) for part in re.split(r"\s\+\s", train_data)]
    parts = [(match[1], int(match[2] or 1)) for match in matches if match and "*" not in match[1]]
    return parts if len({name for name, _ in parts}) == len(matches) else []


def is_hub_id(text: str) -> bool:
    """Check for OWNER/NAME as huggingface_hub's validate_repo_id accepts it: `./base` and `../base` are paths."""
    pattern = r"(?!.*(--|\.\.|\.git$))\b[\w.-]+\b/\b[\w.-]{1,96}\b"
    return re.fullmatch(pattern, text, re.ASCII) is not None


def split_kernel(attention: str) -> tuple[str, str] | None:
    """Split `attention` into hub id and commit of a kernel repository; None if it names none."""
    name, _, commit = attention.partition("@")
    return (name, commit) if is_hub_id(name) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _is_regex(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):  # ((((... and a{99999999999}
        return False
    return bool(pattern)


POSITIVE = Rule("above 0", lambda value: value > 0)
NON_EMPTY = Rule("not empty", lambda value: bool(value.strip()))
REVISION = Rule('40 hex digits, or ""', lambda value: re.fullmatch(r"([0-9a-f]{40})?", value) is not None)
MIXTURE = Rule(
    "a data set, or several different ones as `a*2 + b`, weights 1 to 999", lambda text: bool(parse_mixture(text))
)
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")
KERNEL = Rule(
    f"one of {', '.join(ATTENTION)}, or a kernel repository of the hub at a commit, OWNER/NAME@<40 hex digits>",
    lambda value: value in ATTENTION or split_kernel(value) is not None,
)
LAYERS = Rule("1 to 1000 where it is a number of layers", lambda value: isinstance(value, bool) or 0 < value <= 1000)
LAUNCH = Rule(
    "1 to 4096 where it is a number", lambda value: value == "auto" if isinstance(value, str) else 0 < value <= 4096
)
PATTERN = Rule("a regular expression that compiles (any text is .* in it, not *)", _is_regex)
