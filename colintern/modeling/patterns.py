r"""How an entry of lora_targets reads: a regular expression, matched against whole module names.

The guide writes shell patterns, `language_model.layers.*.self_attn.q_proj`. As a regular expression that one happens to
match the same modules, since `.*` is any text; `layers.1*.self_attn` does not, since `1*` is a row of ones.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from fnmatch import fnmatchcase

RANGE = re.compile(r"\\?\{\d+(?:\.\.|\\\.\\\.)\d+\\?\}")  # {0..27}, which a shell understands


def matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that the regular expression matches whole; none if it is no regular expression."""
    try:
        return {name for name in names if re.fullmatch(pattern, name)}
    except re.error:
        return set()


def reading(target: str, names: Iterable[str]) -> str:
    """`as a glob` where a shell's pattern would match the same of the names, `not as a glob` where it would match
    others, `as a regular expression` where the target is no shell's pattern."""
    names = set(names)
    meant = {name for name in names if fnmatchcase(name, target)}
    if "*" not in target or re.search(r"[\\()|+^$]", target) or not meant:
        return "as a regular expression"
    return "as a glob" if meant == matching(target, names) else "not as a glob"


def suggestion(target: str, names: Iterable[str]) -> str:
    """The pattern for what the target probably means: read without its range, as a glob, or below language_model; else
    the nearest there is."""
    names = sorted(names)
    plain = re.sub(r"^\^?(?:model\\?\.)?", "", target)
    ranged = RANGE.sub(lambda _: r"\d+", plain)
    globbed = re.sub(r"(?<![.\])])\*", ".*", ranged)
    for prefix in ("", r"language_model\.", r"language_model\..*\."):
        for body in (plain, ranged, globbed):
            if found := matching(prefix + body, names):
                exact = {_exact(name) for name in found}
                return exact.pop() if len(exact) == 1 else prefix + body
    readable = {re.sub(r"\.\d+\.", ".0.", name): _exact(name) for name in names}
    wanted = re.sub(r"\\d\+?|\.?\*", "0", ranged).replace("\\", "")
    [near] = get_close_matches(wanted, readable, n=1, cutoff=0.0)
    return readable[near]


def _exact(name: str) -> str:
    """The regular expression for a module in every layer."""
    return re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name))
