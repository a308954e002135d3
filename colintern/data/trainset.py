"""What training reads: the training sets of the manifest, the pages they name by number, and mined negatives."""

from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import ArrowException, parquet

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.core.rules import mixture
from colintern.params import Params
from colintern.storage.manifest import MANIFEST, ensure_files, read_data_file

# Columns of a row that names its pages by their row number in a corpus, as in manu/colpali-queries.
POSITIVES, NEGATIVES = "positive_passages", "negative_passages"


class TrainingSet(NamedTuple):
    """A training set: its name in params, where it lies, its files, and how often an epoch shows each row."""

    name: str
    folder: Path
    files: list[str]
    weight: int

    @property
    def by_number(self) -> bool:
        """Whether its rows name their pages by number."""
        return by_number(self.folder / self.files[0])


class TrainingData(NamedTuple):
    """`corpus`: the pages of rows that name them by number; `negatives`: the file of mined ones."""

    sets: list[TrainingSet]
    corpus: TrainingSet | None
    negatives: Path | None


def asked(params: Params) -> dict[str, str]:
    """The params that say which data training reads."""
    return {
        "train_data": params.train_data,
        "train_revision": params.train_revision,
        "train_corpus": params.train_corpus,
        "train_corpus_revision": params.train_corpus_revision,
        "negatives_file": params.negatives_file,
    }


def made_for(params: Params) -> dict[str, Any]:
    """The manifest.

    Raises:
        UserError: there is none, or it was made for other training data.
    """
    manifest = read_data_file(MANIFEST)
    for key, value in asked(params).items():
        if value != (known := manifest["made_for"][key]):
            raise UserError(f"{key}: {value!r} is not the one in {MANIFEST}, {known!r}; run: dvc repro fetch-data")
    return manifest


def training_data(params: Params, force: bool = False) -> TrainingData:
    """The data of the manifest, every file checked.

    Args:
        force: hash every file, whatever is known of it.

    Raises:
        UserError: no manifest or one made for other data, or a file is missing or changed.
    """
    manifest = made_for(params)
    names = [name for name, _ in mixture(params.train_data)]
    corpus, negatives = manifest["train_corpus"], manifest["negatives"]
    if negatives:
        ensure_files(negatives, "negatives_file", "dataset", force)
    return TrainingData(
        [_set(entry, name, "train_data", force) for entry, name in zip(manifest["train"], names, strict=True)],
        _set(corpus, params.train_corpus, "train_corpus", force) if corpus else None,
        root() / params.negatives_file if negatives else None,
    )


def _set(entry: dict[str, Any], name: str, key: str, force: bool) -> TrainingSet:
    folder = ensure_files(entry, key, "dataset", force)
    return TrainingSet(name, folder, sorted(entry["files"]), entry["weight"])


def by_number(file: Path) -> bool:
    """Whether the rows of a parquet file name their pages by number.

    Raises:
        UserError: it is no parquet file.
    """
    try:
        return POSITIVES in parquet.read_schema(file).names
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{file}: is not a parquet file: {error}") from error


def asks_pseudo_queries() -> bool:
    """Whether a program made some of the training and dev queries from the text of the pages."""
    return any((entry["made_from"] or {}).get("pseudo") for entry in read_data_file(MANIFEST)["train"])
