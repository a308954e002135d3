"""`colintern embed`: the vectors of pages, as parquet files or in a vector database."""

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colintern.commands import print_left_out, print_phase
from colintern.core.errors import UserError
from colintern.params import PRECISIONS, Params, load_params
from colintern.storage.paths import TRAIN_OUT, require_model, require_writable

if TYPE_CHECKING:
    from colintern.encoding.multi_process import EmbedBatch
    from colintern.evaluation.models import EvalModel
    from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
    from colintern.search.embedding import ChangedPages
    from colintern.search.ray_embedding import RayCluster
    from colintern.stores.base import EmbeddedPage, PageStore

SUMMARY = "write the vectors of pages to parquet files, Qdrant or LanceDB; resumes, and updates what changed"
EXAMPLE = "colintern embed ~/manuals --out vectors --precision float16"
STORE_PRECISIONS = PRECISIONS[:2]  # databases quantize by themselves
MAX_SIZES = {"pool-factor": 64, "dim": 128, "batch-size": 1024}
DEFAULT = "(default: %(default)s)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add = parser.add_argument
    add("source", metavar="SOURCE", help="PDFs and images, a BEIR folder, a fetched data set, or ID@COMMIT on the hub")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FOLDER", help="write parquet files and manifest.json")
    stores = "qdrant+http://HOST:PORT/COLLECTION, qdrant+path://FOLDER/COLLECTION or lancedb://PATH[/TABLE]"
    where.add_argument("--to", metavar="URL", help=f"write into {stores}; the key is that of QDRANT_API_KEY")
    add("--precision", choices=PRECISIONS, default="float32", help=f"of the numbers {DEFAULT}")
    add("--model", type=Path, default=TRAIN_OUT, metavar="FOLDER", help=f"an adapter or merged model {DEFAULT}")
    add("--pool-factor", type=int, metavar="N", help="vectors of a tile made into one (default: params.yaml's)")
    add("--dim", type=int, metavar="N", help="numbers kept of a vector (default: params.yaml's)")
    batch = "pages per forward pass; above 1, the last bits of a vector depend on the pages beside it"
    add("--batch-size", type=int, default=1, metavar="N", help=f"{batch} {DEFAULT}")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--shard", default="1/1", metavar="I/N", help=f"embed the I-th of N parts {DEFAULT}")
    where.add_argument("--on", metavar="ADDRESS", help="embed on a Ray cluster: ray://HOST:PORT; ray: this machine's")


def run(args: argparse.Namespace) -> None:
    """Embed what is new or changed; the last line counts what was added, replaced and removed."""
    shard = _parse_shard(args.shard)
    for option, largest in MAX_SIZES.items():
        value = getattr(args, option.replace("-", "_"))
        if value is not None and not 1 <= value <= largest:
            raise UserError(f"--{option}: {value} is not valid; it must be 1 to {largest}")
    if args.on and not re.fullmatch(r"ray|ray://[\w.:[\]-]+:\d+", args.on):
        raise UserError(f"--on: {args.on!r} is not valid; it must be ray or ray://HOST:PORT")
    require_model("--model", args.model)
    if args.out:
        if "://" in str(args.out) or re.match(r"\w+(\+\w+)?:/", str(args.out)):
            raise UserError("--out: a URL is not valid; it must be a folder. Give the URL to --to")
        require_writable("--out", args.out)
    elif args.precision not in STORE_PRECISIONS:
        raise UserError(
            f"--precision: {args.precision} is not valid with --to; it must be float32 or float16. Set quantization in "
            "the database, which keeps the exact vectors for the final order"
        )
    params = load_params()
    params = replace(
        params,
        pool_factor=args.pool_factor or params.pool_factor,
        dim=args.dim or params.dim,
        embedding_precision="float32",  # the store quantizes
        rescore_top_k=0,
        feature_cache_gb=0.0,  # features take a hundred times the space of vectors
        embedding_cache_gb=0.0,
    )
    if args.precision == "binary" and params.dim % 8:
        raise UserError(f"--dim: {params.dim} is not valid with binary; it must be a multiple of 8, one byte each")
    _embed(args, params, shard)


def _parse_shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"--shard: {text!r} is not valid; it must be I/N with I from 1 to N, such as 1/4")
    return int(match[1]), int(match[2])


def _embed(args: argparse.Namespace, params: Params, shard: tuple[int, int]) -> None:
    import time

    from colintern.encoding.loading import get_encoder_settings
    from colintern.encoding.multi_process import EmbeddingPool, count_workers
    from colintern.evaluation.models import make_eval_models
    from colintern.search.corpora import open_corpus, shard_corpus
    from colintern.search.embedding import embed_into_store, embed_pages_in_pool
    from colintern.storage.hub import enable_offline_mode

    connection = _connect_to_ray(args.on)
    print_phase(f"embed: listing the pages of {args.source}")
    corpus = open_corpus(args.source)
    enable_offline_mode()
    settings = get_encoder_settings(params)
    eval_model = make_eval_models(settings, args.model)["trained"]
    identity = make_identity(args.model, eval_model, params, args.precision)
    load = partial(load_embedder, eval_model.load_encoder)
    with connection as cluster:
        identity |= {"device": cluster.device} if cluster else {}
        store = _open_store(args, identity, corpus.source, shard)
        start = time.monotonic()
        if cluster:
            embed = prepare_ray_embedding(cluster, params, load, args.batch_size)
            counts = embed_into_store(store, shard_corpus(corpus, shard), shard, embed)
        else:
            with closing(EmbeddingPool(load, count_workers(params.launch))) as pool:
                embed = partial(embed_pages_in_pool, pool=pool, batch_size=args.batch_size)
                counts = embed_into_store(store, shard_corpus(corpus, shard), shard, embed)
    print_left_out(corpus.bad)
    if corpus.bad:
        print(f"left out: {len(corpus.bad)} in all")
    if new := counts.added + counts.replaced:
        seconds = time.monotonic() - start
        print(f"{new} pages embedded in {seconds:.1f} s, {new / seconds:.1f} pages/s")
    if not counts.pages and shard[1] == 1:
        raise UserError(f"SOURCE: none of {len(corpus.pages)} pages in {args.source} can be read; see the lines above")
    print(
        f"{store.label}: {counts.pages} pages, {counts.added} added, {counts.replaced} replaced, "
        f"{counts.removed} removed"
    )


def _connect_to_ray(address: str | None) -> "AbstractContextManager[RayCluster | None]":
    if not address:
        return nullcontext()
    try:
        from colintern.search.ray_embedding import connect_to_ray
    except ImportError as error:
        raise UserError("ray is not installed; install the extra `ray` of pyproject.toml") from error
    return connect_to_ray(address)


def prepare_ray_embedding(
    cluster: "RayCluster", params: Params, load: Callable[[], "EmbedBatch"], batch_size: int
) -> "Callable[[ChangedPages], Iterator[EmbeddedPage]]":
    """Return the function that embeds on a Ray cluster.

    Raises:
        UserError: the cluster has fewer GPUs or CPUs than `launch` and `threads` need.
    """
    from colintern.encoding.multi_process import count_workers

    num_workers = count_workers(params.launch, cluster.num_gpus, cluster.num_machines)
    needed = num_workers * params.threads + 1
    if needed > cluster.num_cpus:
        raise UserError(
            f"launch: {num_workers} workers with threads: {params.threads}, and one that renders, need {needed} "
            f"CPUs, but the Ray cluster has {cluster.num_cpus}; lower launch or threads"
        )
    from colintern.search.ray_embedding import embed_on_ray

    resources = {"num_cpus": params.threads, "num_gpus": min(cluster.num_gpus, 1)}
    return partial(embed_on_ray, load=load, batch_size=batch_size, num_workers=num_workers, resources=resources)


def _open_store(args: argparse.Namespace, identity: dict[str, Any], source: str, shard: tuple[int, int]) -> "PageStore":
    from colintern.stores.parquet import ParquetStore
    from colintern.stores.urls import open_store

    if args.out:
        return ParquetStore(args.out, identity | {"source": source}, shard)
    if "://" not in args.to:
        raise UserError(f"--to: {args.to!r} is no URL of a store; see --help, or give a folder to --out")
    return open_store(args.to, identity)


def make_identity(folder: Path, eval_model: "EvalModel", params: Params, precision: str) -> dict[str, Any]:
    """Return what decides the vectors, and what may change their last bits: libraries, device, attention, threads."""
    from colintern.storage.identity import content_hash, fingerprint, get_versions

    base = eval_model.identity.get("base")
    return {
        "model": str(folder),
        "revision": content_hash(folder)[:40],
        "base": fingerprint(base["files"])[:40] if base else None,
        "dtype": params.dtype,
        "max_visual_tokens": params.max_visual_tokens,
        "tiling": params.tiling,
        "pool_factor": params.pool_factor,
        "dim": params.dim,
        "precision": precision,
        "attention": params.attention,
        "threads": params.threads,
        "device": eval_model.identity["device"],
        "versions": get_versions(),
    }


def load_embedder(load_encoder: Callable[[], "ColIntern3_5Encoder"]) -> "EmbedBatch":
    """Load the model, and return the function that embeds a batch of images, pooled and truncated."""
    from colintern.encoding.embed import embed_pages

    encoder = load_encoder()

    def embed(images: Any) -> Any:
        return encoder.select_scored_vectors(embed_pages(encoder.model, encoder.processor, images, len(images)))

    return embed
