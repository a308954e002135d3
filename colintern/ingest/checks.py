"""Which data is refused: what costs a row, and what stops the run before anything is trained or measured.

A training row that cannot be used is quarantined: it costs one row. An evaluation set has to be whole, or its numbers
would be another set's; and no page may be in two splits.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.formats import called, check_beir, id_text
from colintern.ingest.collected import query_fault
from colintern.ingest.own import Own
from colintern.ingest.scan import Part, Seen, rows_of

BOUNDED = ("rows", "pages", "questions")  # kinds that `max_bad_fraction` bounds; outline entries are only named
ID_COLUMNS = {"query-id", "corpus-id"}
MAX_RELEVANCE = 1000


def quarantine(
    seen: dict[Part, list[Seen]], own: dict[str, Own]
) -> tuple[list[dict[str, str]], dict[tuple[str, str], int]]:
    """What is left out, {source, kind, row, reason} each, and how many of each kind each source has.

    `own`: the folders of documents, whose bad rows were found when they were made. A kind is rows, pages or questions,
    which `check_share` bounds, or a part of a PDF that costs no page.
    """
    rows = Counter({(name, kind): n for name, folder in own.items() for kind, n in folder.summary["rows"].items()})
    bad = [
        {"source": name, "kind": row["kind"], "row": row["where"], "reason": row["reason"]}
        for name, folder in own.items()
        for row in folder.summary["bad"]
    ]
    for part, found in seen.items():
        kind = "rows" if part.split in ("train", "dev") else "pages"
        if part.name not in own:
            rows[part.name, kind] += len(found)
        bad += [
            {"source": part.name, "kind": kind, "row": row.where, "reason": row.fault} for row in found if row.fault
        ]
    return bad, rows


def check_benchmarks(benchmarks: Sequence[str], evaluation: dict[str, Any]) -> None:
    """Look at the layout and the names of local evaluation sets before their rows; `evaluation`: see the manifest.

    Raises:
        UserError: a folder that mteb would not load, or two entries that would write to one place.
    """
    hub = [name for name, entry in evaluation.items() if entry["revision"]]
    known = {name: name for name in (*hub, *(name for name in benchmarks if name not in evaluation))}
    for entry, files in evaluation.items():
        if files["revision"]:
            continue
        check_beir(root() / files["folder"])
        for name in called(entry, root() / files["folder"]):
            if known.setdefault(name, entry) != entry:
                raise UserError(f"benchmarks: {known[name]} and {entry} would both be called {name}; rename one")


def check(
    seen: dict[Part, list[Seen]], bad: Sequence[dict[str, str]], rows: dict[tuple[str, str], int], most: float
) -> None:
    """Refuse data that shall not be trained on or measured with; see the functions it calls.

    Raises:
        UserError: the first fault found.
    """
    for part, found in seen.items():
        if part.split == "test":
            check_whole(part, found)
            check_judgements(part)
    check_share(bad, rows, most)
    check_filled(seen)
    check_leaks(seen)


def check_whole(part: Part, found: Sequence[Seen]) -> None:
    """Raises UserError where an evaluation set has a page that cannot be read: without it, it is another set."""
    if bad := [row for row in found if row.fault]:
        raise UserError(
            f"benchmarks: {part.name}: {bad[0].where}: {bad[0].fault} ({len(bad)} such pages); an evaluation set must "
            f"be whole"
        )


def check_judgements(part: Part) -> None:
    """Compare the queries and qrels of a local evaluation set with each other and its pages, as mteb will.

    Raises:
        UserError: a table without rows, an id given twice or of a type that is no id, an empty query, a query for which
            no qrel names a page with a score above 0, a page with two scores for one query, or a qrel whose score is no
            small whole number or whose query or page is missing.
    """
    tables = {
        "corpus": rows_of(part, "corpus", ["corpus-id"]),
        "queries": rows_of(part, "queries", ["query-id", "query"]),
        "qrels": rows_of(part, "qrels", ["query-id", "corpus-id", "score"]),
    }
    faults = [f"{table}: has no rows" for table, rows in tables.items() if not rows]
    kinds = {table: _id_types(rows) for table, rows in tables.items()}
    for table, rows in tables.items():
        for number, row in enumerate(rows):
            for key in ID_COLUMNS & row.keys():
                try:
                    row[key] = id_text(row[key])
                except ValueError as error:
                    faults.append(f"{table}: row {number}: {key} {error}")
    for table, key in (("corpus", "corpus-id"), ("queries", "query-id")):
        counts = Counter(row[key] for row in tables[table])
        faults += [f"{key} {one} is in {n} rows" for one, n in counts.items() if n > 1]
    if not faults:
        faults = [*_qrel_faults(tables, kinds), *_query_faults(tables)]
    if faults:
        raise UserError(
            f"benchmarks: {part.name}: {faults[0]} ({len(faults)} such rows); an evaluation set must be whole"
        )


def _id_types(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the type of each id column, for messages."""
    return {key: type(rows[0][key]).__name__ for key in (ID_COLUMNS & rows[0].keys() if rows else ())}


def _query_faults(tables: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    asked = {row["query-id"] for row in tables["qrels"] if not relevance_fault(row["score"]) and row["score"] > 0}
    for row in tables["queries"]:
        if fault := query_fault(row["query"]):
            yield f"query {row['query-id']}: {fault}"
        if row["query-id"] not in asked:
            yield f"query {row['query-id']}: no qrel names a page for it with a score above 0"


def _qrel_faults(tables: dict[str, list[dict[str, Any]]], kinds: dict[str, dict[str, str]]) -> Iterator[str]:
    known = {
        key: {row[key] for row in tables[table]} for table, key in (("queries", "query-id"), ("corpus", "corpus-id"))
    }
    scores: dict[tuple[str, str], Any] = {}
    for row in tables["qrels"]:
        query, page = row["query-id"], row["corpus-id"]
        if scores.setdefault((query, page), row["score"]) != row["score"]:  # mteb would take the last
            two = f"{scores[query, page]} and {row['score']}"
            yield f"qrels: the page {page} of query {query} has the scores {two}"
        if fault := relevance_fault(row["score"]):
            yield f"qrels: the score {row['score']!r:.80} of query {query} is {fault}"
        types = f"qrels has them as {kinds['qrels']['query-id']}, queries as {kinds['queries']['query-id']}"
        if query not in known["query-id"]:
            yield f"qrels: query {query!r} is not among the queries; ids are compared as text, {types}"
        types = f"qrels has them as {kinds['qrels']['corpus-id']}, the corpus as {kinds['corpus']['corpus-id']}"
        if page not in known["corpus-id"]:
            yield f"qrels: the page {page!r} of query {query!r} is not in the corpus; ids are compared as text, {types}"


def relevance_fault(score: Any) -> str:
    """Say why a qrel's score cannot be used, "" if it can: pytrec_eval allocates memory by its size."""
    if isinstance(score, bool) or not isinstance(score, int | float) or (isinstance(score, float) and score % 1 != 0):
        return "no whole number"
    return "" if abs(score) <= MAX_RELEVANCE else f"not from -{MAX_RELEVANCE} to {MAX_RELEVANCE}"


def check_share(bad: Sequence[dict[str, str]], rows: dict[tuple[str, str], int], most: float) -> None:
    """Stop where more than the share `most` of a source's rows, pages or questions is bad; `rows`: how many it has.

    Raises:
        UserError: with the source, the numbers and the first rows.
    """
    bounded = [entry for entry in bad if entry["kind"] in BOUNDED]
    places = {(entry["source"], entry["kind"], entry["row"]) for entry in bounded}  # a line may have several faults
    for (source, kind), count in Counter((source, kind) for source, kind, _ in sorted(places)).items():
        if count > most * rows[source, kind]:
            found = [e for e in bad if (e["source"], e["kind"]) == (source, kind)]
            first = "".join(f"\n  {e['row']}: {e['reason']}" for e in found[:5])
            counted = " (a bad page counts in each row that names it)" if kind == "rows" else ""
            raise UserError(
                f"{source}: {count} of {rows[source, kind]} {kind} cannot be used, more than max_bad_fraction: {most}"
                f"{counted}; all are named in data/quarantine.json; the first:{first}"
            )


def check_filled(seen: dict[Part, list[Seen]]) -> None:
    """Raises UserError where a training set has no row for training, or none for the dev set."""
    for part, found in seen.items():
        if part.split in ("train", "dev") and all(row.fault for row in found):
            raise UserError(
                f"train_data: {part}: has no row that can be used, in {len(part.files)} parquet files"
                f"{' (' + ', '.join(part.files[:3]) + ')' if part.files else ''}; names of files must say train, and "
                f"validation or test for the dev set"
            )


def check_leaks(seen: dict[Part, list[Seen]]) -> None:
    """No page, by its bytes, in two of train, dev and an evaluation set; nor in a corpus and an evaluation set.

    A hub data set's own train and dev split are left as they are published.

    Raises:
        UserError: names both rows.
    """
    for left, right in _pairs(seen):
        first = {row.key: row for row in seen[left] if not row.fault}
        both = [(first[row.key], row) for row in seen[right] if not row.fault and row.key in first]
        if both:
            mine, other = both[0]
            raise UserError(
                f"the same page is in {left}, {mine.where}, and in {right}, {other.where} "
                f"({len({row.key for _, row in both})} such pages); take them out of one of the two"
            )


def _pairs(parts: Iterable[Part]) -> Iterator[tuple[Part, Part]]:
    order = {"corpus": 0, "train": 0, "dev": 1, "test": 2}
    ranked = sorted(parts, key=lambda part: order[part.split])
    for left in ranked:
        for right in ranked:
            same_hub = left.fixed and left.name == right.name
            # Pages of a corpus are those of the rows that name them, in whichever of train and dev these are.
            of_rows = left.split == "corpus" and right.split == "dev"
            if order[left.split] < order[right.split] and not same_hub and not of_rows:
                yield left, right
