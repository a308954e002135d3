"""Curves, intervals and distributions as inline SVG, whose colours are the page's own, in light and in dark."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Colours that stand for variables of the style sheet, and are put in their place when the SVG is written.
INK, FAINT, FIRST, SECOND, THIRD = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "--ink", FAINT: "--line", FIRST: "--first", SECOND: "--second", THIRD: "--third"}
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched and copied, and no font is stored
    "font.family": "sans-serif",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


class Bar(NamedTuple):
    """A score, 0 to 100, with its interval; `before`: before training, None if unknown; `others`: published scores."""

    name: str
    value: float
    low: float
    high: float
    before: float | None
    others: list[float]


def curve(rows: Sequence[tuple[float, float]], what: str, marked: bool = False) -> str:
    """(step, value) as a line."""

    def draw(axes: Axes) -> None:
        x, y = zip(*rows, strict=True)
        axes.plot(x, y, color=FIRST, linewidth=1.6, marker="o" if marked else "", markersize=5)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0, top=1 if marked else None)
        if marked:
            axes.margins(x=0.08)
            for place, value in rows:
                axes.annotate(f"{value:.3f}", (place, value), (0, -14), textcoords="offset points", ha="center")

    return svg(draw, what)


def bars(rows: Sequence[Bar], what: str) -> str:
    """Scores with their intervals, one below the other, beside what others have published."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(rows))[::-1]
        axes.barh(places, [row.value for row in rows], color=FIRST, height=0.5, alpha=0.5)
        for place, row in zip(places, rows, strict=True):
            axes.plot([row.low, row.high], [place, place], color=INK, linewidth=1.4, marker="|", markersize=9)
            if row.before is not None:
                axes.plot([row.before], [place], color=SECOND, marker="D", markersize=7, linestyle="")
            axes.plot(row.others, [place] * len(row.others), color=THIRD, marker="|", markersize=16, linestyle="")
        axes.set_yticks(places, [row.name for row in rows])
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("NDCG@5 x100")

    return svg(draw, what, high=0.7 + 0.4 * len(rows))


def two_histograms(right: Sequence[float], wrong: Sequence[float], what: str) -> str:
    """Scores of right pages and of the best wrong ones."""

    def draw(axes: Axes) -> None:
        edges = np.histogram_bin_edges([*right, *wrong], bins=24).tolist()
        axes.hist(right, edges, color=FIRST, alpha=0.75, label="right page")
        axes.hist(wrong, edges, color=SECOND, histtype="step", linewidth=2, label="best wrong page")
        axes.set_xlabel("MaxSim")
        axes.set_ylabel("queries")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
        axes.legend(loc="upper left", ncols=2)

    return svg(draw, what)


def margins(values: Sequence[float], what: str) -> str:
    """Score of the right page less that of the best wrong page: left of zero the query failed."""

    def draw(axes: Axes) -> None:
        width = max((max(values) - min(values)) / 24, 1e-6)
        first = np.floor(min(values) / width)
        edges = (np.arange(first, np.ceil(max(values) / width) + 1.5) * width).tolist()  # zero is an edge
        axes.hist([v for v in values if v > 0], edges, color=FIRST, alpha=0.75, label="right page first")
        axes.hist([v for v in values if v <= 0], edges, color=SECOND, alpha=0.85, label="a wrong page first")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_xlabel("margin: right page - best wrong page")
        axes.set_ylabel("queries")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
        axes.legend(loc="upper left", ncols=2)

    return svg(draw, what)


def svg(draw: Callable[[Axes], None], what: str, wide: float = 5.4, high: float = 3.3) -> str:
    """What `draw` draws; `what` is its name, also for those who do not see it. The same data gives the same bytes."""
    style: Any = STYLE | {"svg.hashsalt": what}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(wide, high), layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", text)  # which HTML does not need, and no address is left in the file
    text = text.replace("xlink:href", "href")
    text = re.sub(r" font-family: [^;]*;", "", text)  # the page's own
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    prefix = re.sub(r"\W+", "-", what.lower())
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    label = what.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
