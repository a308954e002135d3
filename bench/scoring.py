"""MaxSim scoring against its peers': CPU time, ranking, and memory as the corpus grows.

    .venv/bin/python -m bench.scoring     # in the repository root; --help: sizes, rounds, the streamed corpus
    .venv/bin/python -m bench.scoring --device cuda     # everything on the GPU; time is the clock's. Not run on a GPU.

In: random unit vectors. Three shapes: every page of 700 tokens; the same with nine tokens of ten nearly one vector, as
those of blank paper are; and pages of 1 to 6 tiles of 256 tokens, evenly. Time is the median of this process's CPU
seconds over `--rounds` rounds, each of which runs every scorer once, on one thread. The ranking of each scorer is held
against float64's: two pages whose exact scores differ by more than 1e-5 of themselves, a few roundings of float32, must
stand in its order. Then pages are written to disk as the embedding cache keeps them, and scored from there: the memory
that this takes beside the files themselves (RssAnon), for a small and a large corpus. Exit 1 where our ranking is
another. The last line compares ours with the best of the others, first at 700 tokens:
`RESULT speedup=... blank_speedup=... ragged_speedup=... same_ranking=... streamed_gb=... streamed_pages=...`.
"""

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor
from mteb.similarity_functions import max_sim
from sentence_transformers.util import maxsim
from torch import Tensor
from torch.nn.functional import normalize

from colintern.core.errors import UserError, exit_on_user_error
from colintern.encoding.tensor_cache import TensorCache
from colintern.scoring.maxsim import maxsim_scores

Items = list[Tensor]
OURS = "ours"


def scorers(device: str) -> dict[str, Callable[[Items, Items], Tensor]]:
    return {
        OURS: partial(maxsim_scores, device=device),
        "colpali-engine score_multi_vector": partial(BaseVisualRetrieverProcessor.score_multi_vector, device=device),
        "mteb max_sim": max_sim,
        "sentence-transformers maxsim": maxsim,
    }


def unit(tokens: int, seed: int) -> Tensor:
    return normalize(torch.randn(tokens, 128, generator=torch.Generator().manual_seed(seed)), dim=-1)


def mostly_blank(tokens: int, seed: int) -> Tensor:
    page = unit(tokens, seed)
    blank = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.9
    page[blank] = page[blank] * 0.2 + unit(1, seed + 1)
    return normalize(page, dim=-1)


SHAPES: dict[str, tuple[str, Callable[[int], Tensor]]] = {
    "speedup": ("700 tokens", lambda i: unit(700, 1000 + i)),
    "blank_speedup": ("700 tokens, nine of ten alike", lambda i: mostly_blank(700, 3000 + 2 * i)),
    "ragged_speedup": ("1 to 6 tiles", lambda i: unit(256 * (1 + i % 6) + 10, 5000 + i)),
}


def exact(queries: Items, pages: Items) -> Tensor:
    """In float64, by the definition."""
    return torch.stack([torch.stack([(q.double() @ p.double().T).amax(1).sum() for p in pages]) for q in queries])


def in_order(scores: Tensor, wanted: Tensor) -> bool:
    """Whether the exact scores fall, but for roundings, when the pages are ranked by `scores`."""
    ranked = wanted.gather(1, scores.argsort(dim=1, descending=True))
    return bool((ranked[:, 1:] <= ranked.cummin(dim=1).values[:, :-1] * (1 + 1e-5)).all())


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(name: str, queries: Items, pages: Items, rounds: int, device: str) -> tuple[float, bool]:
    """Print one table; the best peer's time over ours, and whether our ranking is float64's."""
    print(f"\n{len(queries)} queries, {len(pages)} pages of {name}; {device}, s, median of {rounds}", flush=True)
    wanted = exact(queries, pages)
    queries, pages = ([item.to(device) for item in items] for items in (queries, pages))
    times: dict[str, list[float]] = {}
    same = {}
    for _ in range(rounds):
        for scorer, score in scorers(device).items():
            start = clock(device)
            scores = score(queries, pages)
            times.setdefault(scorer, []).append(clock(device) - start)
            same[scorer] = in_order(scores.cpu(), wanted)
    ours = median(times[OURS])
    for scorer, found in times.items():
        ranking = "same ranking" if same[scorer] else "another ranking"
        print(f"{scorer:<36} {median(found):>7.3f} {median(found) / ours:>6.2f}x  {ranking}", flush=True)
    return min(median(found) for scorer, found in times.items() if scorer != OURS) / ours, same[OURS]


def streamed(queries: Items, pages: int, tokens: int, folder: Path, device: str) -> float:
    """GB of memory, without that of mapped files, that scoring adds when the pages lie on disk."""
    cache = TensorCache(folder, "pages", 10**12)
    for number in range(pages):
        if str(number) not in cache:
            cache.put(str(number), unit(tokens, number))
    cache.flush()
    stored: Items = [cache.get(str(number)) for number in range(pages)]  # type: ignore[misc]
    before, start = anonymous(), time.process_time()
    maxsim_scores(queries, stored, device=device)
    print(f"{len(queries)} queries, {pages} pages of {tokens} tokens on disk ({pages * tokens * 512 / 1e9:.1f} GB): "
          f"{anonymous() - before:.3f} GB more at the end, {anonymous():.2f} GB in all, "
          f"{time.process_time() - start:.0f} CPU s", flush=True)  # fmt: skip
    return anonymous()


def anonymous() -> float:
    """This process's memory that belongs to no file, in GB."""
    [kilobytes] = re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kilobytes) / 1e6


@exit_on_user_error()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="MaxSim scoring against its peers'")
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streamed", type=int, nargs=3, default=(50, 500, 5000), metavar=("QUERIES", "FEW", "MANY"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(argv)
    device = args.device
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: 'cuda' is not valid; no CUDA device is available here, it must be cpu")
    torch.set_num_threads(1)
    queries = [unit(15 + i % 30, i) for i in range(args.queries)]
    found = {
        key: compare(name, queries, [page(i) for i in range(args.pages)], args.rounds, device)
        for key, (name, page) in SHAPES.items()
    }
    many, few, most = args.streamed
    print()
    with tempfile.TemporaryDirectory() as folder:
        rows = [unit(30, 10**6 + i) for i in range(many)]
        held = [streamed(rows, number, 768, Path(folder), device) for number in (few, most)]
    same = all(ranked for _, ranked in found.values())
    speedups = " ".join(f"{key}={ratio:.2f}" for key, (ratio, _) in found.items())
    print(f"RESULT {speedups} same_ranking={same} streamed_gb={held[-1]:.2f} streamed_pages={most}")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
