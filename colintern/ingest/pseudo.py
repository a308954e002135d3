"""Pseudo-queries: what a program can ask of a document by reading its text layer. A pure function of the text.

A page is asked for by the headings of the outline that point at it and are printed on it; where it has none, by the
sentence whose words are most its own (mean tf-idf). Whatever would be asked of several pages is left out.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SECTION_NUMBER = re.compile(r"^((chapter|appendix|part)\s+\w+[.:]?\s+|([A-Z]\.)?\d+(\.\d+)*\.?\s+)", re.IGNORECASE)
CONTENTS = {"contents", "tableofcontents", "index"}  # squeezed titles; such a page lists every other heading
COMMON = 3  # pages; a heading printed on more ("Package" is on most) asks for no page in particular
SENTENCE_LENGTH = range(40, 201)  # characters
FULL = 0.7  # of the longest line: a line that is taken to go on in the next
START = 12  # characters of a squeezed text by which pages are looked through; a sentence has 15 and more
LETTERS = 0.75  # least share of letters in a sentence's visible characters: no tables, no listings
# Vowel signs and accents that follow their letter, as in Hindi and Thai: part of a word, but not of \w.
MARKS = "".join(char for char in map(chr, range(0x300, 0x10000)) if unicodedata.category(char).startswith("M"))
NO_LETTER = re.compile(rf"(?:[^\w{MARKS}]|_)+")
WORD = re.compile(rf"[\w{MARKS}]{{3,}}")
ENDS = ".!?。！？।॥؟۔"
# Thai has no full stop: its sentences and clauses end with a space.
SENTENCE_END = re.compile(r"(?<=[.!?؟۔])\s+(?=\w)|(?<=[。！？।॥])|(?<=[\u0e01-\u0e5b])\s+(?=[\u0e01-\u0e5b])")
HYPHEN = re.compile("[\u00ad\u0002\ufffe](\\s*\\n\\s*)?")  # what pdfium gives for a hyphen at the end of a line


@dataclass(frozen=True)
class Text:
    """A document's text: one string a page, and the outline as (title, page from 0)."""

    pages: Sequence[str]
    outline: Sequence[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class PseudoQuery:
    """`page` counts from 0 in document number `document`; `kind` is heading or sentence."""

    document: int
    page: int
    query: str
    kind: str


def squeeze(text: str) -> str:
    """Letters and digits only, in lower case: equal for text that differs in spaces, line breaks and hyphens."""
    return NO_LETTER.sub("", unicodedata.normalize("NFC", text)).casefold()


def pseudo_queries(documents: Sequence[Text]) -> list[PseudoQuery]:
    """The queries of all documents, in the order of their pages, none of them for two pages."""
    squeezed = [[squeeze(page) for page in text.pages] for text in documents]
    everything = [page for pages in squeezed for page in pages]
    headings = _headings(documents, squeezed, everything)
    asked = {(query.document, query.page) for query in headings}
    sentences = _sentences(documents, everything, asked)
    return sorted(headings + sentences, key=lambda query: (query.document, query.page))


def _headings(documents: Sequence[Text], squeezed: list[list[str]], everything: list[str]) -> list[PseudoQuery]:
    entries = [
        PseudoQuery(number, page, SECTION_NUMBER.sub("", " ".join(title.split())), "heading")
        for number, text in enumerate(documents)
        for title, page in text.outline
    ]
    named: dict[str, set[tuple[int, int]]] = {}
    for entry in entries:
        named.setdefault(squeeze(entry.query), set()).add((entry.document, entry.page))
    contents = {(entry.document, entry.page) for entry in entries if squeeze(entry.query) in CONTENTS}
    printed = _printed(named, everything)
    kept: dict[str, PseudoQuery] = {}
    for entry in entries:
        key = squeeze(entry.query)
        if (
            key
            and len(named[key]) == 1
            and (entry.document, entry.page) not in contents
            and key in squeezed[entry.document][entry.page]
            and printed[key] <= COMMON
        ):
            kept.setdefault(key, entry)
    return list(kept.values())


def _sentences(documents: Sequence[Text], everything: list[str], asked: set[tuple[int, int]]) -> list[PseudoQuery]:
    words = [[_words(page) for page in text.pages] for text in documents]
    spread = Counter(word for pages in words for page in pages for word in set(page))
    split = {
        (number, index): {s: squeeze(s) for s in _split(page)}
        for number, text in enumerate(documents)
        for index, page in enumerate(text.pages)
        if (number, index) not in asked
    }
    printed = _printed((key for sentences in split.values() for key in sentences.values()), everything)
    found = []
    for (number, index), sentences in split.items():
        weight = {w: n * math.log(len(everything) / spread[w]) for w, n in Counter(words[number][index]).items()}
        own = [s for s, key in sentences.items() if printed[key] == 1]
        if own:
            best = max(own, key=lambda s: sum(map(weight.__getitem__, _words(s))) / len(_words(s)))
            found.append(PseudoQuery(number, index, best, "sentence"))
    return found


def _printed(keys: Iterable[str], pages: Sequence[str]) -> Counter[str]:
    """On how many pages each key is printed, all squeezed.

    Each page is looked through for the keys' beginnings, and where one stands for what begins so, not for every key: of
    500 documents, or of 4,000 pages whose sentences begin alike, that would take a day.
    """
    wanted = set(keys)
    lengths: defaultdict[str, set[int]] = defaultdict(set)  # of the keys that begin so
    for key in wanted:
        lengths[key[:START]].add(len(key))
    starts = set(map(len, lengths))
    found: Counter[str] = Counter()
    for page in pages:
        places = [(at, page[at : at + start]) for start in starts for at in range(len(page))]
        here = {page[at : at + length] for at, start in places if start in lengths for length in lengths[start]}
        found.update(here & wanted)
    return found


def _split(page: str) -> list[str]:
    """The page's sentences that read like prose, each as one line."""
    lines = [" ".join(line.split()) for line in HYPHEN.sub("", page).splitlines()]
    widest = max(map(len, lines), default=0)
    # Lines of a paragraph fill the page but for the last: after a short one something else begins.
    text = "".join(line + (" " if len(line) >= FULL * widest else "\n") for line in lines)
    sentences = (sentence.strip() for block in text.splitlines() for sentence in SENTENCE_END.split(block))
    return [s for s in sentences if len(s) in SENTENCE_LENGTH and _is_prose(s)]


def _is_prose(sentence: str) -> bool:
    visible = [c for c in sentence if not c.isspace()]
    letters = sum(c.isalpha() or unicodedata.category(c).startswith("M") for c in visible)
    starts = sentence[0].isupper() or not sentence[0].islower()
    is_thai = "\u0e01" <= sentence[-1] <= "\u0e5b"
    ends = is_thai or (sentence[-1] in ENDS and not sentence[-2].isdigit())  # "... 84 Chapter 6." is a page's foot
    return starts and ends and letters >= LETTERS * len(visible) and bool(_words(sentence))


def _words(text: str) -> list[str]:
    return WORD.findall(HYPHEN.sub("", text).casefold())
