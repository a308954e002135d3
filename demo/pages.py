"""Draw the demo's pages: words set in real fonts, freely laid out, in five kinds of document.

A layout is a function of the words to place and a random generator; it knows nothing of what the words mean. The
same layouts draw the pages the demo base learns to read on (random words) and the demo corpus (facts).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

import matplotlib
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 224, 336  # two by three tiles of 112 px: the smallest page that needs the tiler
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral", "STIXGeneralBol")
MIN_GAP = 3  # free pixels kept around a word


@lru_cache(maxsize=64)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Load a font that ships inside matplotlib, set by Pillow's own layout: the same pixels on every machine.

    The other layout, raqm, is there only where the system has FriBidi, and sets the same word wider or narrower.
    """
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


@dataclass(frozen=True)
class PlacedWord:
    """A word and the box of its ink: (left, top, right, bottom) in pixels."""

    text: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        """Return the middle of the box."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass
class PageCanvas:
    """A white page being drawn; `words` lists what stands on it, in the order it was set."""

    rng: Random
    align: float = 0.0  # 1 puts each word in the middle of a 28 px cell, 0 leaves it where the layout wants it
    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (WIDTH, HEIGHT), "white"))
    words: list[PlacedWord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.draw = ImageDraw.Draw(self.image)
        self.face = self.rng.choice(FONTS)
        self.size = self.rng.choice((9, 10, 10, 11))
        shade = self.rng.randrange(0, 90)
        self.ink = (shade, shade, shade if self.rng.random() < 0.7 else min(255, shade + 90))

    def draw_word(self, text: str, x: float, y: float, grow: int = 0) -> float:
        """Set one word at the left end x of a line whose top is y, if it fits, and return where the next may begin."""
        type_ = load_font(self.face, self.size + grow)
        left, top, right, bottom = self.draw.textbbox((0, 0), text, font=type_)
        wide, high = right - left, bottom - top
        if self.align:
            cell = 28
            mid_x = (int((x + wide / 2) // cell) + 0.5) * cell
            mid_y = (int((y + top + high / 2) // cell) + 0.5) * cell
            x += self.align * (mid_x - wide / 2 - x)
            y += self.align * (mid_y - high / 2 - top - y)
        x, y = round(x), round(y)
        box = (x, y + top, x + wide, y + bottom)
        inside = box[0] >= 1 and box[1] >= 1 and box[2] <= WIDTH - 1 and box[3] <= HEIGHT - 1
        if inside and not any(_boxes_overlap(box, word.box) for word in self.words):
            self.draw.text((x - left, y), text, font=type_, fill=self.ink)
            self.words.append(PlacedWord(text, box))
            return x + wide + self.size * 0.6
        return x

    def line(self, words: list[str], x: float, y: float, grow: int = 0) -> list[str]:
        """Set words one after another from (x, y) and return those that did not fit on the line."""
        for i, text in enumerate(words):
            after = self.draw_word(text, x, y, grow)
            if after == x:
                return words[i:]
            x = after
        return []

    def rule(self, x0: float, y0: float, x1: float, y1: float, tone: int = 170) -> None:
        """Draw a line."""
        self.draw.line((x0, y0, x1, y1), fill=(tone, tone, tone))

    def block(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a filled shape of a chart: pale, so that a label on it stays readable."""
        colour = tuple(self.rng.randrange(170, 245) for _ in range(3))
        self.draw.rectangle((x0, y0, x1, y1), fill=colour)


def _boxes_overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] + MIN_GAP and b[0] < a[2] + MIN_GAP and a[1] < b[3] + MIN_GAP and b[1] < a[3] + MIN_GAP


def draw_letter(page: PageCanvas, lines: Iterator[list[str]]) -> None:
    """Draw a sender at the top, a date on the right, then paragraphs."""
    r, pitch = page.rng, page.rng.uniform(21, 27)
    margin, y = r.uniform(6, 24), r.uniform(6, 20)
    for words in lines:
        x = margin if r.random() < 0.8 else r.uniform(margin, WIDTH * 0.5)
        rest = page.line(words, x, y)
        if rest:
            y += pitch
            page.line(rest, margin, y)
        y += pitch * r.choice((1, 1, 1.4))


def draw_invoice(page: PageCanvas, lines: Iterator[list[str]]) -> None:
    """Draw a heading, two columns of addresses, ruled rows."""
    r, pitch = page.rng, page.rng.uniform(20, 25)
    y = r.uniform(6, 16)
    page.line(next(lines), r.uniform(6, 60), y, grow=2)
    y += pitch + 4
    for x in (r.uniform(5, 14), r.uniform(112, 126)):
        for i in range(3):
            page.line(next(lines), x, y + i * pitch)
    y += 3 * pitch
    for words in lines:
        page.rule(6, y - 5, WIDTH - 6, y - 5)
        page.line(words, r.uniform(6, 14), y)
        y += pitch


def draw_report(page: PageCanvas, lines: Iterator[list[str]]) -> None:
    """Draw a title and headed paragraphs, in one column or two."""
    r, pitch = page.rng, page.rng.uniform(20, 25)
    y = r.uniform(8, 20)
    page.line(next(lines), r.uniform(8, 50), y, grow=3)
    y += pitch * 1.4
    page.rule(8, y - 6, WIDTH - 8, y - 6, tone=90)
    columns = r.choice((1, 2))
    starts = [r.uniform(6, 16)] if columns == 1 else [r.uniform(5, 10), r.uniform(114, 120)]
    tops = [y] * columns
    for i, words in enumerate(lines):
        c = i % columns
        page.line(words[: 5 if columns == 1 else 2], starts[c], tops[c], grow=r.choice((0, 0, 1)))
        tops[c] += pitch


def draw_table(page: PageCanvas, lines: Iterator[list[str]]) -> None:
    """Draw a grid with ruled cells, one word or two per cell."""
    r = page.rng
    columns, pitch = r.choice((3, 4)), r.uniform(22, 28)
    x0, y0 = r.uniform(4, 12), r.uniform(8, 40)
    page.line(next(lines), x0, y0 - 2, grow=1)
    y0 += pitch
    step = (WIDTH - x0 - 4) / columns
    y = y0
    for words in lines:
        for c, text in enumerate(words[:columns]):
            page.draw_word(text, x0 + c * step + r.uniform(2, 6), y)
        page.rule(x0, y - 6, WIDTH - 4, y - 6)
        y += pitch
    for c in range(columns + 1):
        page.rule(x0 + c * step, y0 - 6, x0 + c * step, min(y, HEIGHT) - 6)


def draw_chart(page: PageCanvas, lines: Iterator[list[str]]) -> None:
    """Draw bars or stripes with labels, a title above and notes below."""
    r, pitch = page.rng, page.rng.uniform(20, 25)
    y = r.uniform(6, 16)
    page.line(next(lines), r.uniform(6, 50), y, grow=2)
    y += pitch + 4
    for _ in range(r.choice((4, 5, 6))):
        page.block(r.uniform(50, 70), y - 4, r.uniform(90, WIDTH - 8), y + page.size + 4)
        words = next(lines)
        page.draw_word(words[0], r.uniform(4, 8), y)
        page.line(words[1:], r.uniform(72, 84), y)
        y += pitch
    page.rule(60, 30, 60, y, tone=60)
    for words in lines:
        page.line(words, r.uniform(6, 20), y + 6)
        y += pitch


LAYOUTS: dict[str, Callable[[PageCanvas, Iterator[list[str]]], None]] = {
    "invoice": draw_invoice,
    "report": draw_report,
    "table": draw_table,
    "chart": draw_chart,
    "letter": draw_letter,
}
