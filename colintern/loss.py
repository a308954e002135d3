"""The contrastive loss: each query must find its own page among the pages of the batch."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


def maxsim_matrix(q: Tensor, q_mask: Tensor, p: Tensor, p_mask: Tensor, block: int = 8) -> Tensor:
    """Mean over a query's tokens of the largest similarity with a page's tokens, for every query and page.

    The mean, not the sum, as colpali-engine's losses take it, so that a long query is not a sharper one. Masked page
    tokens are -inf before the maximum (times zero, a pad would beat a negative similarity); float32 throughout,
    because in bf16 the sum itself is wrong in the third digit.

    Args:
        q, p: (Q, Nq, D) and (P, Np, D) embeddings.
        q_mask, p_mask: (Q, Nq) and (P, Np), nonzero where a token counts.
        block: queries compared at once; bounds the memory, not the result.

    Returns:
        (Q, P) float32, differentiable.
    """
    pages, blank = p.float(), p_mask == 0
    rows = []
    for start in range(0, len(q), block):
        tokens, keep = q[start : start + block].float(), q_mask[start : start + block].float()
        similarity = torch.einsum("qnd,pmd->qpnm", tokens, pages).masked_fill(blank[None, :, None, :], -torch.inf)
        best = similarity.amax(dim=-1)
        rows.append((best * keep[:, None]).sum(-1) / keep.sum(-1)[:, None])
    return torch.cat(rows)


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


def contrastive_loss(scores: Tensor, left_out: Tensor, temperature: float) -> Tensor:
    """InfoNCE over the pages of the batch (ColBERT in-batch negatives; mined ones are further pages of the batch).

    Embeddings that are all alike give log(P): with 64 pairs a model that knows nothing starts near 4.16.

    Args:
        scores: (B, P), query i against page j, P >= B; page i is the right one for query i.
        left_out: (B, P) bool, see `false_negatives`.
        temperature: scores are divided by it.

    Returns:
        Scalar float32.
    """
    logits = (scores / temperature).masked_fill(left_out, -torch.inf)
    return cross_entropy(logits, torch.arange(len(scores), device=scores.device))
