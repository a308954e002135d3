"""The worst queries of an evaluation, each beside its right page and the wrong pages that were found before it."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from mteb.abstasks.abstask import AbsTask

from colintern.core.page_labels import label_page
from colintern.core.progress import ProgressBar
from colintern.data.benchmarks import use_fetched_data
from colintern.encoding.embed import embed_queries
from colintern.encoding.pooling import cut
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.queries import read_page_names
from colintern.evaluation.scores import short
from colintern.reporting.cases import Case, Seen, case

WRONG = 2  # wrong pages shown of a query


class Corpus:
    """The pages and queries of a task, by their ids."""

    def __init__(self, task: AbsTask):
        loaded: Any = use_fetched_data(task)
        loaded.load_data()
        loaded.convert_v1_dataset_format_to_v2(num_proc=1)
        self.subsets = loaded.dataset
        self.places: dict[int, dict[str, int]] = {}
        self.names: dict[int, dict[str, str]] = {}

    def row(self, subset: str, kind: str, key: str) -> dict[str, Any]:
        """Look up a row of the corpus or the queries (`kind`); `name` is a page's file name, None if it has none."""
        for split in self.subsets[subset].values():
            table: Dataset = split[kind]
            places = self.places.setdefault(id(table), {name: i for i, name in enumerate(table["id"])})
            if key in places:
                if kind == "corpus" and id(table) not in self.names:
                    self.names[id(table)] = read_page_names(table)
                return table[places[key]] | {"name": self.names.get(id(table), {}).get(key)}
        raise KeyError(f"{kind} {key}")

    def right(self, subset: str, query: str) -> list[str]:
        """Ids of the pages that answer a query."""
        judged = (split["relevant_docs"].get(query, {}) for split in self.subsets[subset].values())
        return sorted(page for one in judged for page, score in one.items() if score > 0)


def failures(
    encoder: ColIntern3_5Encoder, tasks: Sequence[AbsTask], rows: Sequence[dict[str, Any]], number: int
) -> tuple[list[Case], int]:
    """The first `number` of the rows (see `evaluated.worst`) explained; and how many were passed over, because their
    query has no right page."""
    by_name = {task.metadata.name: task for task in tasks}
    corpora: dict[str, Corpus] = {}
    cases: list[Case] = []
    with ProgressBar(total=min(number, len(rows)), desc="worst queries", unit="query") as bar:
        for seen, row in enumerate(rows):
            if len(cases) == number:
                return cases, seen - number
            corpus = corpora.get(row["task"]) or corpora.setdefault(row["task"], Corpus(by_name[row["task"]]))
            if right := corpus.right(row["subset"], row["query_id"]):
                documents = getattr(by_name[row["task"]], "documents", "")
                cases.append(_failure(encoder, corpus, row, right, documents))
                bar.update()
    return cases, len(rows) - len(cases)


def _failure(
    encoder: ColIntern3_5Encoder, corpus: Corpus, row: dict[str, Any], right: list[str], documents: str
) -> Case:
    """Show a query's best right page and its first wrong ones. `documents`: the folder of the pages' files, or ""."""
    subset, top = row["subset"], row["top_pages"]
    best = next((page for page in top if page in right), right[0])
    wrong = [page for page in top if page not in right][:WRONG]
    captions = {best: f"rank {row['rank'] or 'beyond 1,000'}"} | {page: f"rank {top.index(page) + 1}" for page in wrong}
    if best not in top and len(right) > 1:
        captions[best] = f"one of {len(right)} right pages, the first of which has rank {row['rank'] or 'beyond 1,000'}"
    names = [best, *wrong]
    found = [corpus.row(subset, "corpus", name) for name in names]
    labels = [label_page(name, page.get("name"), documents) for name, page in zip(names, found, strict=True)]
    query = corpus.row(subset, "queries", row["query_id"])["text"]
    [vectors] = cut(embed_queries(encoder.model, encoder.processor, [query], 1), encoder.dim)
    kinds = ["right" if name == best else "wrong" for name in names]
    whole = encoder.pages([page["image"] for page in found])
    pages = [
        Seen(label.text, captions[name], kind, page["image"], tokens, ranked, label.link)
        for name, label, kind, page, tokens, ranked in zip(
            names, labels, kinds, found, cut(whole, encoder.dim), encoder.smaller(whole), strict=True
        )
    ]
    facts = {"task": short(row["task"]), "ndcg": row["ndcg_at_5"], "rank": row["rank"]}
    facts |= {"subset": "" if subset == "default" else subset}
    return case(encoder.processor, query, vectors, pages, facts)
