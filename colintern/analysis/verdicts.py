"""Scores as a table for people, beside what the guide asks for and what others have published."""

import re
from typing import NamedTuple

from colintern.evaluation.scores import METRICS, Scores, short

# The guide's bands of NDCG@5, lower bound first. It says nothing of 0.30 to 0.50 and of more than 0.85: the first is
# called fair here, the second excellent.
BANDS = ((0.70, "excellent"), (0.50, "good"), (0.30, "fair"), (0.10, "poor"), (0.0, "broken"))
BANDED = re.compile(r"ViDoRe\(v(1|2|1&v2)\)|Vidore2?[A-Z]\w*")  # benchmarks and tasks that the guide knew
NO_BAND = "no band"
TARGETS = {  # the guide's, NDCG@5
    "VidoreArxivQARetrieval": (0.60, 0.75),
    "VidoreDocVQARetrieval": (0.65, 0.80),
    "VidoreInfoVQARetrieval": (0.55, 0.70),
    "VidoreTatdqaRetrieval": (0.50, 0.65),
}
NAMES = {"deu": "German", "eng": "English", "fra": "French", "ita": "Italian", "por": "Portuguese", "spa": "Spanish"}


class Published(NamedTuple):
    """NDCG@5 x100, recomputed in August 2026 from mteb's public results; a task's data may be of another revision."""

    model: str
    v1: float
    v2: float
    v2_english: float
    arxiv: float
    docvqa: float
    infovqa: float
    tatdqa: float


PUBLISHED = (
    Published("colSmol-256M", 79.7, 34.8, 50.0, 72.9, 56.6, 84.2, 76.6),
    Published("colSmol-500M", 82.5, 42.9, 52.1, 74.9, 58.0, 87.2, 77.5),
    Published("colpali-v1.3", 84.8, 54.7, 56.1, 83.3, 58.4, 85.5, 70.8),
    Published("VultronRetrieverFlash-0.8B", 88.2, 60.4, 60.7, 88.6, 62.2, 92.2, 77.9),
    Published("llama-nemoretriever-colembed-1b", 90.5, 63.0, 66.4, 87.6, 64.5, 93.6, 79.8),
    Published("colqwen2.5-v0.2", 89.5, 60.1, 61.5, 88.9, 63.6, 92.5, 82.1),
    Published("Argus-Colqwen3.5-9b (best)", 92.7, 69.3, 70.7, 92.3, 68.1, 94.3, 85.5),
)
COLUMNS = ("v1", "v2 all", "v2 en", "Arxiv", "DocVQA", "Info", "TatDQA")


def band(benchmark: str, ndcg: float) -> str:
    """Return the guide's band of an NDCG@5 from 0 to 1 on ViDoRe v1 or v2, `NO_BAND` on a later one, "" on others."""
    if BANDED.fullmatch(benchmark):
        return next(word for low, word in BANDS if ndcg >= low)
    return NO_BAND if benchmark.startswith(("ViDoRe", "Vidore")) else ""


def target(task: str, ndcg: float) -> str:
    """How a task's NDCG@5 stands to the guide's target for it; "" if it has none."""
    if task not in TARGETS:
        return ""
    low, high = TARGETS[task]
    where = "below" if ndcg < low else "above" if ndcg > high else "within"
    return f"{where} {100 * low:.0f}-{100 * high:.0f}"


def table(by_model: dict[str, Scores]) -> str:
    """The scores x100 as text of at most 80 columns: each benchmark's tasks, then its means, for each model.

    The last column is the guide's band for a mean, and its target for a task, both of NDCG@5.
    """
    lines = [f"{'x100':<34}{'model':<10}{'ndcg@5':>7}{'ndcg@10':>8}{'rec@100':>8} verdict"]
    for benchmark in next(iter(by_model.values())):
        for model, scores in by_model.items():
            found = scores[benchmark]
            tasks = found["tasks"]
            for task, values in tasks.items():
                verdict = target(task, values["ndcg_at_5"]) if model == "trained" else ""
                lines.append(_row(f"  {short(task)}", model, values, verdict))
            every = ", all languages" if "languages" in found else f", mean of {len(tasks)}"
            verdict = band(benchmark, found["ndcg_at_5"]) if model == "trained" else ""
            lines.append(_row(benchmark + every, model, found, verdict))
            for language, values in found.get("languages", {}).items():
                verdict = band(benchmark, values["ndcg_at_5"]) if model == "trained" else ""
                lines.append(_row(f"{benchmark}, {NAMES.get(language, language)}", model, values, verdict))
    return "\n".join([*lines, *_beside_published(by_model["trained"])])


def _row(name: str, model: str, values: dict[str, float], verdict: str) -> str:
    numbers = [f"{100 * values[metric]:.1f}" for metric in METRICS]
    return f"{name[:33]:<34}{model[:9]:<10}{numbers[0]:>7}{numbers[1]:>8}{numbers[2]:>8} {verdict}".rstrip()


def columns(scores: Scores) -> list[float | None]:
    """A run's NDCG@5 under each of `COLUMNS`, None where it has none."""
    tasks = {name: found for benchmark in scores.values() for name, found in benchmark["tasks"].items()}
    second = scores.get("ViDoRe(v2)", {})
    return [
        found.get("ndcg_at_5")
        for found in (
            scores.get("ViDoRe(v1)", {}),
            second,
            second.get("languages", {}).get("eng", {}),
            *(tasks.get(name, {}) for name in TARGETS),
        )
    ]


def _beside_published(scores: Scores) -> list[str]:
    """This run's NDCG@5 under those of published models, where it has one of their columns; else nothing."""
    own = columns(scores)
    if not any(value is not None for value in own):
        return []
    width = max(len(row.model) for row in PUBLISHED)
    lines = ["", f"{'NDCG@5 x100, published':<{width}}" + "".join(f"{name:>7}" for name in COLUMNS)]
    for row in PUBLISHED:
        lines.append(f"{row.model:<{width}}" + "".join(f"{value:>7.1f}" for value in row[1:]))
    mine = ("" if value is None else f"{100 * value:.1f}" for value in own)
    return [*lines, (f"{'this run':<{width}}" + "".join(f"{value:>7}" for value in mine)).rstrip()]
