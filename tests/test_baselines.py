"""BM25 over the text of pages, its fusion with a model, and chance, through the real mteb, against direct computations.

The model and the pages are those of test_evaluation.py; the text of a page is the numbers of its colours.
"""

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest
import torch
from test_evaluation import (
    FOLDER,
    PAGES,
    ColourModel,
    ColourProcessor,
    _page,
    _world,
    subject,
    workspace,  # noqa: F401  # a fixture
    write_manifest,
    write_world,
)

from colintern.analysis.score_tables import format_score_table
from colintern.core.errors import UserError
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.evaluation.baselines import add_baselines, find_mteb_baseline
from colintern.evaluation.results import Scores, merge_means, read_query_results, summarize_scores
from colintern.evaluation.run import evaluate_models
from colintern.params import Params
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import METRIC_KEYS, compute_chance, ndcg_at_k

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(workspace, monkeypatch):  # noqa: F811
    """A workspace outside of a clone, whose code is part of a model's identity."""
    monkeypatch.setattr("colintern.evaluation.baselines.get_runtime_identity", dict)


def write_texts(folder: Path, num_with_text: int = PAGES, pseudo: bool = False) -> None:
    pages, queries = _world()
    texts = [_write_numbers(page) if number < num_with_text else "" for number, page in enumerate(pages)]
    write_beir(
        folder,
        [CorpusPage(i, encode_png(_page(page)), f"{i}.png", texts[i]) for i, page in enumerate(pages)],
        [Query(i, _write_numbers(query)) for i, query in enumerate(queries)],
        [Qrel(i, i) for i in range(PAGES)],
        pseudo,
    )


def _write_numbers(colours: list[int]) -> str:
    return " ".join(map(str, colours))


def evaluate(params: Params, out: str = "out") -> dict[str, Scores]:
    models = {"trained": subject(ColourModel(), ColourProcessor())}
    return evaluate_models(add_baselines(params, models), params, Path(out))


def compute_bm25() -> torch.Tensor:
    """Lucene's formula with k1 = 1.5 and b = 0.75; words of one character do not count."""
    pages, queries = ([[str(colour) for colour in row if colour > 9] for row in rows] for rows in _world())
    frequency = Counter(word for page in pages for word in set(page))
    mean = sum(map(len, pages)) / len(pages)
    scores = torch.zeros(len(queries), len(pages))
    for number, page in enumerate(pages):
        counts, norm = Counter(page), 1.5 * (0.25 + 0.75 * len(page) / mean)
        for query, words in enumerate(queries):
            for word in words:
                idf = math.log(1 + (len(pages) - frequency[word] + 0.5) / (frequency[word] + 0.5))
                scores[query, number] += idf * counts[word] / (counts[word] + norm)
    return scores


def rank_pages(scores: torch.Tensor) -> list[list[int]]:
    """Of equal scores the higher id goes first, as text."""
    return [
        sorted(range(len(row)), key=lambda page: (row[page], f"corpus-test-{page}"), reverse=True)
        for row in scores.tolist()
    ]


def compute_hybrid(ours: torch.Tensor, bm25: torch.Tensor) -> torch.Tensor:
    fused = torch.zeros_like(ours, dtype=torch.float64)
    for scores in (ours, bm25):
        for query, pages in enumerate(rank_pages(scores)):
            for position, page in enumerate(pages[:100]):
                fused[query, page] += 1 / (60 + position + 1)
    return fused


def test_bm25_hybrid_and_chance_equal_direct_computations(folder, capfd):
    write_texts(Path(FOLDER))
    params = replace(write_manifest(FOLDER), baselines=("bm25", "hybrid"))
    by_model = evaluate(params)
    assert list(by_model) == ["trained", "bm25", "hybrid", "chance"]
    assert "BM25S" not in capfd.readouterr().err, "no progress bars of bm25s"
    pages, queries = _world()
    model, processor = ColourModel(), ColourProcessor()
    ours = maxsim_scores(
        embed_queries(model, processor, list(map(_write_numbers, queries)), 7),
        embed_pages(model, processor, list(map(_page, pages)), 5),
    )
    bm25 = compute_bm25()
    for name, scores in {"bm25": bm25, "hybrid": compute_hybrid(ours, bm25)}.items():
        found = read_query_results(Path(f"out/queries/{name}.parquet"))
        ranks = [pages.index(query) + 1 for query, pages in enumerate(rank_pages(scores))]
        assert {int(row.query_id.rpartition("-")[2]): row.rank for row in found} == dict(enumerate(ranks)), name
        assert {row.top_names[0] for row in found} <= {f"{page}.png" for page in range(PAGES)}
    assert by_model["trained"]["some-docs"]["ndcg_at_5"] == pytest.approx(
        ndcg_at_k(ours, [[i] for i in range(PAGES)], 5), abs=1e-5
    )
    assert by_model["chance"]["some-docs"]["ndcg_at_5"] == pytest.approx(2.9485 / PAGES, abs=1e-5)
    assert by_model["chance"]["some-docs"]["recall_at_100"] == pytest.approx(100 / PAGES, abs=1e-5)

    summary = summarize_scores(by_model)
    assert summary.keys() == {*METRIC_KEYS, "bm25_ndcg_at_5", "hybrid_ndcg_at_5", "tasks"}
    assert summary["bm25_ndcg_at_5"] == by_model["bm25"]["some-docs"]["ndcg_at_5"]
    assert merge_means(by_model)["some-docs"]["hybrid"].keys() == set(METRIC_KEYS)
    assert evaluate(params, "again") == by_model, "from what was stored"


def test_pages_without_text_are_counted_and_named(folder):
    write_world(Path(FOLDER))
    write_texts(Path("eval/scans"), num_with_text=100, pseudo=True)
    params = replace(write_manifest(FOLDER, "eval/scans"), baselines=("hybrid",))
    by_model = evaluate(params)
    assert by_model["bm25"].keys() == by_model["hybrid"].keys() == {"scans (pseudo-queries)"}
    assert summarize_scores(by_model).keys() == {*METRIC_KEYS, "tasks"}, "a mean of other tasks is not comparable"
    lines = format_score_table(by_model).splitlines()
    assert max(map(len, lines)) <= 80
    assert {line.split()[1] for line in lines if line.endswith("no text on its pages")} == {"bm25", "hybrid"}
    assert {line.split()[-5] for line in lines if line.endswith(" favoured")} == {"bm25", "hybrid"}
    assert lines[-2:] == [
        "favoured: a program made the queries from the text that bm25 searches",
        "ScansPseudoQueries: 100 of 110 pages have text",
    ]


def test_a_model_of_text_needs_text(folder):
    write_world(Path(FOLDER))
    params = write_manifest(FOLDER)
    bm25 = find_mteb_baseline(params, "mteb/baseline-bm25s")
    with pytest.raises(
        UserError, match=r"mteb/baseline-bm25s reads text, and the pages of SomeDocsRetrieval have none"
    ):
        evaluate_models({"trained": bm25}, params, Path("out"))
    with pytest.raises(UserError, match=r"baselines: 'bm52' is not bm25, hybrid or a model that mteb"):
        add_baselines(replace(params, baselines=("bm52",)), {"trained": bm25})


def test_chance_is_the_mean_over_all_rankings():
    gains = (2, 1, 0, 0, 0, 0)
    scores, recall = [], []
    for ranking in permutations(range(6)):
        discounted = [gains[page] / math.log2(rank + 2) for rank, page in enumerate(ranking)]
        scores.append(sum(discounted[:5]) / (2 + 1 / math.log2(3)))
        recall.append(1.0)
    chance = compute_chance([1, 2], 6)
    assert chance["ndcg_at_5"] == pytest.approx(sum(scores) / len(scores))
    assert chance["recall_at_100"] == 1
