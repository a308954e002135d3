"""Writes the hub's two layouts for visual document retrieval, always to the same bytes.

Training: ``data/<split>-00000-of-00001.parquet`` with the columns of `vidore/colpali_train_set` (one row per query;
that data set calls its development set "test"). Evaluation: mteb's BEIR image layout as the ViDoRe (v1) tasks load it:
configurations corpus / queries / qrels, split "test", integer ids. Both are what `datasets.load_dataset(folder)` reads.

The bytes depend only on the input and on the version of pyarrow: no timestamps, one fixed row group size and codec.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from colintern.core.errors import UserError
from colintern.core.project import root
from colintern.data.images import STORED
from colintern.storage.files import describe_refused, list_files

ROW_GROUP = 100  # rows; what `datasets` itself uses for image columns, so that one row can be read without the rest
GROUP_BYTES = 2**28  # of images, after which a row group ends too: past 2 GB pyarrow cannot read it as a whole
TRAINING_SPLITS = ("train", "test")
TABLES = ("corpus", "queries", "qrels")
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PAGE_TYPE = pa.struct([("bytes", pa.dictionary(pa.int32(), pa.binary())), ("path", pa.string())])  # while it is written
TEXT_COLUMNS = (  # of vidore/colpali_train_set, after "image", in its order
    "image_filename", "query", "answer", "source", "options", "page", "model", "prompt", "answer_type",
)  # fmt: skip
PSEUDO_CARD = (  # the hub's own key for who judged, and the same in words
    "annotations_creators:\n- machine-generated",
    "\nPseudo-queries: a program made the queries from the text of the pages, and nobody judged them.\n"
    "Scores on this set compare runs; they do not say how well people's questions are answered.",
)


@dataclass(frozen=True)
class TrainingRow:
    """One query and the page that answers it. One page may occur in several rows; None is stored as null."""

    image: bytes  # of a PNG or JPEG file
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
    """One page that can be retrieved."""

    corpus_id: int
    image: bytes
    image_filename: str


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
    """Writes one split of a training set and returns its file, `folder/data/<split>-00000-of-00001.parquet`.

    Rows of one page stand best next to each other: its bytes are then stored once. Raises ValueError, naming the row,
    for an empty query or file name, bytes that are neither PNG nor JPEG, a (page, query) pair given twice, or two
    pages under one file name; also for no rows or another split. Nothing is written then.
    """
    if split not in TRAINING_SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(TRAINING_SPLITS)}")
    _check_training_rows(split, rows)
    schema = _schema({"image": IMAGE_TYPE} | {name: pa.string() for name in TEXT_COLUMNS})
    records = (
        {"image": _image(row.image, row.image_filename)} | {name: getattr(row, name) for name in TEXT_COLUMNS}
        for row in rows
    )
    return _write(Path(folder) / "data", split, schema, records)


def write_beir(
    folder: Path, corpus: Sequence[CorpusPage], queries: Sequence[Query], qrels: Sequence[Qrel], pseudo: bool = False
) -> Path:
    """Writes an evaluation set in mteb's BEIR image layout and returns `folder`.

    `pseudo`: the queries were made from the pages by a program; the card says so, see `is_pseudo`. Raises ValueError,
    naming the row, for an id or a qrels pair given twice, an empty query, bytes that are neither PNG nor JPEG, a qrel
    that points to an id that does not exist or has a score below 1, and a query no qrel names (mteb would leave it out
    of the average without a word); also for no pages or no queries. Nothing is written then.
    """
    _check_beir(corpus, queries, qrels)
    root, ids = Path(folder), pa.int64()
    (root / "README.md").unlink(missing_ok=True)  # a run killed half-way leaves a folder that does not load
    pages = ({"corpus-id": page.corpus_id, "image": _image(page.image, page.image_filename)} for page in corpus)
    asked = ({"query-id": query.query_id, "query": query.query} for query in queries)
    answers = ({"query-id": qrel.query_id, "corpus-id": qrel.corpus_id, "score": qrel.score} for qrel in qrels)
    files = [
        _write(root / "corpus", "test", _schema({"corpus-id": ids, "image": IMAGE_TYPE}), pages),
        _write(root / "queries", "test", _schema({"query-id": ids, "query": pa.string()}), asked),
        _write(root / "qrels", "test", _schema({"query-id": ids, "corpus-id": ids, "score": pa.int64()}), answers),
    ]
    (root / "README.md").write_text(_readme(files, pseudo), encoding="utf-8")
    return root


def id_text(value: Any) -> str:
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


def is_pseudo(folder: Path) -> bool:
    """Whether the card of an evaluation set says that a program made its queries."""
    card = folder / "README.md"
    return card.is_file() and PSEUDO_CARD[0] in card.read_text(encoding="utf-8")


def called(entry: str, folder: Path) -> tuple[str, str]:
    """What a local entry of `benchmarks` is called: the label at its scores, and its task in mteb's files."""
    if entry == "demo":
        return entry, "ColInternDemoRetrieval"
    # Nobody shall take a program's questions for people's: the label stands at every number.
    label = (root() / entry).resolve().name + (" (pseudo-queries)" if is_pseudo(folder) else "")
    words = re.findall(r"[^\W_]+", label)
    return label, "".join(w[0].upper() + w[1:] for w in words) + "Retrieval"


def check_beir(folder: Path) -> None:
    """Raises UserError where mteb would find no evaluation set in a folder."""
    tables = {table: list_files(folder / table, (".parquet",), recursive=False) for table in TABLES}
    faults = [
        f"no parquet file in {table}/" + (f": {describe_refused(refused)}" if refused else "")
        for table, (files, refused) in tables.items()
        if not files
    ]
    configured = _configured(folder / "README.md")
    faults += [f"README.md has none for {table}" for table in TABLES if table not in configured]
    if faults:
        raise UserError(
            f"{folder}: not an evaluation set; it needs parquet files in corpus/, queries/ and qrels/, and a README.md "
            f"whose `configs:` block names each with a split test, as the demo's in data/demo/beir; {faults[0]}"
        )


def _configured(card: Path) -> set[str]:
    """The configurations with a split test of which a card tells `datasets`."""
    from ruamel.yaml import YAML  # takes longer to import than a stage's --help may take
    from ruamel.yaml.error import YAMLError

    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        known = YAML(typ="safe").load(head[1]) if head else None
    except YAMLError:
        return set()
    configs = known.get("configs") if isinstance(known, dict) else None
    found = set()
    for config in configs if isinstance(configs, list) else []:
        # Without `data_files` it looks at the files' names; without `split` it makes them train.
        files = config.get("data_files", [{"split": "test"}]) if isinstance(config, dict) else []
        if any(isinstance(one, dict) and one.get("split") == "test" for one in files):
            found.add(str(config.get("config_name")))
    return found


def _readme(files: Sequence[Path], pseudo: bool) -> str:
    """The card that names one configuration a folder.

    The checksum is not decoration. `datasets` (5.2) keys its cache of a local folder with a card on the folder's last
    name and the card alone: without it, two folders called `beir`, or one that was written again, are served from
    the first one's cache. `description` is a field of its configurations and enters that key.
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
    head, text = PSEUDO_CARD if pseudo else ("", "")
    return "\n".join([*lines, *head.splitlines(), "---", *text.splitlines(), ""])


def _check_training_rows(split: str, rows: Sequence[TrainingRow]) -> None:
    if not rows:
        raise ValueError(f"split {split!r}: no rows")
    first_row: dict[tuple[str, str], int] = {}
    pages: dict[str, bytes] = {}
    image = content = b""
    for number, row in enumerate(rows):
        where = f"split {split!r}, row {number} ({row.image_filename!r})"
        _check_text(where, "query", row.query)
        _check_text(where, "image_filename", row.image_filename)
        _check_image(where, row.image)
        pair = (row.image_filename, row.query)
        if pair in first_row:
            raise ValueError(f"{where}: the same page and query {row.query!r} as row {first_row[pair]}")
        first_row[pair] = number
        if row.image is not image:  # the same object where one page is asked by many queries
            image, content = row.image, hashlib.sha256(row.image).digest()
        if pages.setdefault(row.image_filename, content) != content:
            raise ValueError(f"{where}: another page under the same image_filename came before")


def _check_beir(corpus: Sequence[CorpusPage], queries: Sequence[Query], qrels: Sequence[Qrel]) -> None:
    if not corpus or not queries:
        raise ValueError(f"an evaluation set needs pages and queries: got {len(corpus)} pages, {len(queries)} queries")
    for number, page in enumerate(corpus):
        _check_image(f"corpus row {number} (corpus-id {page.corpus_id})", page.image)
    for number, query in enumerate(queries):
        _check_text(f"queries row {number} (query-id {query.query_id})", "query", query.query)
    corpus_ids = _unique("corpus", "corpus-id", [page.corpus_id for page in corpus])
    query_ids = _unique("queries", "query-id", [query.query_id for query in queries])
    _unique("qrels", "(query-id, corpus-id)", [(qrel.query_id, qrel.corpus_id) for qrel in qrels])
    for number, qrel in enumerate(qrels):
        if qrel.query_id not in query_ids:
            raise ValueError(f"qrels row {number}: query-id {qrel.query_id} is not among the queries")
        if qrel.corpus_id not in corpus_ids:
            raise ValueError(f"qrels row {number}: corpus-id {qrel.corpus_id} is not in the corpus")
        if qrel.score < 1:
            raise ValueError(f"qrels row {number}: score {qrel.score} is below 1")
    judged = {qrel.query_id for qrel in qrels}
    for number, query in enumerate(queries):
        if query.query_id not in judged:
            raise ValueError(f"queries row {number} (query-id {query.query_id}): no qrel names a page for it")


def _check_text(where: str, column: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{where}: {column} is empty: {text!r}")


def _check_image(where: str, data: bytes) -> None:
    if not data.startswith(tuple(STORED)):
        raise ValueError(f"{where}: the image is neither PNG nor JPEG, it starts with {data[:8]!r}")


def _unique(table: str, column: str, keys: Sequence[Hashable]) -> set[Hashable]:
    first_row: dict[Hashable, int] = {}
    for number, key in enumerate(keys):
        if key in first_row:
            raise ValueError(f"{table} row {number}: {column} {key} is already that of row {first_row[key]}")
        first_row[key] = number
    return set(first_row)


def _image(data: bytes, filename: str) -> dict[str, Any]:
    return {"bytes": data, "path": filename}


def _schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    """The Arrow schema, with the features in the metadata: without them `datasets` reads images as plain structs."""
    features = {
        name: {"_type": "Image"} if kind == IMAGE_TYPE else {"dtype": str(kind), "_type": "Value"}
        for name, kind in columns.items()
    }
    return pa.schema(list(columns.items()), {"huggingface": json.dumps({"info": {"features": features}})})


def _write(folder: Path, split: str, schema: pa.Schema, records: Iterable[dict[str, Any]]) -> Path:
    """Writes the records in row groups; the file appears under its name only when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}-00000-of-00001.parquet"
    partial = path.with_name(f".{path.name}.partial")  # hidden: the README's `test-*` must not match it
    by_reference = pa.schema([(one.name, PAGE_TYPE if one.name == "image" else one.type) for one in schema])
    # The dictionary limit is raised from 1 MB so that a page asked by several queries is stored once a row group.
    with pq.ParquetWriter(
        partial,
        by_reference,
        version="2.6",
        compression="snappy",
        use_dictionary=True,
        dictionary_pagesize_limit=2**30,
        store_schema=False,
    ) as writer:
        for group in _groups(records):
            writer.write_table(_table(group, by_reference))
        arrow_schema = base64.b64encode(schema.serialize().to_pybytes())  # what store_schema would write of `schema`
        writer.add_key_value_metadata({**schema.metadata, b"ARROW:schema": arrow_schema})
    os.replace(partial, path)
    return path


def _table(group: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    """The records as a table that holds each page once: 100 rows of one page would take it 100 times, to no effect."""
    columns = []
    for column in schema:
        values = [record[column.name] for record in group]
        if column.name == "image":
            pages: dict[bytes, int] = {}
            numbers = pa.array([pages.setdefault(image["bytes"], len(pages)) for image in values], pa.int32())
            images = pa.DictionaryArray.from_arrays(numbers, pa.array(list(pages), pa.binary()))
            paths = pa.array([image["path"] for image in values], pa.string())
            columns.append(pa.StructArray.from_arrays([images, paths], fields=list(PAGE_TYPE)))
        else:
            columns.append(pa.array(values, column.type))
    return pa.table(columns, schema=schema)


def _groups(records: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size = 0
    for record in records:
        group.append(record)
        size += len(record["image"]["bytes"]) if "image" in record else 0
        if len(group) == ROW_GROUP or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
