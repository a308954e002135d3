"""Resolve `benchmarks` to mteb tasks: the demo, folders in mteb's layout, mteb's own benchmarks and tasks."""

import difflib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import pyarrow.parquet as pq
from datasets import Dataset, Image, config
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval
from PIL.Image import Image as PageContent

from colintern.core.errors import UserError
from colintern.data.formats import check_beir_layout, get_benchmark_label, get_task_name, normalize_id
from colintern.data.images import InvalidImageError, decode_image
from colintern.storage.identity import content_hash
from colintern.storage.manifest import (
    MANIFEST,
    FilesEntry,
    ensure_benchmark,
    get_arrow_name,
    is_local_benchmark,
    read_data_file,
)

logger = logging.getLogger(__name__)
BEIR_COLUMNS = {
    "corpus": ["corpus-id", "image"],
    "queries": ["query-id", "query"],
    "qrels": ["query-id", "corpus-id", "score"],
}
TEXT_COLUMNS = ("text", "markdown")  # of a corpus, optional, the first that it has: the text of its pages


def resolve_benchmarks(benchmarks: Sequence[str]) -> list[tuple[str, AbsTask]]:
    """Return the tasks in the order of `benchmarks`, each with the label under which its scores are averaged.

    An entry is "demo", a folder in mteb's BEIR image layout, or the name of an mteb benchmark or task. No data is
    loaded. Tasks whose data is not public are skipped and logged.

    Raises:
        UserError: an unknown name (with the nearest ones), a folder that is not an evaluation set, a task that is not
            text to page images, or two entries with one label or one task name.
    """
    pairs: list[tuple[str, AbsTask]] = []
    for entry in benchmarks:
        label, tasks = _resolve_entry(entry)
        if label in dict(pairs):
            raise UserError(f"benchmarks: {entry!r} has the label {label!r}, which an entry before it already has")
        pairs += [(label, task) for task in tasks]
    sources: dict[str, str] = {}
    for _, task in pairs:
        name, source = task.metadata.name, task.metadata.dataset["path"]
        if sources.setdefault(name, source) != source:
            raise UserError(f"benchmarks: {source} and {sources[name]} would both be the task {name}; rename one")
    return pairs


def list_hub_datasets(benchmarks: Sequence[str]) -> dict[str, dict[str, str]]:
    """Return the data of mteb's own tasks by task name: {"path": hub id, "revision": the commit that mteb pins}.

    Raises:
        UserError: see `resolve_benchmarks`; or a task whose data mteb does not pin.
    """
    datasets = {}
    for entry in benchmarks:
        for task in [] if is_local_benchmark(entry) else _resolve_entry(entry)[1]:
            data = task.metadata.dataset
            if not re.fullmatch("[0-9a-f]{40}", data["revision"] or ""):
                raise UserError(
                    f"benchmarks: {entry!r}: mteb {mteb.__version__} reads {data['path']} at {data['revision']!r}, "
                    f"which is no commit: {task.metadata.name} would give other scores on another day"
                )
            datasets[task.metadata.name] = {"path": data["path"], "revision": data["revision"]}
    return datasets


def use_fetched_data(task: AbsTask) -> AbsTask:
    """Return the task so that it reads what fetch-data fetched: `datasets` finds no hub id in the cache offline."""
    if Path(task.metadata.dataset["path"]).is_dir():
        return task
    folder = ensure_benchmark(task.metadata.name)
    task_type: Any = type(type(task).__name__, (_DecodedPagesMixin, type(task)), {})
    copy = task_type.__new__(task_type)  # mteb keeps one object for each task of a benchmark
    metadata = task.metadata.model_copy(update={"dataset": task.metadata.dataset | {"path": str(folder)}})
    vars(copy).update(vars(task), metadata=metadata)
    return copy


class PageImage(Image):
    """A column of pages that are decoded as in training: `datasets` would open every format, PostScript among them."""

    def decode_example(self, value: object, token_per_repo_id: object = None) -> PageContent | None:
        """Decode a page from its bytes; None if the row has none, since what a row only names is never fetched."""
        if not isinstance(value, dict) or not value.get("bytes"):
            return None
        try:
            return decode_image(value["bytes"])
        except InvalidImageError as error:
            raise UserError(f"benchmarks: page {value.get('path') or ''!r}: {error}; repair its row") from error


class _DecodedPagesMixin:
    """Decode the pages of an mteb task as `PageImage`."""

    def convert_v1_dataset_format_to_v2(self: Any, num_proc: int | None = None) -> None:
        super().convert_v1_dataset_format_to_v2(num_proc)  # type: ignore[misc]
        for split in (split for splits in self.dataset.values() for split in splits.values()):
            if "image" in split["corpus"].column_names:
                split["corpus"] = split["corpus"].cast_column("image", PageImage())


class _FolderMixin(_DecodedPagesMixin):
    """Read the tables of an mteb task from its folder, and nothing else that is in it."""

    def load_data(self: Any, *args: object, **kwargs: object) -> None:
        tables = {table: self._read_table(table, columns) for table, columns in BEIR_COLUMNS.items()}
        relevant: dict[str, dict[str, int]] = {}
        for query, page, score in zip(*(tables["qrels"][column] for column in BEIR_COLUMNS["qrels"]), strict=True):
            relevant.setdefault(f"query-test-{normalize_id(query)}", {})[f"corpus-test-{normalize_id(page)}"] = int(
                score
            )
        corpus, queries = (
            tables[table]
            .remove_columns(f"{kind}-id")
            .add_column("id", [f"{kind}-test-{normalize_id(number)}" for number in tables[table][f"{kind}-id"]])
            .add_column("modality", [modality] * len(tables[table]))
            for table, kind, modality in (("corpus", "corpus", "image"), ("queries", "query", "text"))
        )
        self.corpus, self.queries = {"test": corpus}, {"test": queries.rename_column("query", "text")}
        self.relevant_docs = {"test": relevant}
        self.data_loaded = True

    def _read_table(self: Any, table: str, columns: list[str]) -> Dataset:
        """Return these columns of a table; the copy that `datasets` makes is kept by the content of the folder."""
        files = sorted(map(str, Path(self.metadata.dataset["path"]).glob(f"{table}/*.parquet")))
        if table == "corpus":
            names = pq.read_schema(files[0]).names
            columns = [*columns, *(name for name in TEXT_COLUMNS if name in names)]
        copies = Path(config.HF_DATASETS_CACHE) / self.arrow_name / table
        return Dataset.from_parquet(files, columns=columns, cache_dir=str(copies))


def build_folder_task(folder: Path, name: str, entry: FilesEntry) -> AbsTask:
    """Build a ViDoRe (v1) task over the data in `folder`, with a hash of the data as its revision.

    Its `documents` attribute is the folder of the source documents in the manifest's `entry`, "" if there is none.
    """
    check_beir_layout(folder)
    vidore = type(mteb.get_task("VidoreDocVQARetrieval"))
    metadata = vidore.metadata.model_copy(
        update={
            "name": name,
            "description": "Retrieve the page that answers the query, from a local folder.",
            "reference": None,
            "bibtex_citation": "",
            "dataset": {"path": str(folder), "revision": content_hash(folder)[:40]},
        }
    )
    # A separate class, because mteb falls back to the metadata of the class when it unloads the data.
    documents = source["folder"] if (source := entry.get("made_from")) else ""
    attributes = {"metadata": metadata, "arrow_name": get_arrow_name(entry), "documents": documents}
    return type(name, (_FolderMixin, vidore), attributes)()


def _resolve_entry(entry: str) -> tuple[str, list[AbsTask]]:
    """Return label and tasks of an entry; tasks whose data is not public are skipped and logged."""
    if is_local_benchmark(entry):
        folder = ensure_benchmark(entry)
        task = build_folder_task(folder, get_task_name(entry, folder), read_data_file(MANIFEST)["evaluation"][entry])
        return get_benchmark_label(entry, folder), [task]
    label, tasks = _get_mteb_tasks(entry)
    private = [task.metadata.name for task in tasks if not task.metadata.is_public]
    if len(private) == len(tasks):
        raise UserError(f"benchmarks: {entry!r}: its data is not public, so there is nothing to evaluate")
    if private:
        logger.info(f"{entry}: left out, because their data is not public: {', '.join(private)}")
    for task in tasks:
        metadata = task.metadata
        if not isinstance(task, AbsTaskRetrieval) or metadata.category not in ("t2i", "t2it"):
            raise UserError(
                f"benchmarks: {entry!r}: {metadata.name} is {metadata.type}, category {metadata.category}; only "
                f"retrieval of page images by text (t2i, t2it) can be evaluated, such as ViDoRe(v1)"
            )
    return label, [task for task in tasks if task.metadata.is_public]


def _get_mteb_tasks(entry: str) -> tuple[str, Sequence[AbsTask]]:
    """Return the tasks of a benchmark or task of mteb, and the benchmark's name, of which `entry` may be an alias."""
    try:
        benchmark = mteb.get_benchmark(entry)
        return benchmark.name, list(benchmark.tasks)
    except KeyError:
        pass  # it may be a task
    try:
        return entry, [mteb.get_task(entry)]
    except KeyError:
        page_tasks = mteb.get_tasks(task_types=["DocumentUnderstanding"])
        names = ["demo", *(b.name for b in mteb.get_benchmarks()), *(task.metadata.name for task in page_tasks)]
        by_lower = {name.lower(): name for name in names}
        near = [by_lower[name] for name in difflib.get_close_matches(entry.lower(), by_lower, n=3, cutoff=0.3)]
        raise UserError(
            f"benchmarks: {entry!r} is not demo, a folder, or a benchmark or task of mteb {mteb.__version__}; "
            f"nearest names: {', '.join(near) or 'none'}"
        ) from None
