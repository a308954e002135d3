"""The user's own documents, made into the two layouts that training and evaluation read.

A folder of PDFs, or of JSON lines and images, becomes `data/own/.made/<folder>/<key>/train` and `beir`, split by page.
The key is a hash of every file of the folder and of the code that reads it: the same folder is made once, a changed one
again. The pages that a stage has last read are kept beside the new ones, and any others as long as a process reads
them. Rendered pages are kept apart, by the content of their PDF, so that only what is new is rendered. Deleting
`data/own/.made` costs only the time to make it.
"""

import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.data.formats import CorpusPage, Qrel, Query, TrainingRow, write_beir, write_training_split
from colintern.ingest.collected import MAX_QUERY_CHARACTERS, SPLITS, Ask, Collected, Shelf, Stored
from colintern.ingest.splits import assign
from colintern.storage.files import LINKED_FOLDER, dumps, list_files
from colintern.storage.identity import code_hashes, content_hash
from colintern.storage.lock import get_last_use, is_in_use, locked
from colintern.storage.manifest import BEIR_SUFFIXES, TRAIN_SUFFIXES, Files, hash_local_files, hash_source_files, root

MADE = "data/own/.made"
RENDERED = "rendered"  # beside the keys of a folder, see `rendered.py`
CODE = ("colintern.ingest.own", "colintern.ingest.pdfs", "colintern.ingest.jsonl")
LIBRARIES = ("pypdfium2", "pillow", "pyarrow")


class Own(NamedTuple):
    """A folder as parquet: where it lies, what it was made from, and what came of its rows (see `_write`)."""

    made: str
    made_from: dict[str, Any]
    summary: dict[str, Any]

    def files(self, part: str) -> Files:
        """The files of `part`, train or beir.

        Raises:
            UserError: the folder gave no rows for it.
        """
        if part not in self.summary["parts"]:
            bad = self.summary["bad"]
            first = "".join(f"\n  {row['where']}: {row['reason']}" for row in bad[:5])
            raise UserError(
                f"{self.made_from['folder']}: cannot be used as {'train_data' if part == 'train' else 'benchmarks'}; "
                f"queries by split: {self.summary['queries']}; training needs train and dev, evaluation test; pages "
                f"that share a query are in one split" + (f"; {len(bad)} bad rows, the first:{first}" if bad else "")
            )
        suffixes = TRAIN_SUFFIXES if part == "train" else BEIR_SUFFIXES
        made_from = self.made_from | {"pseudo": set(self.summary["kinds"]) != {"given"}}
        return hash_local_files(f"{self.made}/{part}", suffixes)._replace(made_from=made_from)


def make(folder: str, collect: Callable[[Path, Shelf], Collected]) -> Own:
    """The folder as parquet, made now unless it was made before from the same files.

    Raises:
        UserError: nothing usable in it, or rows that put one page or one query into two splits.
    """
    made_from = {"folder": folder, "files": hash_source_files(folder)}
    refused = list_files(root() / folder).refused  # named with what is not read
    linked = [name if kind == LINKED_FOLDER else f"{name} ({kind})" for name, kind in refused.items()]
    facts = {
        "files": made_from["files"],
        "linked": linked,
        "code": code_hashes(*CODE),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    # The hash: names that differ in other letters alone would delete each other's pages.
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', folder).strip('-.')}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    made = f"{MADE}/{name}/{key}"
    home = root() / made
    with locked(home.parent / "make.lock"):
        summary = _known(home)
        if summary is None:
            _remove([home, *home.parent.glob("*.partial")])  # damaged, or left by a process that was killed
            summary = _write(home, folder, collect, {*made_from["files"], *linked})
            older = [path for path in home.parent.iterdir() if path.is_dir() and path.name not in (key, RENDERED)]
            _remove(path for path in sorted(older, key=get_last_use)[:-1] if not is_in_use(path))
            if not any(name.lower().endswith(".pdf") for name in made_from["files"]):
                _remove([home.parent / RENDERED])
    print(_words(folder, summary))
    return Own(made, made_from, summary)


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _known(home: Path) -> dict[str, Any] | None:
    """The summary of what is there already, None if there is nothing or not what was written."""
    try:
        summary = json.loads((home / "summary.json").read_text(encoding="utf-8"))
        same = all(content_hash(home / name) == known for name, known in summary["files"].items())
    except (OSError, ValueError):
        return None
    return summary if same else None


def _write(
    home: Path, folder: str, collect: Callable[[Path, Shelf], Collected], there: Collection[str]
) -> dict[str, Any]:
    """Read the folder, in which `there` is, and write its parts; the result appears whole or not at all."""
    partial = home.with_suffix(".partial")
    shelf = Shelf(partial / "shelf", home.parent / RENDERED)
    shelf.folder.mkdir(parents=True)
    found = collect(root() / folder, shelf)
    pages, asks, names = _distinct(found)
    split_of = assign(folder, pages, asks, found.fixed, names)
    by_split = {split: [ask for ask in asks if split_of[ask.page] == split] for split in SPLITS}
    parts = []
    if by_split["train"] and by_split["dev"]:
        for split, part in (("train", "train"), ("test", "dev")):  # the hub's training sets call the dev set test
            _write_training(partial / "train", split, by_split[part], pages, Path(folder).name)
        parts.append("train")
    if by_split["test"]:
        corpus = [name for name in pages if split_of[name] == "test"]
        _write_beir(partial / "beir", corpus, by_split["test"], pages)
        parts.append("beir")
    shutil.rmtree(shelf.folder)
    asked = {ask.page for ask in asks}
    summary = {
        "parts": parts,
        "pages": dict(Counter(split_of.values())),
        "queries": {split: len(rows) for split, rows in by_split.items()},
        "rows": dict(found.rows),
        "bad": [bad._asdict() for bad in found.bad],
        "same pages": len(found.pages) - len(pages),
        "same queries": len(found.asks) - len(asks),
        "cut queries": found.cut_queries,
        "pages without a query": sum(name not in asked for name in pages),
        "kinds": dict(sorted(Counter(ask.kind for ask in asks).items())),
        "unknown keys": sorted(found.unknown),
        "not read": sorted(set(there) - found.read),
        "files": {
            p.relative_to(partial).as_posix(): content_hash(p) for p in sorted(partial.rglob("*")) if p.is_file()
        },
    }
    (partial / "summary.json").write_text(dumps(summary), encoding="utf-8")
    os.utime(partial, (0, 0))  # no stage has read it, see `get_last_use`
    os.replace(partial, home)
    return summary


def _distinct(found: Collected) -> tuple[dict[str, Stored], list[Ask], dict[str, str]]:
    """Pages and asks, equal ones once, under the first name; and that name for each page."""
    first: dict[str, str] = {}
    names = {name: first.setdefault(page.key, name) for name, page in found.pages.items()}
    pages = {name: found.pages[name] for name in first.values()}
    order = {name: number for number, name in enumerate(pages)}
    asks = dict.fromkeys(ask._replace(page=names[ask.page]) for ask in found.asks)
    return pages, sorted(asks, key=lambda ask: order[ask.page]), names


class _Lazy(Sequence):
    """Rows whose images are read when they are written: never more than a row group is in memory."""

    def __init__(self, length: int, row: Callable[[int], Any]):
        self.length, self.row = length, row

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: Any) -> Any:
        return self.row(range(self.length)[index])


def _write_training(folder: Path, split: str, asks: Sequence[Ask], pages: dict[str, Stored], source: str) -> None:
    @lru_cache(maxsize=1)  # the rows of a page stand next to each other
    def read_page(name: str) -> bytes:
        return pages[name].path.read_bytes()

    def row(index: int) -> TrainingRow:
        ask = asks[index]
        origin = source if ask.kind == "given" else f"{source} (pseudo-query: {ask.kind})"
        return TrainingRow(read_page(ask.page), ask.page, ask.query, source=origin)

    write_training_split(folder, split, _Lazy(len(asks), row))


def _write_beir(folder: Path, corpus: Sequence[str], asks: Sequence[Ask], pages: dict[str, Stored]) -> None:
    page_ids = {name: number for number, name in enumerate(corpus)}
    query_ids = {query: number for number, query in enumerate(dict.fromkeys(ask.query for ask in asks))}

    def page(index: int) -> CorpusPage:
        return CorpusPage(index, pages[corpus[index]].path.read_bytes(), corpus[index])

    write_beir(
        folder,
        _Lazy(len(corpus), page),
        [Query(number, query) for query, number in query_ids.items()],
        [Qrel(query_ids[ask.query], page_ids[ask.page]) for ask in asks],
        pseudo=any(ask.kind != "given" for ask in asks),
    )


def _words(folder: str, summary: dict[str, Any]) -> str:
    """What came of a folder, for the terminal."""
    parts = [f"{split} {summary['pages'].get(split, 0)}/{summary['queries'][split]}" for split in SPLITS]
    bad = Counter(kind for _, kind in {(row["where"], row["kind"]) for row in summary["bad"]})
    shares = ", ".join(f"{bad[kind]} bad of {count} {kind}" for kind, count in summary["rows"].items())
    lines = [f"{folder}: pages/queries: {', '.join(parts)}; {shares}"]
    counted = ("same pages", "same queries", "pages without a query")
    lines += [f"  {name}: {summary[name]}" for name in counted if summary[name]]
    if summary["cut queries"]:
        lines.append(f"  queries cut to {MAX_QUERY_CHARACTERS} characters: {summary['cut queries']}")
    pseudo = {kind: count for kind, count in summary["kinds"].items() if kind != "given"}
    if pseudo:
        lines.append("  pseudo-queries, made by a program: " + ", ".join(f"{n} {kind}s" for kind, n in pseudo.items()))
    if keys := summary["unknown keys"]:
        lines.append(f"  keys of rows without effect: {', '.join(keys[:20])}{', ...' if keys[20:] else ''}")
    if unread := summary["not read"]:
        lines.append(f"  not read: {len(unread)}, {', '.join(unread[:5])}{', ...' if unread[5:] else ''}")
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # a key may hold half a character
