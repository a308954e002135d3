"""Which data is refused: what costs a row, and what stops the run before anything is trained or measured.

A training row that cannot be used is quarantined: it costs one row. An evaluation set has to be whole, or its numbers
would be another set's; and no page may be in two splits.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from colintern.data.collected import query_fault
from colintern.data.formats import called, check_beir
from colintern.data.own import Own
from colintern.data.survey import Part, Seen, rows_of
from colintern.params import UserError, root


def quarantine(
    seen: dict[Part, list[Seen]], own: dict[str, Own]
) -> tuple[list[dict[str, str]], dict[tuple[str, str], int]]:
    """What is left out, {source, kind, row, reason} each, and how many of each kind each source has.

    `own`: the folders of documents, whose bad rows were found when they were made. A kind is rows, pages or questions.
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
    """Hold the queries and qrels of a local evaluation set against each other and its pages.

    Raises:
        UserError: a table without rows, an id given twice, an empty query, a query for which no qrel names a page with
            a score above 0, a page with two scores for one query, or a qrel whose score is no whole number or whose
            query or page is missing.
    """
    pages = rows_of(part, "corpus", ["corpus-id"])
    queries = rows_of(part, "queries", ["query-id", "query"])
    judged = rows_of(part, "qrels", ["query-id", "corpus-id", "score"])
    tables = {"corpus": pages, "queries": queries, "qrels": judged}
    faults = [f"{table}: has no rows" for table, rows in tables.items() if not rows]
    for key, rows in (("corpus-id", pages), ("query-id", queries)):
        faults += [f"{key} {one} is in {n} rows" for one, n in Counter(row[key] for row in rows).items() if n > 1]
    page_ids, query_ids = {row["corpus-id"] for row in pages}, {row["query-id"] for row in queries}
    asked = {row["query-id"] for row in judged if _whole(row["score"]) and row["score"] > 0}
    faults += [f"query {row['query-id']}: {fault}" for row in queries if (fault := query_fault(row["query"]))]
    faults += [
        f"query {row['query-id']}: no qrel names a page for it with a score above 0"
        for row in queries
        if row["query-id"] not in asked
    ]
    scores: dict[tuple[Any, Any], Any] = {}
    for row in judged:
        first = scores.setdefault((row["query-id"], row["corpus-id"]), row["score"])
        if first != row["score"]:  # mteb would take the last
            two = f"{first} and {row['score']}"
            faults.append(f"qrels: the page {row['corpus-id']} of query {row['query-id']} has the scores {two}")
        if not _whole(row["score"]):
            faults.append(f"qrels: the score {row['score']!r} of query {row['query-id']} is no whole number")
        if row["query-id"] not in query_ids:
            faults.append(f"qrels: query {row['query-id']} is not among the queries")
        if row["corpus-id"] not in page_ids:
            faults.append(f"qrels: the page {row['corpus-id']} of query {row['query-id']} is not in the corpus")
    if faults:
        raise UserError(
            f"benchmarks: {part.name}: {faults[0]} ({len(faults)} such rows); an evaluation set must be whole"
        )


def _whole(score: Any) -> bool:
    return isinstance(score, int) or (isinstance(score, float) and score.is_integer())


def check_share(bad: Sequence[dict[str, str]], rows: dict[tuple[str, str], int], most: float) -> None:
    """Stop where more than the share `most` of a source's rows, pages or questions is bad; `rows`: how many it has.

    Raises:
        UserError: with the source, the numbers and the first rows.
    """
    places = {(entry["source"], entry["kind"], entry["row"]) for entry in bad}  # a line may have several faults
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
