"""`colintern embed`: vectors as parquet files and in the stores, which rank as MaxSim here does."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import qdrant_server
import torch
from conftest import page_image
from hub import running as hub_running
from pages import documented
from pdf_writer import write_pdf
from processes import Place, kill
from pyarrow import parquet
from test_hub import Workspace
from test_search import WORDS, adapted  # noqa: F401
from torch.nn.functional import normalize

from colintern.__main__ import main
from colintern.core.errors import OutOfMemoryError, UserError
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.search.corpora import open_corpus, shard_corpus
from colintern.search.embedding import (
    EmbedCounts,
    OomBackoffEmbedder,
    embed_in_process,
    embed_in_workers,
    embed_into_store,
)
from colintern.storage.identity import content_hash
from colintern.stores.base import PageStore
from colintern.stores.lance import LanceStore
from colintern.stores.parquet import ParquetStore
from colintern.stores.qdrant import QdrantFolderStore
from colintern.stores.urls import open_store, redact_url

pytestmark = pytest.mark.integration
IDENTITY = {
    **{"model": "a", "revision": "1" * 40, "base": "2" * 40, "dtype": "float32", "max_visual_tokens": 96},
    **{"pool_factor": 1, "dim": 128, "precision": "float32", "source": "here"},
}
KINDS = ("parquet", "qdrant+path", "qdrant+http", "lancedb")


@pytest.fixture
def documents(tmp_path) -> Path:
    """Five images; a PDF takes the seconds that its worker process takes to start."""
    folder = tmp_path / "documents"
    folder.mkdir()
    for word in WORDS:
        page_image(word).save(folder / f"{word}.png")
    return folder


@pytest.fixture(params=KINDS)
def url(request, tmp_path) -> Iterator[str]:
    if request.param != "qdrant+http":
        yield {"parquet": ""}.get(request.param, f"{request.param}://") + str(tmp_path / "vectors" / "pages")
        return
    with qdrant_server.running() as server:
        yield f"qdrant+http://{server.address}/pages"


@pytest.fixture
def embed(model, processor):
    def load():
        return lambda images: embed_pages(model, processor, images, len(images))

    return partial(embed_in_process, load=load, batch_size=2)


def fill(url: str, documents: Path, embed, shard=(1, 1), **changes) -> EmbedCounts:
    identity = IDENTITY | changes
    store = ParquetStore(Path(url), identity, shard) if "://" not in url else open_store(url, identity)
    return embed_into_store(store, shard_corpus(open_corpus(str(documents)), shard), shard, embed)


def read_rows(store: PageStore) -> dict[tuple[str, int], torch.Tensor]:
    pages = store.list_pages()
    return {(pages[id_].name, pages[id_].page): vectors for id_, vectors in store.iter_vectors()}


def test_each_store_ranks_as_maxsim_does(url, documents, embed, model, processor):
    assert fill(url, documents, embed) == (5, 5, 0, 0)
    store, corpus = open_store(url), open_corpus(str(documents))
    images = dict(corpus.read(set(corpus.pages), []))
    pages = embed_pages(model, processor, list(images.values()), 2)
    queries = embed_queries(model, processor, [f"sent to {word}" for word in WORDS], 5)
    scores = maxsim_scores(queries, pages)
    ids = [page.id for page in images]
    found = torch.zeros_like(scores)
    for row, query in enumerate(queries):
        hits = store.search(query, 5)
        assert [ids[column] for column in scores[row].argsort(descending=True)] == [id_ for id_, _ in hits]
        assert len(store.search(query, 2)) == 2
        for id_, score in hits:
            found[row, ids.index(id_)] = score
    torch.testing.assert_close(found, scores, atol=1e-4, rtol=0)
    relevant = [{column} for column in range(5)]
    assert ndcg_at_k(found, relevant, 5) == ndcg_at_k(scores, relevant, 5)


def test_only_what_changed_is_replaced_and_what_is_gone_is_removed(url, documents, embed):
    other = shutil.copytree(documents, documents.parent / "other")
    assert fill(url, documents, embed) == (5, 5, 0, 0)
    assert fill(url, documents, embed) == (5, 0, 0, 0)
    for word, change in (("Oslo", "Oslo"), ("Rome", "paid"), ("new", "new")):
        page_image(change).save(documents / f"{word}.png", compress_level=1)  # Oslo: other bytes, the same pixels
    for word in ("milk", "Halde"):
        (documents / f"{word}.png").unlink()
    assert fill(url, documents, embed) == (4, 1, 1, 2)
    (documents / "new.png").write_bytes(b"torn")
    corpus = open_corpus(str(documents))
    store = open_store(url, IDENTITY)
    assert embed_into_store(store, corpus, (1, 1), embed) == (3, 0, 0, 1)
    assert [(row.where, row.reason[:12]) for row in corpus.bad] == [("new.png", "not an image")]
    assert {page.name for page in store.list_pages().values()} == {"Oslo.png", "Rome.png", "Calyx.png"}
    del store
    if "://" in url:  # pages of another source stay
        assert fill(url, other, embed) == (5, 5, 0, 0) and len(open_store(url).list_pages()) == 8


@pytest.mark.parametrize(("precision", "tolerance"), [("float16", 4e-4), ("int8", 4e-3), ("binary", 0.5)])
def test_a_precision_changes_vectors_by_no_more_than_it_may(tmp_path, documents, embed, precision, tolerance):
    fill(str(tmp_path / "exact"), documents, embed)
    fill(str(tmp_path / "less"), documents, embed, precision=precision)
    exact, less = (read_rows(open_store(str(tmp_path / name))) for name in ("exact", "less"))
    for key, vectors in exact.items():
        torch.testing.assert_close(less[key], vectors, atol=tolerance, rtol=0)
        assert len(less[key]) == len(vectors) and (precision != "binary" or (less[key] * vectors >= 0).all())
    [file] = (tmp_path / "less").glob("*.parquet")
    table = parquet.read_table(file)
    assert table["tokens"].to_pylist() == [len(vectors) for vectors in table["vectors"].to_pylist()]
    manifest = json.loads((tmp_path / "less" / "manifest.json").read_text())
    assert (manifest["precision"], manifest["dim"], manifest["pages"], manifest["complete"]) == (
        precision,
        128,
        5,
        True,
    )
    if precision != "binary":
        query = normalize(torch.randn(7, 128, generator=torch.Generator().manual_seed(0)), dim=-1)
        first, second = (open_store(str(tmp_path / name)).search(query, 3) for name in ("exact", "less"))
        assert [id_ for id_, _ in first] == [id_ for id_, _ in second]


def test_another_model_or_form_is_refused_and_nothing_is_changed(url, documents, embed):
    fill(url, documents, embed)
    for change, words in (
        ({"revision": "3" * 40, "model": "b"}, r"revision: was filled with '1{40}', but this run has '3{40}' \(a, b\)"),
        ({"dim": 64}, "dim: was filled with 128, but this run has 64; use the model"),
        ({"precision": "float16"}, "precision: was filled with 'float32', but this run has 'float16'"),
        ({"pool_factor": 2}, "pool_factor: was filled with 1, but this run has 2"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            fill(url, documents, embed, **change)
        assert redact_url(url) in str(caught.value)
    assert fill(url, documents, embed) == (5, 0, 0, 0)


def test_shards_are_divided_alike_and_hold_what_one_run_holds(tmp_path, documents, embed):
    fill(str(tmp_path / "whole"), documents, embed)
    one = partial(embed, batch_size=1)
    out = str(tmp_path / "parts")
    counts = [fill(out, documents, one, (1, 3))]
    with pytest.raises(UserError, match=r"shards are missing or too many: \[\(2, 3\), \(3, 3\)\]"):
        open_store(out)
    moved = shutil.copytree(documents, tmp_path / "mounted" / "elsewhere")
    counts += [fill(out, place, one, (number, 3), source=f"{number}") for number, place in ((2, moved), (3, documents))]
    assert sum(count.pages for count in counts) == 5 and all(count.pages < 5 for count in counts)
    whole, parts = read_rows(open_store(str(tmp_path / "whole"))), read_rows(open_store(out))
    assert whole.keys() == parts.keys()
    with pytest.raises(UserError, match="--shard: was filled with 3, but this run has 1"):
        fill(out, documents, embed)
    with pytest.raises(UserError, match="SOURCE: was filled with '2', but this run has 'here'"):
        fill(out, documents, embed, (2, 3))
    manifest = tmp_path / "parts" / "manifest-2-of-3.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    with pytest.raises(UserError, match=r"manifest-2-of-3.json did not finish; run the same command again"):
        open_store(out)


def test_a_batch_that_does_not_fit_is_halved():
    sizes = []

    def embed(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return [torch.tensor([image]) for image in images]

    embedder = OomBackoffEmbedder(embed, 8)
    assert torch.cat(embedder(range(8))).tolist() == list(range(8)) and sizes == [8, 4, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        OomBackoffEmbedder(lambda images: embed([0, 1, 2]), 1)([0])


def test_a_beir_folder_is_read_row_by_row(tmp_path, documents, embed):
    images = [encode_png(page_image(word)) for word in WORDS]
    pages = [CorpusPage(number, image, f"{number}.png") for number, image in enumerate(images)]
    write_beir(tmp_path / "beir", pages, [Query(0, "a query")], [Qrel(0, 0)])
    corpus = open_corpus(str(tmp_path / "beir"))
    assert [page.name for page in corpus.pages.values()] == ["0", "1", "2", "3", "4"]
    assert fill(str(tmp_path / "out"), tmp_path / "beir", embed) == (5, 5, 0, 0)
    pages[1] = CorpusPage(1, images[0], "1.png")
    write_beir(tmp_path / "beir", pages[:4], [Query(0, "a query")], [Qrel(0, 0)])
    assert fill(str(tmp_path / "out"), tmp_path / "beir", embed) == (4, 0, 1, 1)
    [file] = (tmp_path / "beir" / "corpus").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot be read as a table of corpus-id and image"):
        open_corpus(str(tmp_path / "beir"))


COMMANDS = {  # the page's, with the folder of the documents for FOLDER, and what the last line says of the first run
    documented("colintern embed FOLDER --out vectors/parquet --precision int8", FOLDER="documents"): "vectors/parquet",
    documented(
        "colintern embed FOLDER --to qdrant+path://vectors/qdrant/manuals", FOLDER="documents"
    ): "qdrant+path://vectors/qdrant/manuals",
    documented(
        "colintern embed FOLDER --to lancedb://vectors/lancedb/manuals", FOLDER="documents"
    ): "lancedb://vectors/lancedb/manuals",
    documented("colintern embed FOLDER --out vectors/parts --shard 1/4", FOLDER="documents"): "vectors/parts",
}
SERVER = documented("colintern embed FOLDER --to qdrant+http://localhost:6333/manuals", FOLDER="documents")
STORES = {"parquet": ParquetStore, "qdrant+path": QdrantFolderStore, "lancedb": LanceStore}


@pytest.fixture
def top(adapted, documents, monkeypatch) -> Path:  # noqa: F811
    """A repository with a trained adapter in experiments/colintern, and documents."""
    folder = documents.parent
    ignore = shutil.ignore_patterns("run", "features", ".index")
    shutil.copytree(adapted, folder, symlinks=True, ignore=ignore, dirs_exist_ok=True)
    (folder / "experiments").mkdir()
    (folder / "adapter").rename(folder / "experiments" / "colintern")
    monkeypatch.chdir(folder)
    return folder


def run_main(*words: str) -> None:
    main(words)


def run_command(top: Path, command: str, fault=None, *arguments: object) -> tuple[int, str]:
    """Run a `colintern` command in a process of its own; return the exit code and what it printed."""
    place = Place(top, run_main)
    code = place.run(fault, *arguments, command=command.removeprefix("colintern "))
    return code, place.err + place.out


def get_counts(log: str) -> tuple[int, ...]:
    found = re.search(r": (\d+) pages, (\d+) added, (\d+) replaced, (\d+) removed\n\Z", log)
    assert found, log
    return tuple(map(int, found.groups()))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page_run_as_they_stand(top, command):
    write_pdf(top / "documents" / "two.pdf", [["first"], ["second"]])
    is_part = command.endswith("1/4")
    code, log = run_command(top, command)
    assert code == 0 and f"\n{COMMANDS[command]}: " in log, log
    stored, added, *others = get_counts(log)
    assert stored == added and others == [0, 0] and (0 < stored < 7 if is_part else stored == 7)
    code, log = run_command(top, command)
    assert code == 0 and get_counts(log) == (stored, 0, 0, 0)


def test_a_server_is_filled_and_its_key_is_never_shown(top):
    with qdrant_server.running("s3cret") as server:
        command = SERVER.replace("localhost:6333", server.address)
        code, log = run_command(top, command)
        assert code == 2 and "the server answered 401" in log and "set QDRANT_API_KEY" in log, log
        for url, key in (("", "s3cret"), ("me:s3cret@", ""), ("", "?api-key=s3cret")):
            filled = command.replace("http://", f"http://{url}") + key * key.startswith("?")
            code, log = run_command(top, filled, set_key, key if not key.startswith("?") else "")
            assert code == 0 and "s3cret" not in log and f"qdrant+http://{server.address}/manuals: 5 pages" in log, log
    for url in ("me:s3cret@127.0.0.1:9/manuals", "127.0.0.1:9/manuals?api_key=s3cret", "me:s3cret@127.0.0.1:x/manuals"):
        code, log = run_command(top, f"embed documents --to qdrant+http://{url}")
        assert code == 2 and "s3cret" not in log and "Traceback" not in log
        assert "is not valid; it must be" in log if ":x" in url else "cannot be reached: [Errno 111]" in log, log


def set_key(key: str) -> None:
    os.environ["QDRANT_API_KEY"] = key


def kill_at_third_batch(kind: str) -> None:
    """Write each page by itself, and end the process in the third write, before or after it."""
    store = STORES[kind]
    store.batch_bytes, upsert, calls = 1, store.upsert, []

    def upsert_or_die(self, rows):
        calls.append(rows)
        if len(calls) == 3 and kind != "parquet":
            kill()
        if len(calls) == 3:
            ParquetStore._write_manifest = lambda self: kill()
        upsert(self, rows)

    store.upsert = upsert_or_die


@pytest.mark.parametrize("kind", STORES)
def test_a_killed_run_resumes_without_gaps_or_doubles(top, kind):
    url = "vectors" if kind == "parquet" else f"{kind}://vectors/pages"
    command = f"embed documents {'--out' if kind == 'parquet' else '--to'} {url}"
    code, log = run_command(top, command, kill_at_third_batch, kind)
    assert code == -9, log
    code, log = run_command(top, command)
    assert code == 0 and get_counts(log) == (5, 3, 0, 0), log
    pages = open_store(url).list_pages()
    assert sorted(page.name for page in pages.values()) == sorted(f"{word}.png" for word in WORDS)
    if kind == "parquet":
        files = json.loads((top / "vectors" / "manifest.json").read_text())["files"]
        assert {file.name for file in (top / "vectors").glob("*.parquet*")} == set(files)
        assert sum(files.values()) == 5


@pytest.mark.parametrize(("kind", "size"), [("parquet", "60k"), ("lancedb", "100k"), ("qdrant+path", "100m")])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, documents, embed, kind, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")
    url = str(disk / "pages") if kind == "parquet" else f"{kind}://{disk}/pages/pages"
    try:
        with pytest.raises(UserError, match=r"pages: No space left on device: \d+\.\d MB are free; make room and run"):
            fill(url, documents, embed)
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        assert fill(url, documents, embed).pages == 5
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_two_processes_write_what_one_writes(top):
    assert run_command(top, "embed documents --out one")[0] == 0
    params = top / "params.yaml"
    params.write_text(params.read_text().replace("launch: auto", "launch: 2"))
    code, log = run_command(top, "embed documents --out two --batch-size 2")
    assert code == 0 and get_counts(log) == (5, 5, 0, 0), log
    shutil.rmtree(top / "two")
    code, log = run_command(top, "embed documents --out two")
    assert code == 0, log
    one, two = (parquet.read_table(top / name / "pages-000001.parquet") for name in ("one", "two"))
    assert one.equals(two)


def test_a_process_that_is_killed_is_named(documents):
    corpus = open_corpus(str(documents))
    with pytest.raises(OutOfMemoryError, match="a process that embeds pages was killed or could not load"):
        list(embed_in_workers(corpus.read(set(corpus.pages), []), kill, 1, 1))


def test_hostile_names_are_stored_and_never_reach_the_terminal(top):
    folder = top / "documents"
    for name in (b"caf\xe9.png", b"caf\xe8.png", b"\x1b[2J'; DROP TABLE pages.png", b"a\nb.png"):
        shutil.copy(folder / "milk.png", os.fsencode(folder) + b"/" + name)
    (folder / "\x1b[2Jtorn.png").write_bytes(b"torn")
    for command in ("--out vectors", "--to lancedb://lance/pages", "--to qdrant+path://qdrant/pages"):
        code, log = run_command(top, f"embed documents {command}")
        assert code == 0 and get_counts(log) == (9, 9, 0, 0) and "left out: 1 in all" in log, log
        assert r"left out: \x1b[2Jtorn.png: not an image" in log and "\x1b" not in log
        names = [page.name for page in open_store(command.split()[1]).list_pages().values()]
        assert len(names) == 9 and names.count("caf\ufffd.png") == 2 and "\x1b[2J'; DROP TABLE pages.png" in names


READ_HUB = """
import sys
from colintern.search.corpora import open_corpus
for source in sys.argv[1:]:
    corpus = open_corpus(source)
    print(corpus.source, sorted(page.name for page in corpus.pages.values()), [row.where for row in corpus.bad])
"""


def test_data_sets_of_the_hub_are_read_as_benchmarks_are(tmp_path):
    pages = [CorpusPage(number, encode_png(page_image(word)), "a.png") for number, word in enumerate(WORDS)]
    write_beir(tmp_path / "beir", pages, [Query(0, "a query")], [Qrel(0, 0)])
    commit = "5" * 40
    with hub_running() as hub:
        hub.add_folder("dataset", "org/pages", commit, tmp_path / "beir")
        done = Workspace(tmp_path, hub).run("-c", READ_HUB, f"org/pages@{commit}")
    assert done.returncode == 0 and done.stdout == f"org/pages@{commit} ['0', '1', '2', '3', '4'] []\n", done.stderr
    (tmp_path / "data").mkdir()
    files = {path.relative_to(tmp_path / "beir").as_posix(): path for path in (tmp_path / "beir").rglob("*.*")}
    entry = {name: {"size": path.stat().st_size, "sha256": content_hash(path)} for name, path in files.items()}
    manifest = {"evaluation": {"VidoreTask": {"folder": "org/pages", "revision": commit, "files": entry}}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    done = Workspace(tmp_path, hub).run("-c", READ_HUB, "VidoreTask", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout.startswith(f"VidoreTask@{commit} ['0', '1'"), done.stderr
