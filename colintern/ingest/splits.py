"""Train, dev or test: which split a page of the user's own documents, or a parquet file, belongs to."""

import re
from collections.abc import Iterable, Sequence

from colintern.core.errors import UserError
from colintern.ingest.collected import Ask, Stored, normalize_query

SHARES = {"test": 0.3, "dev": 0.1, "train": 0.6}  # of the pages whose split no row names
WORDS = {  # of `datasets`, which looks for them in the names of files and folders, and so do the users of its hub
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def assign(
    folder: str,
    pages: dict[str, Stored],
    asks: Sequence[Ask],
    fixed: dict[str, list[tuple[str, str]]],
    names: dict[str, str],
) -> dict[str, str]:
    """Page to split; no page and no query is in two.

    Pages that share a query stay together; where no row names a split, a hash of the page decides.

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
        group[head(ask.page)] = head(asked.setdefault(normalize_query(ask.query), ask.page))
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


def by_name(files: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """The parquet files of train and dev by their names, and those that are neither.

    Where no name says a split, all are train. The dev set is validation, or test where there is none, as in
    `vidore/colpali_train_set`.
    """
    found: dict[str, list[str]] = {split: [] for split in ("", *WORDS)}
    for file in sorted(files):
        folder, _, name = file.lower().rpartition("/")
        words = [word for text in (name, folder) for word in re.split(r"[-._ 0-9/]+", text)]
        found[next((split for word in words for split, its in WORDS.items() if word in its), "")].append(file)
    if not any(found[split] for split in WORDS):
        return {"train": found[""], "dev": []}, []
    dev, unread = (found["validation"], found["test"]) if found["validation"] else (found["test"], [])
    return {"train": found["train"], "dev": dev}, found[""] + unread
