"""Compare evaluations of a folder, a git revision or a DVC experiment: scores, changed queries, other settings."""

import re
from typing import NamedTuple

from colintern.analysis.eval_runs import RANK_NOT_FOUND, EvalRun, describe_seeds, get_query_key, list_seed_scores
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
from colintern.evaluation.results import (
    QUERY_KEY,
    UNRECORDED,
    QueryResult,
    shorten_task_name,
)

MAX_CHANGED = 10  # queries shown
QUERY_COLUMNS, LINK_INDENT = 52, 6
MARKDOWN_WIDTH = 100  # of a query or name in a cell
MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~!$]")  # has a meaning in GitHub's Markdown
TaskResults = dict[tuple[str, str], dict[tuple[str, str], QueryResult]]  # (benchmark, task) -> (subset, query id)


class FirstPage(NamedTuple):
    """The first page of a ranking. `name`: in its corpus, None without one; `label`, `link`: see `label_page`."""

    page: str
    name: str | None
    label: str
    link: str


class ChangedQuery(NamedTuple):
    """A query whose score changed, in both evaluations."""

    before: QueryResult
    after: QueryResult
    pages: tuple[FirstPage, FirstPage]

    @property
    def label(self) -> str:
        """Return the words of the query, or its id where neither evaluation has them."""
        return label_query(self.before.query_id, self.before.query or self.after.query)


class EvalComparison(NamedTuple):
    """Two evaluations compared by `metric`."""

    a: str
    b: str
    metric: str
    rows: list[ScoreComparison]
    changed: list[ChangedQuery]  # the most changed first
    params: dict[str, tuple[object, object]]  # key -> values in a and in b, None where there is none
    left_out: dict[str, str]  # task -> why it is not compared
    runs: list[list[str]]  # names of the runs of a and of b; empty for a single one
    notes: list[str]  # what intervals and p cover; how the runs of a side differ


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
    scores_a, scores_b = list_seed_scores(a, metric), list_seed_scores(b, metric)
    rows = compare_scores(
        ScorePair(*before[:3], scores_a[get_query_key(before)], scores_b[get_query_key(after)])
        for before, after in pairs
    )
    settings = UNRECORDED | a.run["params"], UNRECORDED | b.run["params"]
    keys = sorted(settings[0].keys() | settings[1].keys())
    params = {key: (settings[0].get(key), settings[1].get(key)) for key in keys}
    differing = {key: values for key, values in params.items() if values[0] != values[1]}
    # The data are the same, so an evaluation by an older version, which recorded no folder, has the other's.
    folders = b.run.get("folders", {}) | a.run.get("folders", {})
    changed = _select_changed_queries(pairs, metric, folders)
    runs = [[run.name for run in side.members] for side in (a, b)]
    return EvalComparison(a.name, b.name, metric, rows, changed, differing, left_out, runs, describe_seeds(a, b))


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

    def sort_key(pair: tuple[QueryResult, QueryResult]) -> tuple[float, int, tuple[str, str, str]]:
        before, after = pair
        ranks = [result.rank or RANK_NOT_FOUND for result in pair]
        return -abs(after.scores[metric] - before.scores[metric]), -abs(ranks[1] - ranks[0]), before.identity

    changed = []
    for before, after in sorted({pair[0].identity: pair for pair in pairs}.values(), key=sort_key)[:MAX_CHANGED]:
        if before.scores[metric] != after.scores[metric]:
            names: dict[str, str | None] = {}
            for result in (before, after):  # results of older versions have no names
                names |= zip(result.top_pages, result.top_names or (), strict=False)
            folder = folders.get(before.task, "")
            first, second = (
                FirstPage(page, names.get(page), *label_page(page, names.get(page), folder))
                for page in (before.top_pages[0], after.top_pages[0])
            )
            changed.append(ChangedQuery(before, after, (first, second)))
    return changed


def comparison_to_dict(comparison: EvalComparison) -> dict[str, object]:
    """Return all of it, for programs; scores 0 to 1."""
    rows = [row._asdict() | {"difference": row.difference, "verdict": row.verdict} for row in comparison.rows]
    changed = []
    for query in comparison.changed:
        fields = dict(zip(QUERY_KEY, query.before, strict=False)) | {"query": query.before.query or query.after.query}
        results = {"before": query.before, "after": query.after}
        for (side, result), page in zip(results.items(), query.pages, strict=True):
            fields |= {side: result.scores[comparison.metric], f"rank_{side}": result.rank}
            fields |= {f"{key}_{side}": value for key, value in page._asdict().items()}
        changed.append(fields)
    totals = {"resamples": NUM_RESAMPLES, "level": SIGNIFICANCE_LEVEL}
    return comparison._asdict() | {"rows": rows, "changed": changed} | totals


def format_comparison(comparison: EvalComparison) -> str:
    """Format with at most 80 columns, but for the names of evaluations and the values of settings."""
    lines = [
        *_list_sides(comparison),
        f"{comparison.metric + ' x100':<22}{'a':>6}{'b':>6}{'b - a':>7}  {'95 % interval':<14}{'p':>7}{'w/l/ties':>14}",
    ]
    has_seeds = any(comparison.runs)
    for row in comparison.rows:
        name = row.name if row.benchmark else f"  {shorten_task_name(row.name)}"
        mark = {"better": " +", "worse": " -", "": ""}[row.verdict]
        lines.append(
            f"{name[:21]:<22}{100 * row.before:>6.1f}{100 * row.after:>6.1f}{100 * row.difference:>+7.1f}"
            f"  {_format_interval(row):<14}{row.p:>7.4f}{_format_counts(row):>14}{mark}"
        )
        if has_seeds:
            before, after = _format_spread(row.spread_before), _format_spread(row.spread_after)
            lines.append(f"{'    spread over seeds':<22}{before:>6}{after:>6}".rstrip())
    lines += [summarize_comparison(comparison), *comparison.notes, ""]
    if comparison.changed:
        lines.append(f"{f'{len(comparison.changed)} most changed queries':<54}{'a':>6}{'b':>6}  rank")
    for query in comparison.changed:
        words = pad_columns(fit_columns(query.label, QUERY_COLUMNS), QUERY_COLUMNS)
        scores = "".join(f"{100 * result.scores[comparison.metric]:>6.1f}" for result in query[:2])
        lines += [f"  {words}{scores}  {_format_ranks(query)}", *_format_first_pages(comparison, query)]
    links = {page.link for query in comparison.changed for page in query.pages}
    if too_long := sum(LINK_INDENT + len(link) > TERMINAL_COLUMNS for link in links):
        lines.append(f"links longer than a line, left out: {too_long}; --json has them")
    lines += [f"not compared: {task}: {reason}" for task, reason in comparison.left_out.items()]
    if not comparison.params:
        lines.append("no setting differs")
    return "\n".join([*lines, *(f"{key}: {a} -> {b}" for key, a, b in _list_settings(comparison))])


def comparison_to_markdown(comparison: EvalComparison) -> str:
    """Format for a pull request."""
    has_seeds = any(comparison.runs)
    lines = [
        f"`{comparison.a}` (a) against `{comparison.b}` (b), {comparison.metric} x100",
        "",
        f"| | a | b | b - a | 95 % interval | p | wins / losses / ties | |{' spread a | b |' * has_seeds}",
        f"|---|---:|---:|---:|---|---:|---|---|{'---:|---:|' * has_seeds}",
    ]
    for row in comparison.rows:
        name = f"**{row.name}**" if row.benchmark else shorten_task_name(row.name)
        change = f"{100 * row.before:.1f} | {100 * row.after:.1f} | {100 * row.difference:+.1f}"
        interval, counts = _format_interval(row), _format_counts(row)
        lines.append(f"| {name} | {change} | {interval} | {row.p:.4f} | {counts} | {row.verdict} |")
        if has_seeds:
            lines[-1] += f" {_format_spread(row.spread_before)} | {_format_spread(row.spread_after)} |"
    lines += ["", "; ".join([summarize_comparison(comparison), *comparison.notes])]
    if has_seeds:
        lines += ["", "; ".join(_list_sides(comparison))]
    if comparison.changed:
        head = f"| {len(comparison.changed)} most changed queries | task | a | b | rank | first page in a | in b |"
        lines += ["", head, "|---|---|---:|---:|---|---|---|"]
    for query in comparison.changed:
        words, *pages = map(_escape_table_cell, (query.label, *(page.label for page in query.pages)))
        scores = " | ".join(f"{100 * result.scores[comparison.metric]:.1f}" for result in query[:2])
        lines.append(
            f"| {words} | {_format_task(query)} | {scores} | {_format_ranks(query)} | {pages[0]} | {pages[1]} |"
        )
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


def _list_sides(comparison: EvalComparison) -> list[str]:
    """Return the name of each side, with the runs that a pattern matched."""
    lines = []
    for side, name, runs in zip("ab", (comparison.a, comparison.b), comparison.runs, strict=True):
        lines.append(f"{side}: {name}" + (f" ({len(runs)} seeds: {', '.join(runs)})" if runs else ""))
    return lines


def _format_spread(spread: float | None) -> str:
    return "" if spread is None else f"{100 * spread:.1f}"


def _format_interval(row: ScoreComparison) -> str:
    return f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"


def _format_counts(row: ScoreComparison) -> str:
    return f"{row.wins}/{row.losses}/{row.ties}"


def _format_task(query: ChangedQuery) -> str:
    subset = query.before.subset
    return shorten_task_name(query.before.task) + ("" if subset == "default" else f", {subset}")


def _format_first_pages(comparison: EvalComparison, query: ChangedQuery) -> list[str]:
    """Format the lines below a query: its task, where several are compared, and the first page in each evaluation."""
    has_several_tasks = sum(not row.benchmark for row in comparison.rows) > 1
    lines = [f"    task: {_format_task(query)}"] if has_several_tasks or query.before.subset != "default" else []
    first, second = query.pages
    for name, page in {"a": first, "b": second}.items() if first.page != second.page else [("a, b", second)]:
        start = f"    {name}: "
        lines.append(start + fit_columns(page.label, TERMINAL_COLUMNS - len(start), keep_end=True))
        if page.link and LINK_INDENT + len(page.link) <= TERMINAL_COLUMNS:
            lines.append(" " * LINK_INDENT + page.link)
    return lines


def _escape_table_cell(text: str) -> str:
    """Return a text of the user's data as code in a cell of a table: nothing in it is markup or a mention."""
    line = MARKUP.sub(lambda match: f"&#{ord(match[0])};", fit_columns(text, MARKDOWN_WIDTH))
    return f"<code>{line}</code>"


def _format_ranks(query: ChangedQuery) -> str:
    return " -> ".join(str(rank or "none") for rank in (query.before.rank, query.after.rank))


def _list_settings(comparison: EvalComparison) -> list[tuple[object, ...]]:
    return [
        (key, *("none" if value is None else value for value in values)) for key, values in comparison.params.items()
    ]
