"""Draw curves, intervals and distributions as SVG images, in a light and a dark version."""

import base64
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from colintern.analysis.size_table import SizeRow
from colintern.scoring.metrics import MAIN_METRIC

# Colours of a theme by their place in the property cycle, so that one drawing gives both versions of a plot.
FIRST, SECOND, THIRD, INK = "C0", "C1", "C2", "C3"
THEMES = {  # those of templates/style.css, the last for lines of the grid
    "light": ("#2463c9", "#c2571a", "#7a8797", "#1b2430", "#d9dee6"),
    "dark": ("#6ea2ff", "#ff9c5b", "#8b97a8", "#e6eaf0", "#323b48"),
}
WIDTH = 5.4  # inches
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}  # the same data give the same bytes
AXES_STYLE = {
    "svg.fonttype": "none",  # no font is stored
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


class Bar(NamedTuple):
    """A score, 0 to 100, with its interval."""

    name: str
    value: float
    low: float
    high: float
    before: float | None  # training; None if unknown
    others: list[float]  # published scores


def plot_curve(points: Sequence[tuple[float, float]], title: str, is_marked: bool = False) -> str:
    """Plot (step, value) as a line; `is_marked`: few values from 0 to 1, each with its number."""

    def draw(axes: Axes) -> None:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=FIRST, linewidth=1.6, marker="o" if is_marked else "", markersize=5)
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0, top=1 if is_marked else None)
        if is_marked:
            axes.margins(x=0.08)
            for step, value in points:
                axes.annotate(f"{value:.3f}", (step, value), (0, -14), textcoords="offset points", ha="center")

    return draw_svg(draw, title)


def plot_bars(bars: Sequence[Bar], title: str) -> str:
    """Plot scores with their intervals, one below the other, beside what others have published."""

    def draw(axes: Axes) -> None:
        heights = np.arange(len(bars))[::-1]
        axes.barh(heights, [bar.value for bar in bars], color=FIRST, height=0.5, alpha=0.5)
        for y, bar in zip(heights, bars, strict=True):
            axes.plot([bar.low, bar.high], [y, y], color=INK, linewidth=1.4, marker="|", markersize=9)
            if bar.before is not None:
                axes.plot([bar.before], [y], color=SECOND, marker="D", markersize=7, linestyle="")
            axes.plot(bar.others, [y] * len(bar.others), color=THIRD, marker="|", markersize=16, linestyle="")
        axes.set_yticks(heights, [bar.name for bar in bars])
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(bars) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"{MAIN_METRIC.title} x100")

    return draw_svg(draw, title, high=0.7 + 0.4 * len(bars))


def plot_score_histograms(right: Sequence[float], wrong: Sequence[float], title: str) -> str:
    """Plot the scores of right pages and of the best wrong ones."""

    def draw(axes: Axes) -> None:
        edges = np.histogram_bin_edges([*right, *wrong], bins=24).tolist()
        axes.hist(right, edges, color=FIRST, alpha=0.75, label="right page")
        axes.hist(wrong, edges, color=SECOND, histtype="step", linewidth=2, label="best wrong page")
        _label_histogram(axes, "MaxSim")

    return draw_svg(draw, title)


def plot_margins(margins: Sequence[float], title: str) -> str:
    """Plot the score of the right page less that of the best wrong page: left of zero the query failed."""

    def draw(axes: Axes) -> None:
        width = max((max(margins) - min(margins)) / 24, 1e-6)
        first = np.floor(min(margins) / width)
        edges = (np.arange(first, np.ceil(max(margins) / width) + 1.5) * width).tolist()  # zero is an edge
        axes.hist([m for m in margins if m > 0], edges, color=FIRST, alpha=0.75, label="right page first")
        axes.hist([m for m in margins if m <= 0], edges, color=SECOND, alpha=0.85, label="a wrong page first")
        axes.axvline(0, color=INK, linewidth=1)
        _label_histogram(axes, "margin: right page - best wrong page")

    return draw_svg(draw, title)


def _label_histogram(axes: Axes, label: str) -> None:
    axes.set_xlabel(label)
    axes.set_ylabel("queries")
    axes.set_ylim(top=axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper left", ncols=2)


def draw_svg(draw: Callable[[Axes], None], title: str, high: float = 3.3) -> str:
    """Draw a plot `high` inches high as an HTML picture: an SVG for light pages and one for dark ones.

    `draw` uses the colours FIRST, SECOND, THIRD and INK; `title` is for those who do not see the plot.
    """
    urls = {}
    for theme, colours in THEMES.items():
        ink, faint = colours[3:]
        style: Any = AXES_STYLE | {"axes.prop_cycle": matplotlib.rcsetup.cycler(color=colours), "svg.hashsalt": title}
        style |= dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        style |= dict.fromkeys(("axes.edgecolor", "grid.color"), faint)
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(WIDTH, high), layout="constrained")
            draw(figure.subplots())
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata=NO_METADATA)
        urls[theme] = f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{urls["dark"]}">'
        f'<img class="plot" alt="{escape(title)}" src="{urls["light"]}"></picture>'
    )


def plot_sizes(rows: Sequence[SizeRow], file: Path) -> None:
    """Plot to an SVG file: bytes of a page across, in powers of two, NDCG@5 up, a line for each benchmark.

    Rows that are rescored are separate points, because they need the full embeddings as well.
    """
    with matplotlib.rc_context({"svg.hashsalt": "sizes", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for key in dict.fromkeys((row.benchmark, row.dim, row.pool_factor, row.rescore_top_k) for row in rows):
            line = [row for row in rows if (row.benchmark, row.dim, row.pool_factor, row.rescore_top_k) == key]
            line.sort(key=lambda row: row.bytes_per_page)
            x, y = [row.bytes_per_page for row in line], [100 * row.ndcg_at_5 for row in line]
            name, dim, factor, top_k = key
            label = (
                f"{name}, dim {dim}" + f", pooled /{factor}" * (factor > 1) + f", best {top_k} rescored" * (top_k > 0)
            )
            axes.plot(x, y, marker="o", label=label)
            for row, point in zip(line, zip(x, y, strict=True), strict=True):
                axes.annotate(row.embedding_precision, point, (0, 6), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g} KiB")
        axes.set_xlabel("bytes a page")
        axes.set_ylabel(f"{MAIN_METRIC.title} x100")
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.legend(frameon=False, fontsize="small")
        figure.savefig(file, format="svg", metadata={"Date": None})
