"""Two evaluations side by side: rows with intervals and tests, the queries that changed most, other settings."""

import re
from typing import Any, NamedTuple

from colintern.analysis.comparison import LEVEL, RESAMPLES, Row, compare
from colintern.analysis.outcomes import Outcome
from colintern.core.errors import UserError
from colintern.core.page_labels import fit_columns, label_page, label_query, pad_columns
from colintern.core.terminal import TERMINAL_COLUMNS
from colintern.evaluation.queries import KEY
from colintern.evaluation.scores import short

CHANGED = 10  # queries shown
QUERY_COLUMNS, LINK_INDENT = 52, 6
MARKDOWN_WIDTH = 100  # of a query or name in a cell
MARKUP = re.compile(r"[\\`*_{}\[\]<>&|~!$]")  # has a meaning in GitHub's Markdown
BEYOND = 1001  # a rank for pages that are not among mteb's 1,000 best
Tasks = dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]]  # (benchmark, task) -> (subset, query) -> row


class Difference(NamedTuple):
    """`params`: key -> values in a and in b, None where there is none. `left_out`: task -> why it is not compared."""

    a: str
    b: str
    metric: str
    rows: list[Row]
    changed: list[dict[str, Any]]
    params: dict[str, tuple[Any, Any]]
    left_out: dict[str, str]


def difference(a: Outcome, b: Outcome, metric: str) -> Difference:
    """What changed from `a` to `b`.

    Raises:
        UserError: they have no task in common.
    """
    left_out, pairs = {}, []
    first = _by_task(a)
    sides = [first, _renamed(_by_task(b), first)]
    for key in sorted(sides[0].keys() | sides[1].keys()):
        before, after = (side.get(key, {}) for side in sides)
        benchmark, task = key
        revisions = [one.run["data"].get(task) for one in (a, b)]
        if reason := _why_not(before, after, revisions, (a.name, b.name)):
            left_out[f"{benchmark}, {short(task)}"] = reason
            continue
        # The data are the same, so an evaluation by an older version, which recorded no folder, has the other's.
        folder = next(filter(None, (one.run.get("folders", {}).get(task) for one in (a, b))), "")
        pairs += [_pair(before[query], after[query], metric) | {"folder": folder} for query in sorted(before)]
    if not pairs:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in left_out.items())
        raise UserError(f"{a.name} and {b.name} cannot be compared: {reasons or 'neither has results'}")
    distinct = {(pair["task"], pair["subset"], pair["query_id"]): pair for pair in pairs}  # of several benchmarks
    ordered = sorted(distinct.items(), key=lambda item: (*_change(item[1]), item[0]))
    changed = [_with_labels(pair) for _, pair in ordered[:CHANGED] if pair["after"] != pair["before"]]
    settings = [one.run["params"] for one in (a, b)]
    keys = sorted(settings[0].keys() | settings[1].keys())
    params = {key: (settings[0].get(key), settings[1].get(key)) for key in keys}
    differing = {key: values for key, values in params.items() if values[0] != values[1]}
    return Difference(a.name, b.name, metric, compare(pairs), changed, differing, left_out)


def _by_task(one: Outcome) -> Tasks:
    tasks: Tasks = {}
    for row in one.queries:
        benchmark, task, subset, query = (row[key] for key in KEY)
        tasks.setdefault((benchmark, task), {})[subset, query] = row
    return tasks


def _renamed(tasks: Tasks, like: Tasks) -> Tasks:
    """Each under the benchmark it has in `like`: a task may be asked for by its own name, or as one of a benchmark."""
    free = {task: benchmark for benchmark, task in sorted(like.keys() - tasks.keys())}
    return {
        key if key in like or key[1] not in free else (free.pop(key[1]), key[1]): rows for key, rows in tasks.items()
    }


def _why_not(before: dict, after: dict, revisions: list[str | None], names: tuple[str, str]) -> str:
    if not before or not after:
        return f"only in {names[0] if before else names[1]}"
    if revisions[0] != revisions[1]:
        return f"other data: {revisions[0]} and {revisions[1]}"
    if before.keys() != after.keys():
        return f"other queries: {len(before.keys() ^ after.keys())} are in one of them only"
    return ""


def _pair(before: dict[str, Any], after: dict[str, Any], metric: str) -> dict[str, Any]:
    shared = {key: before[key] for key in KEY}
    names: dict[str, str | None] = {}
    for row in (before, after):  # results of older versions have no names
        names |= zip(row["top_pages"], row.get("top_names") or (), strict=False)
    return shared | {
        "before": before[metric],
        "after": after[metric],
        "rank_before": before["rank"],
        "rank_after": after["rank"],
        "page_before": before["top_pages"][0],
        "page_after": after["top_pages"][0],
        "name_before": names.get(before["top_pages"][0]),
        "name_after": names.get(after["top_pages"][0]),
        "query": before.get("query") or after.get("query"),
    }


def _with_labels(pair: dict[str, Any]) -> dict[str, Any]:
    """Add the displayed names of the first pages and the URLs of their files, "" for files that are not here."""
    for side in ("before", "after"):
        text, link = label_page(pair[f"page_{side}"], pair[f"name_{side}"], pair["folder"])
        pair |= {f"label_{side}": text, f"link_{side}": link}
    return {key: value for key, value in pair.items() if key != "folder"}


def _change(pair: dict[str, Any]) -> tuple[float, int]:
    """Sorts the largest change of score first, then of rank."""
    before, after = (pair[key] or BEYOND for key in ("rank_before", "rank_after"))
    return -abs(pair["after"] - pair["before"]), -abs(after - before)


def as_json(found: Difference) -> dict[str, Any]:
    """All of it, for programs; scores 0 to 1."""
    rows = [row._asdict() | {"difference": row.after - row.before, "verdict": row.verdict} for row in found.rows]
    return found._asdict() | {"rows": rows, "resamples": RESAMPLES, "level": LEVEL}


def text(found: Difference) -> str:
    """At most 80 columns, but for the names of evaluations and the values of settings."""
    lines = [
        f"a: {found.a}",
        f"b: {found.b}",
        f"{found.metric + ' x100':<22}{'a':>6}{'b':>6}{'b - a':>7}  {'95 % interval':<14}{'p':>7}{'w/l/ties':>14}",
    ]
    for row in found.rows:
        name = row.name if row.benchmark else f"  {short(row.name)}"
        mark = {"better": "+", "worse": "-", "": ""}[row.verdict]
        lines.append(
            f"{name[:21]:<22}{100 * row.before:>6.1f}{100 * row.after:>6.1f}{100 * (row.after - row.before):>+7.1f}"
            f"  {_interval(row):<14}{row.p:>7.4f}{_counts(row):>14}{mark and ' ' + mark}"
        )
    lines += [summary(found), ""]
    if found.changed:
        lines.append(f"{f'{len(found.changed)} most changed queries':<54}{'a':>6}{'b':>6}  rank")
    for pair in found.changed:
        words = fit_columns(label_query(pair["query_id"], pair["query"]), QUERY_COLUMNS)
        scores = f"{100 * pair['before']:>6.1f}{100 * pair['after']:>6.1f}"
        lines += [f"  {pad_columns(words, QUERY_COLUMNS)}{scores}  {_ranks(pair)}", *_format_first_pages(found, pair)]
    links = [pair[f"link_{side}"] for pair in found.changed for side in ("before", "after")]
    if too_long := len({link for link in links if LINK_INDENT + len(link) > TERMINAL_COLUMNS}):
        lines.append(f"links longer than a line, left out: {too_long}; --json has them")
    lines += [f"not compared: {task}: {reason}" for task, reason in found.left_out.items()]
    if not found.params:
        lines.append("no setting differs")
    return "\n".join([*lines, *(f"{key}: {a} -> {b}" for key, (a, b) in _settings(found))])


def markdown(found: Difference) -> str:
    """For a pull request."""
    lines = [
        f"`{found.a}` (a) against `{found.b}` (b), {found.metric} x100",
        "",
        "| | a | b | b - a | 95 % interval | p | wins / losses / ties | |",
        "|---|---:|---:|---:|---|---:|---|---|",
    ]
    for row in found.rows:
        name = f"**{row.name}**" if row.benchmark else short(row.name)
        change = f"{100 * row.before:.1f} | {100 * row.after:.1f} | {100 * (row.after - row.before):+.1f}"
        lines.append(f"| {name} | {change} | {_interval(row)} | {row.p:.4f} | {_counts(row)} | {row.verdict} |")
    lines += ["", summary(found)]
    if found.changed:
        head = f"| {len(found.changed)} most changed queries | task | a | b | rank | first page in a | in b |"
        lines += ["", head, "|---|---|---:|---:|---|---|---|"]
    for pair in found.changed:
        scores = f"{100 * pair['before']:.1f} | {100 * pair['after']:.1f} | {_ranks(pair)}"
        query = _escape_table_cell(label_query(pair["query_id"], pair["query"]))
        pages = [_escape_table_cell(pair[f"label_{side}"]) for side in ("before", "after")]
        lines.append(f"| {query} | {_task(pair)} | {scores} | {pages[0]} | {pages[1]} |")
    if found.params:
        lines += ["", "| setting | a | b |", "|---|---|---|"]
    lines += [f"| {key} | {a} | {b} |" for key, (a, b) in _settings(found)]
    return "\n".join([*lines, *(f"\nNot compared: {task}: {reason}" for task, reason in found.left_out.items())])


def summary(found: Difference) -> str:
    """The verdict in a sentence."""
    counts = {word: sum(row.verdict == word for row in found.rows) for word in ("better", "worse", "")}
    return (
        f"b is better in {counts['better']}, worse in {counts['worse']} of {len(found.rows)} rows, "
        f"no difference shown in {counts['']} (5 %, Holm)"
    )


def _interval(row: Row) -> str:
    return f"{100 * row.low:+.1f} to {100 * row.high:+.1f}"


def _counts(row: Row) -> str:
    return f"{row.wins}/{row.losses}/{row.ties}"


def _task(pair: dict[str, Any]) -> str:
    subset = "" if pair["subset"] == "default" else f", {pair['subset']}"
    return f"{short(pair['task'])}{subset}"


def _format_first_pages(found: Difference, pair: dict[str, Any]) -> list[str]:
    """Format the lines below a query: its task, where several are compared, and the first page in each evaluation."""
    several = sum(not row.benchmark for row in found.rows) > 1 or pair["subset"] != "default"
    lines = [f"    task: {_task(pair)}"] if several else []
    sides = {"a": "before", "b": "after"} if pair["page_before"] != pair["page_after"] else {"a, b": "after"}
    for name, side in sides.items():
        start, link = f"    {name}: ", pair[f"link_{side}"]
        lines.append(start + fit_columns(pair[f"label_{side}"], TERMINAL_COLUMNS - len(start), keep_end=True))
        if link and LINK_INDENT + len(link) <= TERMINAL_COLUMNS:
            lines.append(" " * LINK_INDENT + link)
    return lines


def _escape_table_cell(text: str) -> str:
    """Return a text of the user's data as code in a cell of a table: nothing in it is markup or a mention."""
    line = MARKUP.sub(lambda match: f"&#{ord(match[0])};", fit_columns(text, MARKDOWN_WIDTH))
    return f"<code>{line}</code>"


def _ranks(pair: dict[str, Any]) -> str:
    return " -> ".join(str(rank or "none") for rank in (pair["rank_before"], pair["rank_after"]))


def _settings(found: Difference) -> list[tuple[str, tuple[Any, Any]]]:
    def show(value: Any) -> Any:
        return "none" if value is None else value

    return [(key, (show(a), show(b))) for key, (a, b) in found.params.items()]
