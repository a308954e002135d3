"""Divide the pages and queries of a folder of documents into train, dev and test.

Given questions are the test set unless their row names a split, and pseudo-queries fill train and dev: a score should
come from questions that people ask, and training can do with more. Without given questions a hash decides.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from colintern.core.errors import UserError
from colintern.ingest.documents import GIVEN, QueryPagePair, RawDocuments, StoredImage, normalize_query

SPLIT_SHARES = {"test": 0.3, "dev": 0.1, "train": 0.6}  # of the pages, or documents, whose split nothing else decides


class DividedPairs(NamedTuple):
    """The split of each page, the pairs of each split, and how many pseudo-queries no split has."""

    split_of: dict[str, str]
    pairs: dict[str, list[QueryPagePair]]
    num_unused: int


class PageGroups:
    """Pages that belong to one split: those that share a query, and those of one document where asked for."""

    def __init__(self, pages: Iterable[str]):
        self.parents = {name: name for name in pages}

    def find_group(self, name: str) -> str:
        """Return the page that stands for the group of a page."""
        while self.parents[name] != name:
            self.parents[name] = name = self.parents[self.parents[name]]
        return name

    def join_pages(self, labels: Iterable[tuple[str, str]]) -> None:
        """Join the pages that have one label, of (label, page)."""
        first: dict[str, str] = {}
        for label, page in labels:
            self.parents[self.find_group(page)] = self.find_group(first.setdefault(label, page))


def divide_pairs(
    folder: str,
    raw: RawDocuments,
    pages: dict[str, StoredImage],
    pairs: Sequence[QueryPagePair],
    first_names: dict[str, str],
    split_by: str,
    train_on_test_pages: bool,
) -> DividedPairs:
    """Divide pages and pairs; no query is in two splits, and no page unless `train_on_test_pages`.

    Args:
        folder: name of the folder in messages.
        raw: what was read.
        pages: distinct pages by name.
        pairs: distinct pairs.
        first_names: name in `pages` of each page of `raw`.
        split_by: page or document.
        train_on_test_pages: pseudo-queries of pages of the test set are used for training.

    Raises:
        UserError: rows put pages that are equal, share a query, or are of one document into two splits.
    """
    groups = PageGroups(pages)
    groups.join_pages((normalize_query(pair.query), pair.page) for pair in pairs)
    if split_by == "document":
        groups.join_pages((document, first_names[page]) for page, document in raw.document_of.items())
    named = _read_named_splits(folder, raw, groups, first_names)
    used = list(pairs)
    if {"train", "dev"} <= {split for splits in raw.named_splits.values() for split, _ in splits}:
        used = [pair for pair in pairs if pair.kind == GIVEN]  # they suffice
    asked = {groups.find_group(pair.page) for pair in used if pair.kind == GIVEN} if raw.has_pseudo_queries else set()
    tested = {group for group in asked if named.get(group, "test") == "test"}
    splits = _choose_splits(groups, pages, used, named, tested)
    by_split: dict[str, list[QueryPagePair]] = {"train": [], "dev": [], "test": []}
    for pair in used:
        split = splits[groups.find_group(pair.page)]
        if split == "test" and pair.kind != GIVEN and tested:
            if not train_on_test_pages:
                continue
            split = hash_split(pages[pair.page].key, has_test=True)
        by_split[split].append(pair)
    num_unused = len(pairs) - sum(map(len, by_split.values()))
    return DividedPairs({name: splits[groups.find_group(name)] for name in pages}, by_split, num_unused)


def _choose_splits(
    groups: PageGroups,
    pages: dict[str, StoredImage],
    pairs: Sequence[QueryPagePair],
    named: dict[str, str],
    tested: set[str],
) -> dict[str, str]:
    """Return the split of each group: as a row names it, test for those of given questions, else by a hash."""
    keys: dict[str, str] = {}
    for name, image in pages.items():
        group = groups.find_group(name)
        keys[group] = min(image.key, keys.get(group, image.key))
    splits = {
        group: named.get(group) or ("test" if group in tested else hash_split(key, has_test=bool(tested)))
        for group, key in keys.items()
    }
    trained = {group for pair in pairs if splits[group := groups.find_group(pair.page)] != "test"}
    free = sorted((keys[group], group) for group in trained if group not in named)
    if len(trained) > 1 and free and not any(splits[group] == "dev" for group in trained):
        splits[free[0][1]] = "dev"  # training needs at least one
    return splits


def _read_named_splits(
    folder: str, raw: RawDocuments, groups: PageGroups, first_names: dict[str, str]
) -> dict[str, str]:
    named: dict[str, tuple[str, str]] = {}
    for name, splits in raw.named_splits.items():
        for split, where in splits:
            first_split, first_where = named.setdefault(groups.find_group(first_names[name]), (split, where))
            if first_split != split:
                raise UserError(
                    f"{folder}: {first_where} is in {first_split}, {where} in {split}, but they show the same page, "
                    "ask the same query, or are of one document (split_by: document); all of it belongs to one split"
                )
    return {group: split for group, (split, _) in named.items()}


def hash_split(key: str, has_test: bool = False) -> str:
    """Return the split that a sha256 decides, with the probabilities `SPLIT_SHARES`.

    Args:
        key: sha256 of a page.
        has_test: the test set is given, and only train and dev are drawn.
    """
    shares = {split: share for split, share in SPLIT_SHARES.items() if split != "test" or not has_test}
    rest = int(key[:8], 16) / 16**8 * sum(shares.values())
    for split, share in shares.items():
        if rest < share:
            return split
        rest -= share
    return "train"
