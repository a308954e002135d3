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


def contrastive_loss(scores: Tensor, page_ids: Tensor, temperature: float) -> Tensor:
    """InfoNCE over the pages of the batch (ColBERT in-batch negatives).

    Embeddings that are all alike give log(B): with 64 pairs a model that knows nothing starts near 4.16.

    Args:
        scores: (B, B), query i against page j; page i is the right one for query i.
        page_ids: (B,) equal for equal pages: another copy of a query's own page is not a negative.
        temperature: scores are divided by it.

    Returns:
        Scalar float32.
    """
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    twins = (page_ids[:, None] == page_ids[None, :]) & ~own
    logits = (scores / temperature).masked_fill(twins, -torch.inf)
    return cross_entropy(logits, torch.arange(len(scores), device=scores.device))
