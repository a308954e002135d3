"""`colintern search`: the pages of a folder that answer a query."""

import argparse
import io
import json
import sys
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TextIO

from colintern.commands import print_left_out
from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.terminal import escape_controls
from colintern.params import PRECISIONS, describe_demo_base, load_params
from colintern.storage.paths import TRAIN_OUT, require_model, require_new_file, require_writable

if TYPE_CHECKING:
    from torch import Tensor

    from colintern.ingest.documents import InvalidRow
    from colintern.search.searcher import PageSearcher, Ranking
    from colintern.search.store_search import StoreSearcher

SUMMARY = "rank the pages of a folder or PDF for a query, and show where they match; indexed once"
EXAMPLE = 'colintern search ~/manuals "how is a package removed" --html found.html'

INDEX = Path("data/.index")  # below the repository's root
DEFAULT_TOP, DEFAULT_PRECISION = 10, "float16"


class _QueryFile(argparse.Action):
    """Take --queries instead of the argument QUERY. A QUERY of nargs="?" would not be found after an option."""

    def __init__(self, query: argparse.Action, **options: Any):
        super().__init__(**options)
        self.query = query

    def __call__(self, parser: object, namespace: argparse.Namespace, value: object, option: object = None) -> None:
        setattr(namespace, self.dest, value)
        self.query.required = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the command line."""
    add_source_arguments(parser)
    query = parser.add_argument("query", metavar="QUERY", help="in quotes where it has several words")
    parser.add_argument("more", nargs="*", default=[], help=argparse.SUPPRESS)  # the words of a query without quotes
    parser.add_argument(
        "--queries",
        action=_QueryFile,
        query=query,
        metavar="FILE",
        help="instead of QUERY: one on each line of a text file, or of -",
    )
    parser.add_argument("--top", type=int, default=DEFAULT_TOP, metavar="N", help="pages shown (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON; all else goes to stderr")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the pages with heatmaps, as one HTML file")
    parser.add_argument("--store", metavar="URL", help="rank in a store that colintern embed has filled from SOURCE")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """Define what `open_searcher` reads."""
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a PDF, an image, or a folder of them")
    parser.add_argument(
        "--model", type=Path, default=TRAIN_OUT, metavar="M", help="adapter or merged model (default: %(default)s)"
    )
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="where embeddings are kept (default: data/.index)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help=f"of the embeddings kept (default: {DEFAULT_PRECISION})"
    )
    parser.add_argument(
        "--rescore", type=int, default=0, metavar="N", help="score the N best again by a float16 copy (default: none)"
    )


def require_source(args: argparse.Namespace) -> None:
    """Refuse values of `add_source_arguments` before anything slow is imported."""
    if not args.source.exists():
        raise UserError(f"SOURCE: {str(args.source)!r} does not exist")
    require_model("--model", args.model)
    require_writable("--index", args.index or root() / INDEX)
    if args.rescore < 0:
        raise UserError(f"--rescore: {args.rescore} is not valid; it must be 0 or more")
    precision = args.precision or DEFAULT_PRECISION
    if args.rescore and precision in ("float32", "float16"):
        raise UserError(
            f"--rescore: {args.rescore} has no effect with --precision {precision}: pages would be scored again "
            "by float16 vectors; give --precision int8 or binary, or leave it out"
        )


def run(args: argparse.Namespace) -> None:
    """Print the ranking; exit 2 where there is nothing to search."""
    queries = _read_queries(args)
    if args.top < 1:
        raise UserError(f"--top: {args.top} is not valid; it must be 1 or more")
    if args.store:
        _require_no_index_options(args)
    require_source(args)
    if args.html:
        require_new_file("--html", args.html)
    log = sys.stderr if args.json else sys.stdout
    searcher = _open_store_searcher(args, log) if args.store else open_searcher(args, log)
    import time

    from colintern.search.listing import format_ranking
    from colintern.search.searcher import PageSearcher, list_results

    start = time.monotonic()
    answers = searcher.rank_queries(queries, args.top)
    num_pages = searcher.count_pages()
    of_queries = "" if args.queries is None else f" for {len(queries)} queries"
    print(f"{num_pages} pages scored{of_queries} in {time.monotonic() - start:.2f} s", file=log)
    rows = []
    for query, (_, ranking) in zip(queries, answers, strict=True):
        results = list_results(ranking, lambda source: source.link)
        rows.append({"query": query, "pages": num_pages, "results": results})
        if not args.json:
            heading = "" if args.queries is None else fill(f"query: {escape_controls(query)}", 80) + "\n"
            names = [(source.name, score) for source, score in ranking]
            print(f"\n{heading}{format_ranking(names, [source.link for source, _ in ranking])}")
    if args.queries is None and isinstance(searcher, PageSearcher):
        _print_heatmaps(args, searcher, *answers[0], log)
    if args.json:
        print(json.dumps(rows[0] if args.queries is None else rows, indent=2))


def _read_queries(args: argparse.Namespace) -> list[str]:
    """Return the queries of the command line or of --queries.

    Raises:
        UserError: they are empty, not UTF-8, or several words without quotes.
    """
    if args.queries is None:
        if args.more:
            query = " ".join([args.query, *args.more])
            raise UserError(
                f"QUERY: {query!r} was given as {len(args.more) + 1} words, and one folder or PDF is searched for one "
                f'query; put it in quotes: colintern search {args.source} "{query}"'
            )
        if not args.query.strip():
            raise UserError("QUERY: is empty; it needs at least one word")
        if any("\ud800" <= char <= "\udfff" for char in args.query):  # how Python keeps bytes that are not UTF-8
            raise UserError(f"QUERY: {args.query!r} is not UTF-8; type it in a terminal whose encoding is UTF-8")
        return [args.query]
    if args.query is not None:
        raise UserError(f"QUERY: {args.query!r} and --queries {args.queries} exclude each other; leave one out")
    if args.html:
        raise UserError(f"--html: {args.html} shows one query; leave it or --queries out")
    try:
        data = sys.stdin.buffer.read() if args.queries == "-" else Path(args.queries).read_bytes()
        lines = list(io.StringIO(data.decode("utf-8-sig"), newline=None))  # its ends of lines are those of files
    except OSError as error:
        raise UserError(
            f"--queries: {args.queries} cannot be read: {error.strerror}; give a text file, or -"
        ) from error
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"--queries: {args.queries}: line {number} is not UTF-8; convert the file") from error
    queries = [line.strip() for line in lines if line.strip()]
    if not queries:
        raise UserError(f"--queries: {args.queries} holds no query; write one on each line")
    if len(queries) < len(lines):
        print(f"--queries: {len(lines) - len(queries)} empty lines left out", file=sys.stderr)
    return queries


def open_searcher(args: argparse.Namespace, log: TextIO) -> "PageSearcher":
    """Load the model of `add_source_arguments`, embed the pages that its index lacks, and print what was left out."""
    params = load_params()
    import time

    from colintern.search.sources import format_reasons, list_sources, summarize_unsearched

    sources, bad = list_sources(args.source)  # refuses what it can before a model is loaded
    from colintern.encoding.loading import get_encoder_settings
    from colintern.search.searcher import load_searcher

    folder = args.index or root() / INDEX
    precision = args.precision or DEFAULT_PRECISION
    searcher = load_searcher(get_encoder_settings(params), args.model, folder, sources, precision, args.rescore)
    start = time.monotonic()
    new = searcher.index.add_pages(sources, searcher.model, searcher.processor, params.eval_batch_size, bad)
    seconds = time.monotonic() - start
    if (args.model / "adapter_config.json").is_file() and (note := describe_demo_base(params.base, [str(args.source)])):
        print(fill(note, 80, subsequent_indent="  "), file=log)
    print_left_out(bad, log)
    if others := summarize_unsearched(args.source):
        print(fill(escape_controls(f"not searched: {others}"), 80, subsequent_indent="  "), file=log)
    rate = f", {new / seconds:.1f} pages/s" if new else ""
    print(f"{searcher.count_pages()} pages, {new} of them new: {seconds:.1f} s{rate}", file=log)
    if not searcher.count_pages():
        raise UserError(f"SOURCE: none of {len(sources)} pages in {args.source} can be read{format_reasons(bad)}")
    return searcher


def _require_no_index_options(args: argparse.Namespace) -> None:
    """Refuse options of the index, and of heatmaps, which need a page's vectors."""
    for option in ("index", "precision", "rescore", "html"):
        if getattr(args, option):
            raise UserError(f"--{option}: is not supported with --store; leave one of them out")


def _open_store_searcher(args: argparse.Namespace, log: TextIO) -> "StoreSearcher":
    """Load the model, open --store, and print how many pages of SOURCE it lacks."""
    params = load_params()
    from colintern.encoding.loading import get_encoder_settings
    from colintern.search.store_search import open_store_searcher

    searcher, bad = open_store_searcher(get_encoder_settings(params), args.model, args.store, args.source)
    print_left_out(bad, log)
    if searcher.num_missing:
        print(f"{searcher.num_missing} pages are not in the store; embed SOURCE again", file=log)
    if searcher.num_outdated:
        print(f"{searcher.num_outdated} pages are of files that changed after they were embedded", file=log)
    return searcher


def _print_heatmaps(
    args: argparse.Namespace, searcher: "PageSearcher", embedding: "Tensor", ranking: "Ranking", log: TextIO
) -> None:
    """Draw where the best pages match, in the terminal and in --html."""
    from colintern.reporting.examples import explain_query, split_query
    from colintern.reporting.heatmaps import compute_saliency, compute_similarity_map
    from colintern.reporting.html import render_html
    from colintern.search.listing import MAX_MAPS, draw_text_maps
    from colintern.search.sources import decode_name, format_reasons

    num_shown = len(ranking) if args.html else 0 if args.json else MAX_MAPS
    bad: list[InvalidRow] = []
    pages = searcher.render_ranking(ranking[:num_shown], bad)
    print_left_out(bad, log)
    if num_shown and not pages:
        raise UserError(f"SOURCE: none of the {len(bad)} pages to show can be rendered{format_reasons(bad)}")
    if not args.json:
        is_own = [token.is_own for token in split_query(searcher.processor, args.query)]
        maps = [
            compute_similarity_map(searcher.processor, embedding, page.embedding, page.image.size).page
            for page in pages[:MAX_MAPS]
        ]
        print(f"\n{draw_text_maps([compute_saliency(tokens[is_own]) for tokens in maps])}")
    if args.html:
        facts = {"pages": searcher.count_pages(), "place": decode_name(args.source)}
        example = explain_query(searcher.processor, args.query, embedding, pages, facts)
        args.html.parent.mkdir(parents=True, exist_ok=True)
        html = render_html("search.html", [example], model=decode_name(args.model))
        args.html.write_text(html, encoding="utf-8")
        print(f"\n{args.html}: {len(pages)} pages, {args.html.stat().st_size / 1e6:.1f} MB", file=log)
