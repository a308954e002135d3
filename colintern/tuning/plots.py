"""What a study did, as SVG: its history, what mattered, the settings of each trial, and how each went."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.ticker import MaxNLocator

from colintern.reporting.plots import FAINT, FIRST, SECOND, draw_svg
from colintern.tuning.space import Range


def history(rows: Sequence[Any], one_objective: bool = True) -> str:
    """Dev NDCG@5 by trial, and of one objective the best so far; hollow where the trial was stopped early."""

    def draw(axes: Axes) -> None:
        done = [row for row in rows if row.state == "complete"]
        stopped = [row for row in rows if row.state == "pruned"]
        best = [(row.number, max(r.score for r in done if r.number <= row.number)) for row in done]
        if best and one_objective:
            numbers, scores = zip(*best, (max(row.number for row in rows), best[-1][1]), strict=True)
            axes.step(numbers, scores, where="post", color=SECOND, linewidth=1.6, label="best so far")
        axes.plot([r.number for r in done], [r.score for r in done], "o", color=FIRST, markersize=6, label="complete")
        if stopped:
            places = [row.number for row in stopped], [row.score for row in stopped]
            axes.plot(*places, "o", color=FIRST, markerfacecolor="none", markersize=6, label="stopped early")
        axes.set_xlabel("trial")
        axes.set_ylabel("dev NDCG@5")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)

    return draw_svg(draw, "History")


def front(rows: Sequence[Any], best: Sequence[Any], against: str) -> str:
    """All complete trials by both objectives; those on the front are joined, and bear their numbers."""

    def draw(axes: Axes) -> None:
        axes.plot([r.second for r in rows], [r.score for r in rows], "o", color=FIRST, markersize=6, label="complete")
        where = [row.second for row in best], [row.score for row in best]
        axes.step(*where, where="post", color=SECOND, linewidth=1.6, marker="o", markersize=7, label="front")
        for row in best:
            axes.annotate(f"{row.number:03}", (row.second, row.score), (4, 6), textcoords="offset points", fontsize=9)
        axes.set_xlabel(against.replace("_", " ") + (", as float16" if against == "bytes_per_page" else ""))
        axes.set_ylabel("dev NDCG@5")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.08)
        axes.set_ylim(0, 1)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2)

    return draw_svg(draw, "Front")


def importance(weights: dict[str, float]) -> str:
    """Share of the score's variance that each key explains."""

    def draw(axes: Axes) -> None:
        names = list(weights)[::-1]
        axes.barh(names, [weights[name] for name in names], color=FIRST, height=0.55, alpha=0.75)
        for place, name in enumerate(names):
            axes.annotate(f"{weights[name]:.2f}", (weights[name], place), (5, -4), textcoords="offset points")
        axes.set_xlim(0, max(weights.values()) * 1.15)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("share of the variance of dev NDCG@5")

    return draw_svg(draw, "Importance", high=1.0 + 0.42 * len(weights))


def curves(rows: Sequence[Any]) -> str:
    """Dev NDCG@5 of each trial as it was trained."""

    def draw(axes: Axes) -> None:
        best = max(rows, key=lambda row: (row.state == "complete", row.score))
        for row in rows:
            evaluations = range(1, len(row.curve) + 1)
            colour, width = (SECOND, 2.2) if row is best else (FIRST, 1.0)
            axes.plot(evaluations, row.curve, color=colour, linewidth=width, marker="o", markersize=3, alpha=0.85)
        axes.set_xlabel("evaluation")
        axes.set_ylabel("dev NDCG@5")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(0, 1)

    return draw_svg(draw, "Curves")


def parallel(rows: Sequence[Any], space: Sequence[Range]) -> str:
    """A line for each trial through its settings to its score: the better, the stronger."""

    def draw(axes: Axes) -> None:
        scores = [row.score for row in rows]
        low, high = min(scores), max(scores)
        first = max(rows, key=lambda row: (row.state == "complete", row.score))
        ends = [*(one.ends for one in space), [low, high]]
        for row in sorted(rows, key=lambda row: row.score):
            strength = (row.score - low) / (high - low) if high > low else 1.0
            heights = [*(_height(one, row.values[one.key]) for one in space), strength]
            best = row is first
            line = LineCollection([list(enumerate(heights))], colors=[SECOND if best else FIRST])
            line.set(linewidth=2.4 if best else 1.4, alpha=1.0 if best else 0.15 + 0.65 * strength)
            line.set_linestyle("--" if row.state == "pruned" else "-")
            axes.add_collection(line)
        for place, values in enumerate(ends):
            axes.axvline(place, color=FAINT, linewidth=1)
            for height, label in _ticks(space[place] if place < len(space) else None, values):
                # Clear of the lines: above the axis, below it, and beside it only where a choice is between both.
                at, words = {1.0: ((0, 5), "bottom"), 0.0: ((0, -5), "top")}.get(height, ((5, 0), "center"))
                side = "center" if height in (0.0, 1.0) else "left"
                where: Any = {"textcoords": "offset points", "ha": side, "va": words, "fontsize": 10}
                axes.annotate(label, (place, height), at, **where)
        axes.set_xticks(range(len(ends)), [*(one.key for one in space), "dev NDCG@5"])
        axes.set_xlim(-0.3, len(ends) - 0.7)
        axes.set_ylim(-0.1, 1.1)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)

    return draw_svg(draw, "Parallel coordinates", wide=11.0, high=3.6)


def _height(one: Range, value: Any) -> float:
    """Where a value stands between the ends of its range, 0 to 1."""
    if one.choices:
        return one.choices.index(value) / (len(one.choices) - 1)
    form = math.log if one.log else float
    return (form(value) - form(one.low)) / (form(one.high) - form(one.low))


def _ticks(one: Range | None, values: Sequence[Any]) -> list[tuple[float, str]]:
    if one and one.choices:
        return [(_height(one, choice), str(choice)) for choice in one.choices]
    return [(0.0, f"{values[0]:.3g}"), (1.0, f"{values[1]:.3g}")]
