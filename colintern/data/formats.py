"""Write the hub's two layouts for visual document retrieval, always to the same bytes, and check the second.

Training: `data/<split>-00000-of-00001.parquet` with the columns of `vidore/colpali_train_set` (one row per query; that
data set calls its development set "test"). Evaluation: mteb's BEIR image layout as the ViDoRe (v1) tasks load it:
configurations corpus / queries / qrels, split "test", integer ids, and the text of pages in a column of the corpus, as
in ViDoRe v3.1. Both are what `datasets.load_dataset(folder)` reads.

The bytes depend only on the input and on the version of pyarrow: no timestamps, one fixed row group size and codec.
"""

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.storage.files import describe_refused, list_files

ROWS_PER_GROUP = 100  # what `datasets` itself uses for image columns, so that one row can be read without the rest
MAX_GROUP_BYTES = 2**28  # of images, after which a row group ends too: past 2 GB pyarrow cannot read it as a whole
BEIR_TABLES = ("corpus", "queries", "qrels")
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# While a table is written: the image is in memory once, however many rows have it.
SHARED_IMAGE_TYPE = pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary())), ("path", pa.string())])
TEXT_COLUMNS = (  # of vidore/colpali_train_set, after "image", in its order
    "image_filename", "query", "answer", "source", "options", "page", "model", "prompt", "answer_type",
)  # fmt: skip
PSEUDO_QUERIES_TAG = "annotations_creators:\n- machine-generated"  # of the hub's cards
PSEUDO_QUERIES_LABEL = " (pseudo-queries"  # in the label of such a benchmark
TRAINED_PAGES_TAG = "tags:\n- pages-in-training"
LABEL_NOTES = {PSEUDO_QUERIES_TAG: "pseudo-queries", TRAINED_PAGES_TAG: "pages trained on"}
PSEUDO_QUERIES_NOTE = """
Pseudo-queries: a program made the queries from the text of the pages, and nobody judged them.
Scores on this set compare runs; they do not say how well people's questions are answered."""


@dataclass(frozen=True)
class TrainingRow:
    """One query and the page that answers it. One page may occur in several rows; None is stored as null."""

    image: bytes | Path  # of a PNG or JPEG file, or its path; a path is read when the row is written
    image_filename: str
    query: str
    answer: str | None = None
    source: str | None = None
    options: str | None = None
    page: str | None = None
    model: str | None = None
    prompt: str | None = None
    answer_type: str | None = None


@dataclass(frozen=True)
class CorpusPage:
    """One page that can be retrieved; `image` as in `TrainingRow`, `text` "" where the page's text is not known."""

    corpus_id: int
    image: bytes | Path
    image_filename: str
    text: str = ""


@dataclass(frozen=True)
class Query:
    """One query of the evaluation set."""

    query_id: int
    query: str


@dataclass(frozen=True)
class Qrel:
    """Page `corpus_id` answers query `query_id`; score > 0, larger is more relevant."""

    query_id: int
    corpus_id: int
    score: int = 1


def write_training_split(folder: Path, split: str, rows: Sequence[TrainingRow]) -> Path:
    """Write one split of a training set and return its file, `folder/data/<split>-00000-of-00001.parquet`.

    Put rows of one page next to each other: its bytes are then read and stored once. Rows are not checked here;
    `scan_rows` checks them when they are read.
    """
    columns = {"image": IMAGE_TYPE} | {name: pa.string() for name in TEXT_COLUMNS}
    return _write_parquet(Path(folder) / "data", split, columns, _iter_training_records(rows))


def write_beir(
    folder: Path,
    corpus: Sequence[CorpusPage],
    queries: Sequence[Query],
    qrels: Sequence[Qrel],
    pseudo: bool = False,
    num_trained_pages: int = 0,
) -> Path:
    """Write an evaluation set in mteb's BEIR image layout and return `folder`.

    Where a program made the queries from the pages (`pseudo`), or pages that answer queries are trained on
    (`num_trained_pages`), the card says so, see `get_benchmark_label`. Rows are not checked here; `validate_judgments`
    checks them when they are read.
    """
    folder, ids = Path(folder), pa.int64()
    (folder / "README.md").unlink(missing_ok=True)  # a run killed half-way leaves a folder that does not load
    query_records = ({"query-id": query.query_id, "query": query.query} for query in queries)
    qrel_records = ({"query-id": qrel.query_id, "corpus-id": qrel.corpus_id, "score": qrel.score} for qrel in qrels)
    qrel_columns = {"query-id": ids, "corpus-id": ids, "score": pa.int64()}
    corpus_columns, corpus_records = {"corpus-id": ids, "image": IMAGE_TYPE}, _iter_corpus_records(corpus)
    if any(page.text for page in corpus):
        corpus_columns["text"] = pa.string()
    files = [
        _write_parquet(folder / "corpus", "test", corpus_columns, corpus_records),
        _write_parquet(folder / "queries", "test", {"query-id": ids, "query": pa.string()}, query_records),
        _write_parquet(folder / "qrels", "test", qrel_columns, qrel_records),
    ]
    (folder / "README.md").write_text(_format_card(files, pseudo, num_trained_pages), encoding="utf-8")
    return folder


def normalize_id(value: object) -> str:
    """Return an id of an evaluation set as text, which is how mteb compares ids.

    A whole float is the integer: pandas turns integers into floats where a join leaves rows without a partner.

    Raises:
        ValueError: of another type, or a number with a fraction.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int | str) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{value!r:.80} is of the type {type(value).__name__}; ids are text or whole numbers")


def get_benchmark_label(entry: str, folder: Path) -> str:
    """Return the label of the scores of a local entry of `benchmarks`.

    It says if a program made the queries, and if pages that answer them are trained on, as the card has it.
    """
    if entry == "demo":
        return entry
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    notes = [note for tag, note in LABEL_NOTES.items() if tag in text]
    return (root() / entry).resolve().name + (f" ({', '.join(notes)})" if notes else "")


def get_task_name(entry: str, folder: Path) -> str:
    """Return the name of the task of a local entry of `benchmarks` in mteb's files."""
    if entry == "demo":
        return "ColInternDemoRetrieval"
    words = re.findall(r"[^\W_]+", get_benchmark_label(entry, folder))
    return "".join(word[0].upper() + word[1:] for word in words) + "Retrieval"


def check_beir_layout(folder: Path) -> None:
    """Check that mteb would find the tables of an evaluation set in a folder.

    Raises:
        UserError: a table has no parquet file, or the card does not name it.
    """
    listings = {table: list_files(folder / table, (".parquet",), recursive=False) for table in BEIR_TABLES}
    errors = [
        f"no parquet file in {table}/" + (f": {describe_refused(listing.refused)}" if listing.refused else "")
        for table, listing in listings.items()
        if not listing.files
    ]
    configured = _read_test_configs(folder / "README.md")
    errors += [f"README.md has none for {table}" for table in BEIR_TABLES if table not in configured]
    if errors:
        raise UserError(
            f"{folder}: not an evaluation set; it needs parquet files in corpus/, queries/ and qrels/, and a README.md "
            f"whose `configs:` block names each with a split test, as the demo's in data/demo/beir; {errors[0]}"
        )


def _read_test_configs(card: Path) -> set[str]:
    """Return the configurations that a dataset card declares with a test split."""
    from huggingface_hub import metadata_load  # takes longer to import than a stage's --help may take
    from yaml import YAMLError

    try:
        metadata = metadata_load(card)
    except (OSError, ValueError, YAMLError):
        return set()
    configs = metadata.get("configs") if metadata else None
    names = set()
    for config in configs if isinstance(configs, list) else []:
        # Without `data_files` it looks at the files' names; without `split` it makes them train.
        files = config.get("data_files", [{"split": "test"}]) if isinstance(config, dict) else []
        if any(isinstance(file, dict) and file.get("split") == "test" for file in files):
            names.add(str(config.get("config_name")))
    return names


def _format_card(files: Sequence[Path], pseudo: bool, num_trained_pages: int) -> str:
    """Return the card that names one configuration per folder.

    `datasets` (5.2) keys its cache of a local folder with a card on the folder's last name and the card alone. Without
    the checksum in `description`, which is a part of that key, two folders called `beir`, or one that was written
    again, would be served from the first one's cache.
    """
    lines = ["---", "configs:"]
    for file in files:
        lines += [
            f"- config_name: {file.parent.name}",
            f"  description: sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}",
            "  data_files:",
            "  - split: test",
            f"    path: {file.parent.name}/test-*",
        ]
    tags, notes = [], []
    if pseudo:
        tags, notes = PSEUDO_QUERIES_TAG.splitlines(), PSEUDO_QUERIES_NOTE.splitlines()
    if num_trained_pages:
        tags += TRAINED_PAGES_TAG.splitlines()
        notes += ["", f"Pages that answer queries are trained on with other queries: {num_trained_pages}."]
    return "\n".join([*lines, *tags, "---", *notes, ""])


def _iter_training_records(rows: Sequence[TrainingRow]) -> Iterator[dict[str, object]]:
    image: bytes | Path = b""
    data = b""
    for row in rows:
        if row.image is not image:  # the same object in the rows of one page
            image, data = row.image, _read_image(row.image)
        yield {"image": {"bytes": data, "path": row.image_filename}} | {
            name: getattr(row, name) for name in TEXT_COLUMNS
        }


def _iter_corpus_records(corpus: Sequence[CorpusPage]) -> Iterator[dict[str, object]]:
    for page in corpus:
        image = {"bytes": _read_image(page.image), "path": page.image_filename}
        yield {"corpus-id": page.corpus_id, "image": image, "text": page.text}


def _read_image(image: bytes | Path) -> bytes:
    return image if isinstance(image, bytes) else image.read_bytes()


def _build_schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    """Return the schema with the features in its metadata: without them `datasets` reads images as plain structs."""
    features = {
        name: {"_type": "Image"} if kind == IMAGE_TYPE else {"dtype": str(kind), "_type": "Value"}
        for name, kind in columns.items()
    }
    return pa.schema(list(columns.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def _write_parquet(
    folder: Path, split: str, columns: dict[str, pa.DataType], records: Iterable[dict[str, Any]]
) -> Path:
    """Write the records in row groups; the file appears under its name only when it is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    schema = _build_schema(columns)
    path = folder / f"{split}-00000-of-00001.parquet"
    partial = path.with_name(f".{path.name}.partial")  # hidden: the card's `test-*` must not match it
    shared = pa.schema([(field.name, SHARED_IMAGE_TYPE if field.name == "image" else field.type) for field in schema])
    try:
        # The dictionary limit is raised from 1 MB so that a page of several queries is stored once a row group.
        with pq.ParquetWriter(
            partial, shared, version="2.6", compression="snappy", dictionary_pagesize_limit=2**30, store_schema=False
        ) as writer:
            for group in _group_records(records):
                writer.write_table(_build_table(group, shared))
            # What store_schema would write of `schema`.
            arrow_schema = base64.b64encode(schema.serialize().to_pybytes())
            writer.add_key_value_metadata({**schema.metadata, b"ARROW:schema": arrow_schema})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _build_table(group: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """Return the records as a table that holds each page once: 100 rows of one page would hold it 100 times."""
    columns = []
    for field in schema:
        values = [record[field.name] for record in group]
        if field.name == "image":
            pages: dict[bytes, int] = {}
            numbers = pa.array([pages.setdefault(image["bytes"], len(pages)) for image in values], pa.int32())
            images = pa.DictionaryArray.from_arrays(numbers, pa.array(list(pages), pa.binary()))
            paths = pa.array([image["path"] for image in values], pa.string())
            columns.append(pa.StructArray.from_arrays([images, paths], fields=list(SHARED_IMAGE_TYPE)))
        else:
            columns.append(pa.array(values, field.type))
    return pa.table(columns, schema=schema)


def _group_records(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += len(record["image"]["bytes"]) if "image" in record else 0
        if len(group) == ROWS_PER_GROUP or size >= MAX_GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
