"""Train, dev or test: which split a page of the user's own documents belongs to. No page and no query is in two."""

from collections.abc import Sequence

from colintern.data.collected import Ask, Stored
from colintern.data.pseudo import squeeze
from colintern.params import UserError

SHARES = {"test": 0.3, "dev": 0.1, "train": 0.6}  # of the pages whose split no row names


def assign(
    folder: str,
    pages: dict[str, Stored],
    asks: Sequence[Ask],
    fixed: dict[str, list[tuple[str, str]]],
    names: dict[str, str],
) -> dict[str, str]:
    """Page to split. Pages that share a query stay together; where no row names a split, a hash of the page decides.

    Raises:
        UserError: rows put pages that are equal, or share a query, into two splits.
    """
    group = {name: name for name in pages}

    def head(name: str) -> str:
        while group[name] != name:
            group[name] = name = group[group[name]]
        return name

    asked: dict[str, str] = {}
    for ask in asks:
        group[head(ask.page)] = head(asked.setdefault(squeeze(ask.query) or ask.query, ask.page))
    named: dict[str, tuple[str, str]] = {}
    for name, splits in fixed.items():
        for split, where in splits:
            known, before = named.setdefault(head(names[name]), (split, where))
            if known != split:
                raise UserError(
                    f"{folder}: {before} is in {known}, {where} in {split}, but they show the same page or "
                    f"ask the same query; a page and all its queries belong to one split"
                )
    keys: dict[str, str] = {}
    for name, page in pages.items():
        keys[head(name)] = min(page.key, keys.get(head(name), page.key))
    return {name: named[head(name)][0] if head(name) in named else _drawn(keys[head(name)]) for name in pages}


def _drawn(key: str) -> str:
    place = int(key[:8], 16) / 16**8
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"
