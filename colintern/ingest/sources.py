"""Fetch the data that params name: each source puts files on disk and lists them. Nothing here reads a row."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import parse_mixture
from colintern.data.training_set import POSITIVES, get_training_data_params, has_page_numbers
from colintern.ingest.jsonl import list_jsonl_files, read_jsonl_folder
from colintern.ingest.pdfs import is_query_file, list_pdfs, read_pdf_folder
from colintern.ingest.scan import DatasetSplit
from colintern.ingest.user_documents import (
    DEFAULT_DIVISION,
    DivisionParams,
    DocumentReader,
    UserDocuments,
    convert_documents,
)
from colintern.modeling.kernels import download_kernel, get_kernel_repo
from colintern.params import Params, is_on_hub
from colintern.storage.files import describe_refused, list_files
from colintern.storage.hub import FileSelector, Repo
from colintern.storage.manifest import (
    BASE_SUFFIXES,
    BEIR_SUFFIXES,
    TASK_SUFFIXES,
    TRAIN_SUFFIXES,
    Files,
    download_hub_files,
    get_files_folder,
    hash_local_file,
    hash_local_files,
    is_local_benchmark,
)

logger = logging.getLogger(__name__)
DEMO = "demo"  # a name in params.yaml; its sets are drawn, not fetched
SPLIT_WORDS = {  # that `datasets` and the users of its hub write into the names of files and folders
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


class DemoWriters(NamedTuple):
    """Functions that write the demo's sets into the folder they are given."""

    write_training_set: Callable[[Path], None]
    write_evaluation_set: Callable[[Path], None]


class FetchedInputs(NamedTuple):
    """The manifest (base, train, evaluation by benchmark or task), and the converted folders of documents."""

    manifest: dict[str, Any]
    documents: dict[str, UserDocuments]


def fetch_inputs(params: Params, tasks: Mapping[str, Mapping[str, str]], demo: DemoWriters) -> FetchedInputs:
    """Put all that params name on disk; `tasks` of mteb's are given as by `list_hub_datasets`.

    Raises:
        UserError: a folder that holds nothing; see also `hub.download_repos`.
    """
    sets = parse_mixture(params.train_data)
    benchmarks = [name for name in params.benchmarks if is_local_benchmark(name)]
    wanted: dict[tuple[str, str], tuple[Repo, FileSelector]] = {}
    if params.base_revision:
        wanted["base", ""] = (Repo("base", params.base, params.base_revision, "model"), BASE_SUFFIXES)
    if kernel := get_kernel_repo(params.attention):
        download_kernel(kernel)
    for name in filter(is_on_hub, dict(sets)):
        wanted["train", name] = (Repo("train_data", name, params.train_revision, "dataset"), TRAIN_SUFFIXES)
    if params.train_corpus_revision:
        repo = Repo("train_corpus", params.train_corpus, params.train_corpus_revision, "dataset")
        wanted["corpus", ""] = (repo, TRAIN_SUFFIXES)
    for name, data in tasks.items():
        repo = Repo(f"benchmarks: {name}", data["path"], data["revision"], "dataset")
        wanted["evaluation", name] = (repo, TASK_SUFFIXES)
    # All at once, and before anything is made here: one check of free space, one progress bar.
    fetched = dict(zip(wanted, download_hub_files(list(wanted.values())), strict=True))
    readers = {name: detect_format(name) for name in (*dict(sets), *benchmarks)}
    division = DivisionParams(params.split_by, params.train_on_test_pages)
    documents = {name: convert_documents(name, reader, division) for name, reader in readers.items() if reader}
    if division != DEFAULT_DIVISION and not documents:
        key, value = ("split_by", "document") if params.split_by == "document" else ("train_on_test_pages", "true")
        raise UserError(
            f"{key}: {value} has no effect: neither train_data nor benchmarks is a folder of PDFs or JSON lines; it "
            f"must be {'page' if key == 'split_by' else 'false'}"
        )

    def list_local(name: str, part: str) -> Files:
        suffixes = TRAIN_SUFFIXES if part == "train" else BEIR_SUFFIXES
        if name == DEMO:
            write = demo.write_training_set if part == "train" else demo.write_evaluation_set
            name = f"data/demo/{part}"
            write(root() / name)
        return documents[name].list_dataset_files(part) if name in documents else hash_local_files(name, suffixes)

    train = [fetched.get(("train", name)) or list_local(name, "train") for name, _ in sets]
    corpus = fetched.get(("corpus", ""))
    if params.train_corpus and not corpus:
        corpus = hash_local_files(params.train_corpus, TRAIN_SUFFIXES)
    evaluation = {name: list_local(name, "beir") for name in benchmarks}
    evaluation |= {name: fetched["evaluation", name] for name in tasks}
    manifest = {
        "base": (fetched.get(("base", "")) or hash_local_files(params.base, BASE_SUFFIXES))._asdict(),
        "made_for": get_training_data_params(params),
        "train": [files._replace(weight=weight)._asdict() for files, (_, weight) in zip(train, sets, strict=True)],
        "train_corpus": corpus._asdict() if corpus else None,
        "negatives": hash_local_file(params.negatives_file)._asdict() if params.negatives_file else None,
        "evaluation": {name: files._asdict() for name, files in evaluation.items()},
    }
    return FetchedInputs(manifest, documents)


def list_dataset_splits(manifest: Mapping[str, Any], train_data: str, train_corpus: str) -> list[DatasetSplit]:
    """Return the splits of the training sets, the corpus and the local benchmarks of a manifest.

    Raises:
        UserError: a corpus is missing or has no effect; see also `has_page_numbers`.
    """
    train = [Files(**entry) for entry in manifest["train"]]
    numbered = [has_page_numbers(get_files_folder(files, "dataset") / min(files.files)) for files in train]
    entry, corpus = manifest["train_corpus"], None
    if any(numbered) and not entry:
        raise UserError(
            f"train_corpus: '' is not valid: rows of {train_data} name their pages by number ({POSITIVES}); it must be "
            f"the set those numbers count in, such as manu/colpali-corpus for manu/colpali-queries"
        )
    if entry and not any(numbered):
        raise UserError(
            f"train_corpus: {train_corpus!r} has no effect, all rows of {train_data} hold their pages; it must be ''"
        )
    if entry:
        files = Files(**entry)
        corpus = DatasetSplit(train_corpus, "corpus", get_files_folder(files, "dataset"), tuple(sorted(files.files)))
    splits = [corpus] if corpus else []
    for (name, _), files, has_numbers in zip(parse_mixture(train_data), train, numbered, strict=True):
        by_split, unread = group_files_by_split(files.files)
        if unread:
            logger.info(
                f"{name}: {len(unread)} of {len(files.files)} parquet files are not read, since their names are those "
                f"of neither train nor dev set: {', '.join(unread)}"
            )
        folder, pages = get_files_folder(files, "dataset"), corpus if has_numbers else None
        splits += [
            DatasetSplit(name, split, folder, tuple(names), is_on_hub(name), pages) for split, names in by_split.items()
        ]
    for name, entry in manifest["evaluation"].items():
        if not entry["revision"]:  # mteb itself checks its own tasks
            shards = [file for file in sorted(entry["files"]) if re.fullmatch(r"corpus/.*\.parquet", file)]
            splits.append(DatasetSplit(name, "test", root() / entry["folder"], tuple(shards)))
    return splits


def group_files_by_split(files: Iterable[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the parquet files of train and dev by their names, and those that are neither.

    Where no name says a split, all are train. The dev set is validation, or test where there is none, as in
    `vidore/colpali_train_set`.
    """
    groups: dict[str, list[str]] = {split: [] for split in ("", *SPLIT_WORDS)}
    for file in sorted(files):
        folder, _, name = file.lower().rpartition("/")
        words = [word for text in (name, folder) for word in re.split(r"[-._ 0-9/]+", text)]
        split = next((split for word in words for split, known in SPLIT_WORDS.items() if word in known), "")
        groups[split].append(file)
    if not any(groups[split] for split in SPLIT_WORDS):
        return {"train": groups[""], "dev": []}, []
    dev, unread = (groups["validation"], groups["test"]) if groups["validation"] else (groups["test"], [])
    return {"train": groups["train"], "dev": dev}, groups[""] + unread


def get_tokenizer_path(manifest: Mapping[str, Any]) -> Path:
    """Return the file of the base's tokenizer."""
    return get_files_folder(Files(**manifest["base"]), "model") / "tokenizer.json"


def detect_format(name: str) -> DocumentReader | None:
    """Return the reader of a folder of documents; None for the demo, a folder of parquet files, and other names.

    Raises:
        UserError: a folder of two formats, or of none.
    """
    folder = root() / name
    if name == DEMO or not folder.is_dir():
        return None
    has_pdfs = bool(list_pdfs(folder))
    formats = {
        "parquet files": (bool(list_files(folder, TRAIN_SUFFIXES).files), None),
        "PDFs": (has_pdfs, read_pdf_folder),
        "JSON lines": (
            any(not (has_pdfs and is_query_file(path)) for path in list_jsonl_files(folder)),
            read_jsonl_folder,
        ),
    }
    present = [label for label, (is_present, _) in formats.items() if is_present]
    if len(present) != 1:
        refused = describe_refused(list_files(folder, (".jsonl", ".pdf", *TRAIN_SUFFIXES)).refused)
        raise UserError(
            f"{name}: holds {' and '.join(present) or 'none'} of {', '.join(formats)}; it must be one of them"
            + (f" ({refused})" if refused else "")
        )
    return formats[present[0]][1]
