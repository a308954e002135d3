"""Read what fetch-data prepared for training: the sets of the manifest, the index of their rows, mined negatives.

The index names the rows that can be trained on, so that training starts without reading a page. It holds names, keys
and queries; the images stay in their parquet files.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import parse_mixture
from colintern.params import Params
from colintern.storage.manifest import MANIFEST, FilesEntry, ensure_files, read_data_file

ROW_INDEX = "data/rows.parquet"
# Columns of a row that names its pages by their row number in a corpus, as in manu/colpali-queries.
POSITIVES, NEGATIVES = "positive_passages", "negative_passages"


class IndexRow(NamedTuple):
    """A query and where its page is: row `row` of `file` of a set, `page` the sha256 of the bytes of its image."""

    source: str  # the set, as train_data names it
    split: str  # train or dev
    file: str  # path below the set's folder
    row: int
    page: str
    query: str


class TrainingSet(NamedTuple):
    """A training set: its name in params, its folder and files, and how often an epoch shows each row."""

    name: str
    folder: Path
    files: list[str]
    weight: int

    @property
    def has_page_numbers(self) -> bool:
        """Check whether its rows name their pages by number."""
        return has_page_numbers(self.folder / self.files[0])


class TrainingData(NamedTuple):
    """`corpus`: the pages of rows that name them by number; `negatives`: the file of mined ones."""

    sets: list[TrainingSet]
    corpus: TrainingSet | None
    negatives: Path | None


def write_row_index(rows: Iterable[IndexRow]) -> None:
    """Write the index, to the same bytes for the same rows (given one version of pyarrow)."""
    columns = list(zip(*rows, strict=True)) or [()] * len(IndexRow._fields)
    types = [pa.int64() if name == "row" else pa.string() for name in IndexRow._fields]
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, names=list(IndexRow._fields)), ROW_INDEX, compression="zstd")


def read_row_index() -> list[IndexRow]:
    """Read the index, in the order in which it was written."""
    if not Path(ROW_INDEX).is_file():
        raise UserError(f"{ROW_INDEX}: missing; run the stage that makes it: dvc repro fetch-data")
    try:
        # No threads: the data loader's processes are forked from this one.
        table = pq.read_table(ROW_INDEX, use_threads=False)
        return [
            IndexRow(*values) for values in zip(*(table[name].to_pylist() for name in IndexRow._fields), strict=True)
        ]
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"{ROW_INDEX}: damaged: {str(error)[:200]}; make it again: dvc repro -f fetch-data") from error


def get_training_data_params(params: Params) -> dict[str, str | bool]:
    """Return the params that say which data training reads."""
    return {
        "train_data": params.train_data,
        "train_revision": params.train_revision,
        "train_corpus": params.train_corpus,
        "train_corpus_revision": params.train_corpus_revision,
        "negatives_file": params.negatives_file,
        "split_by": params.split_by,
        "train_on_test_pages": params.train_on_test_pages,
    }


def read_training_manifest(params: Params) -> dict[str, Any]:
    """Read the manifest.

    Raises:
        UserError: it is missing, or was written for other training data.
    """
    manifest = read_data_file(MANIFEST)
    for key, value in get_training_data_params(params).items():
        if value != (known := manifest["made_for"].get(key)):
            raise UserError(f"{key}: {value!r} is not the one in {MANIFEST}, {known!r}; run: dvc repro fetch-data")
    return manifest


def load_training_data(params: Params, force: bool = False) -> TrainingData:
    """Return the data of the manifest after verifying every file; `force` hashes files whose hash is recorded, too.

    Raises:
        UserError: no manifest or one made for other data, or a file is missing or changed.
    """
    manifest = read_training_manifest(params)

    def check_set(entry: FilesEntry, name: str, key: str) -> TrainingSet:
        folder = ensure_files(entry, key, "dataset", force)
        return TrainingSet(name, folder, sorted(entry["files"]), entry["weight"])

    names = [name for name, _ in parse_mixture(params.train_data)]
    corpus, negatives = manifest["train_corpus"], manifest["negatives"]
    if negatives:
        ensure_files(negatives, "negatives_file", "dataset", force)
    return TrainingData(
        [check_set(entry, name, "train_data") for entry, name in zip(manifest["train"], names, strict=True)],
        check_set(corpus, params.train_corpus, "train_corpus") if corpus else None,
        root() / params.negatives_file if negatives else None,
    )


def has_page_numbers(file: Path) -> bool:
    """Check whether the rows of a parquet file name their pages by number."""
    try:
        return POSITIVES in pq.read_schema(file).names
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: is not a parquet file: {error}") from error


def trains_on_pseudo_queries() -> bool:
    """Check whether a program made some of the training and dev queries from the text of the pages."""
    return any((entry["made_from"] or {}).get("pseudo") for entry in read_data_file(MANIFEST)["train"])
