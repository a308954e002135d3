"""Pooling a page tile by tile against pooling it whole: time at InternVL3.5's sizes, and score on the demo.

    python -m bench.pooling    # after `make repro`; --adapter FOLDER

Time: CPU seconds to pool one page of 6 tiles of 256 vectors around which 15 of text stand, random vectors, median of
`--rounds`, both ways in turn. Score: NDCG@5 of the demo's 200 test pages with the adapter, each page pooled both ways
by each factor; the text of the prompt is kept by the first way and pooled with the rest by the second, as
colpali-engine does it. The last line: `RESULT speedup=... tiles=... whole=...`, the scores at factor 3.
"""

import argparse
import time
from pathlib import Path
from statistics import median

import torch
from colpali_engine.compression.token_pooling import HierarchicalTokenPooler
from torch import Tensor
from torch.nn.functional import normalize

from colintern.core.errors import exit_on_user_error
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.encoding.loading import get_encoder_settings, load_page_encoder
from colintern.encoding.pooling import pool_tiles
from colintern.modeling.loading import require_adapter, require_same_base
from colintern.params import load_recipe
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.storage.manifest import ensure_base
from demo.corpus import generate_corpus

PAGES, FACTORS = 200, (2, 3, 4, 8)


def whole(page: Tensor, factor: int) -> Tensor:
    [pooled] = HierarchicalTokenPooler().pool_embeddings([page], pool_factor=factor)
    return pooled


def seconds(rounds: int) -> tuple[float, float]:
    """CPU seconds of a page by tiles and whole, factor 3."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        generator = torch.Generator().manual_seed(number)
        page = normalize(torch.randn(10 + 6 * 256 + 5, 128, generator=generator), dim=-1)
        for found, way in zip(times, (lambda p: pool_tiles(p, 3, 256, 10), lambda p: whole(p, 3)), strict=True):
            start = time.process_time()
            way(page)
            found.append(time.process_time() - start)
    return median(times[0]), median(times[1])


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description="pooling by tiles against pooling whole pages")
    parser.add_argument("--adapter", type=Path, default=Path("experiments/colintern"))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiles, page = seconds(args.rounds)
    print(f"a page of 6 tiles: {tiles:.3f} CPU s by tiles, {page:.3f} whole")
    params = load_recipe(Path("recipes/demo.yaml"))
    require_adapter(args.adapter)
    require_same_base(args.adapter, params.base, params.base_revision)
    base = ensure_base(params.base, params.base_revision)
    model, processor, _ = load_page_encoder(get_encoder_settings(params), args.adapter, base)
    drawn = generate_corpus("test", PAGES, 1, seed=0)
    queries = embed_queries(model, processor, [page.queries[0] for page in drawn], 32)
    pages = embed_pages(model, processor, [page.image for page in drawn], 16)
    relevant = [{number} for number in range(PAGES)]

    def score(smaller: list[Tensor]) -> float:
        return 100 * ndcg_at_k(maxsim_scores(queries, smaller), relevant, 5)

    print(f"not pooled: {score(pages):.1f}\nfactor  by tiles     whole")
    found = {}
    for factor in FACTORS:
        ways = ([pool_tiles(p, factor, processor.image_seq_length, processor.num_tokens_before_tiles) for p in pages],
                [whole(p, factor) for p in pages])  # fmt: skip
        found[factor] = tuple(map(score, ways))
        kept = [sum(map(len, way)) / PAGES for way in ways]
        print(f"{factor:>6} {found[factor][0]:>6.1f} {kept[0]:>4.0f} {found[factor][1]:>6.1f} {kept[1]:>4.0f} vectors")
    print(f"RESULT speedup={page / tiles:.2f} tiles={found[3][0]:.1f} whole={found[3][1]:.1f}")


if __name__ == "__main__":
    main()
