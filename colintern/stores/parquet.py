"""Page vectors as parquet files with a manifest.

A file is listed in the manifest once it is complete; others are what a killed run left, and are deleted. Runs with
`--shard I/N` write a manifest each, and a reader needs all N of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from colintern.core.errors import UserError
from colintern.encoding.precision import dequantize, quantize
from colintern.scoring.maxsim import maxsim_scores
from colintern.storage.files import format_json, read_json_object
from colintern.storage.lock import hold_lock
from colintern.stores.base import MODEL_KEYS, EmbeddedPage, PageStore, StoredPage

ROWS_PER_GROUP = 16  # read at once, so that memory does not grow with a file
# Vectors neither repeat nor compress; with pyarrow's defaults they take 4 times as long to read, for 7 % less space.
WRITE_OPTIONS: dict[str, Any] = {"row_group_size": ROWS_PER_GROUP, "use_dictionary": False, "compression": "none"}
SCALES = {
    "int8": "one for all: value = element / 127",
    "binary": "sign bits, the first dimension in the highest bit: 1 is +1/sqrt(dim), 0 is -1/sqrt(dim)",
}
MANIFEST_KEYS = {"shard", "files", "complete", "revision", "precision", "dim"}


class ParquetStore(PageStore):
    """The files of all shards for reading, or of one for writing; `shard` is its number, from 1, and their count."""

    def __init__(self, folder: Path, identity: dict[str, Any] | None = None, shard: tuple[int, int] = (1, 1)):
        super().__init__(str(folder), folder, identity)
        self.top = folder
        self.manifests = {path.name: read_json_object(path) for path in sorted(folder.glob("manifest*.json"))}
        for name, content in self.manifests.items():
            if not content.keys() >= MANIFEST_KEYS:
                raise UserError(f"{folder / name}: is no manifest of `colintern embed`; give another folder")
        if identity is None:
            self._require_all_shards()
        else:
            self._start_writing(identity, shard)
        self.pages: dict[str, StoredPage] = {}
        self.file_of_id: dict[str, str] = {}
        for file, batch in self._iter_batches(list(StoredPage._fields)):
            for row in batch.to_pylist():
                self.pages[row["id"]], self.file_of_id[row["id"]] = StoredPage(**row), file

    def _require_all_shards(self) -> None:
        if not self.manifests:
            raise UserError(f"{self.label}: holds no manifest.json of `colintern embed`; check the path")
        shards = [tuple(content["shard"]) for content in self.manifests.values()]
        count = shards[0][1]
        if missing := sorted({(number, count) for number in range(1, count + 1)} ^ set(shards)):
            raise UserError(f"{self.label}: shards are missing or too many: {missing}; run those of one --shard I/N")
        first = next(iter(self.manifests))
        for name, content in self.manifests.items():
            for key in MODEL_KEYS:
                if content.get(key) != self.manifests[first].get(key):
                    values = f"{self.manifests[first].get(key)!r} in {first}, {content.get(key)!r} in {name}"
                    raise UserError(f"{self.label}: {key}: {values}; these are not shards of one run")
            if not content["complete"]:
                raise UserError(f"{self.label}: the run that writes {name} did not finish; run the same command again")

    def _start_writing(self, identity: dict[str, Any], shard: tuple[int, int]) -> None:
        number, count = shard
        suffix = "" if count == 1 else f"-{number}-of-{count}"
        self.name, self.prefix = f"manifest{suffix}.json", f"pages{suffix}-"
        for name, content in self.manifests.items():
            self.manifests = {name: content}
            self.require_same_model(content["dim"])
            for key, stored, current in (
                ("--shard", content["shard"][1], count),
                ("SOURCE", content["source"], identity["source"] if name == self.name else content["source"]),
            ):
                if stored != current:
                    raise UserError(
                        f"{self.label}: {key}: was filled with {stored!r}, but this run has {current!r}; give another "
                        "folder"
                    )
        self.top.mkdir(parents=True, exist_ok=True)
        self.lock = ExitStack()  # held as long as this object
        waiting = f"{self.label}: another process is writing {self.name}, waiting for it"
        self.lock.enter_context(hold_lock(self.top / f".{self.prefix}lock", waiting))
        path = self.top / self.name
        new = identity | {"scale": SCALES.get(identity["precision"], "none"), "shard": list(shard), "files": {}}
        self.content = (read_json_object(path) if path.exists() else new) | {"complete": False}
        self.manifests = {self.name: self.content}
        for file in self.top.glob(f"{self.prefix}[0-9]*.parquet*"):
            if file.name not in self.content["files"]:
                file.unlink()
        self._write_manifest()

    def _iter_batches(self, columns: list[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
        for name, content in self.manifests.items():
            for file in content["files"]:
                try:
                    with pq.ParquetFile(self.top / file) as table:
                        for batch in table.iter_batches(ROWS_PER_GROUP, columns=columns):
                            yield file, batch
                except (pa.ArrowException, OSError) as error:
                    raise UserError(
                        f"{self.top / file}: listed in {name}, cannot be read: {error}; delete {name} and embed again"
                    ) from error

    def get_identity(self) -> dict[str, Any] | None:
        """Return the first manifest, which has the keys of an identity."""
        return next(iter(self.manifests.values()), None)

    def list_pages(self) -> dict[str, StoredPage]:
        """Return the stored pages by id."""
        return dict(self.pages)

    def upsert(self, rows: Sequence[EmbeddedPage]) -> None:
        """Write a file of these pages, and write the files of the pages that they replace again, without those."""
        self._rewrite_files([row.page.id for row in rows], rows)

    def delete(self, ids: Sequence[str]) -> None:
        """Write the files of these pages again, without them."""
        self._rewrite_files(ids, [])

    def finish(self, num_pages: int) -> None:
        """Mark the manifest as complete."""
        self.content |= {"complete": True, "pages": num_pages}
        self._write_manifest()

    def _rewrite_files(self, removed: Sequence[str], rows: Sequence[EmbeddedPage]) -> None:
        outdated = {self.file_of_id[id_] for id_ in removed if id_ in self.file_of_id}
        tables = [pq.read_table(self.top / file) for file in sorted(outdated)]
        tables = [table.filter(pc.invert(pc.is_in(table["id"], pa.array(removed)))) for table in tables]
        tables += [make_table(rows, self.content["precision"])] if rows else []
        number = max((int(file[len(self.prefix) :].partition(".")[0]) for file in self.content["files"]), default=0)
        files = {name: num_rows for name, num_rows in self.content["files"].items() if name not in outdated}
        for table in filter(len, tables):
            number += 1
            file = f"{self.prefix}{number:06}.parquet"
            self._write_file(file, partial(pq.write_table, table, **WRITE_OPTIONS))
            files[file] = len(table)
            self.file_of_id |= dict.fromkeys(table["id"].to_pylist(), file)
        self.content["files"] = files
        self._write_manifest()
        for id_ in set(removed) - {row.page.id for row in rows}:
            del self.pages[id_], self.file_of_id[id_]
        self.pages |= {row.page.id: row.page for row in rows}
        for file in outdated:
            (self.top / file).unlink()

    def _write_manifest(self) -> None:
        self._write_file(self.name, lambda path: path.write_text(format_json(self.content)))

    def _write_file(self, name: str, write: Callable[[Path], object]) -> None:
        """Write a file under another name and rename it, so that it is complete or absent."""
        unfinished = self.top / f"{name}.partial"
        try:
            with self.convert_errors():
                write(unfinished)
                unfinished.replace(self.top / name)
        finally:
            unfinished.unlink(missing_ok=True)

    def iter_vectors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the id and the (tokens, dim) float32 vectors of each page."""
        for ids, pages in self._iter_groups():
            yield from zip(ids, pages, strict=True)

    def _iter_groups(self) -> Iterator[tuple[list[str], Sequence[Tensor]]]:
        identity = self.get_identity() or {}
        for _, batch in self._iter_batches(["id", "vectors"]):
            vectors = batch["vectors"].flatten()
            elements = torch.from_numpy(vectors.flatten().to_numpy().copy()).view(len(vectors), -1)
            lengths = pc.list_value_length(batch["vectors"]).to_pylist()
            yield batch["id"].to_pylist(), dequantize(elements, identity["precision"], identity["dim"]).split(lengths)

    def search(self, query: Tensor, top: int) -> list[tuple[str, float]]:
        """Rank all pages, reading each file once."""
        scores: list[tuple[str, float]] = []
        for ids, pages in self._iter_groups():
            scores += zip(ids, maxsim_scores([query], pages)[0].tolist(), strict=True)
        return nlargest(top, scores, key=lambda hit: hit[1])


def make_table(rows: Sequence[EmbeddedPage], precision: str = "float32") -> pa.Table:
    """Return the fields of `StoredPage`, the number of tokens and the vectors, a list of lists of `dim`."""
    columns: dict[str, Any] = {name: [getattr(row.page, name) for row in rows] for name in StoredPage._fields}
    columns["tokens"] = [len(row.vectors) for row in rows]
    elements = quantize(torch.cat([row.vectors for row in rows]), precision).numpy()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(elements.ravel()), elements.shape[1])
    offsets = pa.array(np.cumsum([0, *columns["tokens"]]), pa.int32())
    return pa.table(columns | {"vectors": pa.ListArray.from_arrays(offsets, vectors)})
