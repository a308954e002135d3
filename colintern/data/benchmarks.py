"""What `benchmarks` names: the demo, folders in mteb's layout, mteb's own benchmarks and tasks, all as mteb tasks."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
from datasets import Dataset, Image, config
from mteb.abstasks.abstask import AbsTask
from mteb.abstasks.retrieval import AbsTaskRetrieval

from colintern.core.errors import UserError
from colintern.data.formats import called, check_beir, id_text
from colintern.data.images import BadImage, decode
from colintern.params import Params
from colintern.storage.identity import content_hash
from colintern.storage.manifest import MANIFEST, ensure_benchmark, get_arrow_name, is_local_benchmark, read_data_file


def tasks_for(params: Params) -> list[tuple[str, AbsTask]]:
    """The tasks of `params.benchmarks` in its order, each with the label its scores are averaged under.

    An entry is "demo", a folder in mteb's BEIR image layout, or the name of an mteb benchmark or task. Nothing is
    loaded yet. Tasks whose data is not public are left out, and named on the terminal.

    Raises:
        UserError: an unknown name (with the nearest ones), a folder that is no evaluation set, a task that is not
            text to page images, or two entries that would write to one place.
    """
    pairs: list[tuple[str, AbsTask]] = []
    for entry in params.benchmarks:
        label, tasks = _resolve(entry)
        if label in dict(pairs):
            raise UserError(f"benchmarks: {entry!r} has the label {label!r}, which an entry before it already has")
        pairs += [(label, task) for task in _public(entry, tasks)]
    sources: dict[str, str] = {}
    for _, task in pairs:
        name, source = task.metadata.name, task.metadata.dataset["path"]
        if sources.setdefault(name, source) != source:
            raise UserError(f"benchmarks: {source} and {sources[name]} would both be the task {name}; rename one")
    return pairs


def hub_data(params: Params) -> dict[str, dict[str, str]]:
    """Where the data of mteb's own tasks is: task name -> {"path": hub id, "revision": the commit mteb pins}.

    Local folders are not looked at.

    Raises:
        UserError: see `tasks_for`; or a task whose data mteb does not pin.
    """
    found = {}
    for entry in params.benchmarks:
        for task in [] if is_local_benchmark(entry) else _public(entry, _resolve(entry)[1]):
            data = task.metadata.dataset
            if not re.fullmatch("[0-9a-f]{40}", data["revision"] or ""):
                raise UserError(
                    f"benchmarks: {entry!r}: mteb {mteb.__version__} reads {data['path']} at {data['revision']!r}, "
                    f"which is no commit: {task.metadata.name} would give other scores on another day"
                )
            found[task.metadata.name] = {"path": data["path"], "revision": data["revision"]}
    return found


def from_cache(task: AbsTask) -> AbsTask:
    """The task, reading what fetch-data fetched for it: `datasets` cannot read the hub's cache offline by hub id."""
    if Path(task.metadata.dataset["path"]).is_dir():
        return task
    folder = ensure_benchmark(task.metadata.name)
    kind: Any = type(type(task).__name__, (_DecodedPages, type(task)), {})
    found = kind.__new__(kind)  # mteb keeps one object for each task of a benchmark
    metadata = task.metadata.model_copy(update={"dataset": task.metadata.dataset | {"path": str(folder)}})
    vars(found).update(vars(task), metadata=metadata)
    return found


def _public(entry: str, tasks: Sequence[AbsTask]) -> list[AbsTask]:
    """The tasks whose data is public; the others are named on the terminal."""
    private = [task.metadata.name for task in tasks if not task.metadata.is_public]
    if len(private) == len(tasks):
        raise UserError(f"benchmarks: {entry!r}: its data is not public, so there is nothing to evaluate")
    if private:
        print(f"{entry}: left out, because their data is not public: {', '.join(private)}")
    for task in tasks:
        _check_task(entry, task)
    return [task for task in tasks if task.metadata.is_public]


def _resolve(entry: str) -> tuple[str, list[AbsTask]]:
    if is_local_benchmark(entry):
        folder = ensure_benchmark(entry)
        label, task = called(entry, folder)
        return label, [_folder_task(folder, task, read_data_file(MANIFEST)["evaluation"][entry])]
    try:
        benchmark = mteb.get_benchmark(entry)
        return benchmark.name, list(benchmark.tasks)  # its name, which differs from the entry if that is an alias
    except KeyError:
        pass  # then it is a task, or nothing
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


def _folder_task(folder: Path, name: str, entry: dict[str, Any]) -> AbsTask:
    """A ViDoRe (v1) task that reads `folder` instead of the hub; its revision is a hash of the folder's data.

    The task's `documents` is the folder that its pages were made from, "" for a data set in mteb's layout.
    """
    check_beir(folder)
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
    # A class of its own, because mteb falls back to the metadata of the class when it unloads the data.
    documents = (entry.get("made_from") or {}).get("folder", "")
    attributes = {"metadata": metadata, "arrow_name": get_arrow_name(entry), "documents": documents}
    return type(name, (_Folder, vidore), attributes)()


class PageImage(Image):
    """A column of pages that are decoded as in training: `datasets` would open every format, PostScript among them."""

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """Decode a page from its bytes; None if the row has none, since what a row only names is never fetched.

        Raises:
            UserError: bytes that are no page.
        """
        if not isinstance(value, dict) or not value.get("bytes"):
            return None
        try:
            return decode(value["bytes"])
        except BadImage as error:
            raise UserError(f"benchmarks: page {value.get('path') or ''!r}: {error}; repair its row") from error


class _DecodedPages:
    """Before a task of mteb's, which then decodes its pages by `PageImage`."""

    def convert_v1_dataset_format_to_v2(self: Any, num_proc: int | None = None) -> None:
        super().convert_v1_dataset_format_to_v2(num_proc)  # type: ignore[misc]
        for split in (split for splits in self.dataset.values() for split in splits.values()):
            if "image" in split["corpus"].column_names:
                split["corpus"] = split["corpus"].cast_column("image", PageImage())


class _Folder(_DecodedPages):
    """Before a task of mteb's, which then reads from its folder what it needs, and nothing else that lies there."""

    def load_data(self: Any, *args: Any, **kwargs: Any) -> None:
        pages, queries, qrels = (
            self._read(table, columns)
            for table, columns in (
                ("corpus", ["corpus-id", "image"]),
                ("queries", ["query-id", "query"]),
                ("qrels", ["query-id", "corpus-id", "score"]),
            )
        )
        relevant: dict[str, dict[str, int]] = {}
        for query, page, score in zip(qrels["query-id"], qrels["corpus-id"], qrels["score"], strict=True):
            relevant.setdefault(f"query-test-{id_text(query)}", {})[f"corpus-test-{id_text(page)}"] = int(score)
        pages, queries = (
            rows.remove_columns(key)
            .add_column("id", [f"{table}-test-{id_text(one)}" for one in rows[key]])
            .add_column("modality", [modality] * len(rows))
            for rows, key, table, modality in (
                (pages, "corpus-id", "corpus", "image"),
                (queries, "query-id", "query", "text"),
            )
        )
        self.corpus = {"test": pages}
        self.queries, self.relevant_docs = {"test": queries.rename_column("query", "text")}, {"test": relevant}
        self.data_loaded = True

    def _read(self: Any, table: str, columns: list[str]) -> Dataset:
        """Return these columns of a table; the copy that `datasets` makes is kept by the content of the folder."""
        files = sorted(map(str, Path(self.metadata.dataset["path"]).glob(f"{table}/*.parquet")))
        copies = Path(config.HF_DATASETS_CACHE) / self.arrow_name / table
        return Dataset.from_parquet(files, columns=columns, cache_dir=str(copies))


def _check_task(entry: str, task: AbsTask) -> None:
    meta = task.metadata
    if not isinstance(task, AbsTaskRetrieval) or meta.category not in ("t2i", "t2it"):
        raise UserError(
            f"benchmarks: {entry!r}: {meta.name} is {meta.type}, category {meta.category}; only retrieval of page "
            f"images by text (t2i, t2it) can be evaluated, such as ViDoRe(v1)"
        )
