"""Make pseudo-queries from the text layer of documents. A pure function of the text.

A page's queries are the headings of the outline that point at it and are printed on it; where it has none, the sentence
whose words are most its own (mean tf-idf). A query that would fit several pages is left out.
"""

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

SECTION_NUMBER = re.compile(r"^((chapter|appendix|part)\s+\w+[.:]?\s+|([A-Z]\.)?\d+(\.\d+)*\.?\s+)", re.IGNORECASE)
CONTENTS_TITLES = {"contents", "tableofcontents", "index"}  # normalized; such a page lists every other heading
MAX_HEADING_PAGES = 3  # a heading printed on more ("Package" is on most) identifies no page
SENTENCE_CHARACTERS = range(40, 201)
FULL_LINE_SHARE = 0.7  # of the longest line: a line that is taken to continue in the next
PREFIX_CHARACTERS = 12  # of a normalized text by which pages are searched; a sentence has 15 and more
MIN_LETTER_SHARE = 0.75  # of a sentence's visible characters: no tables, no listings
# Vowel signs and accents that follow their letter, as in Hindi and Thai: part of a word, but not of \w.
MARKS = "".join(char for char in map(chr, range(0x300, 0x10000)) if unicodedata.category(char).startswith("M"))
NO_LETTER = re.compile(rf"(?:[^\w{MARKS}]|_)+")
WORD = re.compile(rf"[\w{MARKS}]{{3,}}")
SENTENCE_MARKS = ".!?。！？।॥؟۔"
# Thai has no full stop: its sentences and clauses end with a space.
SENTENCE_END = re.compile(r"(?<=[.!?؟۔])\s+(?=\w)|(?<=[。！？।॥])|(?<=[\u0e01-\u0e5b])\s+(?=[\u0e01-\u0e5b])")
HYPHEN = re.compile("[\u00ad\u0002\ufffe](\\s*\\n\\s*)?")  # what pdfium gives for a hyphen at the end of a line


@dataclass(frozen=True)
class DocumentText:
    """A document's text: one string per page, and the outline as (title, page from 0)."""

    pages: Sequence[str]
    outline: Sequence[tuple[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class PseudoQuery:
    """`page` counts from 0 in document number `document`; `kind` is heading or sentence."""

    document: int
    page: int
    query: str
    kind: str


def normalize_text(text: str) -> str:
    """Return letters and digits in lower case: equal for text that differs in spaces, line breaks and hyphens."""
    return NO_LETTER.sub("", unicodedata.normalize("NFC", text)).casefold()


def make_pseudo_queries(documents: Sequence[DocumentText]) -> list[PseudoQuery]:
    """Return the queries of all documents in the order of their pages, none of them for two pages."""
    pages = {(number, index): page for number, text in enumerate(documents) for index, page in enumerate(text.pages)}
    normalized = {key: normalize_text(page) for key, page in pages.items()}
    headings = _select_headings(documents, normalized)
    with_heading = {(query.document, query.page) for query in headings}
    sentences = _select_sentences(pages, [*normalized.values()], with_heading)
    return sorted(headings + sentences, key=lambda query: (query.document, query.page))


def _select_headings(documents: Sequence[DocumentText], normalized: dict[tuple[int, int], str]) -> list[PseudoQuery]:
    entries: defaultdict[str, list[PseudoQuery]] = defaultdict(list)
    for number, text in enumerate(documents):
        for title, page in text.outline:
            query = SECTION_NUMBER.sub("", " ".join(title.split()))
            entries[normalize_text(query)].append(PseudoQuery(number, page, query, "heading"))
    contents = {(entry.document, entry.page) for title in CONTENTS_TITLES for entry in entries.get(title, ())}
    num_pages = count_pages_with(entries, [*normalized.values()])
    return [
        same[0]
        for key, same in entries.items()
        if key
        and len({(entry.document, entry.page) for entry in same}) == 1
        and (place := (same[0].document, same[0].page)) not in contents
        and key in normalized[place]
        and num_pages[key] <= MAX_HEADING_PAGES
    ]


def _select_sentences(
    pages: dict[tuple[int, int], str], normalized: Sequence[str], with_heading: set[tuple[int, int]]
) -> list[PseudoQuery]:
    words = {key: _find_words(page) for key, page in pages.items()}
    document_frequency = Counter(word for page_words in words.values() for word in set(page_words))
    sentences = {
        key: {sentence: normalize_text(sentence) for sentence in _split_sentences(page)}
        for key, page in pages.items()
        if key not in with_heading
    }
    num_pages = count_pages_with((text for texts in sentences.values() for text in texts.values()), normalized)
    queries = []
    for key, texts in sentences.items():
        weights = {w: n * math.log(len(pages) / document_frequency[w]) for w, n in Counter(words[key]).items()}
        unique = [sentence for sentence, text in texts.items() if num_pages[text] == 1]
        if unique:
            best = max(unique, key=lambda s: sum(map(weights.__getitem__, _find_words(s))) / len(_find_words(s)))
            queries.append(PseudoQuery(*key, best, "sentence"))
    return queries


def count_pages_with(texts: Iterable[str], pages: Sequence[str]) -> Counter[str]:
    """Count the pages on which each text is printed, all normalized.

    Each page is searched for the texts' prefixes, and where one is found for the texts that begin so, not for every
    text: for 500 documents, or for 4,000 pages whose sentences begin alike, that would take a day.
    """
    wanted = set(texts)
    lengths: defaultdict[str, set[int]] = defaultdict(set)  # of the texts with that prefix
    for text in wanted:
        lengths[text[:PREFIX_CHARACTERS]].add(len(text))
    prefix_lengths = set(map(len, lengths))
    counts: Counter[str] = Counter()
    for page in pages:
        prefixes = ((start, page[start : start + n]) for n in prefix_lengths for start in range(len(page)))
        printed = {page[at : at + n] for at, prefix in prefixes if prefix in lengths for n in lengths[prefix]}
        counts.update(printed & wanted)
    return counts


def _split_sentences(page: str) -> list[str]:
    """Return the page's sentences that read like prose, each as one line."""
    lines = [" ".join(line.split()) for line in HYPHEN.sub("", page).splitlines()]
    widest = max(map(len, lines), default=0)
    # Lines of a paragraph fill the page but for the last: after a short one something else begins.
    text = "".join(line + (" " if len(line) >= FULL_LINE_SHARE * widest else "\n") for line in lines)
    sentences = (sentence.strip() for block in text.splitlines() for sentence in SENTENCE_END.split(block))
    return [sentence for sentence in sentences if len(sentence) in SENTENCE_CHARACTERS and _is_prose(sentence)]


def _is_prose(sentence: str) -> bool:
    visible = [char for char in sentence if not char.isspace()]
    letters = sum(char.isalpha() or unicodedata.category(char).startswith("M") for char in visible)
    is_thai = "\u0e01" <= sentence[-1] <= "\u0e5b"
    # "... 84 Chapter 6." is a page's foot.
    has_end = is_thai or (sentence[-1] in SENTENCE_MARKS and not sentence[-2].isdigit())
    is_text = letters >= MIN_LETTER_SHARE * len(visible) and bool(_find_words(sentence))
    return not sentence[0].islower() and has_end and is_text


def _find_words(text: str) -> list[str]:
    return WORD.findall(HYPHEN.sub("", text).casefold())
