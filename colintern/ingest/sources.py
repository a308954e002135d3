"""Where data comes from: each source puts files on disk and says which they are. Nothing here reads a row."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import mixture, split_kernel
from colintern.data.trainset import POSITIVES, asked, by_number
from colintern.ingest import jsonl, pdfs
from colintern.ingest.collected import Collected, Shelf
from colintern.ingest.own import Own, make
from colintern.ingest.scan import Part
from colintern.ingest.splits import by_name
from colintern.modeling.kernels import select_build_files
from colintern.params import Params, on_hub
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

DEMO = "demo"  # a name of params.yaml; its sets are drawn, not fetched


class GeneratedSets(NamedTuple):
    """Functions that write the demo's sets into the folder they are given."""

    write_training_set: Callable[[Path], None]
    write_evaluation_set: Callable[[Path], None]


class Fetched(NamedTuple):
    """The manifest (base, kernel, train, evaluation by benchmark or task), and the folders of documents behind it."""

    manifest: dict[str, Any]
    own: dict[str, Own]


def fetch(params: Params, tasks: Mapping[str, Mapping[str, str]], demo: GeneratedSets) -> Fetched:
    """Put all that params names on disk.

    Args:
        tasks: the tasks of mteb's that are to be evaluated, by name: {"path": hub id, "revision": 40 hex digits}.
        demo: writes the sets that params call "demo".

    Raises:
        UserError: a folder that holds nothing; see also `hub.download_repos`.
    """
    sets, benchmarks = mixture(params.train_data), [name for name in params.benchmarks if is_local_benchmark(name)]
    wanted: dict[tuple[str, str], tuple[Repo, FileSelector]] = {}
    if params.base_revision:
        wanted["base", params.base] = (Repo("base", params.base, params.base_revision, "model"), BASE_SUFFIXES)
    if kernel := split_kernel(params.attention):
        wanted["kernel", params.attention] = (Repo("attention", *kernel, "kernel"), select_build_files)
    for name in filter(on_hub, dict(sets)):
        repo = Repo("train_data", name, params.train_revision, "dataset")
        wanted["train", name] = (repo, TRAIN_SUFFIXES)
    if params.train_corpus_revision:
        repo = Repo("train_corpus", params.train_corpus, params.train_corpus_revision, "dataset")
        wanted["corpus", params.train_corpus] = (repo, TRAIN_SUFFIXES)
    for name, data in tasks.items():
        repo = Repo(f"benchmarks: {name}", data["path"], data["revision"], "dataset")
        wanted["evaluation", name] = (repo, TASK_SUFFIXES)
    # All at once, and before anything is made here: one question of room, one bar.
    found = dict(zip(wanted, download_hub_files(list(wanted.values())), strict=True))
    kinds = {name: _kind(name) for name in (*dict(sets), *benchmarks)}
    own = {name: make(name, collect) for name, collect in kinds.items() if collect}
    train = [found.get(("train", name)) or _training(name, own, demo) for name, _ in sets]
    corpus = found.get(("corpus", params.train_corpus))
    if params.train_corpus and not corpus:
        corpus = hash_local_files(params.train_corpus, TRAIN_SUFFIXES)
    evaluation = {name: _evaluation(name, own, demo) for name in benchmarks}
    evaluation |= {name: found["evaluation", name] for name in tasks}
    manifest = {
        "base": (found.get(("base", params.base)) or hash_local_files(params.base, BASE_SUFFIXES))._asdict(),
        "kernel": found["kernel", params.attention]._asdict() if kernel else None,
        "made_for": asked(params),
        "train": [files._replace(weight=w)._asdict() for files, (_, w) in zip(train, sets, strict=True)],
        "train_corpus": corpus._asdict() if corpus else None,
        "negatives": hash_local_file(params.negatives_file)._asdict() if params.negatives_file else None,
        "evaluation": {name: files._asdict() for name, files in evaluation.items()},
    }
    return Fetched(manifest, own)


def parts(params: Params, manifest: dict[str, Any]) -> list[Part]:
    """The training sets and local benchmarks of a manifest, split by split, under the names that params give them.

    Raises:
        UserError: a corpus is missing or has no effect; see also `by_number`.
    """
    train = [Files(**entry) for entry in manifest["train"]]
    numbered = [by_number(get_files_folder(files, "dataset") / min(files.files)) for files in train]
    corpus = _corpus(params, manifest["train_corpus"], any(numbered))
    found = [corpus] if corpus else []
    for (name, _), files, without_pages in zip(mixture(params.train_data), train, numbered, strict=True):
        splits, unread = by_name(files.files)
        if unread:
            print(
                f"{name}: {len(unread)} of {len(files.files)} parquet files are not read, since their names are those "
                f"of neither train nor dev set: {', '.join(unread)}"
            )
        of = corpus if without_pages else None
        for split, names in splits.items():
            found.append(Part(name, split, get_files_folder(files, "dataset"), tuple(names), on_hub(name), of))
    for name, entry in manifest["evaluation"].items():
        if entry["revision"]:  # a task of mteb's: not ours to judge
            continue
        names = [file for file in sorted(entry["files"]) if file.startswith("corpus/") and file.endswith(".parquet")]
        found.append(Part(name, "test", root() / entry["folder"], tuple(names)))
    return found


def _corpus(params: Params, entry: dict[str, Any] | None, needed: bool) -> Part | None:
    if needed and not entry:
        raise UserError(
            f"train_corpus: '' is not valid: rows of {params.train_data} name their pages by number ({POSITIVES}); it "
            f"must be the set those numbers count in, such as manu/colpali-corpus for manu/colpali-queries"
        )
    if entry and not needed:
        raise UserError(
            f"train_corpus: {params.train_corpus!r} has no effect, all rows of {params.train_data} hold their pages; "
            f"it must be ''"
        )
    if not entry:
        return None
    files = Files(**entry)
    return Part(params.train_corpus, "corpus", get_files_folder(files, "dataset"), tuple(sorted(files.files)))


def tokenizer(manifest: dict[str, Any]) -> Path:
    """The file of the base's tokenizer."""
    return get_files_folder(Files(**manifest["base"]), "model") / "tokenizer.json"


def _training(name: str, own: dict[str, Own], demo: GeneratedSets) -> Files:
    if name == DEMO:
        demo.write_training_set(root() / "data/demo/train")
        return hash_local_files("data/demo/train", TRAIN_SUFFIXES)
    return own[name].files("train") if name in own else hash_local_files(name, TRAIN_SUFFIXES)


def _evaluation(name: str, own: dict[str, Own], demo: GeneratedSets) -> Files:
    if name == DEMO:
        demo.write_evaluation_set(root() / "data/demo/beir")
        return hash_local_files("data/demo/beir", BEIR_SUFFIXES)
    return own[name].files("beir") if name in own else hash_local_files(name, BEIR_SUFFIXES)


def _kind(name: str) -> Callable[[Path, Shelf], Collected] | None:
    """What reads a folder of documents; None for the demo, a folder of parquet files, and what is no folder.

    Raises:
        UserError: a folder of two kinds, or of none.
    """
    folder = root() / name
    if name == DEMO or not folder.is_dir():
        return None
    has_pdfs, lines = bool(pdfs.pdf_files(folder)), jsonl.line_files(folder)
    kinds = {
        "parquet files": bool(list_files(folder, TRAIN_SUFFIXES).files),
        "PDFs": has_pdfs,
        "JSON lines": any(not (has_pdfs and pdfs.is_query_file(path)) for path in lines),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) != 1:
        refused = describe_refused(list_files(folder, (".jsonl", ".pdf", *TRAIN_SUFFIXES)).refused)
        raise UserError(
            f"{name}: holds {' and '.join(found) or 'none'} of {', '.join(kinds)}; it must be one of them"
            + (f" ({refused})" if refused else "")
        )
    return {"parquet files": None, "PDFs": pdfs.collect, "JSON lines": jsonl.collect}[found[0]]
