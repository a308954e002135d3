"""Contrastive loss: each query must find its own page among the pages of the batch and, if symmetric, the reverse.

Shapes: Q queries of N tokens, P pages of L tokens, embeddings of D numbers; the first Q pages are those of the queries.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import cross_entropy

# (queries, query_mask, pages, page_mask, false_negative_mask) -> scalar
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def make_contrastive_loss(temperature: float, symmetric: bool) -> Loss:
    """Return the loss that training uses by default: `contrastive_loss` over `maxsim_matrix`."""

    def compute_loss(queries: Tensor, query_mask: Tensor, pages: Tensor, page_mask: Tensor, excluded: Tensor) -> Tensor:
        return contrastive_loss(maxsim_matrix(queries, query_mask, pages, page_mask), excluded, temperature, symmetric)

    return compute_loss


def maxsim_matrix(queries: Tensor, query_mask: Tensor, pages: Tensor, page_mask: Tensor) -> Tensor:
    """Compute, for every query and page, the mean over the query's tokens of the largest similarity with a page token.

    The mean, not the sum, as in colpali-engine's losses, so that a long query does not get sharper scores. Masked page
    tokens are -inf before the maximum, because a zero would beat a negative similarity. Products and sums are float32:
    in bfloat16 the sum is wrong in the third digit. The result has the same bits in each run, on CUDA too.

    Example: a query of tokens (1, 0) and (0, 1) on a page of tokens (1, 0) and (-1, 0) scores (1 + 0) / 2.

    Args:
        queries: (Q, N, D) embeddings.
        query_mask: (Q, N), nonzero for tokens that count. Values at other places, even NaN, have no effect and get no
            gradient.
        pages: (P, L, D) embeddings.
        page_mask: (P, L), as `query_mask`.

    Returns:
        (Q, P) float32 (float64 for float64), differentiable once. A page without a token scores -inf and gets no
        gradient. Among equal similarities the gradient goes to the first token of the page.

    Raises:
        ValueError: a query has no token; its mean would be 0 / 0.
    """
    is_empty = (query_mask == 0).all(dim=1)
    if is_empty.any():
        index = int(is_empty.int().argmax())
        raise ValueError(f"query {index} of {len(queries)} has no token: its mask is zero throughout")
    return _MaxSim.apply(queries, query_mask != 0, pages, page_mask != 0)  # type: ignore[no-untyped-call]


class _MaxSim(torch.autograd.Function):
    """Saves for each (query token, page) only the index of the best page token; autograd would save all similarities.

    Pages are processed one at a time: the similarities of one page stay in the CPU's cache, and memory does not grow
    with the number of pages.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, query_keep: Tensor, pages: Tensor, page_keep: Tensor) -> Tensor:
        dtype = torch.promote_types(queries.dtype, torch.float32)
        tokens = _zero_masked(queries, query_keep, dtype).flatten(0, 1)
        maxima, best_indices = [], []
        has_autocast = torch.amp.is_autocast_available(queries.device.type)  # the meta device has none
        with torch.autocast(queries.device.type, enabled=False) if has_autocast else nullcontext():
            for page, keep in zip(pages, page_keep, strict=True):
                # Added by addmm, the mask costs nothing; masked_fill would be one more pass over all similarities.
                mask = torch.zeros_like(keep, dtype=dtype).masked_fill(~keep, -torch.inf)
                maximum, index = torch.addmm(mask, tokens, _zero_masked(page, keep, dtype).T).max(dim=1)
                maxima.append(maximum)
                best_indices.append(index)
        weights = query_keep.to(dtype) / query_keep.sum(dim=1, keepdim=True)  # of each token in its query's mean
        per_token = torch.stack(maxima, dim=1).unflatten(0, query_keep.shape).masked_fill(~query_keep[..., None], 0)
        ctx.save_for_backward(queries, query_keep, pages, page_keep, torch.stack(best_indices), weights)
        # Not a product with `weights`: 0 * -inf, of a masked token and a page without any, is NaN.
        return per_token.sum(dim=1) / query_keep.sum(dim=1, keepdim=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        queries, query_keep, pages, page_keep, best_indices, weights = ctx.saved_tensors
        tokens = _zero_masked(queries, query_keep, grad.dtype).flatten(0, 1)
        grad_queries = torch.zeros_like(tokens) if ctx.needs_input_grad[0] else None
        grad_pages = torch.empty_like(pages) if ctx.needs_input_grad[2] else None
        grad = grad.masked_fill(~page_keep.any(dim=1), 0)
        for i, index in enumerate(best_indices):
            weight = (weights * grad[:, i, None]).flatten()[:, None]
            if grad_queries is not None:
                grad_queries += weight * _zero_masked(pages[i], page_keep[i], grad.dtype)[index]
            if grad_pages is not None:
                grad_pages[i] = _sum_rows_by_index(weight * tokens, index, pages.shape[1])
        if grad_queries is not None:
            grad_queries = grad_queries.view_as(queries).to(queries.dtype)
        return grad_queries, None, grad_pages, None


def _zero_masked(tokens: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    return tokens.to(dtype).masked_fill(~keep[..., None], 0)


def _sum_rows_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sum into row j of the result those `rows` whose `index` is j, always in the same order."""
    total = rows.new_zeros(size, rows.shape[1])
    if rows.is_cuda:  # index_add_ adds there in the order in which threads arrive; index_put_ sorts first
        return total.index_put_((index,), rows, accumulate=True)
    return total.index_add_(0, index, rows)


def find_false_negatives(query_ids: Tensor, page_ids: Tensor) -> Tensor:
    """Find the pages of a batch that answer a query without being the page of its row; they are no negatives.

    Page j answers query i if it is equal to the page of any row with the same query.

    Example: rows (q, a), (r, a), (q, b) with a further page c: row 0 excludes the pages of rows 1 and 2, row 1 that of
    row 0, row 2 those of rows 0 and 1; c is a negative of all three.

    Args:
        query_ids: (Q,) equal for equal queries.
        page_ids: (P,) equal for equal pages, P >= Q; the first Q are the pages of the rows.

    Returns:
        (Q, P) bool.
    """
    is_same_query = query_ids[:, None] == query_ids[None, :]
    is_same_page = page_ids[: len(query_ids), None] == page_ids[None, :]
    is_answer = (is_same_query.float() @ is_same_page.float()) > 0
    return is_answer & ~torch.eye(*is_answer.shape, dtype=torch.bool, device=is_answer.device)


def contrastive_loss(scores: Tensor, false_negative_mask: Tensor, temperature: float, symmetric: bool) -> Tensor:
    """Compute InfoNCE over the pages of the batch: in-batch negatives as in ColBERT, and mined hard negatives.

    Equal embeddings give log(P): with 64 pairs an untrained model starts near 4.16.

    Args:
        scores: (Q, P), query i against page j, P >= Q; page i is the positive of query i.
        false_negative_mask: (Q, P) bool, see `find_false_negatives`.
        temperature: divides the scores.
        symmetric: average with the loss of page j against all queries, of which query j is the positive (as in CLIP,
            Radford et al. 2021, arXiv 2103.00020); mined negatives have no query and are left out of it.

    Returns:
        Scalar float32.
    """
    logits = (scores / temperature).masked_fill(false_negative_mask, -torch.inf)
    positives = torch.arange(len(scores), device=scores.device)
    loss = cross_entropy(logits, positives)
    return (loss + cross_entropy(logits[:, : len(scores)].T, positives)) / 2 if symmetric else loss
