"""The demo corpus: business pages that state facts, and queries that ask for a pair of facts in other words.

Everything is a pure function of the seed. A pair of facts that is asked in one split is never asked in another, so
a model that has memorised pairs gains nothing; no page and no query string occurs in two splits.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from random import Random

from PIL import Image

from demo.pages import LAYOUTS, PageCanvas, PlacedWord

COMPANIES = (
    "Acorn Altor Baxel Borun Brize Calyx Cedra Delio Dorma Elvan Fabro Ferox Galen Gorse Halde Helix Ibera Indra Jarvo "
    "Kelto Koral Lumen Lyric Mavis Mirex Nexus Nimbo Ombra Orbit Pavon Pyxis Quark Ravel Rigel Sable Solis Tamar Velox "
    "Wexor Zenda"
).split()
CITIES = (
    "Basel Bern Bonn Cairo Dakar Delhi Ghent Graz Hanoi Izmir Kazan Kyoto Leeds Lima Lyon Malmo Milan Minsk Nice Osaka "
    "Oslo Paris Perth Pisa Porto Praia Quito Rabat Riga Rome Seoul Sofia Split Tartu Tokyo Tunis Turin Turku Vaduz "
    "Varna"
).split()
PEOPLE = (
    "Adams Baker Berg Blake Boyle Brown Clark Craig Davis Dunn Ellis Evans Ford Frost Gomez Grant Green Hayes Irwin "
    "James Kaur Kelly Klein Lopez Marsh Meyer Moore Nolan Novak Olsen Owens Patel Quinn Reyes Rossi Sato Singh Stone "
    "Weber Young"
).split()
# what the page says, and what a query may say instead
GOODS = dict(
    pair.split("/")
    for pair in (
        "chairs/seats lamps/lights boots/shoes coats/jackets cups/mugs bowls/dishes books/volumes rugs/carpets "
        "doors/gates "
        "ropes/cords boxes/crates bikes/cycles cars/autos trucks/lorries boats/ships phones/handsets clocks/watches "
        "knives/blades bags/sacks beds/bunks desks/benches tools/gear paint/varnish wood/timber rocks/gravel coal/fuel "
        "soap/cleaner milk/dairy bread/loaves meat/beef fruit/apples wine/drinks sugar/sweets wool/yarn silk/fabric "
        "hats/caps belts/straps pipes/tubes wires/cables bolts/screws"
    ).split()
)
Pair = tuple[str, str]
FACTS = {"company": COMPANIES, "city": CITIES, "person": PEOPLE, "goods": list(GOODS)}

# A label that may stand before a fact on the page, and the ways a query may point at it.
LABELS = {
    "company": ("from", "seller", "firm", "by"),
    "city": ("to", "place", "town", "in"),
    "person": ("contact", "name", "agent", "for"),
    "goods": ("item", "goods", "stock", "of"),
}
PHRASES = {
    "company": ("from {}", "sold by {}", "of the firm {}"),
    "city": ("sent to {}", "for the town of {}", "delivered in {}"),
    "person": ("handled by {}", "naming {}", "with {} as contact"),
    "goods": ("about {}", "listing {}", "concerning {}"),
}
KINDS = {
    "invoice": ("invoice", "bill"),
    "report": ("report", "review"),
    "table": ("table", "list"),
    "chart": ("chart", "graph"),
    "letter": ("letter", "note"),
}
OPENINGS = ("the {}", "which {} is", "find the {}", "show the {}")
FILLER = (
    "account amount annual area audit avail balance before board budget change client close code copy cost count "
    "credit daily dated debit detail draft due early entry error events export extra field file final form full gross "
    "group half hours house index issue joint kind large later least level limit local lower main major margin market "
    "mean minor model month notes number offer office open order other owner paid part past phase plan point price "
    "print profit public quota quick range rate ready refer region rest result room rule sales scope score second "
    "share short signed small source staff stage state status sum team terms third total trade unit upper usual valid "
    "value view volume week whole width year zone"
).split()


def list_page_words() -> list[str]:
    """List every word that can be on a page: what the demo base learns to read."""
    labels = [w for words in LABELS.values() for w in words]
    kinds = [w for words in KINDS.values() for w in words]
    return sorted({*COMPANIES, *CITIES, *PEOPLE, *GOODS, *labels, *kinds, *FILLER})


def list_query_words() -> list[str]:
    """List every word that can be in a query."""
    texts = (*OPENINGS, *(p for ps in PHRASES.values() for p in ps))
    spoken = {w for text in texts for w in text.replace("{}", "").split()}
    return sorted({*list_page_words(), *GOODS.values(), *spoken})


@dataclass(frozen=True)
class PagePlan:
    """What a page is to state, and which pairs of facts its queries ask for; `seed` decides how it looks."""

    name: str
    kind: str
    facts: dict[str, str]
    asked: list[Pair]
    seed: str


@dataclass(frozen=True)
class DemoPage:
    """A page, the facts it states, its queries, and where each word stands."""

    name: str
    kind: str
    facts: dict[str, str]
    image: Image.Image
    queries: tuple[str, ...]
    words: tuple[PlacedWord, ...]

    @property
    def text(self) -> str:
        """Return its words in the order in which they were set."""
        return " ".join(word.text for word in self.words)


def get_split(pair: Pair) -> str:
    """Return the only split whose queries name this pair of facts: train (60 %), dev (10 %) or test (30 %)."""
    bucket = hashlib.sha256(" ".join(sorted(pair)).encode()).digest()[0] / 256
    return "train" if bucket < 0.6 else "dev" if bucket < 0.7 else "test"


def generate_corpus(split: str, pages: int, queries_per_page: int, seed: int) -> list[DemoPage]:
    """Draw the pages of `plan_pages`."""
    return list(map(draw_page, plan_pages(split, pages, queries_per_page, seed)))


def plan_pages(split: str, pages: int, queries_per_page: int, seed: int) -> list[PagePlan]:
    """Plan pages whose queries name only pairs of facts that belong to `split`.

    One page of the split is of the kind that a query names and states its pair, so every query has one right answer.
    """
    rng = Random(f"{seed}/{split}")
    plans: list[PagePlan] = []
    stated: set[tuple[str, Pair]] = set()  # of a kind, on any page so far
    asked: set[tuple[str, Pair]] = set()
    while len(plans) < pages:
        kind = rng.choice(sorted(LAYOUTS))
        facts = {name: rng.choice(values) for name, values in FACTS.items()}
        pairs = list(combinations(facts.values(), 2))
        own = [pair for pair in pairs if get_split(pair) == split and (kind, pair) not in stated]
        if len(own) < queries_per_page or any((kind, pair) in asked for pair in pairs):
            continue
        chosen = rng.sample(own, queries_per_page)
        stated.update((kind, pair) for pair in pairs)
        asked.update((kind, pair) for pair in chosen)
        name = f"{split}-{len(plans):05d}.png"
        plans.append(PagePlan(name, kind, facts, chosen, f"{seed}/{name}"))
    return plans


def draw_page(plan: PagePlan) -> DemoPage:
    """Draw a page, until every fact has found both its places on it, and put its queries in words."""
    rng = Random(plan.seed)
    while True:
        page = PageCanvas(Random(rng.random()))
        LAYOUTS[plan.kind](page, _write_lines(plan.kind, plan.facts, rng))
        placed = [word.text for word in page.words]
        if all(placed.count(value) == 2 for value in plan.facts.values()):
            break
    queries = tuple(_write_query(plan, pair, rng) for pair in plan.asked)
    return DemoPage(plan.name, plan.kind, plan.facts, page.image, queries, tuple(page.words))


def _write_lines(kind: str, facts: dict[str, str], rng: Random) -> Iterator[list[str]]:
    # Business pages repeat themselves, and a word that a tile's edge cuts in two can be read in its other place.
    lines = [[label, value] for name, value in facts.items() for label in rng.sample(LABELS[name], 2)]
    lines += [rng.sample(FILLER, rng.choice((2, 3, 4))) for _ in range(4)]
    rng.shuffle(lines)
    heading = [rng.choice(KINDS[kind]), *rng.sample(FILLER, 2)]
    return iter([heading, *lines])


def _write_query(plan: PagePlan, pair: Pair, rng: Random) -> str:
    """A query for a pair of the page's facts, in words of its own: another order, other labels, synonyms."""
    names = [name for name, value in plan.facts.items() if value in pair]
    rng.shuffle(names)
    parts = [rng.choice(OPENINGS).format(rng.choice(KINDS[plan.kind]))]
    for name in names:
        value = plan.facts[name]
        if name == "goods" and rng.random() < 0.5:
            value = GOODS[value]
        parts.append(rng.choice(PHRASES[name]).format(value))
    return " ".join(parts)
