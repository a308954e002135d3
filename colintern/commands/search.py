"""`colintern search`: the pages of a folder that answer a query."""

import argparse
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.terminal import escape_controls
from colintern.params import load_params
from colintern.storage.paths import require_model, require_new_file, require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from colintern.ingest.documents import InvalidRow
    from colintern.modeling.processor import ColIntern3_5Processor
    from colintern.search.index import PageIndex
    from colintern.search.sources import PageSource

SUMMARY = "rank the pages of a folder or PDF for a query, and show where they match; indexed once"
EXAMPLE = 'colintern search experiments/colintern ~/manuals "how is a package removed" --html found.html'

INDEX = Path("data/.index")  # below the repository's root


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of an adapter or a merged model")
    parser.add_argument("place", type=Path, metavar="FOLDER_OR_PDF", help="PDFs and images, also in folders below it")
    parser.add_argument("query", metavar="QUERY", help="in quotes where it has several words")
    parser.add_argument("more", nargs="*", help=argparse.SUPPRESS)  # the words of a query without quotes
    parser.add_argument("--top", type=int, default=10, metavar="N", help="pages shown (default: %(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the pages with heatmaps, as one HTML file")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="where embeddings are kept (default: data/.index)")


def run(args: argparse.Namespace) -> None:
    """Print the ranking; exit 2 where there is nothing to search."""
    if args.top < 1:
        raise UserError(f"--top: {args.top} is not valid; it must be 1 or more")
    if args.more:
        query = " ".join([args.query, *args.more])
        raise UserError(
            f"QUERY: {query!r} was given as {len(args.more) + 1} words, and one folder or PDF is searched for one "
            f'query; put it in quotes: colintern search {args.model} {args.place} "{query}"'
        )
    if not args.query.strip():
        raise UserError("QUERY: is empty; it needs at least one word")
    if any("\ud800" <= char <= "\udfff" for char in args.query):  # how Python keeps bytes that are not UTF-8
        raise UserError(f"QUERY: {args.query!r} is not UTF-8; type it in a terminal whose encoding is UTF-8")
    require_model("MODEL", args.model)
    if not args.place.exists():
        raise UserError(f"FOLDER_OR_PDF: {str(args.place)!r} does not exist")
    if args.html:
        require_new_file("--html", args.html)
    require_writable("--index", args.index or root() / INDEX)
    params = load_params()
    import time

    from colintern.search.sources import format_reasons, list_sources, summarize_unsearched

    sources, bad = list_sources(args.place)  # refuses what it can before a model is loaded
    from colintern.encoding.embed import embed_queries
    from colintern.evaluation.models import make_eval_models
    from colintern.search.index import PageIndex, get_index_identity
    from colintern.storage.hub import enable_offline_mode
    from colintern.storage.identity import content_hash

    enable_offline_mode()
    eval_model = make_eval_models(params, args.model)["trained"]
    encoder = eval_model.load_encoder()
    model, processor = encoder.model, encoder.processor
    identity = get_index_identity(content_hash(args.model), eval_model.identity.get("base"), model, processor)
    index = PageIndex(args.index or root() / INDEX, identity)
    start = time.monotonic()
    new = index.add_pages(sources, model, processor, params.eval_batch_size, bad)
    seconds = time.monotonic() - start
    _print_left_out(bad)
    if others := summarize_unsearched(args.place):
        print(fill(escape_controls(f"not searched: {others}"), 80, subsequent_indent="  "))
    rate = f", {new / seconds:.1f} pages/s" if new else ""
    print(f"{len(sources) - len(index.list_missing(sources))} pages, {new} of them new: {seconds:.1f} s{rate}")
    start = time.monotonic()
    [embedding] = embed_queries(model, processor, [args.query], 1)
    ranking = sorted(index.score_pages(embedding, sources), key=lambda page: -page[1])
    if not ranking:
        raise UserError(f"FOLDER_OR_PDF: none of {len(sources)} pages in {args.place} can be read{format_reasons(bad)}")
    print(f"{len(ranking)} pages scored in {time.monotonic() - start:.2f} s\n")
    _show_ranking(args, index, processor, embedding, ranking)


def _print_left_out(bad: "list[InvalidRow]") -> None:
    for page in bad:
        line = escape_controls(f"left out: {page.where}: {page.reason}")  # before it is measured
        print(fill(line, 80, subsequent_indent="  ", break_long_words=False))


def _show_ranking(
    args: argparse.Namespace,
    index: "PageIndex",
    processor: "ColIntern3_5Processor",
    embedding: "Tensor",
    ranking: "list[tuple[PageSource, float]]",
) -> None:
    from colintern.reporting.examples import RankedPage, explain_query, split_query
    from colintern.reporting.heatmaps import compute_saliency, compute_similarity_map
    from colintern.reporting.html import render_html
    from colintern.search.listing import MAX_MAPS, draw_text_maps, format_ranking
    from colintern.search.sources import decode_name, format_reasons, render_sources

    top = ranking[: args.top]
    print(format_ranking([(source.name, score) for source, score in top], [source.link for source, _ in top]))
    shown = [source for source, _ in top[: len(top) if args.html else MAX_MAPS]]
    bad: list[InvalidRow] = []  # pages of the index that cannot be rendered any more
    images = dict(render_sources(shown, bad))
    _print_left_out(bad)
    pages = [
        RankedPage(source.name, f"rank {rank}", "found", images[source], tokens.float(), link=source.link)
        for rank, source in enumerate(shown, start=1)
        if source in images and (tokens := index.load_embedding(source)) is not None
    ]
    if not pages:
        raise UserError(f"FOLDER_OR_PDF: none of the {len(shown)} pages to show can be rendered{format_reasons(bad)}")
    is_own = [token.is_own for token in split_query(processor, args.query)]
    maps = [
        compute_similarity_map(processor, embedding, page.embedding, page.image.size).page for page in pages[:MAX_MAPS]
    ]
    print(f"\n{draw_text_maps([compute_saliency(tokens[is_own]) for tokens in maps])}")
    if args.html:
        facts = {"pages": len(ranking), "place": decode_name(args.place)}
        example = explain_query(processor, args.query, embedding, pages, facts)
        args.html.parent.mkdir(parents=True, exist_ok=True)
        html = render_html("search.html", [example], model=decode_name(args.model))
        args.html.write_text(html, encoding="utf-8")
        print(f"\n{args.html}: {len(pages)} pages, {args.html.stat().st_size / 1e6:.1f} MB")
