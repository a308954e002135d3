"""Count rows, pages, queries, duplicates, tokens and languages of each data set."""

from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from colintern.ingest.collected import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import Part, Seen, rows_of
from colintern.statistics.language import languages


def survey(seen: dict[Part, list[Seen]], tokenizer: Path) -> dict[str, dict[str, Any]]:
    """{"name (split)": counts and histograms}, all that is known without params. A query's tokens are its text's."""
    words = Tokenizer.from_file(str(tokenizer))
    found = {}
    for part, rows in seen.items():
        good = [row for row in rows if not row.fault]
        sizes = {row.key: row.size for row in good if row.size}
        if part.split == "test":
            texts = [row["query"] for row in rows_of(part, "queries", ["query"])]
            queries = [text[:MAX_QUERY_CHARACTERS] for text in texts]
            cut = sum(len(text) > MAX_QUERY_CHARACTERS for text in texts)
            asked = Counter(row["corpus-id"] for row in rows_of(part, "qrels", ["corpus-id"]))
            copies = len(good) - len(sizes)
        elif part.split == "corpus":
            queries, asked, copies, cut = [], Counter(), len(good) - len(sizes), 0
        else:
            queries = [row.query for row in good]
            cut = sum(row.is_cut for row in good)
            asked = Counter(row.key for row in good)
            copies = len(good) - len({(row.key, row.query) for row in good})
        tokens = (
            len(each.ids)
            for start in range(0, len(queries), 64)  # an encoding takes kilobytes, that of the longest query megabytes
            for each in words.encode_batch(queries[start : start + 64], add_special_tokens=False)
        )
        found[str(part)] = {
            "rows": len(rows),
            "pages": len(sizes),
            "queries": len(queries),
            "duplicates": copies,
            "quarantined": len(rows) - len(good),
            "bytes": sum((part.folder / name).stat().st_size for name in part.files),
            "page sizes": _histogram(f"{width}x{height}" for width, height in sizes.values()),
            "queries of a page": _histogram(asked.values()),
            "tokens of a query": _histogram(tokens),
            "languages, guessed": languages(queries),
        } | ({"queries cut": cut} if cut else {})
    return found


def _histogram(values: Any) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
