import math

import pytest
import torch
from colpali_engine.loss import ColbertLoss

from colintern.loss import contrastive_loss, false_negatives, maxsim_matrix


def nothing(size: int) -> torch.Tensor:
    """No pair is left out of a square batch."""
    return torch.zeros(size, size, dtype=torch.bool)


def unit(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    q_mask = (torch.arange(7) < torch.tensor([7, 3, 5, 1])[:, None]).long()
    p_mask = (torch.arange(9) < torch.tensor([9, 2, 6, 4])[:, None]).long()
    q, p = unit(4, 7, 16) * q_mask[..., None], unit(4, 9, 16) * p_mask[..., None]
    return q, q_mask, p, p_mask


def naive(q, q_mask, p, p_mask):
    scores = torch.empty(len(q), len(p), dtype=torch.float64)
    for i in range(len(q)):
        for j in range(len(p)):
            tokens, page = q[i][q_mask[i] > 0].double(), p[j][p_mask[j] > 0].double()
            scores[i, j] = sum(max(float(t @ v) for v in page) for t in tokens) / len(tokens)
    return scores


@pytest.mark.parametrize("block", [1, 3, 8])
def test_matrix_is_the_definition(batch, block):
    torch.testing.assert_close(maxsim_matrix(*batch, block=block).double(), naive(*batch), atol=1e-6, rtol=0)


def test_padding_cannot_beat_a_negative_similarity():
    q, p = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert maxsim_matrix(q, torch.ones(1, 1), p, torch.tensor([[1, 0]])).item() == -1.0


def test_bf16_embeddings_are_scored_in_float32(batch):
    q, q_mask, p, p_mask = batch
    low = maxsim_matrix(q.bfloat16(), q_mask, p.bfloat16(), p_mask)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), naive(q.bfloat16(), q_mask, p.bfloat16(), p_mask), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 64])
def test_knowing_nothing_costs_log_batch(size):
    loss = contrastive_loss(torch.zeros(size, size), nothing(size), 0.02)
    assert loss.item() == pytest.approx(math.log(size))


def test_two_pairs_by_hand():
    scores = torch.tensor([[0.5, 0.3], [0.1, 0.5]])
    want = (math.log(1 + math.exp(-0.2 / 0.1)) + math.log(1 + math.exp(-0.4 / 0.1))) / 2
    assert contrastive_loss(scores, nothing(2), 0.1).item() == pytest.approx(want, rel=1e-5)


def test_a_hard_negative_is_a_negative_of_every_query():
    scores = torch.tensor([[0.5, 0.3, 0.4], [0.1, 0.5, 0.2]])
    want = sum(math.log(1 + sum(math.exp((x - 0.5) / 0.1) for x in row)) for row in ((0.3, 0.4), (0.1, 0.2))) / 2
    assert contrastive_loss(scores, torch.zeros(2, 3, dtype=torch.bool), 0.1).item() == pytest.approx(want, rel=1e-5)


def test_what_is_left_out_is_no_negative():
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.2, 0.8]])
    twin = contrastive_loss(scores, false_negatives(torch.tensor([1, 2, 3]), torch.tensor([5, 5, 7])), 0.02)
    assert twin < 0.01 < contrastive_loss(scores, nothing(3), 0.02)


def test_copies_of_a_page_and_other_pages_of_the_same_query_are_no_negatives():
    # rows (q, a), (r, a), (q, b), (s, c); hard negatives b, a, d
    left_out = false_negatives(torch.tensor([1, 2, 1, 3]), torch.tensor([10, 10, 11, 12, 11, 10, 13]))
    assert left_out.int().tolist() == [
        [0, 1, 1, 0, 1, 1, 0],
        [1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]


def test_loss_and_gradient_are_colpali_engines_where_that_is_right():
    # It is right without padded pages: it multiplies padding by zero instead of taking it out.
    torch.manual_seed(1)
    q, p = unit(6, 5, 16).requires_grad_(), unit(6, 8, 16).requires_grad_()
    theirs = ColbertLoss(temperature=0.02, normalize_scores=True)(q, p)
    want = torch.autograd.grad(theirs, (q, p))
    ours = contrastive_loss(maxsim_matrix(q, torch.ones(6, 5), p, torch.ones(6, 8)), nothing(6), 0.02)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, (q, p)), want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)
