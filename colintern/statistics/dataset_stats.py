"""Describe the data in numbers: the survey of fetch-data, with the tiles and visual tokens that its pages get."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from colintern.modeling.base_tile import choose_base_grid, read_base_tile
from colintern.storage.manifest import MANIFEST, SURVEY, Files, get_files_folder, read_data_file

HISTOGRAM_COLUMNS = ("set", "measure", "value", "count")
MEASURES = {  # histogram -> what the table calls its mean
    "queries of a page": "queries/page",
    "tiles of a page": "tiles/page",
    "tokens of a page": "tokens/page",
    "tokens of a query": "tokens/query",
}
MAX_BARS = 6  # of a histogram, and languages, in the printed table

Stats = dict[str, dict[str, Any]]


def load_dataset_stats(max_visual_tokens: int, tiling: str) -> Stats:
    """Read the survey and add the tiles and visual tokens that its pages get.

    Raises:
        UserError: there is no survey, or the bound is too small for the tiling.
    """
    stats: Stats = read_data_file(SURVEY)
    side, tokens = read_base_tile(get_files_folder(Files(**read_data_file(MANIFEST)["base"]), "model"))
    for facts in stats.values():
        tiles: Counter[int] = Counter()
        for size, count in facts.pop("page sizes").items():
            width, height = map(int, size.split("x"))
            tiles[choose_base_grid(width, height, max_visual_tokens, side, tokens, tiling).tiles] += count
        facts["tiles of a page"] = {str(n): count for n, count in sorted(tiles.items())}
        facts["tokens of a page"] = {str(n * tokens): count for n, count in sorted(tiles.items())}
    return stats


def summarize_stats(stats: Stats) -> Stats:
    """Return the counts, and the mean of each histogram."""
    return {
        name: {key: value for key, value in facts.items() if key not in MEASURES}
        | {label: _compute_mean(facts[measure]) for measure, label in MEASURES.items()}
        for name, facts in stats.items()
    }


def iter_histogram_rows(stats: Stats) -> Iterator[dict[str, object]]:
    """Yield the histograms as rows with the keys `HISTOGRAM_COLUMNS`, one for each bar."""
    for name, facts in stats.items():
        for measure in MEASURES:
            for value, count in facts[measure].items():
                yield {"set": name, "measure": measure, "value": value, "count": count}


def format_stats(stats: Stats, quarantined: Sequence[Mapping[str, str]]) -> str:
    """Format counts, means, histograms, languages and the reasons for quarantine as text."""
    lines = []
    for name, facts in stats.items():
        lines.append(
            f"{name}: {facts['rows']} rows, {facts['pages']} pages, {facts['queries']} queries, "
            f"{facts['duplicates']} duplicates, {facts['quarantined']} quarantined, {facts['bytes'] / 1e6:.1f} MB"
            + (f", {facts['queries cut']} queries cut" if "queries cut" in facts else "")
        )
        for measure, label in MEASURES.items():
            histogram = facts[measure]
            lines.append(f"  {label:<13} mean {_compute_mean(histogram):<8g} {_format_histogram(histogram)}")
        lines.append(f"  languages     {_format_languages(facts['languages, guessed'])}")
    counts = Counter((entry["source"], entry["reason"].split(":")[0]) for entry in quarantined)
    lines += [f"quarantined: {source}: {count} x {reason}" for (source, reason), count in sorted(counts.items())]
    return "\n".join(lines)


def _compute_mean(histogram: dict[str, int]) -> float:
    total = sum(histogram.values())
    return round(sum(int(value) * count for value, count in histogram.items()) / total, 3) if total else 0.0


def _format_languages(guessed: dict[str, int]) -> str:
    """Format the most frequent languages, how many others there are, and what could not be guessed."""
    known = sorted(((count, name) for name, count in guessed.items() if name != "unknown"), reverse=True)
    shown = [f"{name}: {count}" for count, name in known[:MAX_BARS]]
    if others := known[MAX_BARS:]:
        shown.append(f"{len(others)} others: {sum(count for count, _ in others)}")
    if "unknown" in guessed:
        shown.append(f"unknown: {guessed['unknown']}")
    return f"guessed, of {sum(guessed.values())} distinct queries: {'  '.join(shown)}"


def _format_histogram(histogram: dict[str, int]) -> str:
    """Format `value: count` of each value, or of equally wide ranges where there are many."""
    counts = {int(value): histogram[value] for value in sorted(histogram, key=int)}  # JSON's keys are sorted as text
    if len(counts) <= MAX_BARS:
        return "  ".join(f"{value}: {count}" for value, count in counts.items())
    low, high = min(counts), max(counts)
    width = -(-(high - low + 1) // MAX_BARS)
    bins: Counter[int] = Counter()
    for value, count in counts.items():
        bins[low + (value - low) // width * width] += count
    return "  ".join(f"{start}-{min(start + width - 1, high)}: {count}" for start, count in sorted(bins.items()))
