"""What the data is, in numbers: rows, pages, queries a page, tiles, tokens, duplicates, bytes; set by set."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from colintern.modeling.tiling import choose_grid, read_base_tile
from colintern.storage.manifest import MANIFEST, SURVEY, Files, get_files_folder, read_data_file

COLUMNS = ("set", "measure", "value", "count")
MEASURES = {  # histogram -> what the table calls its mean
    "queries of a page": "queries/page",
    "tiles of a page": "tiles/page",
    "tokens of a page": "tokens/page",
    "tokens of a query": "tokens/query",
}
Survey = dict[str, dict[str, Any]]


def inventory(max_visual_tokens: int) -> Survey:
    """The survey, with the tiles and visual tokens that its pages get.

    Raises:
        UserError: there is no survey.
    """
    found: Survey = read_data_file(SURVEY)
    side, tokens = read_base_tile(get_files_folder(Files(**read_data_file(MANIFEST)["base"]), "model"))
    for facts in found.values():
        tiles: Counter[int] = Counter()
        for size, count in facts.pop("page sizes").items():
            width, height = map(int, size.split("x"))
            tiles[choose_grid(width, height, max_visual_tokens // tokens, side).tiles] += count
        facts["tiles of a page"] = {str(n): count for n, count in sorted(tiles.items())}
        facts["tokens of a page"] = {str(n * tokens): count for n, count in sorted(tiles.items())}
    return found


def summarize_survey(found: Survey) -> dict[str, dict[str, float]]:
    """Return the counts, and the mean of each histogram."""
    return {
        name: {key: value for key, value in facts.items() if key not in MEASURES}
        | {label: _mean(facts[measure]) for measure, label in MEASURES.items()}
        for name, facts in found.items()
    }


def _mean(histogram: dict[str, int]) -> float:
    total = sum(histogram.values())
    return round(sum(int(value) * count for value, count in histogram.items()) / total, 3) if total else 0.0


def survey_rows(found: Survey) -> Iterator[dict[str, Any]]:
    """Yield the histograms as rows with the keys `COLUMNS`, one for each bar."""
    for name, facts in found.items():
        for measure in MEASURES:
            for value, count in facts[measure].items():
                yield {"set": name, "measure": measure, "value": value, "count": count}


def table(found: Survey, quarantined: Sequence[dict[str, str]]) -> str:
    """All of it as text."""
    lines = []
    for name, facts in found.items():
        lines.append(
            f"{name}: {facts['rows']} rows, {facts['pages']} pages, {facts['queries']} queries, "
            f"{facts['duplicates']} duplicates, {facts['quarantined']} quarantined, {facts['bytes'] / 1e6:.1f} MB"
            + (f", {facts['queries cut']} queries cut" if "queries cut" in facts else "")
        )
        for measure, label in MEASURES.items():
            lines.append(f"  {label:<13} mean {_mean(facts[measure]):<8g} {_bars(facts[measure])}")
        lines.append(f"  languages     {_languages(facts['languages, guessed'])}")
    counts = Counter((entry["source"], entry["reason"].split(":")[0]) for entry in quarantined)
    lines += [f"quarantined: {source}: {count} x {reason}" for (source, reason), count in sorted(counts.items())]
    return "\n".join(lines)


def _languages(guessed: dict[str, int], most: int = 6) -> str:
    """The most frequent ones, what could not be guessed, and how many others there are."""
    known = sorted(((count, name) for name, count in guessed.items() if name != "unknown"), reverse=True)
    shown = [f"{name}: {count}" for count, name in known[:most]]
    if rest := known[most:]:
        shown.append(f"{len(rest)} others: {sum(count for count, _ in rest)}")
    if "unknown" in guessed:
        shown.append(f"unknown: {guessed['unknown']}")
    return f"guessed, of {sum(guessed.values())} distinct queries: {'  '.join(shown)}"


def _bars(histogram: dict[str, int], most: int = 6) -> str:
    """`value: count` of each value, or of equally wide ranges where there are many."""
    numbers = {int(value): histogram[value] for value in sorted(histogram, key=int)}  # JSON's keys are sorted as text
    if len(numbers) <= most:
        return "  ".join(f"{value}: {count}" for value, count in numbers.items())
    low, high = min(numbers), max(numbers)
    width = -(-(high - low + 1) // most)
    bins = Counter((value - low) // width for value in numbers for _ in range(numbers[value]))
    return "  ".join(
        f"{low + place * width}-{min(low + (place + 1) * width - 1, high)}: {bins[place]}"
        for place in range(most)
        if bins[place]
    )
