"""What a page takes against how well it is found: settings of `pool_factor` and `dim` side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from colintern.evaluation.scores import Scores

FIELDS = ("benchmark", "pool_factor", "dim", "vectors_per_page", "bytes_per_page", "ndcg_at_5")


def rows(scores: Scores, pool_factor: int, dim: int) -> list[dict[str, Any]]:
    """One row for each benchmark, with the keys `FIELDS`."""
    setting = {"pool_factor": pool_factor, "dim": dim}
    return [{key: ({"benchmark": name} | setting | found)[key] for key in FIELDS} for name, found in scores.items()]


def table(found: Sequence[dict[str, Any]]) -> str:
    """The rows as text of at most 80 columns; a share is of the largest size, or of the highest score."""
    lines = [
        f"{'benchmark':<26}{'pool':>5}{'dim':>5}{'vectors':>9}{'bytes/page':>11}{'share':>7}{'ndcg@5':>8}{'share':>7}"
    ]
    for row in found:
        same = [other for other in found if other["benchmark"] == row["benchmark"]]
        shares = [row[key] / (max(other[key] for other in same) or 1) for key in ("bytes_per_page", "ndcg_at_5")]
        lines.append(
            f"{row['benchmark'][:25]:<26}{row['pool_factor']:>5}{row['dim']:>5}{row['vectors_per_page']:>9.1f}"
            f"{row['bytes_per_page']:>11,.0f}{shares[0]:>7.0%}{100 * row['ndcg_at_5']:>8.1f}{shares[1]:>7.0%}"
        )
    return "\n".join(lines)


def plot(found: Sequence[dict[str, Any]], file: Path) -> None:
    """The rows as an SVG: bytes of a page across, in powers of two, NDCG@5 up, a line for each benchmark and `dim`."""
    with matplotlib.rc_context({"svg.hashsalt": "sizes", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for name, dim in dict.fromkeys((row["benchmark"], row["dim"]) for row in found):
            line = [row for row in found if (row["benchmark"], row["dim"]) == (name, dim)]
            line.sort(key=lambda row: row["bytes_per_page"])
            x, y = [row["bytes_per_page"] for row in line], [100 * row["ndcg_at_5"] for row in line]
            axes.plot(x, y, marker="o", label=f"{name}, dim {dim}")
            for row, place in zip(line, zip(x, y, strict=True), strict=True):
                axes.annotate(f"/{row['pool_factor']}", place, (0, 6), textcoords="offset points", ha="center")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:g} KiB")
        axes.set_xlabel("bytes a page, as float16; /n: pool_factor n")
        axes.set_ylabel("NDCG@5 x100")
        axes.grid(alpha=0.3)
        axes.margins(y=0.15)
        axes.legend(frameon=False)
        figure.savefig(file, format="svg", metadata={"Date": None})
