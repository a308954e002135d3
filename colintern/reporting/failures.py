"""Group the queries whose first page is wrong: by what that page is, language, document and query length."""

from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from mteb.abstasks.abstask import AbsTask

from colintern.core.page_labels import PDF_PAGE
from colintern.core.progress import ProgressBar
from colintern.core.terminal import escape_controls
from colintern.evaluation.results import QueryResult
from colintern.reporting.examples import EvaluationCorpus
from colintern.reporting.near_duplicates import are_near_duplicates, shrink_page
from colintern.scoring.metrics import MAIN_METRIC
from colintern.statistics.survey import guess_languages

LENGTHS = {"1 to 4 words": 4, "5 to 8 words": 8, "9 to 16 words": 16}  # name -> most words
MAX_RIGHT_PAGES = 5  # of a query, compared with the first page
MAX_DOCUMENTS = 10  # listed, those with most failures
FIRST_PAGE, LANGUAGE, DOCUMENT, LENGTH = "first page", "language", "document of the right page", "query length"
NO_DOCUMENT = "not a page of a PDF"


class JudgedQuery(NamedTuple):
    """A query with the documents of its right pages; None where a page is of no PDF."""

    result: QueryResult
    first_document: str | None  # of the first page found
    right_documents: tuple[str | None, ...]
    language: str
    is_near_duplicate: bool  # of the first page and a right page, where the first is wrong

    @property
    def is_failed(self) -> bool:
        """Return whether a wrong page comes first."""
        return self.result.rank != 1


class QueryGroup(NamedTuple):
    """Queries with something in common. `failed`: those whose first page is wrong; `ndcg`: mean NDCG@5, 0 to 1."""

    name: str
    queries: int
    failed: int
    ndcg: float


def judge_queries(tasks: Sequence[AbsTask], results: Iterable[QueryResult]) -> list[JudgedQuery]:
    """Look up the documents and the language of each query; one of several benchmarks once, one without page never."""
    corpora = {task.metadata.name: EvaluationCorpus(task) for task in tasks}
    judged = []
    distinct = list({result.identity: result for result in results}.values())
    for result in ProgressBar(distinct, desc="first pages", unit="query"):
        corpus = corpora[result.task]
        if right := corpus.list_right_pages(result.subset, result.query_id):
            first, *documents = (_get_document(corpus, result.subset, page) for page in (result.top_pages[0], *right))
            is_duplicate = result.rank != 1 and _has_near_duplicate(corpus, result, right)
            judged.append(JudgedQuery(result, first, tuple(documents), _get_language(result), is_duplicate))
    return judged


def _has_near_duplicate(corpus: EvaluationCorpus, result: QueryResult, right: list[str]) -> bool:
    """Compare the first page with the right ones."""
    first, *others = (
        shrink_page(corpus.read_row(result.subset, "corpus", page)["image"])
        for page in (result.top_pages[0], *right[:MAX_RIGHT_PAGES])
    )
    return any(are_near_duplicates(first, other) for other in others)


def _get_document(corpus: EvaluationCorpus, subset: str, page: str) -> str | None:
    match = PDF_PAGE.fullmatch(corpus.read_page_name(subset, page) or "")
    return match[1] if match else None


def _get_language(result: QueryResult) -> str:
    """Return the subset, which is a language where a task has several, or else the language of the words, guessed."""
    if result.subset != "default":
        return result.subset
    return next(iter(guess_languages([result.query])), "unknown") if result.query else "unknown"


def group_failures(queries: Sequence[JudgedQuery]) -> dict[str, list[QueryGroup]]:
    """Group the queries in each of four ways; the groups with most failures first.

    The first is of failed queries only: whether their first page is nearly a right page, or of its document.
    """
    failed = [query for query in queries if query.is_failed]
    documents = _group_by(queries, lambda query: query.right_documents[0] or NO_DOCUMENT)
    return {
        FIRST_PAGE: _group_by(failed, _classify_first_page),
        LANGUAGE: _group_by(queries, lambda query: query.language),
        DOCUMENT: documents[:MAX_DOCUMENTS],
        LENGTH: _group_by(queries, _get_length),
    }


def _classify_first_page(query: JudgedQuery) -> str:
    if query.is_near_duplicate:
        return "a page that looks like the right one"
    if query.first_document is None or None in query.right_documents:
        return NO_DOCUMENT
    return "another page of the same document" if query.first_document in query.right_documents else "another document"


def _get_length(query: JudgedQuery) -> str:
    if query.result.query is None:
        return "unknown"
    num_words = len(query.result.query.split())
    return next((name for name, most in LENGTHS.items() if num_words <= most), "more than 16 words")


def _group_by(queries: Sequence[JudgedQuery], get_name: Callable[[JudgedQuery], str]) -> list[QueryGroup]:
    groups: dict[str, list[JudgedQuery]] = {}
    for query in queries:
        groups.setdefault(get_name(query), []).append(query)
    rows = [
        QueryGroup(
            escape_controls(name),
            len(members),
            sum(query.is_failed for query in members),
            fmean(query.result.scores[MAIN_METRIC.key] for query in members),
        )
        for name, members in groups.items()
    ]
    return sorted(rows, key=lambda group: (-group.failed, group.name))
