"""The contrastive loss: each query must find its own page among the pages of the batch, and, if wanted, the reverse."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy


def maxsim_matrix(q: Tensor, q_mask: Tensor, p: Tensor, p_mask: Tensor) -> Tensor:
    """Mean over a query's tokens of the largest similarity with a page's tokens, for every query and page.

    The mean, not the sum, as colpali-engine's losses take it, so that a long query is not a sharper one. Masked page
    tokens are -inf before the maximum (times zero, a pad would beat a negative similarity); products and sums are
    float32, because in bf16 the sum itself is wrong in the third digit. The bits are the same in each run, on CUDA too.

    Example: a query of tokens (1, 0) and (0, 1) on a page of tokens (1, 0) and (-1, 0) scores (1 + 0) / 2.

    Args:
        q, p: (Q, Nq, D) and (P, Np, D) embeddings; Q and P may differ.
        q_mask, p_mask: (Q, Nq) and (P, Np), nonzero where a token counts. What stands in the other places, NaN too,
            has no influence and gets no gradient.

    Returns:
        (Q, P) float32 (float64 of float64), differentiable once. A page without a token scores -inf: no query can
        find it, and it gets no gradient. Among equal similarities the gradient goes to the first token of the page.

    Raises:
        ValueError: a query without a token, whose mean would be 0 / 0.
    """
    empty = (q_mask == 0).all(dim=1)
    if empty.any():
        raise ValueError(f"query {int(empty.int().argmax())} of {len(q)} has no token: its mask is zero throughout")
    return _MaxSim.apply(q, q_mask != 0, p, p_mask != 0)  # type: ignore[no-untyped-call]


class _MaxSim(torch.autograd.Function):
    """Keeps of each (query token, page) only which page token was best, where autograd would keep every similarity.

    Pages one at a time: what all query tokens make of one page stays in the CPU's cache, and the memory does not grow
    with the number of pages.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, q_keep: Tensor, p: Tensor, p_keep: Tensor) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        tokens = _kept(q, q_keep, exact).flatten(0, 1)
        best, chosen = [], []
        known = torch.amp.is_autocast_available(q.device.type)  # tensors without memory know none
        with torch.autocast(q.device.type, enabled=False) if known else nullcontext():
            for page, keep in zip(p, p_keep, strict=True):
                # As the sum's other term, the mask costs nothing; masked_fill would be a pass over all similarities.
                mask = torch.zeros_like(keep, dtype=exact).masked_fill(~keep, -torch.inf)
                top, place = torch.addmm(mask, tokens, _kept(page, keep, exact).T).max(dim=1)
                best.append(top)
                chosen.append(place)
        share = q_keep.to(exact) / q_keep.sum(dim=1, keepdim=True)  # of each token in its query's mean
        per_token = torch.stack(best, dim=1).unflatten(0, q_keep.shape).masked_fill(~q_keep[..., None], 0)
        ctx.save_for_backward(q, q_keep, p, p_keep, torch.stack(chosen), share)
        # Not a product with `share`: 0 * -inf, of a masked token and a page without any, is NaN.
        return per_token.sum(dim=1) / q_keep.sum(dim=1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        q, q_keep, p, p_keep, chosen, share = ctx.saved_tensors
        tokens = _kept(q, q_keep, grad.dtype).flatten(0, 1)
        grad_q = torch.zeros_like(tokens) if ctx.needs_input_grad[0] else None
        grad_p = torch.empty_like(p) if ctx.needs_input_grad[2] else None
        grad = grad.masked_fill(~p_keep.any(dim=1), 0)
        for i, place in enumerate(chosen):
            weight = (share * grad[:, i, None]).flatten()[:, None]
            if grad_q is not None:
                grad_q += weight * _kept(p[i], p_keep[i], grad.dtype)[place]
            if grad_p is not None:
                grad_p[i] = _sum_by_place(weight * tokens, place, p.shape[1])
        return None if grad_q is None else grad_q.view_as(q).to(q.dtype), None, grad_p, None


def _kept(tokens: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype).masked_fill(~keep[..., None], 0)


def _sum_by_place(rows: Tensor, place: Tensor, places: int) -> Tensor:
    """Row j is the sum of those `rows` whose `place` is j, always added in the same order."""
    total = rows.new_zeros(places, rows.shape[1])
    if rows.is_cuda:  # index_add_ adds there in whatever order its threads come; index_put_ sorts first
        return total.index_put_((place,), rows, accumulate=True)
    return total.index_add_(0, place, rows)


def false_negatives(query_ids: Tensor, page_ids: Tensor) -> Tensor:
    """Which pages of a batch answer a query without being the page of its row: they must not count as negatives.

    Page j answers query i if it is equal to the page of any row that asks the same query.

    Example: rows (q, a), (r, a), (q, b) with a further page c: row 0 leaves out the pages of rows 1 and 2, row 1 that
    of row 0, row 2 those of rows 0 and 1; c is a negative of all three.

    Args:
        query_ids: (B,) equal for equal queries.
        page_ids: (P,) equal for equal pages, P >= B; the first B are the pages of the rows.

    Returns:
        (B, P) bool.
    """
    same_query = query_ids[:, None] == query_ids[None, :]
    same_page = page_ids[: len(query_ids), None] == page_ids[None, :]
    answers = (same_query.float() @ same_page.float()) > 0
    return answers & ~torch.eye(*answers.shape, dtype=torch.bool, device=answers.device)


def contrastive_loss(scores: Tensor, left_out: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """InfoNCE over the pages of the batch (ColBERT in-batch negatives; mined ones are further pages of the batch).

    Embeddings that are all alike give log(P): with 64 pairs a model that knows nothing starts near 4.16.

    Args:
        scores: (B, P), query i against page j, P >= B; page i is the right one for query i.
        left_out: (B, P) bool, see `false_negatives`.
        temperature: scores are divided by it.
        symmetric: the mean of that and of its mirror, page j against all queries, in which query j is the right one
            (as in CLIP, Radford et al. 2021, arXiv 2103.00020); a mined page has no query and is not asked.

    Returns:
        Scalar float32.
    """
    logits = (scores / temperature).masked_fill(left_out, -torch.inf)
    right = torch.arange(len(scores), device=scores.device)
    loss = cross_entropy(logits, right)
    return (loss + cross_entropy(logits[:, : len(scores)].T, right)) / 2 if symmetric else loss
