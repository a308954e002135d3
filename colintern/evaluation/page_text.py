"""Give the text of pages to models that read text: from the column of a corpus that holds it."""

import copy
import re
from typing import Any, NamedTuple

from datasets import Dataset
from mteb.abstasks.abstask import AbsTask

from colintern.data.benchmarks import TEXT_COLUMNS
from colintern.evaluation.results import NAME_COLUMN, read_page_names

WORD = re.compile(r"\w\w")  # the shortest that BM25 counts


class TextCoverage(NamedTuple):
    """How many pages of a task have text, over the corpora of all its languages."""

    pages: int
    pages_with_text: int


def load_text_task(task: AbsTask) -> tuple[AbsTask, TextCoverage]:
    """Load a copy of a retrieval task whose corpora hold the text of pages in place of their images."""
    loaded: Any = copy.copy(task)
    loaded.load_data()
    loaded.convert_v1_dataset_format_to_v2(None)
    # mteb refuses to run a model of text on a task whose pages are images.
    loaded.metadata = task.metadata.model_copy(update={"category": "t2t", "modalities": ["text"]})
    texts: list[str] = []
    dataset: dict[str, dict[str, object]] = {}
    for subset, splits in loaded.dataset.items():
        dataset[subset] = {}
        for split, data in splits.items():
            corpus = _replace_images(data["corpus"])
            texts += corpus["text"]
            dataset[subset][split] = data | {"corpus": corpus}
    loaded.dataset = dataset
    return loaded, TextCoverage(len(texts), sum(map(_has_words, texts)))


def _replace_images(corpus: Dataset) -> Dataset:
    column = next((name for name in TEXT_COLUMNS if name in corpus.column_names), None)
    names = read_page_names(corpus)
    texts = corpus[column][:] if column else [None] * len(corpus)
    ids = corpus["id"][:]
    return Dataset.from_dict(
        {"id": ids, "text": [text or "" for text in texts], NAME_COLUMN: [names.get(page, "") for page in ids]}
    )


def _has_words(text: str) -> bool:
    return WORD.search(text) is not None
