"""What training reads: the training sets of the manifest, the pages they name by number, and mined negatives."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from pyarrow import parquet

from colintern.manifest import MANIFEST, QUARANTINE, checked_folder, read
from colintern.params import Params, UserError

# Columns of a row that names its pages by their row number in a corpus, as in manu/colpali-queries.
POSITIVES, NEGATIVES = "positive_passages", "negative_passages"


class TrainingSet(NamedTuple):
    """A set of the manifest: its name there, where it lies, its files, and how often an epoch shows each row."""

    name: str
    folder: Path
    files: list[str]
    weight: int

    def split(self, prefix: str) -> list[str]:
        """The files of a split, train or test."""
        return [file for file in self.files if Path(file).name.startswith(f"{prefix}-")]


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


def training_data(params: Params, anew: bool = False) -> TrainingData:
    """The data of the manifest, every file checked.

    Args:
        anew: hash every file, whatever is known of it.

    Raises:
        UserError: no manifest or one made for other data, or a file is missing or changed.
    """
    manifest = read(MANIFEST)
    for key, value in asked(params).items():
        if value != (made_for := manifest["made_for"][key]):
            raise UserError(f"{key}: {value!r} is not the one in {MANIFEST}, {made_for!r}; run: dvc repro fetch-data")
    corpus, negatives = manifest["train_corpus"], manifest["negatives"]
    return TrainingData(
        [_set(entry, "train_data", anew) for entry in manifest["train"]],
        _set(corpus, "train_corpus", anew) if corpus else None,
        _set(negatives, "negatives_file", anew).folder / params.negatives_file if negatives else None,
    )


def _set(entry: dict[str, Any], key: str, anew: bool) -> TrainingSet:
    folder = checked_folder(entry, key, "dataset", anew)
    return TrainingSet(entry["folder"], folder, sorted(entry["files"]), entry["weight"])


def by_number(file: Path) -> bool:
    """Whether the rows of a parquet file name their pages by number.

    Raises:
        UserError: it is no parquet file.
    """
    try:
        return POSITIVES in parquet.read_schema(file).names
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: is not a parquet file: {error}") from error


def asks_pseudo_queries() -> bool:
    """Whether a program made some of the training and dev queries from the text of the pages."""
    return any((entry["made_from"] or {}).get("pseudo") for entry in read(MANIFEST)["train"])


def quarantined() -> set[tuple[str, str]]:
    """(training set, "file:row") of each row that is left out.

    Raises:
        UserError: no such list; an empty one would be there.
    """
    return {(row["source"], row["row"]) for row in read(QUARANTINE)["rows"]}


def held_out(keys: Iterable[str]) -> set[str]:
    """The pages whose rows are the dev set of a data set that has none: a fiftieth of them, at least one.

    A page's place among all of them is that of its hash, so the choice depends on nothing but the pages.
    """
    ranked = sorted(set(keys))
    return set(ranked[: max(1, len(ranked) // 50)])
