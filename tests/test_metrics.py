"""The metrics that come out of an evaluation against pytrec_eval and against the formula written out, and sklearn's.

Random rankings with ties, graded relevance, pages that nobody judged, and pages judged irrelevant. Of pages with equal
scores the higher id (as text) goes first: trec_eval's rule, which knows nothing of relevance.
"""

from math import log2
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import pytrec_eval
import torch
from sklearn.metrics import ndcg_score
from test_evaluation import (
    FOLDER,
    ColourModel,
    ColourProcessor,
    _page,
    evaluate,
    params,  # noqa: F401  (a fixture)
    subject,
    workspace,  # noqa: F401  (a fixture)
    write_manifest,
)

from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import METRIC_KEYS

PAGES, QUERIES = 130, 40  # more than 100 pages, or recall_at_100 would always be 1
GRADES = (1, 1, 1, 2, 3)
Judged = dict[str, dict[str, int]]
Found = dict[str, dict[str, float]]


def world(seed: int) -> tuple[list[list[int]], list[list[int]], list[Qrel], list[tuple[int, int]]]:
    """Colours of pages and queries, who answers what and how well, and pairs that were judged irrelevant."""
    rng = Random(seed)
    pages = [[rng.randrange(512) for _ in range(rng.randrange(4, 12))] for _ in range(PAGES)]
    queries, qrels, irrelevant = [], [], []
    for query in range(QUERIES):
        judged = rng.sample(range(PAGES), rng.choice((2, 3, 8, 30)))
        right = judged[: rng.randrange(1, len(judged))]
        shown = rng.sample(pages[rng.choice(right)], rng.randrange(3)) if query % 4 else []
        queries.append(shown + [rng.randrange(512) for _ in range(rng.randrange(1, 4))])
        qrels += [Qrel(query, page, rng.choice(GRADES)) for page in right]
        irrelevant += [(query, page) for page in judged[len(right) :]]
    return pages, queries, qrels, irrelevant


def tied() -> ColourModel:
    """Colours that are equal or have nothing in common: a score is a number of tokens."""
    model = ColourModel()
    with torch.no_grad():
        model.table.copy_(torch.eye(128)[torch.arange(512) % 16])
    return model


def by_formula(found: dict[str, float], judged: dict[str, int], lower_first: bool = False) -> dict[str, float]:
    order = sorted(sorted(found, reverse=not lower_first), key=lambda page: -found[page])
    gains = [judged.get(page, 0) for page in order]
    best = sorted(judged.values(), reverse=True)
    right = sum(grade > 0 for grade in best)

    def dcg(values: list[int], k: int) -> float:
        return sum(value / log2(rank + 2) for rank, value in enumerate(values[:k]))

    scores = {f"ndcg_at_{k}": dcg(gains, k) / dcg(best, k) if right else 0.0 for k in (5, 10)}
    return scores | {"recall_at_100": sum(gain > 0 for gain in gains[:100]) / right if right else 0.0}


def by_trec(found: Found, judged: Judged) -> dict[str, dict[str, float]]:
    names = {"ndcg_at_5": "ndcg_cut_5", "ndcg_at_10": "ndcg_cut_10", "recall_at_100": "recall_100"}
    scores = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.5,10", "recall.100"}).evaluate(found)
    return {query: {ours: one[trecs] for ours, trecs in names.items()} for query, one in scores.items()}


def by_sklearn(found: dict[str, float], judged: dict[str, int]) -> dict[str, float]:
    """It has no recall at 100."""
    truth, scores = [[judged.get(page, 0) for page in found]], [list(found.values())]
    return {f"ndcg_at_{k}": ndcg_score(truth, scores, k=k, ignore_ties=True) for k in (5, 10)}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [True, False])
def test_metrics_are_those_of_three_other_implementations(workspace, ties, seed):  # noqa: F811
    model, processor = tied() if ties else ColourModel(), ColourProcessor()
    pages, asked, qrels, irrelevant = world(seed)
    texts = [" ".join(map(str, query)) for query in asked]
    write_beir(
        Path(FOLDER),
        [CorpusPage(i, encode_png(_page(page)), f"{i}.png") for i, page in enumerate(pages)],
        [Query(i, text) for i, text in enumerate(texts)],
        qrels,
    )
    [file] = Path(FOLDER).glob("qrels/*.parquet")  # as the hub's sets have them; write_beir takes no such rows
    table, (queries, others) = pq.read_table(file), zip(*irrelevant, strict=True)
    zeros = {"query-id": queries, "corpus-id": others, "score": [0] * len(others)}
    pq.write_table(pa.concat_tables([table, pa.table(zeros, schema=table.schema)]), file)
    scores = evaluate(subject(model, processor), write_manifest(FOLDER), "out")["some-docs"]
    rows = {row["query_id"]: row for row in pq.read_table("out/queries/trained.parquet").to_pylist()}

    matrix = maxsim_scores(embed_queries(model, processor, texts, 7), embed_pages(model, processor, pages_of(pages), 5))
    found = {f"query-test-{q}": {f"corpus-test-{p}": s for p, s in enumerate(r)} for q, r in enumerate(matrix.tolist())}
    judged: Judged = {query: {} for query in found}
    for query, page, grade in [*((q.query_id, q.corpus_id, q.score) for q in qrels), *((*i, 0) for i in irrelevant)]:
        judged[f"query-test-{query}"][f"corpus-test-{page}"] = grade
    distinct = {query: len(set(one.values())) for query, one in found.items()}
    assert max(distinct.values()) <= 6 if ties else list(distinct.values()).count(PAGES) > QUERIES / 3

    trec = by_trec(found, judged)
    assert rows.keys() == found.keys() == trec.keys()
    for query, row in rows.items():
        others = [by_formula(found[query], judged[query]), trec[query]]
        others += [by_sklearn(found[query], judged[query])] if distinct[query] == PAGES else []
        for other in others:
            for metric, value in other.items():
                assert row[metric] == pytest.approx(value, abs=1e-6), (query, metric)
    other_rule = [by_formula(found[query], judged[query], lower_first=True) for query in trec]
    differ = sum(abs(a["ndcg_at_5"] - b["ndcg_at_5"]) > 1e-3 for a, b in zip(trec.values(), other_rule, strict=True))
    assert differ > 5 or not ties, "the rule for ties decides"
    for metric in METRIC_KEYS:
        values = [one[metric] for one in trec.values()]
        assert scores[metric] == pytest.approx(np.mean(values), abs=1e-5)  # mteb rounds its mean to 5 digits
        assert 0 < np.mean(values) < 1 and len(set(values)) > 5, "neither trivial nor hopeless"


def pages_of(pages: list[list[int]]) -> list:
    return [_page(page) for page in pages]
