"""A query beside pages, explained: what each of its tokens found where, ready for the templates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from colintern.core.terminal import escape_controls
from colintern.reporting.heatmaps import SimilarityMap, layout, similarity_map, standing_out
from colintern.reporting.pictures import heat, picture
from colintern.reporting.words import query_words


class Sheet(NamedTuple):
    """A page that is shown: its name and the URL of its file, what is said of it, its picture (a data URI) and size.

    `heat`, `small`: its maps and its thumbnail's, see `pictures.heat`; first that of the whole query, then one for
    each token; `small` is "" where there is no thumbnail. `score`: MaxSim. `elsewhere`: query tokens whose best place
    is in the thumbnail or in the prompt, not in a tile.
    """

    name: str
    link: str
    caption: str
    kind: str
    score: float
    picture: str
    size: tuple[int, int]
    heat: str
    small: str
    elsewhere: int


class Token(NamedTuple):
    """A token of the query. `lead`: what it adds to the first page's score less what it adds to the second's."""

    text: str
    own: bool
    lead: float | None


class Case(NamedTuple):
    """A query and the pages beside it; `facts`: what is said of it, such as {"task": ...}."""

    query: str
    facts: dict[str, Any]
    tokens: list[Token]
    sheets: list[Sheet]


class Seen(NamedTuple):
    """A page to be shown: `kind` is right, wrong or found; `tokens` are the model's (tokens, dim), from which maps are
    made; `ranked`, if it is not these, what scores come from: (fewer, dim), pooled; `link`: the URL of its file or "".
    """

    name: str
    caption: str
    kind: str
    image: Image.Image
    tokens: Tensor
    ranked: Tensor | None = None
    link: str = ""


def case(processor: Any, query: str, vectors: Tensor, pages: Sequence[Seen], facts: dict[str, Any]) -> Case:
    """Explain a query; `vectors` are its tokens'.

    Of a token, a place is as hot as it stands out: from the mean over all pages shown to the highest of them, so that
    the same heat means the same similarity on each of them.
    """
    words = query_words(processor, query)
    own = [i for i, word in enumerate(words) if word.own] or list(range(len(words)))
    maps = [similarity_map(vectors, page.tokens, layout(processor, page.image.size)) for page in pages]
    # First a map of the query's own words together, then one for each token.
    parts = [[torch.cat([standing_out(part[own])[None], part]) for part in _parts(found)] for found in maps]
    every = torch.cat([part.flatten(1) for page_parts in parts for part in page_parts], dim=1)
    low, span = every.mean(dim=1)[:, None, None], (every.amax(dim=1) - every.mean(dim=1)).clamp(min=1e-6)[:, None, None]
    heats = [[heat((part - low) / span) for part in page_parts] for page_parts in parts]
    best = [
        found.best if page.ranked is None else (vectors.float() @ page.ranked.float().T).amax(dim=1)
        for page, found in zip(pages, maps, strict=True)
    ]
    sheets = [
        _sheet(page, found, hot, round(one.sum().item(), 3))
        for page, found, hot, one in zip(pages, maps, heats, best, strict=True)
    ]
    lead = [None] * len(words) if len(best) < 2 else (best[0] - best[1]).tolist()
    tokens = [Token(word.text, word.own, one) for word, one in zip(words, lead, strict=True)]
    return Case(escape_controls(query), facts, tokens, sheets)


def _sheet(page: Seen, found: SimilarityMap, heats: list[str], score: float) -> Sheet:
    elsewhere = int((~found.on_page).sum())
    small = heats[1] if len(heats) > 1 else ""
    drawn = picture(page.image), page.image.size, heats[0], small
    return Sheet(escape_controls(page.name), page.link, page.caption, page.kind, score, *drawn, elsewhere)


def _parts(found: SimilarityMap) -> list[Tensor]:
    return [found.page] if found.thumbnail is None else [found.page, found.thumbnail]
