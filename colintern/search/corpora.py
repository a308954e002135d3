"""List and read the pages that are embedded: a folder of PDFs and images, a BEIR folder, or a data set of the hub."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from colintern.core.errors import UserError
from colintern.data.formats import check_beir_layout, normalize_id
from colintern.data.images import InvalidImageError, decode_image
from colintern.ingest.documents import InvalidRow
from colintern.params import is_on_hub, split_hub_id
from colintern.search.sources import PageSource, decode_name, list_sources, render_sources
from colintern.storage.files import list_files
from colintern.storage.hub import Repo
from colintern.storage.manifest import BEIR_SUFFIXES, MANIFEST, download_hub_files, ensure_benchmark, read_data_file
from colintern.stores.base import StoredPage, make_page_id

ROWS_PER_BATCH = 16  # of a corpus: a page takes megabytes
PageImages = Iterator[tuple[StoredPage, Image.Image]]


class PageCorpus(NamedTuple):
    """The pages of a source."""

    source: str
    pages: dict[str, StoredPage]  # by id
    bad: list[InvalidRow]  # pages that cannot be read
    places: dict[str, Any]  # by id; the argument of `read_places`
    read_places: Callable[[Mapping[StoredPage, Any], list[InvalidRow]], PageImages]  # picklable

    def select_places(self, ids: Collection[str]) -> dict[StoredPage, Any]:
        """Map the pages with these ids to the places where they are read."""
        return {page: self.places[id_] for id_, page in self.pages.items() if id_ in ids}

    def read(self, ids: Collection[str], bad: list[InvalidRow]) -> PageImages:
        """Yield the pages with these ids; `bad` gets those that cannot be read."""
        return self.read_places(self.select_places(ids), bad)


def open_corpus(source: str) -> PageCorpus:
    """List the pages of a source.

    Args:
        source: a folder of PDFs and images, or one such file; a folder in mteb's BEIR layout; the name of a data set
            that fetch-data has fetched; or a data set of the hub in that layout, as ID@COMMIT.

    Raises:
        UserError: nothing is there, no page is in it, or a file of a data set is damaged.
    """
    path = Path(source)
    if (path / "corpus").is_dir() and list_files(path / "corpus", (".parquet",), recursive=False).files:
        check_beir_layout(path)
        return _open_beir(path, decode_name(path.resolve()))
    if os.path.lexists(path):
        return _open_documents(path)
    if "@" in source and is_on_hub(source.partition("@")[0]):
        repo = Repo("SOURCE", *split_hub_id("SOURCE", source), "dataset")
        download_hub_files([(repo, BEIR_SUFFIXES)])
        return _open_beir(repo.snapshot_folder, source)
    entries = read_data_file(MANIFEST)["evaluation"] if Path(MANIFEST).is_file() else {}
    if source not in entries:
        raise UserError(
            f"SOURCE: {source!r} is no file or folder here, no hub id with its commit (ID@COMMIT), and not among the "
            f"data sets that fetch-data has fetched: {', '.join(entries) or 'none'}"
        )
    return _open_beir(ensure_benchmark(source), f"{source}@{entries[source]['revision']}")


def list_documents(place: Path) -> tuple[dict[StoredPage, PageSource], list[InvalidRow]]:
    """List the pages of a folder of PDFs and images, or of one such file, and the unreadable files."""
    sources, bad = list_sources(place)
    label, top = decode_name(place.resolve()), place if place.is_dir() else place.parent
    pages = {}
    for source in sources:
        number = 0 if source.page is None else source.page + 1
        file = source.path.relative_to(top)
        page_id = make_page_id(label, os.fsencode(file), number)
        pages[StoredPage(page_id, label, decode_name(file), number, source.key)] = source
    return pages, bad


def _open_documents(place: Path) -> PageCorpus:
    listed, bad = list_documents(place)
    pages = {page.id: page for page in listed}
    places = {page.id: source for page, source in listed.items()}
    return PageCorpus(decode_name(place.resolve()), pages, bad, places, _read_documents)


def _read_documents(places: Mapping[StoredPage, PageSource], bad: list[InvalidRow]) -> PageImages:
    pages = {source: page for page, source in places.items()}
    return ((pages[source], image) for source, image in render_sources(list(pages), bad))


class _RowGroup(NamedTuple):
    """A row group of a parquet file."""

    file: Path
    number: int


def _open_beir(folder: Path, label: str) -> PageCorpus:
    pages: dict[str, StoredPage] = {}
    places: dict[str, _RowGroup] = {}
    bad: list[InvalidRow] = []
    for group in _list_row_groups(folder):
        for name, data in _iter_rows(group, bad):
            page_id = make_page_id(label, name.encode(), 0)
            if page_id in pages:
                bad.append(InvalidRow(f"corpus-id {name}", "has a row before; the first is embedded"))
            elif not data:
                bad.append(InvalidRow(f"corpus-id {name}", "has no image"))
            else:
                pages[page_id] = StoredPage(page_id, label, name, 0, hashlib.sha256(data).hexdigest())
                places[page_id] = group
    if not pages:
        raise UserError(f"SOURCE: {folder}: its corpus holds no page")
    return PageCorpus(label, pages, bad, places, _read_rows)


def _read_rows(places: Mapping[StoredPage, _RowGroup], bad: list[InvalidRow]) -> PageImages:
    groups: dict[_RowGroup, dict[str, StoredPage]] = defaultdict(dict)
    for page, group in places.items():
        groups[group][page.name] = page
    for group, remaining in groups.items():
        for name, data in _iter_rows(group, []):
            if data and name in remaining:
                try:
                    yield remaining.pop(name), decode_image(data)
                except InvalidImageError as error:
                    bad.append(InvalidRow(f"corpus-id {name}", str(error)))


def _list_row_groups(folder: Path) -> Iterator[_RowGroup]:
    files = list_files(folder / "corpus", (".parquet",), recursive=False).files
    if not files:
        raise UserError(f"SOURCE: {folder}: holds no parquet file in corpus/, as a data set in mteb's BEIR layout does")
    for file in files:
        with _name_unreadable_table(file), pq.ParquetFile(file) as content:
            count = content.num_row_groups
        yield from (_RowGroup(file, number) for number in range(count))


def _iter_rows(group: _RowGroup, bad: list[InvalidRow]) -> Iterator[tuple[str, bytes]]:
    """Yield the id and the image's bytes of each row, b"" for a row without an image."""
    with _name_unreadable_table(group.file), pq.ParquetFile(group.file) as content:
        columns = ["corpus-id", "image"]
        for batch in content.iter_batches(ROWS_PER_BATCH, row_groups=[group.number], columns=columns):
            for row in batch.to_pylist():
                try:
                    yield normalize_id(row["corpus-id"]), (row["image"] or {}).get("bytes") or b""
                except ValueError as error:
                    bad.append(InvalidRow(group.file.name, f"corpus-id {error}"))


@contextmanager
def _name_unreadable_table(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, KeyError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read as a table of corpus-id and image: {error}; replace it") from error


def shard_corpus(corpus: PageCorpus, shard: tuple[int, int]) -> PageCorpus:
    """Return the part of a corpus that one of several runs embeds."""
    return corpus._replace(pages={page.id: page for page in corpus.pages.values() if is_in_shard(page, shard)})


def is_in_shard(page: StoredPage, shard: tuple[int, int]) -> bool:
    """Return whether a page belongs to shard (number from 1, count), by a hash of its name and number.

    The source is left out, so that machines which mount it in different places divide it alike.
    """
    number, count = shard
    digest = hashlib.sha256(f"{page.name}\0{page.page}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % count == number - 1
