"""Where data comes from: each source puts files on disk and says which they are. Nothing here reads a row."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from colintern import jsonl, pdfs
from colintern.collected import Collected, Shelf
from colintern.demo import DemoPage, corpus
from colintern.formats import CorpusPage, Qrel, Query, TrainingRow, write_beir, write_training_split
from colintern.images import png_bytes
from colintern.manifest import BASE_SUFFIXES, BEIR_SUFFIXES, TRAIN_SUFFIXES, Files, hub_files, local, local_files, root
from colintern.own import make
from colintern.params import Params, UserError, mixture, on_hub

DEMO = "demo"
DEMO_SEED = 0  # of the corpus; the training seed is params.seed, so that seeds are compared on the same pages
DEMO_TRAIN_PAGES, DEMO_DEV_PAGES, DEMO_TEST_PAGES = 1200, 100, 200
DEMO_QUERIES = 2  # a training page


def fetch(params: Params) -> dict[str, Any]:
    """Put all that params names on disk and return the manifest: base, train, and evaluation by benchmark.

    mteb's own tasks are not among the latter: mteb fetches them, at the revision it pins.
    """
    evaluation = {name: _evaluation(name) for name in params.benchmarks if local(name)}
    return {
        "base": _source(params.base, params.base_revision, "model", BASE_SUFFIXES)._asdict(),
        "train": [
            _training(name, params.train_revision)._replace(weight=weight)._asdict()
            for name, weight in mixture(params.train_data)
        ],
        "evaluation": {name: files._asdict() for name, files in evaluation.items()},
    }


def _source(name: str, revision: str, kind: str, suffixes: tuple[str, ...]) -> Files:
    return hub_files(name, revision, kind, suffixes) if on_hub(name) else local_files(name, suffixes)


def _training(name: str, revision: str) -> Files:
    if name == DEMO:
        return demo_training()
    collect = _kind(name)
    return make(name, collect).files("train") if collect else _source(name, revision, "dataset", TRAIN_SUFFIXES)


def _evaluation(name: str) -> Files:
    if name == DEMO:
        return demo_evaluation()
    collect = _kind(name)
    return make(name, collect).files("beir") if collect else local_files(name, BEIR_SUFFIXES)


def _kind(name: str) -> Callable[[Path, Shelf], Collected] | None:
    """What reads a folder of documents; None for a folder of parquet files, and for what is no folder.

    Raises:
        UserError: a folder of two kinds, or of none.
    """
    folder = root() / name
    if not folder.is_dir():
        return None
    kinds = {
        "parquet files": any(folder.rglob("*.parquet")),
        "PDFs": bool(pdfs.pdf_files(folder)),
        "JSON lines": any(p.name not in pdfs.QUERY_FILES for p in folder.glob("*.jsonl")),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) != 1:
        raise UserError(f"{name}: holds {' and '.join(found) or 'none'} of {', '.join(kinds)}; it must be one of them")
    return {"parquet files": None, "PDFs": pdfs.collect, "JSON lines": jsonl.collect}[found[0]]


def demo_training() -> Files:
    """Draw the demo's training pages: two queries a page; the split `test` is the dev set, as on the hub."""
    folder = "data/demo/train"
    for split, drawn, pages, queries in (
        ("train", "train", DEMO_TRAIN_PAGES, DEMO_QUERIES),
        ("test", "dev", DEMO_DEV_PAGES, 1),
    ):
        rows = [row for page in corpus(drawn, pages, queries, DEMO_SEED) for row in _rows(page)]
        write_training_split(root() / folder, split, rows)
    return local_files(folder, TRAIN_SUFFIXES)


def _rows(page: DemoPage) -> list[TrainingRow]:
    png = png_bytes(page.image)
    return [TrainingRow(png, page.name, query, source=f"colintern-demo-{page.kind}") for query in page.queries]


def demo_evaluation() -> Files:
    """Draw the demo's test pages, one query each, in mteb's layout."""
    folder = "data/demo/beir"
    pages = corpus("test", DEMO_TEST_PAGES, 1, DEMO_SEED)
    write_beir(
        root() / folder,
        [CorpusPage(i, png_bytes(page.image), page.name) for i, page in enumerate(pages)],
        [Query(i, page.queries[0]) for i, page in enumerate(pages)],
        [Qrel(i, i) for i in range(len(pages))],
    )
    return local_files(folder, BEIR_SUFFIXES)
