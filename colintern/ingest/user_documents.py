"""Convert a folder of the user's own documents into the two layouts that training and evaluation read.

A folder of PDFs, or of JSON lines and images, becomes `data/own/.made/<folder>/<key>/train` and `beir`. The evaluation
set ranks every page of the folder, and its queries are those of the test split, see `document_splits.py`. The key is a
hash of every file of the folder and of the code that reads it: an unchanged folder is converted once. The
pages that a stage has read last are kept beside the new ones, and any others as long as a process reads them. Rendered
pages are kept apart, by the content of their PDF. Deleting `data/own/.made` costs only the time to convert again.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.formats import CorpusPage, Qrel, Query, TrainingRow, write_beir, write_training_split
from colintern.ingest.document_splits import divide_pairs
from colintern.ingest.documents import (
    GIVEN,
    MAX_QUERY_CHARACTERS,
    SPLITS,
    ImageStore,
    QueryPagePair,
    RawDocuments,
    StoredImage,
)
from colintern.storage.files import LINKED_FOLDER, format_json, list_files
from colintern.storage.identity import code_hashes, content_hash
from colintern.storage.lock import get_last_use, hold_lock, is_in_use
from colintern.storage.manifest import BEIR_SUFFIXES, TRAIN_SUFFIXES, Files, Source, hash_local_files, hash_source_files

logger = logging.getLogger(__name__)
MADE = "data/own/.made"
RENDERED = "rendered"  # beside the keys of a folder, see `render_cache.py`
CODE = ("colintern.ingest.user_documents", "colintern.ingest.pdfs", "colintern.ingest.jsonl")
LIBRARIES = ("pypdfium2", "pillow", "pyarrow")

FEW_TRAINING_QUERIES = 64  # the batch of the real recipe
FEW_TEST_QUERIES = 100  # fewer have a standard error of 5 points and more

DocumentReader = Callable[[Path, ImageStore], RawDocuments]


class DivisionParams(NamedTuple):
    """The keys of params.yaml that divide a folder of documents."""

    split_by: str = "page"
    train_on_test_pages: bool = False


DEFAULT_DIVISION = DivisionParams()


class UserDocuments(NamedTuple):
    """A folder as parquet: its place, its source, and its counts and invalid rows (see `_convert_folder`)."""

    made: str
    made_from: Source
    summary: dict[str, Any]

    def list_dataset_files(self, part: str) -> Files:
        """Return the files of `part`, train or beir."""
        if part not in self.summary["parts"]:
            bad = self.summary["bad"]
            first = "".join(f"\n  {row['where']}: {row['reason']}" for row in bad[:5])
            raise UserError(
                f"{self.made_from['folder']}: cannot be used as {'train_data' if part == 'train' else 'benchmarks'}; "
                f"queries by split: {self.summary['queries']}; training needs train and dev, evaluation test; pages "
                "that share a query, and with split_by: document those of a document, are in one split"
                + (f"; {len(bad)} bad rows, the first:{first}" if bad else "")
            )
        suffixes = TRAIN_SUFFIXES if part == "train" else BEIR_SUFFIXES
        made_from: Source = {**self.made_from, "pseudo": part == "train" and self.summary["trains on pseudo-queries"]}
        return hash_local_files(f"{self.made}/{part}", suffixes)._replace(made_from=made_from)


def convert_documents(
    folder: str, reader: DocumentReader, division: DivisionParams = DEFAULT_DIVISION
) -> UserDocuments:
    """Convert a folder unless it was converted before from the same files, and print what is in it.

    Raises:
        UserError: rows put one page or one query into two splits; see also the readers.
    """
    made_from: Source = {"folder": folder, "files": hash_source_files(folder)}
    refused = list_files(root() / folder).refused  # named with what is not read
    linked = [name if kind == LINKED_FOLDER else f"{name} ({kind})" for name, kind in refused.items()]
    facts = {
        "files": made_from["files"],
        "linked": linked,
        "code": code_hashes(*CODE),
        "versions": {name: version(name) for name in LIBRARIES},
        "division": division,
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    # The hash: names that differ in other letters alone would delete each other's pages.
    name = f"{re.sub(r'[^A-Za-z0-9.]+', '-', folder).strip('-.')}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    made = f"{MADE}/{name}/{key}"
    target = root() / made
    with hold_lock(target.parent / "make.lock"):
        summary = _read_summary(target)
        if summary is None:
            _remove_folders([target, *target.parent.glob("*.partial")])  # damaged, or left by a process that was killed
            summary = _convert_folder(target, folder, reader, {*made_from["files"], *linked}, division)
            others = [path for path in target.parent.iterdir() if path.is_dir() and path.name not in (key, RENDERED)]
            _remove_folders(path for path in sorted(others, key=get_last_use)[:-1] if not is_in_use(path))
            if not any(name.lower().endswith(".pdf") for name in made_from["files"]):
                _remove_folders([target.parent / RENDERED])
    logger.info(_format_summary(folder, summary))
    return UserDocuments(made, made_from, summary)


def _remove_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _read_summary(target: Path) -> dict[str, Any] | None:
    """Return the summary of a converted folder, None if it is missing or its files are not those that were written."""
    try:
        summary = json.loads((target / "summary.json").read_text(encoding="utf-8"))
        is_intact = all(content_hash(target / name) == sha256 for name, sha256 in summary["files"].items())
    except (OSError, ValueError):
        return None
    return summary if is_intact else None


def _convert_folder(
    target: Path, folder: str, reader: DocumentReader, file_names: Collection[str], division: DivisionParams
) -> dict[str, Any]:
    """Read the folder, which holds `file_names`, and write its parts; `target` appears complete or not at all."""
    partial = target.with_suffix(".partial")
    store = ImageStore(partial / "images", target.parent / RENDERED)
    store.folder.mkdir(parents=True)
    raw = reader(root() / folder, store)
    pages, pairs, first_names = _deduplicate_pages(raw)
    split_of, by_split, num_unused = divide_pairs(folder, raw, pages, pairs, first_names, *division)
    training_pairs = by_split["train"] + by_split["dev"]
    num_shared = len({pair.page for pair in by_split["test"]} & {pair.page for pair in training_pairs})
    parts = []
    if by_split["train"] and by_split["dev"]:
        for hub_split, split in (("train", "train"), ("test", "dev")):  # training sets of the hub call the dev set test
            sources = {kind: f"{Path(folder).name} (pseudo-query: {kind})" for kind in ("heading", "sentence")}
            rows = [
                TrainingRow(pages[page].path, page, query, source=sources.get(kind, Path(folder).name))
                for query, page, kind in by_split[split]
            ]
            write_training_split(partial / "train", hub_split, rows)
        parts.append("train")
    if by_split["test"]:
        _write_evaluation_set(partial / "beir", pages, by_split["test"], raw.texts, num_shared)
        parts.append("beir")
    shutil.rmtree(store.folder)
    summary = {
        "parts": parts,
        "pages": dict(Counter(split_of.values())),
        # A training row is a pair; a query of several pages is judged once.
        "queries": {split: len(rows) for split, rows in by_split.items()}
        | {"test": len({pair.query for pair in by_split["test"]})},
        "rows": dict(raw.row_counts),
        "bad": [row._asdict() for row in raw.invalid_rows],
        "same pages": len(raw.pages) - len(pages),
        "same queries": len(raw.pairs) - len(pairs),
        "cut queries": raw.num_cut_queries,
        "pages without a query": len(pages.keys() - {pair.page for pair in pairs}),
        "pseudo-queries left out": num_unused,
        "test pages that are trained on": num_shared,
        "trains on pseudo-queries": any(pair.kind != GIVEN for pair in training_pairs),
        "kinds": dict(sorted(Counter(pair.kind for rows in by_split.values() for pair in rows).items())),
        "unknown keys": sorted(raw.unknown_keys),
        "not read": sorted(set(file_names) - raw.read_files),
        "files": {
            path.relative_to(partial).as_posix(): content_hash(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file()
        },
    }
    (partial / "summary.json").write_text(format_json(summary), encoding="utf-8")
    os.utime(partial, (0, 0))  # no stage has read it, see `get_last_use`
    os.replace(partial, target)
    return summary


def _deduplicate_pages(raw: RawDocuments) -> tuple[dict[str, StoredImage], list[QueryPagePair], dict[str, str]]:
    """Return pages and pairs, equal ones once, under the name of the first; and that name for each page."""
    first: dict[str, str] = {}
    first_names = {name: first.setdefault(page.key, name) for name, page in raw.pages.items()}
    pages = {name: raw.pages[name] for name in first.values()}
    order = {name: number for number, name in enumerate(pages)}
    pairs = dict.fromkeys(pair._replace(page=first_names[pair.page]) for pair in raw.pairs)
    return pages, sorted(pairs, key=lambda pair: order[pair.page]), first_names


def _write_evaluation_set(
    folder: Path,
    corpus: dict[str, StoredImage],
    pairs: Sequence[QueryPagePair],
    texts: dict[str, str],
    num_shared: int,
) -> None:
    page_ids = {name: number for number, name in enumerate(corpus)}
    query_ids = {query: number for number, query in enumerate(dict.fromkeys(pair.query for pair in pairs))}
    write_beir(
        folder,
        [CorpusPage(number, corpus[name].path, name, texts.get(name, "")) for name, number in page_ids.items()],
        [Query(number, query) for query, number in query_ids.items()],
        [Qrel(query_ids[pair.query], page_ids[pair.page]) for pair in pairs],
        pseudo=any(pair.kind != GIVEN for pair in pairs),
        num_trained_pages=num_shared,
    )


def _format_summary(folder: str, summary: dict[str, Any]) -> str:
    parts = [f"{split} {summary['pages'].get(split, 0)}/{summary['queries'][split]}" for split in SPLITS]
    bad = Counter(kind for _, kind in {(row["where"], row["kind"]) for row in summary["bad"]})
    shares = ", ".join(f"{bad[kind]} bad of {count} {kind}" for kind, count in summary["rows"].items())
    lines = [f"{folder}: pages/queries: {', '.join(parts)}; {shares}"]
    lines += _format_amounts(summary["queries"], sum(summary["pages"].values()))
    counted = ("same pages", "same queries", "pages without a query", "test pages that are trained on")
    lines += [f"  {name}: {summary[name]}" for name in (*counted, "pseudo-queries left out") if summary[name]]
    if summary["cut queries"]:
        lines.append(f"  queries cut to {MAX_QUERY_CHARACTERS} characters: {summary['cut queries']}")
    pseudo = {kind: count for kind, count in summary["kinds"].items() if kind != GIVEN}
    if pseudo:
        lines.append("  pseudo-queries, made by a program: " + ", ".join(f"{n} {kind}s" for kind, n in pseudo.items()))
    if keys := summary["unknown keys"]:
        lines.append(f"  keys of rows without effect: {', '.join(keys[:20])}{', ...' if keys[20:] else ''}")
    if unread := summary["not read"]:
        lines.append(f"  not read: {len(unread)}, {', '.join(unread[:5])}{', ...' if unread[5:] else ''}")
    return "\n".join(lines).encode(errors="backslashreplace").decode()  # a key may hold half a character


def _format_amounts(queries: Mapping[str, int], num_pages: int) -> list[str]:
    """Say what there is to train on and to evaluate on, and what is too little."""
    lines = [f"  to train on: {queries['train']} queries and {queries['dev']} dev queries"]
    if 0 < queries["train"] < FEW_TRAINING_QUERIES:
        lines.append(f"    few: batch_size can be at most {queries['train']}; give more questions or more PDFs")
    lines.append(f"  to evaluate on: {queries['test']} queries, {num_pages} pages ranked for each")
    if 0 < queries["test"] < FEW_TEST_QUERIES:
        # Scores are between 0 and 1, so that their standard deviation is at most 0.5.
        points = 50 / queries["test"] ** 0.5
        lines.append(f"    few: the standard error of an NDCG x 100 over them is up to {points:.0f}")
    return lines
