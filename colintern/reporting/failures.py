"""The worst queries of an evaluation, each beside its right page and the wrong pages that were found before it."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from mteb.abstasks.abstask import AbsTask

from colintern.data.benchmarks import from_cache
from colintern.evaluation.scores import short
from colintern.modeling.embed import embed_queries
from colintern.mteb_model import ColIntern3_5Encoder
from colintern.reporting.cases import Case, Seen, case

WRONG = 2  # wrong pages shown of a query


class Corpus:
    """The pages and queries of a task, by their ids."""

    def __init__(self, task: AbsTask):
        loaded: Any = from_cache(task)
        loaded.load_data()
        loaded.convert_v1_dataset_format_to_v2(num_proc=1)
        self.subsets = loaded.dataset
        self.places: dict[int, dict[str, int]] = {}

    def row(self, subset: str, kind: str, key: str) -> dict[str, Any]:
        """`kind`: corpus or queries."""
        for split in self.subsets[subset].values():
            table: Dataset = split[kind]
            places = self.places.setdefault(id(table), {name: i for i, name in enumerate(table["id"])})
            if key in places:
                return table[places[key]]
        raise KeyError(f"{kind} {key}")

    def right(self, subset: str, query: str) -> list[str]:
        """Ids of the pages that answer a query."""
        judged = (split["relevant_docs"].get(query, {}) for split in self.subsets[subset].values())
        return sorted(page for one in judged for page, score in one.items() if score > 0)


def failures(encoder: ColIntern3_5Encoder, tasks: Sequence[AbsTask], rows: Sequence[dict[str, Any]]) -> list[Case]:
    """Each of the rows (see `evaluated.worst`) explained, in their order."""
    by_name = {task.metadata.name: task for task in tasks}
    corpora = {name: Corpus(by_name[name]) for name in dict.fromkeys(row["task"] for row in rows)}
    return [_failure(encoder, corpora[row["task"]], row) for row in rows]


def _failure(encoder: ColIntern3_5Encoder, corpus: Corpus, row: dict[str, Any]) -> Case:
    subset, top = row["subset"], row["top_pages"]
    right = corpus.right(subset, row["query_id"])
    best = next((page for page in top if page in right), right[0])
    wrong = [page for page in top if page not in right][:WRONG]
    captions = {best: f"rank {row['rank'] or 'beyond 1,000'}"} | {page: f"rank {top.index(page) + 1}" for page in wrong}
    if best not in top and len(right) > 1:
        captions[best] = f"one of {len(right)} right pages, the first of which has rank {row['rank'] or 'beyond 1,000'}"
    names = [best, *wrong]
    images = [corpus.row(subset, "corpus", name)["image"] for name in names]
    query = corpus.row(subset, "queries", row["query_id"])["text"]
    [vectors] = embed_queries(encoder.model, encoder.processor, [query], 1)
    pages = [
        Seen(name, captions[name], "right" if name == best else "wrong", image, tokens)
        for name, image, tokens in zip(names, images, encoder.pages(images), strict=True)
    ]
    facts = {"task": short(row["task"]), "id": row["query_id"], "ndcg": row["ndcg_at_5"], "rank": row["rank"]}
    facts |= {"subset": "" if subset == "default" else subset}
    return case(encoder.processor, query, vectors, pages, facts)
