"""Late interaction: MaxSim scores of queries with pages.

score(q, p) = sum over the tokens of q of the largest dot product with a token of p (Khattab & Zaharia 2020,
"ColBERT", arXiv 2004.12832, eq. 3; for page images Faysse et al. 2024, "ColPali", arXiv 2407.01449).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GROUP = 64  # pages whose best similarities are held at once
BLOCK = {"cpu": 256, "cuda": 8192}  # tokens of queries in one product; on the CPU the product stays in the cache
SCREENED = 512  # tokens of queries, and of a page, from which on screening costs less than it saves


def maxsim_scores(
    queries: Sequence[Tensor], pages: Sequence[Tensor], device: torch.device | str = "cpu", block: int | None = None
) -> Tensor:
    """MaxSim of every query with every page.

    Each page is read once, so that pages which lie on disk (memory-mapped) need not fit into memory.

    Example: a query of tokens (1, 0) and (0, 1) on a page of tokens (1, 0) and (-1, 0) scores 1 + 0 = 1.

    Args:
        queries, pages: one (tokens, dim) tensor each, without padding, so that no pad can win a maximum whose true
            value is negative. Any floating type, on any device: products and sums are float32.
        device: where it is computed.
        block: tokens of queries in one product, instead of `BLOCK`. The scores do not depend on it.

    Returns:
        (number of queries, number of pages) float32 on the CPU.

    Raises:
        ValueError: a query or page without tokens or of another dim, or a score that is not finite.
    """
    dim = queries[0].shape[1:] if len(queries) else None
    for kind, items in (("query", queries), ("page", pages)):
        for i, tokens in enumerate(items):
            if tokens.dim() != 2 or not len(tokens) or dim not in (None, tokens.shape[1:]):
                raise ValueError(
                    f"{kind} {i}: embeddings of shape {tuple(tokens.shape)}; expected (tokens >= 1, "
                    f"{'dim' if dim is None else dim[0] if dim else 'dim'}), with the dim of query 0"
                )
    scores = torch.empty(len(queries), len(pages))
    if not scores.numel():
        return scores
    device, lengths = torch.device(device), [len(query) for query in queries]
    tokens = torch.cat([query.to(device, torch.float32) for query in queries])
    blocks = [part.T for part in tokens.split(block or BLOCK.get(device.type, BLOCK["cuda"]))]
    screen = _Screen(tokens) if _Screen.pays(tokens) else None
    for start in range(0, len(pages), GROUP):
        group = pages[start : start + GROUP]
        best = torch.empty(len(group), len(tokens), device=device)
        pays = screen is not None
        for row, page in zip(best, group, strict=True):
            vectors = page.to(device, torch.float32)
            if screen and pays and len(vectors) >= SCREENED:
                pays = screen.best(vectors, out=row)
                if pays:
                    continue
            # One matrix product a page: faster than any padded batch of pages, and nothing has to be masked.
            torch.cat([(vectors @ part).amax(dim=0) for part in blocks], out=row)
        sums = [part.sum(dim=1) for part in best.split(lengths, dim=1)]
        scores[:, start : start + GROUP] = torch.stack(sums).cpu()
    if not scores.isfinite().all():
        query, page = (~scores.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"the score of query {query} with page {page} is {scores[query, page]}: embeddings are broken")
    return scores


class _Screen:
    """The largest float32 product of each query token with a page's tokens, found by products of 8-bit integers.

    With x = scale * (x8 + e) and the norm of e known, q8 . p8 is off by at most |e_q| |p8| + |q8| |e_p| + |e_q| |e_p|
    (Cauchy-Schwarz). A page token further than twice that below the best one cannot be the best. Those that can be,
    some three of 700 in random vectors, are multiplied in float32, so that the result is no approximation.

    Args:
        tokens: (query tokens, dim) float32 on the CPU, all finite.
    """

    AT_ONCE = 2048  # query tokens whose candidates are held at once
    BLOCK = 512  # query tokens in one 8-bit product
    RUN = 32  # neighbouring page tokens that are kept or left together: their products are one matrix product
    ROWS = 8  # below, the matrix product would be another routine, of other roundings than on the whole page
    MOST = 0.25  # share of the products from which on all of them in float32 cost less

    def __init__(self, tokens: Tensor) -> None:
        whole, norms, errors = self._rounded(tokens, dim=1)
        self.parts = [
            (part, [block.T.contiguous() for block in eights.split(self.BLOCK)], norm, error)
            for part, eights, norm, error in zip(
                *(of.split(self.AT_ONCE) for of in (tokens, whole, norms, errors)), strict=True
            )
        ]
        self.held: dict[str, Tensor] = {}

    @staticmethod
    def pays(tokens: Tensor) -> bool:
        """Whether it saves time: measured with AVX-512 VNNI, where products of 8 bits are 4 times as fast, and with one
        or two threads. Its float32 products are too small to be shared between many.
        """
        return (
            tokens.device.type == "cpu"
            and bool(torch.cpu.get_capabilities().get("avx512_vnni"))
            and torch.get_num_threads() <= 2
            and len(tokens) >= SCREENED
            and tokens.shape[1] >= 64
            and bool(tokens.isfinite().all())
        )

    def best(self, page: Tensor, out: Tensor) -> bool:
        """Write the largest product of each query token into `out`; False, and nothing is written: it does not pay."""
        whole, norms, errors = self._rounded(page, dim=(0, 1))
        norm, error = norms.amax(), errors.amax()
        if not norm.isfinite():  # the plain product shows what is broken
            return False
        short = -len(page) % self.RUN
        page, whole = (torch.cat([rows, rows[-1:].expand(short, -1)]) for rows in (page, whole))
        runs = page.view(-1, self.RUN, page.shape[1]).transpose(1, 2).unbind()
        found = []
        for tokens, blocks, norm_q, error_q in self.parts:
            products = torch.cat([self._products(whole, block) for block in blocks], dim=1)
            off = norm * error_q + error * norm_q + error * error_q
            can = products >= products.amax(dim=0) - (2 * off + 1).int()
            counts = can.sum(dim=1).tolist()
            if sum(counts) > self.MOST * can.numel():
                return False
            found.append(self._refined(tokens, can.nonzero()[:, 1], runs, counts))
        torch.cat(found, out=out)
        return True

    def _products(self, whole: Tensor, block: Tensor) -> Tensor:
        """(runs, query tokens): the largest 8-bit product of each run."""
        every = self._hold("products", len(whole), block.shape[1], torch.int32)
        torch._int_mm(whole, block, out=every)
        return every.view(-1, self.RUN, block.shape[1]).amax(dim=1)

    def _refined(self, tokens: Tensor, which: Tensor, runs: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
        """The largest float32 product of each token with its runs; `which`: the tokens of each run, run by run."""
        padded = torch.cat([which, which.new_zeros(self.ROWS)])
        rows = self._hold("rows", len(padded), tokens.shape[1], torch.float32)
        torch.index_select(tokens, 0, padded, out=rows)
        products = self._hold("refined", len(padded), self.RUN, torch.float32)
        at = 0
        for run, count in zip(runs, counts, strict=True):
            if count:
                to = at + max(count, self.ROWS)  # what is too much, the next run overwrites
                torch.mm(rows[at:to], run, out=products[at:to])
                at += count
        best = torch.full((len(tokens),), -torch.inf)
        return best.scatter_reduce_(0, which, products[:at].amax(dim=1), "amax")

    def _hold(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Memory that is used for every page: to get it anew would cost a tenth of the time."""
        if name not in self.held or self.held[name].numel() < rows * columns:
            self.held[name] = torch.empty(rows * columns, dtype=dtype)
        return self.held[name][: rows * columns].view(rows, columns)

    @staticmethod
    def _rounded(x: Tensor, dim: int | tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """In steps of the largest number over `dim` / 127: x as int8, the norms of its rows, those of their errors."""
        steps = x / (x.abs().amax(dim, keepdim=True) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        whole = steps.round()
        steps -= whole
        return whole.to(torch.int8), whole.square_().sum(1).sqrt_(), steps.square_().sum(1).sqrt_()
