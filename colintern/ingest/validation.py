"""Decide which data is refused: what is left out row by row, and what stops the run before anything is trained.

A training row that cannot be used is quarantined and costs one row. An evaluation set must be complete, or its scores
would be those of another set; and no page may be in two splits.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.formats import check_beir_layout, get_benchmark_label, get_task_name, normalize_id
from colintern.ingest.documents import find_query_error
from colintern.ingest.scan import DatasetSplit, RowInfo, ScannedRows, read_beir_table
from colintern.ingest.user_documents import UserDocuments
from colintern.storage.manifest import FilesEntry

BOUNDED_KINDS = ("rows", "pages", "questions")  # those that `max_bad_fraction` bounds; outline entries are only named
BEIR_KEYS = {"corpus": ["corpus-id"], "queries": ["query-id"], "qrels": ["query-id", "corpus-id"]}
MAX_RELEVANCE = 1000  # pytrec_eval allocates memory by the size of a score
SPLIT_ORDER = {"corpus": 0, "train": 0, "dev": 1, "test": 2}


class QuarantinedRow(NamedTuple):
    """A row that is left out, as in data/quarantine.json; `kind`: rows, pages, questions, or a part of a PDF."""

    source: str
    kind: str
    row: str
    reason: str


class Quarantine(NamedTuple):
    """The rows that are left out, and how many rows of each kind each source has: (source, kind) -> count."""

    rows: list[QuarantinedRow]
    totals: Counter[tuple[str, str]]


def collect_quarantine(scanned: ScannedRows, documents: Mapping[str, UserDocuments]) -> Quarantine:
    """Collect the rows that are left out: of `scanned` data, and of folders of `documents` when they were converted."""
    totals: Counter[tuple[str, str]] = Counter()
    rows = []
    for name, converted in documents.items():
        totals.update({(name, kind): count for kind, count in converted.summary["rows"].items()})
        bad = converted.summary["bad"]
        rows += [QuarantinedRow(name, row["kind"], row["where"], row["reason"]) for row in bad]
    for split, split_rows in scanned.items():
        kind = "rows" if split.split in ("train", "dev") else "pages"
        if split.name not in documents:
            totals[split.name, kind] += len(split_rows)
        rows += [QuarantinedRow(split.name, kind, row.where, row.error) for row in split_rows if row.error]
    return Quarantine(rows, totals)


def check_benchmarks(benchmarks: Sequence[str], evaluation: Mapping[str, FilesEntry]) -> None:
    """Check layout and names of the local evaluation sets of the manifest, before their rows are read.

    Raises:
        UserError: a folder that mteb would not load, or two entries that would write to one place.
    """
    hub_tasks = [name for name, entry in evaluation.items() if entry["revision"]]
    names = {name: name for name in (*hub_tasks, *(name for name in benchmarks if name not in evaluation))}
    for entry, files in evaluation.items():
        if files["revision"]:
            continue
        folder = root() / files["folder"]
        check_beir_layout(folder)
        for name in (get_benchmark_label(entry, folder), get_task_name(entry, folder)):
            if names.setdefault(name, entry) != entry:
                raise UserError(f"benchmarks: {names[name]} and {entry} would both be called {name}; rename one")


def validate_data(scanned: ScannedRows, quarantine: Quarantine, max_bad_fraction: float) -> None:
    """Refuse data that must not be trained on or evaluated on; see the functions it calls."""
    for split, rows in scanned.items():
        if split.split == "test":
            if bad := [row for row in rows if row.error]:
                raise UserError(
                    f"benchmarks: {split.name}: {bad[0].where}: {bad[0].error} ({len(bad)} such pages); an evaluation "
                    f"set must be whole"
                )
            validate_judgments(split)
    check_bad_fraction(quarantine, max_bad_fraction)
    for split, rows in scanned.items():
        if split.split in ("train", "dev") and all(row.error for row in rows):
            raise UserError(
                f"train_data: {split}: has no row that can be used, in {len(split.files)} parquet files"
                f"{' (' + ', '.join(split.files[:3]) + ')' if split.files else ''}; names of files must say train, and "
                f"validation or test for the dev set"
            )
    check_split_overlap(scanned)


def validate_judgments(split: DatasetSplit) -> None:
    """Compare the queries and qrels of a local evaluation set with each other and its pages, as mteb will.

    Raises:
        UserError: a table without rows, an id given twice or of a type that is not an id, an empty query, a query for
            which no qrel names a page with a score above 0, a page with two scores for one query, or a qrel whose score
            is not a small whole number or whose query or page is missing.
    """
    more_columns = {"corpus": [], "queries": ["query"], "qrels": ["score"]}
    tables = {table: read_beir_table(split, table, keys + more_columns[table]) for table, keys in BEIR_KEYS.items()}
    errors = [f"{table}: has no rows" for table, rows in tables.items() if not rows]
    types = {(t, key): type(rows[0][key]).__name__ for t, rows in tables.items() for key in BEIR_KEYS[t] if rows}
    for table, rows in tables.items():
        for number, row in enumerate(rows):
            for key in BEIR_KEYS[table]:
                try:
                    row[key] = normalize_id(row[key])
                except ValueError as error:
                    errors.append(f"{table}: row {number}: {key} {error}")
    for table, key in (("corpus", "corpus-id"), ("queries", "query-id")):
        counts = Counter(row[key] for row in tables[table])
        errors += [f"{key} {value} is in {n} rows" for value, n in counts.items() if n > 1]
    if errors := errors or [*_iter_judgment_errors(tables, types)]:
        raise UserError(
            f"benchmarks: {split.name}: {errors[0]} ({len(errors)} such rows); an evaluation set must be whole"
        )


def _iter_judgment_errors(tables: dict[str, list[dict[str, Any]]], types: dict[tuple[str, str], str]) -> Iterator[str]:
    queries = {row["query-id"] for row in tables["queries"]}
    pages = {row["corpus-id"] for row in tables["corpus"]}
    scores: dict[tuple[str, str], object] = {}
    judged = set()
    compared = "ids are compared as text, qrels has them as"
    for row in tables["qrels"]:
        query, page, score = row["query-id"], row["corpus-id"], row["score"]
        if (first := scores.setdefault((query, page), score)) != score:  # mteb would take the last
            yield f"qrels: the page {page} of query {query} has the scores {first} and {score}"
        if error := find_score_error(score):
            yield f"qrels: the score {score!r:.80} of query {query} is {error}"
        elif score > 0:
            judged.add(query)
        if query not in queries:
            kinds = f"{types['qrels', 'query-id']}, queries as {types['queries', 'query-id']}"
            yield f"qrels: query {query!r} is not among the queries; {compared} {kinds}"
        if page not in pages:
            kinds = f"{types['qrels', 'corpus-id']}, the corpus as {types['corpus', 'corpus-id']}"
            yield f"qrels: the page {page!r} of query {query!r} is not in the corpus; {compared} {kinds}"
    for row in tables["queries"]:
        if error := find_query_error(row["query"]):
            yield f"query {row['query-id']}: {error}"
        if row["query-id"] not in judged:
            yield f"query {row['query-id']}: no qrel names a page for it with a score above 0"


def find_score_error(score: object) -> str:
    """Return why a qrel's score cannot be used, "" if it can."""
    if isinstance(score, bool) or not isinstance(score, int | float) or (isinstance(score, float) and score % 1 != 0):
        return "no whole number"
    return "" if abs(score) <= MAX_RELEVANCE else f"not from -{MAX_RELEVANCE} to {MAX_RELEVANCE}"


def check_bad_fraction(quarantine: Quarantine, max_bad_fraction: float) -> None:
    """Check that at most this fraction of a source's rows, pages or questions is left out."""
    # A line may have several errors.
    places = {(row.source, row.kind, row.row) for row in quarantine.rows if row.kind in BOUNDED_KINDS}
    for (source, kind), count in Counter((source, kind) for source, kind, _ in sorted(places)).items():
        if count > max_bad_fraction * (total := quarantine.totals[source, kind]):
            rows = [row for row in quarantine.rows if (row.source, row.kind) == (source, kind)]
            first = "".join(f"\n  {row.row}: {row.reason}" for row in rows[:5])
            note = " (a bad page counts in each row that names it)" if kind == "rows" else ""
            raise UserError(
                f"{source}: {count} of {total} {kind} cannot be used, more than max_bad_fraction: {max_bad_fraction}"
                f"{note}; all are named in data/quarantine.json; the first:{first}"
            )


def check_split_overlap(scanned: ScannedRows) -> None:
    """Check that no page, by its bytes, is in two of train, dev and an evaluation set, or in a corpus and the latter.

    A hub data set's own train and dev split are left as they are published. An evaluation set made from the folder
    that is trained on ranks all of its pages, and `divide_pairs` keeps those that answer its queries apart.
    """
    for first, second in permutations(scanned, 2):
        is_published = first.is_published and first.name == second.name
        is_divided = second.split == "test" and first.name == second.name
        # Pages of a corpus are those of the rows that name them, in whichever of train and dev these are.
        is_corpus_of_dev = first.split == "corpus" and second.split == "dev"
        if SPLIT_ORDER[first.split] >= SPLIT_ORDER[second.split] or is_published or is_divided or is_corpus_of_dev:
            continue
        rows: dict[str, RowInfo] = {row.key: row for row in scanned[first] if not row.error}
        shared = [(rows[row.key], row) for row in scanned[second] if not row.error and row.key in rows]
        if shared:
            row, other = shared[0]
            raise UserError(
                f"the same page is in {first}, {row.where}, and in {second}, {other.where} "
                f"({len({row.key for _, row in shared})} such pages); take them out of one of the two"
            )
