"""A search page for a browser, and the same search as JSON.

Only files that were listed at the start are served, and nothing is written. The page has no scripts and loads nothing:
its policy allows the pictures and the style that are in it.
"""

from dataclasses import dataclass
from threading import Lock
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import FileResponse, HTMLResponse

from colintern.ingest.documents import InvalidRow
from colintern.reporting.examples import explain_query
from colintern.reporting.html import render_html
from colintern.search.searcher import PageSearcher, list_results
from colintern.search.sources import PageSource
from colintern.storage.files import irregular_type

MAX_QUERY_CHARACTERS = 1000
MAX_TOP, DEFAULT_TOP = 100, 10
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; "
HEADERS = {
    "Content-Security-Policy": POLICY + "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",  # a page of another host cannot show what is here
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FILE_POLICY = "frame-ancestors 'none'"  # the browser's own viewer of PDFs needs the rest

Top = Annotated[int, Query(ge=1, le=MAX_TOP, description="number of pages")]


@dataclass(frozen=True)
class SearchResult:
    """A page that answers a query.

    rank: from 1. score: MaxSim. file: path below the folder that is searched. page: number in a PDF, from 1; null for
    an image. link: path of the file on this server, with #page=N in a PDF.
    """

    rank: int
    score: float
    file: str
    page: int | None
    link: str


@dataclass(frozen=True)
class SearchResponse:
    """The best pages for a query. pages: number of pages searched."""

    query: str
    pages: int
    results: list[SearchResult]


def make_app(searcher: PageSearcher, place: str, hosts: list[str]) -> FastAPI:
    """Make the web application.

    Args:
        searcher: its index has the pages.
        place: name of what is searched, for the page.
        hosts: accepted in the Host header. A name that others point to this machine is not, so that a page of theirs
            cannot read the answers.
    """
    numbers = {path: number for number, path in enumerate(dict.fromkeys(source.path for source in searcher.sources))}
    files = {_get_url_path(source, numbers): source.path for source in searcher.sources}
    num_pages = searcher.count_pages()
    lock = Lock()  # requests come in threads, and there is one model
    app = FastAPI(title="colintern search", docs_url=None, redoc_url=None)  # those pages load scripts of another host
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)

    def get_link(source: PageSource) -> str:
        number = "" if source.page is None else f"#page={source.page_number}"
        return f"/files/{quote(_get_url_path(source, numbers))}{number}"

    @app.middleware("http")
    async def add_headers(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    def show_page(
        q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS)] = "", top: Top = DEFAULT_TOP
    ) -> HTMLResponse:
        examples, bad = [], list[InvalidRow]()
        if q.strip():
            with lock:
                [(embedding, ranking)] = searcher.rank_queries([q], top)
                pages = searcher.render_ranking(ranking, bad, get_link)
                examples = [explain_query(searcher.processor, q, embedding, pages, {})] if pages else []
        values = {"query": q, "place": place, "num_pages": num_pages, "bad": bad, "limit": MAX_QUERY_CHARACTERS}
        return HTMLResponse(render_html("serve.html", examples, **values))

    @app.get("/api/search", summary="Rank the pages for a query")
    def search_pages(
        q: Annotated[str, Query(max_length=MAX_QUERY_CHARACTERS, pattern=r"\S", description="query")],
        top: Top = DEFAULT_TOP,
    ) -> SearchResponse:
        with lock:
            [(_, ranking)] = searcher.rank_queries([q], top)
        rows = [SearchResult(**row) for row in list_results(ranking, get_link)]
        return SearchResponse(query=q, pages=num_pages, results=rows)

    @app.get("/files/{key:path}", include_in_schema=False)
    def send_file(key: str) -> FileResponse:
        if key not in files or irregular_type(files[key]):
            raise HTTPException(404, "no such file, or it is gone")
        name = key.rpartition("/")[2]
        headers = {"Content-Security-Policy": FILE_POLICY}
        return FileResponse(files[key], filename=name, content_disposition_type="inline", headers=headers)

    return app


def _get_url_path(source: PageSource, numbers: dict[Any, int]) -> str:
    """Return what names a file in a URL. Names alone are not unique where some are not UTF-8."""
    return f"{numbers[source.path]}/{' '.join(source.file.split())}"
