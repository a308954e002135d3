"""MaxSim against float64 and a loop, NDCG against values worked out by hand."""

from math import log2

import pytest
import torch
from torch.nn.functional import normalize

from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.fixture(scope="module")
def queries() -> list[torch.Tensor]:
    return [unit(n, 128, seed=n) for n in (1, 5, 30, 12, 7)]


@pytest.fixture(scope="module")
def pages() -> list[torch.Tensor]:
    return [unit(n, 128, seed=100 + n) for n in (700, 3, 1, 80)]


def by_loop(queries: list[torch.Tensor], pages: list[torch.Tensor]) -> torch.Tensor:
    """The definition, token by token, in float64."""
    rows = []
    for query in queries:
        scores = [sum(max(float(q @ p) for p in page.double()) for q in query.double()) for page in pages]
        rows.append(scores)
    return torch.tensor(rows, dtype=torch.float64)


def test_equals_the_definition_in_float64(queries, pages):
    scores = maxsim_scores(queries, pages)
    assert scores.dtype == torch.float32 and scores.shape == (5, 4)
    torch.testing.assert_close(scores.double(), by_loop(queries, pages), atol=1e-5, rtol=0)


def test_docstring_example():
    query, page = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert maxsim_scores([query], [page]).tolist() == [[1.0]]


@pytest.mark.parametrize("block", [1, 2, 5, 64])
def test_block_does_not_change_scores(queries, pages, block):
    torch.testing.assert_close(maxsim_scores(queries, pages, block=block), maxsim_scores(queries, pages))


def test_negative_similarities_stay_negative_beside_longer_items():
    # In a batch padded with zeros, the short page's pads would lift its maximum from -1 to 0.
    query = torch.tensor([[1.0, 0.0]])
    pages = [torch.tensor([[-1.0, 0.0]]), torch.tensor([[-0.6, 0.8], [-0.8, 0.6], [0.0, -1.0]])]
    assert maxsim_scores([query, torch.cat([query, query])], pages).tolist() == [[-1.0, 0.0], [-2.0, 0.0]]


def test_low_precision_is_summed_in_float32(queries, pages):
    half = [[item.bfloat16() for item in items] for items in (queries, pages)]
    exact = maxsim_scores(*[[item.float() for item in items] for items in half])
    assert torch.equal(maxsim_scores(*half), exact)


def test_nothing_to_score():
    assert maxsim_scores([], [unit(2, 4)]).shape == (0, 1)
    assert maxsim_scores([unit(2, 4)], []).shape == (1, 0)


def test_broken_embeddings_are_named(queries, pages):
    broken = [*pages[:2], pages[2] * float("nan"), pages[3]]
    with pytest.raises(ValueError, match="query 0 with page 2 is nan"):
        maxsim_scores(queries, broken)
    with pytest.raises(ValueError, match="page 1: embeddings of shape"):
        maxsim_scores(queries, [pages[0], torch.zeros(0, 128)])


def mostly_blank(tokens: int) -> torch.Tensor:
    """Like a page of much paper: nine tokens of ten are nearly one vector."""
    page, paper = unit(tokens, 128, seed=tokens), unit(128, seed=7)
    blank = torch.arange(tokens) % 10 > 0
    page[blank] = page[blank] * 0.05 + paper
    return normalize(page, dim=-1)


def test_many_queries_on_large_pages_equal_the_definition():
    queries, alike = [unit(20, 128, seed=i) for i in range(30)], unit(1, 128).expand(600, -1)
    pages = [unit(700, 128, seed=1), alike, mostly_blank(800), unit(100, 128)]
    exact = [[(q.double() @ p.double().T).amax(dim=1).sum().item() for p in pages] for q in queries]
    torch.testing.assert_close(maxsim_scores(queries, pages).double().tolist(), exact, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="query 29 with page 0 is nan"):
        maxsim_scores([*queries[:29], queries[29] * float("nan")], pages)
    with pytest.raises(ValueError, match="query 0 with page 1 is"):
        maxsim_scores(queries, [pages[0], pages[0] / 0])


def test_ndcg_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    assert ndcg_at_k(scores, [[0]], 5) == 1.0
    assert ndcg_at_k(scores, [[1]], 5) == pytest.approx(1 / log2(3))
    assert ndcg_at_k(scores, [[2]], 2) == 0.0
    assert ndcg_at_k(scores, [[0, 2]], 5) == pytest.approx((1 + 1 / log2(4)) / (1 + 1 / log2(3)))
    assert ndcg_at_k(scores, [[0, 1, 2]], 1) == 1.0
    assert ndcg_at_k(torch.cat([scores, scores]), [[0], [2]], 5) == pytest.approx((1 + 1 / log2(4)) / 2)


def test_a_collapsed_model_gains_nothing_from_ties():
    assert ndcg_at_k(torch.zeros(4, 100), [[i] for i in range(4)], 5) == 0.0
    assert ndcg_at_k(torch.tensor([[0.5, 0.5, 0.1]]), [[0]], 5) == pytest.approx(1 / log2(3))


def test_ndcg_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="not finite"):
        ndcg_at_k(torch.tensor([[float("nan"), 0.0]]), [[0]], 5)
    with pytest.raises(ValueError, match="query 0: relevant pages"):
        ndcg_at_k(torch.zeros(1, 2), [[]], 5)
    with pytest.raises(ValueError, match="query 0: relevant pages"):
        ndcg_at_k(torch.zeros(1, 2), [[2]], 5)
    with pytest.raises(ValueError, match="2 rows of scores"):
        ndcg_at_k(torch.zeros(2, 2), [[0]], 5)
