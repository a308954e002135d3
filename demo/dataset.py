"""Write the demo's training set and evaluation set below data/demo, in the two layouts that the pipeline reads."""

from pathlib import Path

from colintern.data.formats import CorpusPage, Qrel, Query, TrainingRow, write_beir, write_training_split
from colintern.data.images import encode_png
from colintern.storage.parallel import parallel_map
from demo.corpus import PagePlan, draw_page, generate_corpus, plan_pages

SEED = 0  # of the corpus; the training seed is params.seed, so that seeds are compared on the same pages
TRAIN_PAGES, DEV_PAGES, TEST_PAGES = 8000, 100, 200


def write_training_set(folder: Path) -> None:
    """Draw the training pages, one query each, into `folder`; the split `test` is the dev set, as on the hub."""
    for split, drawn, pages in (("train", "train", TRAIN_PAGES), ("test", "dev", DEV_PAGES)):
        rows = list(parallel_map(_draw_row, plan_pages(drawn, pages, 1, SEED), f"drawing pages ({drawn})", "page"))
        write_training_split(folder, split, rows)


def _draw_row(plan: PagePlan) -> TrainingRow:
    page = draw_page(plan)
    return TrainingRow(encode_png(page.image), page.name, page.queries[0], source=f"colintern-demo-{page.kind}")


def write_evaluation_set(folder: Path) -> None:
    """Draw the test pages, one query each, into `folder`, in mteb's BEIR layout."""
    pages = generate_corpus("test", TEST_PAGES, 1, SEED)
    write_beir(
        folder,
        [CorpusPage(i, encode_png(page.image), page.name, page.text) for i, page in enumerate(pages)],
        [Query(i, page.queries[0]) for i, page in enumerate(pages)],
        [Qrel(i, i) for i in range(len(pages))],
    )
