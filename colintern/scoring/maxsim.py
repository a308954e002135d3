"""Late interaction: MaxSim scores of queries and pages.

score(q, p) = sum over the tokens of q of the largest dot product with a token of p (Khattab & Zaharia 2020,
"ColBERT", arXiv 2004.12832, eq. 3; for page images Faysse et al. 2024, "ColPali", arXiv 2407.01449).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PAGES_PER_COPY = 64  # pages whose maxima are held before they are summed and copied to the CPU
# Query tokens per matrix product; on the CPU the product stays in the cache.
MAX_QUERY_TOKENS = {"cpu": 256, "cuda": 8192}


def maxsim_scores(
    queries: Sequence[Tensor], pages: Sequence[Tensor], device: torch.device | str = "cpu", block: int | None = None
) -> Tensor:
    """Compute the MaxSim score of every query with every page.

    Each page is read once, so memory-mapped pages need not fit into memory.

    Example: a query of tokens (1, 0) and (0, 1) on a page of tokens (1, 0) and (-1, 0) scores 1 + 0 = 1.

    Args:
        queries: one (tokens, dim) tensor each, without padding, so that no pad can win a maximum whose true value is
            negative. Any floating type, on any device: products and sums are float32.
        pages: in the same form.
        device: where the scores are computed.
        block: query tokens per product instead of `MAX_QUERY_TOKENS`. The scores do not depend on it.

    Returns:
        (number of queries, number of pages) float32 on the CPU.

    Raises:
        ValueError: a query or page without tokens or of another dim, or a score that is not finite.
    """
    _validate_shapes(queries, pages)
    scores = torch.empty(len(queries), len(pages))
    if not scores.numel():
        return scores
    device, lengths = torch.device(device), [len(query) for query in queries]
    tokens = torch.cat([query.to(device, torch.float32) for query in queries])
    blocks = [part.T for part in tokens.split(block or MAX_QUERY_TOKENS.get(device.type, MAX_QUERY_TOKENS["cuda"]))]
    for start in range(0, len(pages), PAGES_PER_COPY):
        group = pages[start : start + PAGES_PER_COPY]
        maxima = torch.empty(len(group), len(tokens), device=device)
        for row, page in zip(maxima, group, strict=True):
            vectors = page.to(device, torch.float32)
            # One matrix product a page: faster than any padded batch of pages, and nothing has to be masked.
            torch.cat([(vectors @ part).amax(dim=0) for part in blocks], out=row)
        sums = [part.sum(dim=1) for part in maxima.split(lengths, dim=1)]
        scores[:, start : start + PAGES_PER_COPY] = torch.stack(sums).cpu()
    if not scores.isfinite().all():
        i, j = (~scores.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the score of query {i} with page {j} is {scores[i, j]}: embeddings are broken")
    return scores


def rescore_best(
    scores: Tensor, queries: Sequence[Tensor], pages: Sequence[Tensor], k: int, device: torch.device
) -> None:
    """Replace each query's k best scores, in place, by those with other vectors of the same pages.

    The other pages keep their order, below the k best.

    Args:
        scores: (queries, pages) float32 on the CPU.
        queries: see `maxsim_scores`.
        pages: see `maxsim_scores`.
        k: pages rescored, at least 1.
        device: where the scores are computed.
    """
    best = scores.topk(min(k, scores.shape[1])).indices
    for row, query, columns in zip(scores, queries, best, strict=True):
        rescored = maxsim_scores([query], [pages[column] for column in columns], device)[0]
        row -= row.amax() - rescored.amin() + 1
        row[columns] = rescored


def _validate_shapes(queries: Sequence[Tensor], pages: Sequence[Tensor]) -> None:
    dim = queries[0].shape[1:] if len(queries) else None
    for kind, items in (("query", queries), ("page", pages)):
        for i, tokens in enumerate(items):
            if tokens.dim() != 2 or not len(tokens) or dim not in (None, tokens.shape[1:]):
                raise ValueError(
                    f"{kind} {i}: embeddings of shape {tuple(tokens.shape)}; expected (tokens >= 1, "
                    f"{'dim' if dim is None else dim[0] if dim else 'dim'}), with the dim of query 0"
                )
