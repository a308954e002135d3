"""Explain queries beside pages: what each token of a query matches where, ready for the templates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from mteb.abstasks.abstask import AbsTask
from PIL import Image
from torch import Tensor

from colintern.core.page_labels import label_page
from colintern.core.progress import ProgressBar
from colintern.core.terminal import escape_controls
from colintern.data.benchmarks import use_fetched_data
from colintern.encoding.embed import embed_queries
from colintern.encoding.pooling import truncate_dim
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.results import QueryResult, read_page_names, shorten_task_name
from colintern.modeling.configuration_colintern import EMBEDDING_DIM
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.reporting.heatmaps import (
    SimilarityMap,
    compute_saliency,
    compute_similarity_map,
    encode_heatmaps,
    encode_picture,
)
from colintern.scoring.metrics import MAIN_METRIC

MAX_WRONG_PAGES = 2  # shown of a query


class QueryToken(NamedTuple):
    """A token of a query."""

    text: str
    is_own: bool  # the user's, not of the prefix and the augmentation that every query has
    lead: float | None = None  # what it adds to the first page's score less what it adds to the second's


class PageView(NamedTuple):
    """A page as the templates show it."""

    name: str
    link: str  # URL of its file, or ""
    caption: str
    kind: str  # right, wrong or found
    score: float  # MaxSim
    picture: str  # data URI
    size: tuple[int, int]  # (width, height) of the page in pixels
    heat: str  # see `encode_heatmaps`; first the map of the whole query, then one for each token
    small: str  # the same of its thumbnail, "" where there is none
    elsewhere: int  # query tokens whose best match is in the thumbnail or in the prompt, not in a tile


class QueryExample(NamedTuple):
    """A query and the pages beside it; `facts`: for the template, such as {"task": ...}."""

    query: str
    facts: dict[str, object]
    tokens: list[QueryToken]
    pages: list[PageView]


class RankedPage(NamedTuple):
    """A page to explain."""

    name: str
    caption: str
    kind: str  # right, wrong or found
    image: Image.Image
    embedding: Tensor  # (tokens, dim), from which maps are made
    ranked: Tensor | None = None  # (fewer, dim), pooled, from which scores come; None: `embedding`
    link: str = ""  # URL of its file


def split_query(processor: ColIntern3_5Processor, query: str) -> list[QueryToken]:
    """Split a query into the tokens of `process_queries`, in order."""
    ids = processor.process_queries([query])["input_ids"][0].tolist()
    text = processor.format_query(query)
    offsets = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    tail = len(processor.tokenizer(processor.query_augmentation_token * 10, add_special_tokens=False)["input_ids"])
    # A token's text is a slice of the query's, since part of a letter cannot be decoded. The space before a word may be
    # the prefix's: the end of a token decides which.
    prefix = len(processor.query_prefix)
    words = [QueryToken(text[start:end].strip(), end > prefix) for start, end in offsets[: len(ids) - tail]]
    return [*words, *(QueryToken(processor.tokenizer.decode([token]), False) for token in ids[len(ids) - tail :])]


def explain_query(
    processor: ColIntern3_5Processor,
    query: str,
    embedding: Tensor,
    pages: Sequence[RankedPage],
    facts: dict[str, object],
) -> QueryExample:
    """Explain a query of embedding (query tokens, dim).

    A token's heat grows from its mean similarity over all pages shown to the highest one, so that the same heat means
    the same similarity on each page.
    """
    tokens = split_query(processor, query)
    own = [i for i, token in enumerate(tokens) if token.is_own] or list(range(len(tokens)))
    maps = [compute_similarity_map(processor, embedding, page.embedding, page.image.size) for page in pages]
    # First a map of the query's own words together, then one for each token.
    parts = [[torch.cat([compute_saliency(part[own])[None], part]) for part in _list_parts(found)] for found in maps]
    values = torch.cat([part.flatten(1) for page_parts in parts for part in page_parts], dim=1)
    low = values.mean(dim=1)[:, None, None]
    span = (values.amax(dim=1) - values.mean(dim=1)).clamp(min=1e-6)[:, None, None]
    best = [
        found.best_scores if page.ranked is None else (embedding.float() @ page.ranked.float().T).amax(dim=1)
        for page, found in zip(pages, maps, strict=True)
    ]
    views = []
    for page, found, page_parts, scores in zip(pages, maps, parts, best, strict=True):
        heat, *small = [encode_heatmaps((part - low) / span) for part in page_parts]
        views.append(
            PageView(
                escape_controls(page.name),
                page.link,
                page.caption,
                page.kind,
                round(scores.sum().item(), 3),
                encode_picture(page.image),
                page.image.size,
                heat,
                small[0] if small else "",
                int((~found.is_on_page).sum()),
            )
        )
    if len(best) > 1:
        leads = (best[0] - best[1]).tolist()
        tokens = [token._replace(lead=lead) for token, lead in zip(tokens, leads, strict=True)]
    return QueryExample(escape_controls(query), facts, tokens, views)


def _list_parts(found: SimilarityMap) -> list[Tensor]:
    return [found.page] if found.thumbnail is None else [found.page, found.thumbnail]


class EvaluationCorpus:
    """The pages and queries of a task, by their ids."""

    def __init__(self, task: AbsTask):
        loaded: Any = use_fetched_data(task)
        loaded.load_data()
        loaded.convert_v1_dataset_format_to_v2(num_proc=1)
        self.subsets = loaded.dataset
        self.documents = getattr(task, "documents", "")  # folder of the pages' files
        self.rows: dict[tuple[str, str], dict[str, tuple[Dataset, int]]] = {}
        self.names: dict[str, dict[str, str]] = {}  # of a subset's pages

    def read_row(self, subset: str, kind: str, key: str) -> dict[str, Any]:
        """Look up a row of the corpus or the queries (`kind`); `name` is a page's file name, None if it has none."""
        if (subset, kind) not in self.rows:
            tables = [split[kind] for split in self.subsets[subset].values()]
            self.rows[subset, kind] = {id: (table, i) for table in tables for i, id in enumerate(table["id"])}
        table, position = self.rows[subset, kind][key]
        return table[position] | {"name": self.read_page_name(subset, key) if kind == "corpus" else None}

    def read_page_name(self, subset: str, page: str) -> str | None:
        """Return a page's file name, None if it has none; no image is read."""
        if subset not in self.names:
            tables = [split["corpus"] for split in self.subsets[subset].values()]
            self.names[subset] = {id: name for table in tables for id, name in read_page_names(table).items()}
        return self.names[subset].get(page)

    def list_right_pages(self, subset: str, query: str) -> list[str]:
        """Return the ids of the pages that answer a query."""
        qrels = (split["relevant_docs"].get(query, {}) for split in self.subsets[subset].values())
        return sorted(page for grades in qrels for page, grade in grades.items() if grade > 0)


def explain_failures(
    encoder: ColIntern3_5Encoder, tasks: Sequence[AbsTask], results: Sequence[QueryResult], number: int
) -> tuple[list[QueryExample], int]:
    """Explain the first `number` of the results, each query beside its right page and the wrong pages found before it.

    Returns:
        The examples, and how many queries were passed over, because no page is right for them.
    """
    by_name = {task.metadata.name: task for task in tasks}
    corpora: dict[str, EvaluationCorpus] = {}
    examples: list[QueryExample] = []
    with ProgressBar(total=min(number, len(results)), desc="worst queries", unit="query") as bar:
        for count, result in enumerate(results):
            if len(examples) == number:
                return examples, count - number
            if result.task not in corpora:
                corpora[result.task] = EvaluationCorpus(by_name[result.task])
            corpus = corpora[result.task]
            if right := corpus.list_right_pages(result.subset, result.query_id):
                examples.append(_explain_failure(encoder, corpus, result, right))
                bar.update()
    return examples, len(results) - len(examples)


def _explain_failure(
    encoder: ColIntern3_5Encoder, corpus: EvaluationCorpus, result: QueryResult, right: list[str]
) -> QueryExample:
    """Explain a query beside its best right page and its first wrong ones."""
    top = result.top_pages
    best = next((page for page in top if page in right), right[0])
    wrong = [page for page in top if page not in right][:MAX_WRONG_PAGES]
    rank = f"rank {result.rank or 'beyond 1,000'}"
    captions = {best: rank} | {page: f"rank {top.index(page) + 1}" for page in wrong}
    if best not in top and len(right) > 1:
        captions[best] = f"one of {len(right)} right pages, the first of which has {rank}"
    rows = [corpus.read_row(result.subset, "corpus", page) for page in captions]
    query = corpus.read_row(result.subset, "queries", result.query_id)["text"]
    dim = EMBEDDING_DIM if encoder.rescore_top_k else encoder.dim
    [embedding] = truncate_dim(embed_queries(encoder.model, encoder.processor, [query], 1), dim)
    full = encoder.embed_images([row["image"] for row in rows])
    pages = []
    embeddings = zip(truncate_dim(full, dim), encoder.select_scored_vectors(full), strict=True)
    for (page, caption), row, (tokens, ranked) in zip(captions.items(), rows, embeddings, strict=True):
        label = label_page(page, row.get("name"), corpus.documents)
        kind = "right" if page == best else "wrong"
        pages.append(RankedPage(label.text, caption, kind, row["image"], tokens, ranked, label.link))
    facts = {"task": shorten_task_name(result.task), "ndcg": result.scores[MAIN_METRIC.key], "rank": result.rank}
    facts |= {"subset": "" if result.subset == "default" else result.subset}
    return explain_query(encoder.processor, query, embedding, pages, facts)
