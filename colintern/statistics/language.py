"""Which language queries are in: a guess, since a query of three words may be one in several languages."""

from collections import Counter
from collections.abc import Iterable
from functools import cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

CONFIDENCE = 0.5  # of 48 queries in 11 languages, set down by hand, 40 were named right, 8 not named and none wrong
SAMPLE = 20_000  # queries: 3 s


@cache  # half a second to read
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=CONFIDENCE)


def languages(queries: Iterable[str]) -> dict[str, int]:
    """{ISO 639 code: distinct queries} as py3langid's model of 139 languages guesses.

    `unknown`: its guess is below `CONFIDENCE`, or it sees no language at all. Of more than `SAMPLE` distinct queries
    evenly spread ones are looked at. The same queries give the same counts.
    """
    distinct = list(dict.fromkeys(queries))
    step = -(-len(distinct) // SAMPLE) or 1
    found = Counter(_identifier().classify(query)[0] for query in distinct[::step])
    unknown = found.pop("und", 0) + found.pop("zxx", 0)
    return dict(found) | ({"unknown": unknown} if unknown else {})
