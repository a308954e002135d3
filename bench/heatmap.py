"""Whether heatmaps point at the answer: on the demo's test pages the place of what a query asks for is known.

    python -m bench.heatmap    # after `make repro`; --adapter FOLDER

A case is a test query on the page that answers it. Its map is the one reports and search show, of the query's own words
(`heatmaps.compute_saliency`); it points at the answer where its hottest cell touches a word that states the kind of
page or a fact asked for. `words`: the same of each asked word's own map and its own place. `untrained`: cases before
training. `chance`: of a cell drawn at random. Exit 1 below 90 % of the cases. The last line:
`RESULT cases=... words=... untrained=... chance=...`.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from colintern.core.errors import exit_on_user_error
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.encoding.loading import get_encoder_settings, load_page_encoder
from colintern.modeling.loading import require_adapter, require_same_base
from colintern.params import load_params
from colintern.reporting.examples import split_query
from colintern.reporting.heatmaps import compute_saliency, compute_similarity_map
from colintern.storage.manifest import ensure_base
from demo.corpus import GOODS, KINDS, DemoPage, generate_corpus

PAGES = 200
BOUND = 0.90
Box = tuple[float, float, float, float]


class Pointed(NamedTuple):
    """Shares, 0 to 1, of the cases and of the asked words whose hottest cell lies on the answer, and of all cells."""

    cases: float
    words: float
    cells: float


def find_hottest_box(grid: Tensor, image_size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Find the box (left, top, right, bottom), in pixels of the page, of the largest cell of a (rows, columns) grid."""
    row, col = divmod(int(grid.argmax()), grid.shape[1])
    wide, high = image_size[0] / grid.shape[1], image_size[1] / grid.shape[0]
    return col * wide, row * high, (col + 1) * wide, (row + 1) * high


def touch(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def asked(page: DemoPage, tokens: list[str]) -> list[tuple[int, list[Box]]]:
    """(token of the query, where the page says that) for the kind of page and both facts, also in another word."""
    shown: dict[str, tuple[str, ...]] = dict.fromkeys(KINDS[page.kind], KINDS[page.kind])
    shown |= {name: (fact,) for fact in page.facts.values() for name in (fact, GOODS.get(fact, fact))}
    spoken = [name for name in shown if name in tokens]
    return [(tokens.index(name), [word.box for word in page.words if word.text in shown[name]]) for name in spoken]


def share(grid: Tensor, size: tuple[int, int], boxes: list[Box]) -> float:
    """Of the cells of a grid over a page, those that touch a box."""
    rows, cols = grid.shape
    wide, high = size[0] / cols, size[1] / rows
    cells = [(c * wide, r * high, (c + 1) * wide, (r + 1) * high) for r in range(rows) for c in range(cols)]
    return sum(any(touch(cell, box) for box in boxes) for cell in cells) / len(cells)


def measure(model: Any, processor: Any, pages: list[DemoPage]) -> Pointed:
    """Of pages drawn with one query each."""
    cases, words, cells = [], [], []
    queries = embed_queries(model, processor, [page.queries[0] for page in pages], 32)
    for page, query, tokens in zip(
        pages, queries, embed_pages(model, processor, [page.image for page in pages], 16), strict=True
    ):
        size = page.image.size
        found = compute_similarity_map(processor, query, tokens, size).page
        names = split_query(processor, page.queries[0])
        found_in = asked(page, [name.text for name in names])
        assert len(found_in) == 3, (page.queries, page.facts)
        boxes = [box for _, places in found_in for box in places]
        grid = compute_saliency(found[[name.is_own for name in names]])
        cases.append(any(touch(find_hottest_box(grid, size), box) for box in boxes))
        words += [any(touch(find_hottest_box(found[i], size), box) for box in places) for i, places in found_in]
        cells.append(share(grid, size, boxes))
    return Pointed(sum(cases) / len(cases), sum(words) / len(words), sum(cells) / len(cells))


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--adapter", type=Path, default=Path("experiments/colintern"), metavar="FOLDER")
    folder = parser.parse_args().adapter
    params = load_params()
    require_adapter(folder)
    require_same_base(folder, params.base, params.base_revision)
    base, settings = ensure_base(params.base, params.base_revision), get_encoder_settings(params)
    pages = generate_corpus("test", PAGES, 1, seed=0)
    after, before = (
        measure(encoder.model, encoder.processor, pages)
        for encoder in (load_page_encoder(settings, folder, base, trained) for trained in (True, False))
    )
    print(f"{len(pages)} pages, a query each: hottest cell on the answer")
    print(
        f"RESULT cases={after.cases:.3f} words={after.words:.3f} untrained={before.cases:.3f} chance={after.cells:.3f}"
    )
    if after.cases < BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
