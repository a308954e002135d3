"""Compare evaluations of a folder, a git revision or a DVC experiment: scores, changed queries, other settings."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from colintern.analysis.significance import (
    NUM_RESAMPLES,
    SIGNIFICANCE_LEVEL,
    ScoreComparison,
    ScorePair,
    compare_scores,
)
from colintern.core.errors import UserError
from colintern.core.page_labels import fit_columns, label_page, label_query, pad_columns
from colintern.core.terminal import TERMINAL_COLUMNS
from colintern.evaluation.results import QueryResult, read_query_results, shorten_task_name

EVALUATION = "results/mteb_evaluation"
RUN_FILE, QUERIES_FILE = "run.json", "queries/trained.parquet"
MAX_CHANGED = 10  # queries shown
QUERY_COLUMNS, LINK_INDENT = 52, 6
MARKDOWN_WIDTH = 100  # of a query or name in a cell
MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~!$]")  # has a meaning in GitHub's Markdown
RANK_NOT_FOUND = 1001  # stands for the rank of a page that is not among mteb's 1,000 best
TaskResults = dict[tuple[str, str], dict[tuple[str, str], QueryResult]]  # (benchmark, task) -> (subset, query id)


class EvalRun(NamedTuple):
    """An evaluation. `run`: its run.json (revision, params, data). `queries`: what each query scored."""

    name: str
    run: dict[str, Any]
    queries: list[QueryResult]


class ChangedQuery(NamedTuple):
    """A query whose score changed; pages are the first of each ranking, labels as `label_page` gives them."""

    benchmark: str
    task: str
    subset: str
    query_id: str
    before: float
    after: float
    rank_before: int | None
    rank_after: int | None
    page_before: str
    page_after: str
    name_before: str | None
    name_after: str | None
    query: str | None
    label_before: str
    link_before: str
    label_after: str
    link_after: str


class EvalComparison(NamedTuple):
    """Two evaluations compared.

    Attributes:
        a: name of the first.
        b: name of the second.
        metric: that is compared.
        rows: of tasks and benchmarks.
        changed: queries, the most changed first.
        params: key -> values in a and in b, None where there is none.
        left_out: task -> why it is not compared.
    """

    a: str
    b: str
    metric: str
    rows: list[ScoreComparison]
    changed: list[ChangedQuery]
    params: dict[str, tuple[Any, Any]]
    left_out: dict[str, str]


def load_eval_run(name: str) -> EvalRun:
    """Load the evaluation at a folder (an eval stage's out, or a checkout with one), or else at a revision.

    Raises:
        UserError: there is none, it is older than these files, or DVC's cache lacks it.
    """
    read_file = _open_folder(Path(name)) if Path(name).is_dir() else _open_revision(name)
    try:
        return EvalRun(name, json.loads(read_file(RUN_FILE)), read_query_results(read_file(QUERIES_FILE)))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{name}: its results cannot be read: {error}; evaluate it again: dvc repro -f eval") from error


def _open_folder(folder: Path) -> Callable[[str], bytes]:
    top = next((top for top in (folder, folder / EVALUATION) if (top / RUN_FILE).is_file()), None)
    if top is None:
        raise UserError(
            f"{folder}: holds no {RUN_FILE}, nor does {folder / EVALUATION}; give the folder of an evaluation made by "
            f"the eval stage or by `colintern evaluate`; results of an older version: dvc repro -f eval"
        )

    def read_file(name: str) -> bytes:
        if not (top / name).is_file():
            raise UserError(f"{top / name}: missing; evaluate it again: dvc repro -f eval")
        return (top / name).read_bytes()

    return read_file


def _open_revision(revision: str) -> Callable[[str], bytes]:
    from dvc.api import DVCFileSystem
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.scm import RevError, SCMError
    from dvc_data.index import DataIndexDirError

    def explain_missing(name: str) -> UserError:
        return UserError(
            f"{revision}: {name} is not in DVC's cache here, nor in a remote, or that revision is older than this "
            "file; get it with `dvc pull` at that revision or `dvc exp pull`, or make it in a checkout of it with "
            "`dvc repro eval`"
        )

    try:
        files = DVCFileSystem(rev=revision, subrepos=True)
        # Its paths begin at git's root, which may hold this pipeline as a sub folder. `repo` opens the revision:
        # `exists` would take an error for "no".
        below = Path(Repo.find_root()).resolve().relative_to(Path(files.repo.scm.root_dir).resolve())
        top = f"{Path('/', below, EVALUATION)}"
        exists = files.exists(top)
    except DataIndexDirError as error:
        raise explain_missing(EVALUATION) from error
    except (RevError, SCMError, DvcException) as error:
        raise UserError(
            f"{revision!r} is no folder here, and no git revision or DVC experiment: {error}; "
            f"`git log --oneline` and `dvc exp list --all-commits` name some, and the workspace is `.`"
        ) from error
    if not exists:
        raise UserError(f"{revision}: has no {EVALUATION}; it was not evaluated there, or dvc.lock was not committed")

    def read_file(name: str) -> bytes:
        try:
            return files.read_bytes(f"{top}/{name}")
        except (OSError, DvcException, DataIndexDirError) as error:
            raise explain_missing(f"{EVALUATION}/{name}") from error

    return read_file


def compare_eval_runs(a: EvalRun, b: EvalRun, metric: str) -> EvalComparison:
    """Compare `b` with `a`.

    Raises:
        UserError: they have no task in common.
    """
    left_out, pairs = {}, []
    tasks_a = _group_by_task(a.queries)
    tasks_b = _match_benchmarks(_group_by_task(b.queries), tasks_a)
    for key in sorted(tasks_a.keys() | tasks_b.keys()):
        before, after = tasks_a.get(key, {}), tasks_b.get(key, {})
        benchmark, task = key
        revisions = a.run["data"].get(task), b.run["data"].get(task)
        if not before or not after:
            reason = f"only in {a.name if before else b.name}"
        elif revisions[0] != revisions[1]:
            reason = f"other data: {revisions[0]} and {revisions[1]}"
        elif before.keys() != after.keys():
            reason = f"other queries: {len(before.keys() ^ after.keys())} are in one of them only"
        else:
            pairs += [(before[query], after[query]) for query in sorted(before)]
            continue
        left_out[f"{benchmark}, {shorten_task_name(task)}"] = reason
    if not pairs:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise UserError(f"{a.name} and {b.name} cannot be compared: {reasons or 'neither has results'}")
    rows = compare_scores(
        ScorePair(before.benchmark, before.task, before.subset, before.scores[metric], after.scores[metric])
        for before, after in pairs
    )
    settings = a.run["params"], b.run["params"]
    keys = sorted(settings[0].keys() | settings[1].keys())
    params = {key: (settings[0].get(key), settings[1].get(key)) for key in keys}
    differing = {key: values for key, values in params.items() if values[0] != values[1]}
    # The data are the same, so an evaluation by an older version, which recorded no folder, has the other's.
    folders = b.run.get("folders", {}) | a.run.get("folders", {})
    return EvalComparison(
        a.name, b.name, metric, rows, _select_changed_queries(pairs, metric, folders), differing, left_out
    )


def _group_by_task(queries: list[QueryResult]) -> TaskResults:
    tasks: TaskResults = {}
    for result in queries:
        tasks.setdefault((result.benchmark, result.task), {})[result.subset, result.query_id] = result
    return tasks


def _match_benchmarks(tasks: TaskResults, reference: TaskResults) -> TaskResults:
    """Put each under its benchmark in `reference`: a task may be given by its own name, or as one of a benchmark."""
    unmatched = {task: benchmark for benchmark, task in sorted(reference.keys() - tasks.keys())}
    return {
        key if key in reference or key[1] not in unmatched else (unmatched.pop(key[1]), key[1]): results
        for key, results in tasks.items()
    }


def _select_changed_queries(
    pairs: list[tuple[QueryResult, QueryResult]], metric: str, folders: dict[str, str]
) -> list[ChangedQuery]:
    """Select those with the largest change of score, then of rank; a query of several benchmarks once."""

    def sort_key(identity: tuple[str, str, str]) -> tuple[float, int, tuple[str, str, str]]:
        before, after = distinct[identity]
        ranks = [result.rank or RANK_NOT_FOUND for result in (before, after)]
        return -abs(after.scores[metric] - before.scores[metric]), -abs(ranks[1] - ranks[0]), identity

    distinct = {before.identity: (before, after) for before, after in pairs}
    changed = []
    for identity in sorted(distinct, key=sort_key)[:MAX_CHANGED]:
        before, after = distinct[identity]
        if before.scores[metric] != after.scores[metric]:
            changed.append(_make_changed_query(before, after, metric, folders.get(before.task, "")))
    return changed


def _make_changed_query(before: QueryResult, after: QueryResult, metric: str, folder: str) -> ChangedQuery:
    names: dict[str, str | None] = {}
    for result in (before, after):  # results of older versions have no names
        names |= zip(result.top_pages, result.top_names or (), strict=False)
    page_before, page_after = before.top_pages[0], after.top_pages[0]
    label_before, label_after = (label_page(page, names.get(page), folder) for page in (page_before, page_after))
    return ChangedQuery(
        benchmark=before.benchmark,
        task=before.task,
        subset=before.subset,
        query_id=before.query_id,
        before=before.scores[metric],
        after=after.scores[metric],
        rank_before=before.rank,
        rank_after=after.rank,
        page_before=page_before,
        page_after=page_after,
        name_before=names.get(page_before),
        name_after=names.get(page_after),
        query=before.query or after.query,
        label_before=label_before.text,
        link_before=label_before.link,
        label_after=label_after.text,
        link_after=label_after.link,
    )


def comparison_to_dict(comparison: EvalComparison) -> dict[str, Any]:
    """Return all of it, for programs; scores 0 to 1."""
    rows = [row._asdict() | {"difference": row.difference, "verdict": row.verdict} for row in comparison.rows]
    changed = [query._asdict() for query in comparison.changed]
    totals = {"resamples": NUM_RESAMPLES, "level": SIGNIFICANCE_LEVEL}
    return comparison._asdict() | {"rows": rows, "changed": changed} | totals


def format_comparison(comparison: EvalComparison) -> str:
    """Format with at most 80 columns, but for the names of evaluations and the values of settings."""
    lines = [
        f"a: {comparison.a}",
        f"b: {comparison.b}",
        f"{comparison.metric + ' x100':<22}{'a':>6}{'b':>6}{'b - a':>7}  {'95 % interval':<14}{'p':>7}{'w/l/ties':>14}",
    ]
    for row in comparison.rows:
        name = row.name if row.benchmark else f"  {shorten_task_name(row.name)}"
        mark = {"better": " +", "worse": " -", "": ""}[row.verdict]
        lines.append(
            f"{name[:21]:<22}{100 * row.before:>6.1f}{100 * row.after:>6.1f}{100 * row.difference:>+7.1f}"
            f"  {_format_interval(row):<14}{row.p:>7.4f}{_format_counts(row):>14}{mark}"
        )
    lines += [summarize_comparison(comparison), ""]
    if comparison.changed:
        lines.append(f"{f'{len(comparison.changed)} most changed queries':<54}{'a':>6}{'b':>6}  rank")
    for query in comparison.changed:
        words = fit_columns(label_query(query.query_id, query.query), QUERY_COLUMNS)
        scores = f"{100 * query.before:>6.1f}{100 * query.after:>6.1f}"
        lines.append(f"  {pad_columns(words, QUERY_COLUMNS)}{scores}  {_format_ranks(query)}")
        lines += _format_first_pages(comparison, query)
    links = {link for query in comparison.changed for link in (query.link_before, query.link_after)}
    if too_long := sum(LINK_INDENT + len(link) > TERMINAL_COLUMNS for link in links):
        lines.append(f"links longer than a line, left out: {too_long}; --json has them")
    lines += [f"not compared: {task}: {reason}" for task, reason in comparison.left_out.items()]
    if not comparison.params:
        lines.append("no setting differs")
    return "\n".join([*lines, *(f"{key}: {a} -> {b}" for key, a, b in _list_settings(comparison))])


def comparison_to_markdown(comparison: EvalComparison) -> str:
    """Format for a pull request."""
    lines = [
        f"`{comparison.a}` (a) against `{comparison.b}` (b), {comparison.metric} x100",
        "",
        "| | a | b | b - a | 95 % interval | p | wins / losses / ties | |",
        "|---|---:|---:|---:|---|---:|---|---|",
    ]
    for row in comparison.rows:
        name = f"**{row.name}**" if row.benchmark else shorten_task_name(row.name)
        change = f"{100 * row.before:.1f} | {100 * row.after:.1f} | {100 * row.difference:+.1f}"
        interval, counts = _format_interval(row), _format_counts(row)
        lines.append(f"| {name} | {change} | {interval} | {row.p:.4f} | {counts} | {row.verdict} |")
    lines += ["", summarize_comparison(comparison)]
    if comparison.changed:
        head = f"| {len(comparison.changed)} most changed queries | task | a | b | rank | first page in a | in b |"
        lines += ["", head, "|---|---|---:|---:|---|---|---|"]
    for query in comparison.changed:
        texts = label_query(query.query_id, query.query), query.label_before, query.label_after
        words, *pages = map(_escape_table_cell, texts)
        scores = f"{100 * query.before:.1f} | {100 * query.after:.1f} | {_format_ranks(query)}"
        lines.append(f"| {words} | {_format_task(query)} | {scores} | {pages[0]} | {pages[1]} |")
    if comparison.params:
        lines += ["", "| setting | a | b |", "|---|---|---|"]
    lines += [f"| {key} | {a} | {b} |" for key, a, b in _list_settings(comparison)]
    return "\n".join([*lines, *(f"\nNot compared: {task}: {reason}" for task, reason in comparison.left_out.items())])


def summarize_comparison(comparison: EvalComparison) -> str:
    """Return the verdict in a sentence."""
    counts = {verdict: sum(row.verdict == verdict for row in comparison.rows) for verdict in ("better", "worse", "")}
    return (
        f"b is better in {counts['better']}, worse in {counts['worse']} of {len(comparison.rows)} rows, "
        f"no difference shown in {counts['']} (5 %, Holm)"
    )


def _format_interval(row: ScoreComparison) -> str:
    return f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"


def _format_counts(row: ScoreComparison) -> str:
    return f"{row.wins}/{row.losses}/{row.ties}"


def _format_task(query: ChangedQuery) -> str:
    return shorten_task_name(query.task) + ("" if query.subset == "default" else f", {query.subset}")


def _format_first_pages(comparison: EvalComparison, query: ChangedQuery) -> list[str]:
    """Format the lines below a query: its task, where several are compared, and the first page in each evaluation."""
    has_several_tasks = sum(not row.benchmark for row in comparison.rows) > 1
    lines = [f"    task: {_format_task(query)}"] if has_several_tasks or query.subset != "default" else []
    after = query.label_after, query.link_after
    pages = {"a": (query.label_before, query.link_before), "b": after}
    for name, (label, link) in (pages if query.page_before != query.page_after else {"a, b": after}).items():
        start = f"    {name}: "
        lines.append(start + fit_columns(label, TERMINAL_COLUMNS - len(start), keep_end=True))
        if link and LINK_INDENT + len(link) <= TERMINAL_COLUMNS:
            lines.append(" " * LINK_INDENT + link)
    return lines


def _escape_table_cell(text: str) -> str:
    """Return a text of the user's data as code in a cell of a table: nothing in it is markup or a mention."""
    line = MARKUP.sub(lambda match: f"&#{ord(match[0])};", fit_columns(text, MARKDOWN_WIDTH))
    return f"<code>{line}</code>"


def _format_ranks(query: ChangedQuery) -> str:
    return " -> ".join(str(rank or "none") for rank in (query.rank_before, query.rank_after))


def _list_settings(comparison: EvalComparison) -> list[tuple[str, Any, Any]]:
    def mark_missing(value: Any) -> Any:
        return "none" if value is None else value

    return [(key, mark_missing(a), mark_missing(b)) for key, (a, b) in comparison.params.items()]
