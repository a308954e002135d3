"""Where data comes from: each source puts files on disk and says which they are. Nothing here reads a row."""

from collections.abc import Mapping
from typing import Any

from colintern.demo import DemoPage, corpus
from colintern.formats import CorpusPage, Qrel, Query, TrainingRow, png_bytes, write_beir, write_training_split
from colintern.hub_errors import Repo
from colintern.manifest import (
    BASE_SUFFIXES,
    BEIR_SUFFIXES,
    TASK_SUFFIXES,
    TRAIN_SUFFIXES,
    Files,
    hub_files,
    local,
    local_files,
)
from colintern.params import Params, root

DEMO = "demo"
DEMO_SEED = 0  # of the corpus; the training seed is params.seed, so that seeds are compared on the same pages
DEMO_TRAIN_PAGES, DEMO_DEV_PAGES, DEMO_TEST_PAGES = 1800, 100, 200
DEMO_QUERIES = 2  # a training page


def fetch(params: Params, tasks: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """Put all that params names on disk and return the manifest: base, train, and evaluation by benchmark or task.

    Args:
        tasks: the tasks of mteb's that are to be evaluated, by name: {"path": hub id, "revision": 40 hex digits}.

    Raises:
        UserError: a folder that holds nothing; see also `hub.fetch`.
    """
    evaluation = {name: _evaluation(name) for name in params.benchmarks if local(name)}
    here: dict[str, Files] = {}
    hub: dict[str, tuple[Repo, tuple[str, ...]]] = {}
    if params.base_revision:
        hub["base"] = (Repo("base", params.base, params.base_revision, "model"), BASE_SUFFIXES)
    else:
        here["base"] = local_files(params.base, BASE_SUFFIXES)
    if params.train_revision:
        hub["train"] = (Repo("train_data", params.train_data, params.train_revision, "dataset"), TRAIN_SUFFIXES)
    else:
        here["train"] = demo_training() if params.train_data == DEMO else local_files(params.train_data, TRAIN_SUFFIXES)
    pinned = {
        name: (Repo(f"benchmarks: {name}", data["path"], data["revision"], "dataset"), TASK_SUFFIXES)
        for name, data in tasks.items()
    }
    found = hub_files([*hub.values(), *pinned.values()])  # all at once: one question of room, one bar
    parts = here | dict(zip(hub, found, strict=False))
    evaluation |= dict(zip(pinned, found[len(hub) :], strict=True))
    return {
        "base": parts["base"]._asdict(),
        "train_data": params.train_data,
        "train_revision": params.train_revision,
        "train": parts["train"]._asdict(),
        "evaluation": {name: files._asdict() for name, files in evaluation.items()},
    }


def _evaluation(name: str) -> Files:
    return demo_evaluation() if name == DEMO else local_files(name, BEIR_SUFFIXES)


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
