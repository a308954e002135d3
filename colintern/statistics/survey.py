"""Count rows, pages, queries, duplicates, tokens and languages of each data set."""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from py3langid.langid import MODEL_FILE, LanguageIdentifier
from tokenizers import Tokenizer

from colintern.ingest.documents import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import ScannedRows, read_beir_table
from colintern.statistics.dataset_stats import Stats

TOKENIZER_BATCH = 64  # queries; an encoding takes kilobytes, that of the longest query megabytes
MIN_LANGUAGE_PROBABILITY = 0.5  # of 48 queries in 11 languages, labelled by hand, 40 came out right, none wrong
MAX_LANGUAGE_QUERIES = 20_000  # 3 s


def survey_rows(scanned: ScannedRows, tokenizer_file: Path) -> Stats:
    """Return {"name (split)": counts and histograms}. A query's tokens are those of its text alone."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    stats = {}
    for split, rows in scanned.items():
        valid = [row for row in rows if not row.error]
        sizes = {row.key: row.size for row in valid if row.size}
        if split.split == "test":
            texts = [row["query"] for row in read_beir_table(split, "queries", ["query"])]
            queries = [text[:MAX_QUERY_CHARACTERS] for text in texts]
            num_cut = sum(len(text) > MAX_QUERY_CHARACTERS for text in texts)
            pages = [row["corpus-id"] for row in read_beir_table(split, "qrels", ["corpus-id"])]
        elif split.split == "corpus":
            queries, pages, num_cut = [], [], 0
        else:
            queries, pages = [row.query for row in valid], [row.key for row in valid]
            num_cut = sum(row.is_cut for row in valid)
        is_training = split.split in ("train", "dev")
        num_tokens = (
            len(encoding.ids)
            for start in range(0, len(queries), TOKENIZER_BATCH)
            for encoding in tokenizer.encode_batch(queries[start : start + TOKENIZER_BATCH], add_special_tokens=False)
        )
        stats[str(split)] = {
            "rows": len(rows),
            "pages": len(sizes),
            "queries": len(queries),
            "duplicates": len(valid) - len({(row.key, row.query) for row in valid} if is_training else sizes),
            "quarantined": len(rows) - len(valid),
            "bytes": sum((split.folder / name).stat().st_size for name in split.files),
            "page sizes": _build_histogram(f"{width}x{height}" for width, height in sizes.values()),
            "queries of a page": _build_histogram(Counter(pages).values()),
            "tokens of a query": _build_histogram(num_tokens),
            "languages, guessed": guess_languages(queries),
        } | ({"queries cut": num_cut} if num_cut else {})
    return stats


def _build_histogram(values: Iterable[str | int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


@cache  # half a second to read
def _load_language_identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True, min_confidence=MIN_LANGUAGE_PROBABILITY)


def guess_languages(queries: Iterable[str]) -> dict[str, int]:
    """Return {ISO 639 code: distinct queries} as py3langid's model of 139 languages guesses.

    A query of three words may be one in several languages: it is `unknown` where the probability is too low, and where
    the model sees no language at all. Of more than `MAX_LANGUAGE_QUERIES` distinct queries evenly spaced ones are
    classified. The same queries give the same counts.
    """
    distinct = list(dict.fromkeys(queries))
    step = -(-len(distinct) // MAX_LANGUAGE_QUERIES) or 1
    counts = Counter(_load_language_identifier().classify(query)[0] for query in distinct[::step])
    unknown = counts.pop("und", 0) + counts.pop("zxx", 0)
    return dict(counts) | ({"unknown": unknown} if unknown else {})
