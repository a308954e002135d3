"""`colintern search`: the pages of a folder that answer a query."""

import argparse
from pathlib import Path
from textwrap import fill

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.terminal import escape_controls
from colintern.params import load_params
from colintern.storage.paths import require_model, require_new_file, require_writable

SUMMARY = "rank the pages of a folder or PDF for a query, and show where they match; indexed once"
EXAMPLE = 'colintern search experiments/colintern ~/manuals "how is a package removed" --html found.html'

INDEX = Path("data/.index")  # below the repository's root


def arguments(parser: argparse.ArgumentParser) -> None:
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

    from colintern.search.sources import reasons, skipped, sources

    pages, bad = sources(args.place)  # what can be refused, before a model is loaded
    from colintern.encoding.embed import embed_queries
    from colintern.evaluation.subjects import subjects
    from colintern.search.index import Index, identity
    from colintern.storage.hub import enable_offline_mode
    from colintern.storage.identity import content_hash

    enable_offline_mode()
    subject = subjects(params, args.model)["trained"]
    encoder = subject.encoder()
    model, processor = encoder.model, encoder.processor
    of = identity(content_hash(args.model), subject.identity.get("base"), model, processor)
    index = Index(args.index or root() / INDEX, of)
    start = time.monotonic()
    new = index.fill(pages, model, processor, params.eval_batch_size, bad)
    seconds = time.monotonic() - start
    _print_left_out(bad)
    if other := skipped(args.place):
        print(fill(escape_controls(f"not searched: {other}"), 80, subsequent_indent="  "))
    rate = f", {new / seconds:.1f} pages/s" if new else ""
    print(f"{len(pages) - len(index.missing(pages))} pages, {new} of them new: {seconds:.1f} s{rate}")
    start = time.monotonic()
    [vectors] = embed_queries(model, processor, [args.query], 1)
    ranked = sorted(index.scores(vectors, pages), key=lambda found: -found[1])
    if not ranked:
        raise UserError(f"FOLDER_OR_PDF: none of {len(pages)} pages in {args.place} can be read{reasons(bad)}")
    print(f"{len(ranked)} pages scored in {time.monotonic() - start:.2f} s\n")
    _show(args, index, processor, vectors, ranked[: args.top], len(ranked))


def _print_left_out(bad) -> None:
    for row in bad:
        line = escape_controls(f"left out: {row.where}: {row.reason}")  # before it is measured
        print(fill(line, 80, subsequent_indent="  ", break_long_words=False))


def _show(args, index, processor, vectors, ranked, searched) -> None:
    from colintern.reporting.cases import Seen, case
    from colintern.reporting.heatmaps import layout, similarity_map, standing_out
    from colintern.reporting.html import render
    from colintern.reporting.words import query_words
    from colintern.search.listing import MAPS, listing, maps
    from colintern.search.sources import images, reasons, shown

    print(listing([(source.name, score) for source, score in ranked], [source.link for source, _ in ranked]))
    chosen = [source for source, _ in ranked[: len(ranked) if args.html else MAPS]]
    bad: list = []  # pages of the index that cannot be rendered any more
    drawn = dict(images(chosen, bad))
    _print_left_out(bad)
    seen = [
        Seen(source.name, f"rank {rank}", "found", drawn[source], index.tokens(source).float(), link=source.link)
        for rank, source in enumerate(chosen, start=1)
        if source in drawn
    ]
    if not seen:
        raise UserError(f"FOLDER_OR_PDF: none of the {len(chosen)} pages to show can be rendered{reasons(bad)}")
    own = [word.own for word in query_words(processor, args.query)]
    grids = [
        standing_out(similarity_map(vectors, page.tokens, layout(processor, page.image.size)).page[own])
        for page in seen[:MAPS]
    ]
    print(f"\n{maps(grids)}")
    if args.html:
        found = case(processor, args.query, vectors, seen, {"pages": searched, "place": shown(args.place)})
        args.html.parent.mkdir(parents=True, exist_ok=True)
        args.html.write_text(render("search.html", [found], model=shown(args.model)), encoding="utf-8")
        print(f"\n{args.html}: {len(seen)} pages, {args.html.stat().st_size / 1e6:.1f} MB")
