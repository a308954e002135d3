"""Vector stores against our own brute force: build time, bytes, recall and time of a query, as the corpus grows.

    python -m bench.stores    # after `make repro`; --help: sizes, stores, folder; 30,000 pages take 8 GB a store

In: the demo's 200 test pages as the adapter embeds them, 108 vectors each. A page of the corpus is several of them,
joined to `--tokens` vectors, with noise, and normalized: random vectors would be equally far from all queries. Each
store is filled in a separate process, whose anonymous memory is that of the writer, and is then queried in another one
for the ten best pages of each query. Recall is the share of the ten best pages of exact float32 scores. "files" are
parquet files of `colintern embed`, read by our own brute force. Build time and time of a query are CPU-seconds of all
threads; the last column is the wall clock. The last line: `RESULT lancedb_10000_cpu_ms=... lancedb_10000_recall=...
...`, CPU-milliseconds of a query and recall of each store and size.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

from colintern.core.errors import exit_on_user_error
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.encoding.loading import get_encoder_settings, load_page_encoder
from colintern.modeling.loading import require_adapter
from colintern.params import load_recipe
from colintern.scoring.maxsim import maxsim_scores
from colintern.storage.manifest import ensure_base
from colintern.stores.base import EmbeddedPage, StoredPage, make_page_id
from colintern.stores.urls import open_store
from demo.corpus import generate_corpus

NUM_DEMO_PAGES, TOP, NOISE, PAGES_PER_BLOCK = 200, 10, 0.5, 64
URLS = {"lancedb": "lancedb://{}/lance/pages", "qdrant": "qdrant+path://{}/pages", "files": "{}/parquet"}
IDENTITY = {
    "model": "bench", "revision": "0" * 40, "dim": 128, "precision": "float16", "pool_factor": 1,
    "max_visual_tokens": 0, "tiling": "exact", "dtype": "float32", "base": "demo", "source": "bench",
}  # fmt: skip


def embed_demo(adapter: Path, num_queries: int) -> tuple[list[Tensor], list[Tensor]]:
    params = load_recipe(Path("recipes/demo.yaml"))
    require_adapter(adapter)
    base = ensure_base(params.base, params.base_revision)
    model, processor, _ = load_page_encoder(get_encoder_settings(params), adapter, base)
    drawn = generate_corpus("test", NUM_DEMO_PAGES, 1, seed=0)
    queries = embed_queries(model, processor, [page.queries[0] for page in drawn[:num_queries]], 32)
    return queries, embed_pages(model, processor, [page.image for page in drawn], 16)


def make_page(number: int, demo: list[Tensor], tokens: int) -> Tensor:
    """(tokens, 128) unit vectors of several demo pages, the first of which is page `number` of the demo."""
    generator = torch.Generator().manual_seed(number)
    picked = [
        number % len(demo),
        *torch.randint(len(demo), (tokens // len(demo[0]) + 1,), generator=generator).tolist(),
    ]
    vectors = torch.cat([demo[page] for page in picked])[:tokens]
    noise = torch.randn(vectors.shape, generator=generator) / vectors.shape[1] ** 0.5
    return normalize(vectors + NOISE * noise, dim=-1)


def iter_pages(count: int, demo: list[Tensor], tokens: int) -> Iterator[EmbeddedPage]:
    for number in range(count):
        name = f"{number}.png"
        page = StoredPage(make_page_id("bench", name.encode(), 0), "bench", name, 0, str(number), str(number))
        yield EmbeddedPage(page, make_page(number, demo, tokens))


def rank_exactly(queries: list[Tensor], count: int, demo: list[Tensor], tokens: int) -> list[set[str]]:
    """The ids of the TOP best pages of each query."""
    ids, blocks, rows = [], [], iter_pages(count, demo, tokens)
    while block := list(islice(rows, PAGES_PER_BLOCK)):
        ids += [row.page.id for row in block]
        blocks.append(maxsim_scores(queries, [row.vectors for row in block]))
    best = torch.cat(blocks, dim=1).topk(TOP).indices
    return [{ids[page] for page in row} for row in best.tolist()]


def fill_store(url: str, count: int, demo: list[Tensor], tokens: int) -> dict[str, float]:
    store, rows, seconds = open_store(url, IDENTITY), iter_pages(count, demo, tokens), 0.0
    memory = 0
    batch_size = max(1, store.batch_bytes // (tokens * 128 * 4))
    while batch := list(islice(rows, batch_size)):
        start = time.process_time()
        store.upsert(batch)
        seconds += time.process_time() - start
        memory = max(memory, read_anonymous_memory())
    store.finish(count)
    return {"build_s": seconds, "writer_mb": memory / 1e6}


def read_anonymous_memory() -> int:
    """Return the bytes of this process that are not pages of files, which the kernel drops where memory is short."""
    [kilobytes] = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


def query_store(url: str, queries: list[Tensor], exact: list[set[str]]) -> dict[str, float]:
    store = open_store(url)
    store.search(queries[0], TOP)  # opens files
    start, cpu_start = time.perf_counter(), time.process_time()
    found = [{id_ for id_, _ in store.search(query, TOP)} for query in queries]
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    hits = sum(len(ids & best) for ids, best in zip(found, exact, strict=True))
    ms_per_query = 1000 / len(queries)
    return {"ms": ms_per_query * seconds, "cpu_ms": ms_per_query * cpu_seconds, "recall": hits / TOP / len(queries)}


def run_step(step: str, **arguments: object) -> dict[str, float]:
    """Run a step of this program in a separate process."""
    command = [sys.executable, "-m", "bench.stores", "--step", json.dumps({"step": step} | arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main_of_step(call: dict) -> None:
    data = torch.load(call["data"], weights_only=True)
    if call["step"] == "fill":
        print(json.dumps(fill_store(call["url"], call["pages"], data["demo"], call["tokens"])))
    else:
        print(json.dumps(query_store(call["url"], data["queries"], [set(ids) for ids in data["exact"]])))


@exit_on_user_error()
def main() -> None:
    parser = argparse.ArgumentParser(description="vector stores against our own brute force")
    parser.add_argument("--adapter", type=Path, default=Path("experiments/colintern"))
    parser.add_argument("--pages", type=int, nargs="+", default=[1000, 10_000, 30_000])
    parser.add_argument("--stores", nargs="+", choices=URLS, default=list(URLS))
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="for the stores, on the disk to measure (default: a temporary one)")
    parser.add_argument("--step", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        return main_of_step(args.step)
    queries, demo = embed_demo(args.adapter, args.queries)
    results = []
    print("store      pages  build CPU s    GB  kB/page  writer MB  recall  CPU ms/query  ms/query")
    for count in args.pages:
        exact = rank_exactly(queries, count, demo, args.tokens)
        for name in args.stores:
            with tempfile.TemporaryDirectory(dir=args.folder) as top:
                data = Path(top, "data.pt")
                torch.save({"demo": demo, "queries": queries, "exact": [sorted(ids) for ids in exact]}, data)
                url = URLS[name].format(top)
                call = {"url": url, "data": str(data), "pages": count, "tokens": args.tokens}
                filled = run_step("fill", **call)
                size = sum(path.stat().st_blocks * 512 for path in Path(top).rglob("*") if path.is_file())
                asked = run_step("ask", **call)
                shutil.rmtree(top, ignore_errors=True)
            print(
                f"{name:<9}{count:>7,}{filled['build_s']:>13.1f}{size / 1e9:>6.2f}{size / count / 1e3:>9.1f}"
                f"{filled['writer_mb']:>11,.0f}{asked['recall']:>8.3f}{asked['cpu_ms']:>14,.0f}{asked['ms']:>10,.0f}",
                flush=True,
            )
            results.append(f"{name}_{count}_cpu_ms={asked['cpu_ms']:.0f} {name}_{count}_recall={asked['recall']:.3f}")
    print("RESULT " + " ".join(results))
    return None


if __name__ == "__main__":
    main()
