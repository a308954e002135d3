import math

import pytest
import torch
from colpali_engine.loss import ColbertLoss
from sentence_transformers.multi_vector_encoder.scoring import mean_colbert_scores
from torch.nn.functional import cross_entropy

from colintern.training.loss import contrastive_loss, find_false_negatives, maxsim_matrix


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


def plain(q, q_mask, p, p_mask):
    """The definition as one expression that autograd differentiates."""
    blank = (p_mask == 0)[None, :, None]
    best = torch.einsum("qnd,pmd->qpnm", q, p).masked_fill(blank, -torch.inf).amax(-1)
    return (best * q_mask[:, None]).sum(-1) / q_mask.sum(-1)[:, None]


def slopes(score, q, q_mask, p, p_mask):
    """The loss over a rectangle of scores, and its gradients with respect to queries and pages."""
    q, p = q.clone().requires_grad_(), p.clone().requires_grad_()
    loss = cross_entropy(score(q, q_mask, p, p_mask) / 0.02, torch.arange(len(q)))
    return loss, *torch.autograd.grad(loss, (q, p))


@pytest.mark.parametrize("queries", [1, 3, 4])
def test_matrix_is_the_definition(batch, queries):
    q, q_mask, p, p_mask = batch
    batch = q[:queries], q_mask[:queries], p, p_mask
    torch.testing.assert_close(maxsim_matrix(*batch).double(), naive(*batch), atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries", [2, 4])
def test_loss_and_gradient_are_float64s(batch, queries):
    q, q_mask, p, p_mask = batch
    q, q_mask = q[:queries], q_mask[:queries]
    ours, want = slopes(maxsim_matrix, q, q_mask, p, p_mask), slopes(plain, q.double(), q_mask, p.double(), p_mask)
    for mine, true in zip(ours, want, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), true, atol=1e-5, rtol=1e-4)


def test_gradcheck(batch):
    q, q_mask, p, p_mask = batch
    p_mask[1] = 0
    q, p = q[:2, :, :4].double().requires_grad_(), p[..., :4].double().requires_grad_()
    real = [0, 2, 3]  # page 1 has no token
    torch.autograd.gradcheck(lambda q, p: maxsim_matrix(q, q_mask[:2], p, p_mask)[:, real], (q, p))
    torch.autograd.gradcheck(lambda q: maxsim_matrix(q, q_mask[:2], p.detach(), p_mask)[:, real], (q,))


def test_a_page_without_a_token_is_never_found_and_gets_no_gradient(batch):
    q, q_mask, p, p_mask = batch
    want = slopes(maxsim_matrix, q[:3], q_mask[:3], p[:3], p_mask[:3])
    p_mask[3] = 0
    assert (maxsim_matrix(q, q_mask, p, p_mask)[:, 3] == -torch.inf).all()
    loss, grad_q, grad_p = slopes(maxsim_matrix, q[:3], q_mask[:3], p, p_mask)
    for mine, without in zip((loss, grad_q, grad_p[:3]), want, strict=True):
        torch.testing.assert_close(mine, without)  # a softmax over one page more adds up in another order
    assert not grad_p[3].any()


def test_a_query_without_a_token_is_refused(batch):
    q, q_mask, p, p_mask = batch
    q_mask[2] = 0
    with pytest.raises(ValueError, match="query 2 of 4 has no token"):
        maxsim_matrix(q, q_mask, p, p_mask)


def test_what_stands_in_padding_has_no_influence_and_gets_no_gradient(batch):
    q, q_mask, p, p_mask = batch
    want = slopes(maxsim_matrix, *batch)
    q, p = q.masked_fill(q_mask[..., None] == 0, torch.nan), p.masked_fill(p_mask[..., None] == 0, torch.nan)
    for mine, clean in zip(slopes(maxsim_matrix, q, q_mask, p, p_mask), want, strict=True):
        assert torch.equal(mine, clean)
    assert not want[1][q_mask == 0].any() and not want[2][p_mask == 0].any()


def test_equal_similarities_send_the_gradient_to_the_first_token():
    q, p = torch.ones(1, 1, 2), torch.ones(1, 3, 2).requires_grad_()
    maxsim_matrix(q, torch.ones(1, 1), p, torch.tensor([[0, 1, 1]])).sum().backward()
    assert p.grad.tolist() == [[[0, 0], [1, 1], [0, 0]]]


def test_only_the_best_tokens_place_is_kept():
    torch.manual_seed(0)
    q, p = unit(8, 16, 32).requires_grad_(), unit(8, 500, 32).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        maxsim_matrix(q, torch.ones(8, 16), p, torch.ones(8, 500))
    own = sum(t.nbytes for t in kept if t is not q and t is not p)
    assert own < 8 * 8 * 16 * 8 + 10_000  # one int64 for each page and query token; all similarities: 2 MB
    assert {id(t) for t in kept} >= {id(q), id(p)}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_each_time(threads):
    torch.manual_seed(0)
    # Few distinct page tokens: many query tokens choose the same one, whose gradient is then a long sum.
    batch = unit(6, 40, 128), torch.ones(6, 40), unit(6, 5, 128).repeat(1, 60, 1), torch.ones(6, 300)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [slopes(maxsim_matrix, *batch) for _ in range(5)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


def test_padding_cannot_beat_a_negative_similarity():
    q, p = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[-1.0, 0.0], [0.0, 0.0]]])
    assert maxsim_matrix(q, torch.ones(1, 1), p, torch.tensor([[1, 0]])).item() == -1.0


def test_bf16_embeddings_are_scored_in_float32(batch):
    q, q_mask, p, p_mask = batch
    q, p = q.bfloat16(), p.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = maxsim_matrix(q, q_mask, p, p_mask)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), naive(q, q_mask, p, p_mask), atol=1e-6, rtol=0)
    loss, grad_q, grad_p = slopes(maxsim_matrix, q, q_mask, p, p_mask)
    want = slopes(maxsim_matrix, q.float(), q_mask, p.float(), p_mask)
    assert grad_q.dtype == grad_p.dtype == torch.bfloat16
    assert torch.equal(loss, want[0])
    assert torch.equal(grad_q, want[1].bfloat16()) and torch.equal(grad_p, want[2].bfloat16())


@pytest.mark.parametrize("size", [2, 64])
def test_knowing_nothing_costs_log_batch(size):
    loss = contrastive_loss(torch.zeros(size, size), nothing(size), 0.02, False)
    assert loss.item() == pytest.approx(math.log(size))


def test_two_pairs_by_hand():
    scores = torch.tensor([[0.5, 0.3], [0.1, 0.5]])
    want = (math.log(1 + math.exp(-0.2 / 0.1)) + math.log(1 + math.exp(-0.4 / 0.1))) / 2
    assert contrastive_loss(scores, nothing(2), 0.1, False).item() == pytest.approx(want, rel=1e-5)


def test_a_hard_negative_is_a_negative_of_every_query():
    scores = torch.tensor([[0.5, 0.3, 0.4], [0.1, 0.5, 0.2]])
    want = sum(math.log(1 + sum(math.exp((x - 0.5) / 0.1) for x in row)) for row in ((0.3, 0.4), (0.1, 0.2))) / 2
    assert contrastive_loss(scores, torch.zeros(2, 3, dtype=torch.bool), 0.1, False).item() == pytest.approx(
        want, rel=1e-5
    )


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    # The mined page, the last column, is a negative of both queries, and asks for none itself.
    scores = torch.tensor([[0.5, 0.3, 0.4], [0.1, 0.5, 0.2]])
    rows = sum(math.log(1 + sum(math.exp((x - 0.5) / 0.1) for x in row)) for row in ((0.3, 0.4), (0.1, 0.2))) / 2
    columns = sum(math.log(1 + math.exp((x - 0.5) / 0.1)) for x in (0.1, 0.3)) / 2
    loss = contrastive_loss(scores, torch.zeros(2, 3, dtype=torch.bool), 0.1, True)
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_what_a_page_answers_is_no_negative_of_it_either():
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.2, 0.8]])
    copies = find_false_negatives(torch.tensor([1, 2, 3]), torch.tensor([5, 5, 7]))
    assert contrastive_loss(scores, copies, 0.02, True) < 0.01 < contrastive_loss(scores, nothing(3), 0.02, True)


def test_what_is_left_out_is_no_negative():
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.9, 0.9, 0.1], [0.1, 0.2, 0.8]])
    twin = contrastive_loss(scores, find_false_negatives(torch.tensor([1, 2, 3]), torch.tensor([5, 5, 7])), 0.02, False)
    assert twin < 0.01 < contrastive_loss(scores, nothing(3), 0.02, False)


def test_copies_of_a_page_and_other_pages_of_the_same_query_are_no_negatives():
    # rows (q, a), (r, a), (q, b), (s, c); hard negatives b, a, d
    left_out = find_false_negatives(torch.tensor([1, 2, 1, 3]), torch.tensor([10, 10, 11, 12, 11, 10, 13]))
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
    ours = contrastive_loss(maxsim_matrix(q, torch.ones(6, 5), p, torch.ones(6, 8)), nothing(6), 0.02, False)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for mine, other in zip(torch.autograd.grad(ours, (q, p)), want, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_scores_and_gradients_are_sentence_transformers():
    torch.manual_seed(2)
    q_mask = torch.arange(7) < torch.tensor([7, 3, 5])[:, None]
    p_mask = torch.arange(9) < torch.tensor([9, 2, 6, 4, 9, 1])[:, None]

    def theirs(q, q_mask, p, p_mask):
        return mean_colbert_scores(q, p[:, None], queries_mask=q_mask, documents_mask=p_mask[:, None])

    batch = unit(3, 7, 16), q_mask, unit(6, 9, 16), p_mask
    for mine, other in zip(slopes(maxsim_matrix, *batch), slopes(theirs, *batch), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_colpali_engine_loses_digits_in_bf16_and_we_do_not():
    torch.manual_seed(3)
    q, p = unit(16, 30, 128).bfloat16(), unit(16, 200, 128).bfloat16()
    batch = q.double(), torch.ones(16, 30), p.double(), torch.ones(16, 200)
    true = contrastive_loss(plain(*batch), nothing(16), 0.02, False).item()
    ours = contrastive_loss(maxsim_matrix(q, batch[1], p, batch[3]), nothing(16), 0.02, False).item()
    assert ours == pytest.approx(true, abs=1e-5)
    assert abs(ColbertLoss(temperature=0.02)(q, p).item() - true) > 1e-3
