"""`colintern embed`: vectors as parquet files and in the stores, which rank as MaxSim here does."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial, partialmethod
from pathlib import Path
from types import SimpleNamespace

import pytest
import qdrant_server
import torch
from base_embedder import load_base
from conftest import BASE, page_image
from hub import running as hub_running
from pages import documented
from pdf_writer import write_pdf
from processes import FORKS, Place, kill
from pyarrow import parquet
from test_hub import Workspace
from test_search import WORDS, adapted  # noqa: F401
from torch.nn.functional import normalize

from colintern.__main__ import main
from colintern.commands.embed import prepare_ray_embedding
from colintern.core.errors import OutOfMemoryError, UserError
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.encoding.multi_process import EmbeddingPool, OomBackoffEmbedder, count_workers
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from colintern.search.corpora import open_corpus, shard_corpus
from colintern.search.embedding import EmbedCounts, embed_into_store, embed_pages_in_pool
from colintern.storage.identity import content_hash
from colintern.stores.base import EmbeddedPage, PageStore
from colintern.stores.lance import LanceStore
from colintern.stores.parquet import ParquetStore
from colintern.stores.qdrant import QdrantFolderStore
from colintern.stores.urls import open_store, redact_url

pytestmark = pytest.mark.integration
IDENTITY = {
    **{
        "model": "a",
        "revision": "1" * 40,
        "base": "2" * 40,
        "dtype": "float32",
        "max_visual_tokens": 96,
        "tiling": "exact",
    },
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

    return partial(embed_pages_in_pool, pool=EmbeddingPool(load, 1), batch_size=2)


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

    embedder = OomBackoffEmbedder(embed)
    assert torch.cat(embedder(range(8))).tolist() == list(range(8)) and sizes == [8, 4, 2, 2, 2, 2]
    with pytest.raises(torch.OutOfMemoryError):
        OomBackoffEmbedder(lambda images: embed([0, 1, 2]))([0])


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


def run_commands(*lines: str) -> None:
    """Run command lines one after the other, since a process takes seconds to start."""
    for line in lines:
        key, _, command = line.rpartition("|")
        os.environ["QDRANT_API_KEY"] = key
        try:
            main(command.split()[command.startswith("colintern") :])
        except SystemExit as ended:
            print(f"exit {ended.code}", flush=True)
        print("end", flush=True)


def join_streams() -> None:
    os.dup2(1, 2)


def run(top: Path, *lines: str) -> list[str]:
    """Return what each of the command lines printed, in one separate process."""
    place = Place(top, run_commands)
    assert place.run(join_streams, command=shlex.join(lines)) == 0, place.log
    return place.out.split("end\n")[:-1]


def get_counts(log: str) -> tuple[int, ...]:
    found = re.search(r": (\d+) pages, (\d+) added, (\d+) replaced, (\d+) removed\n\Z", log)
    assert found, log
    return tuple(map(int, found.groups()))


def test_commands_of_the_page_run_as_they_stand(top):
    write_pdf(top / "documents" / "two.pdf", [["first"], ["second"]])
    first, again = run(top, *COMMANDS), run(top, *COMMANDS)
    for label, log, later in zip(COMMANDS.values(), first, again, strict=True):
        assert f"\n{label}: " in log
        stored, added, *others = get_counts(log)
        assert stored == added and others == [0, 0] and (0 < stored < 7 if label.endswith("parts") else stored == 7)
        assert get_counts(later) == (stored, 0, 0, 0)


def test_a_server_is_filled_and_credentials_are_never_shown(top):
    with qdrant_server.running("s3cret") as server:
        url = SERVER.replace("localhost:6333", server.address)
        refused, *filled = run(top, url, f"s3cret|{url}", url.replace("//", "//me:s3cret@"), f"{url}?api-key=s3cret")
    assert "the server answered 401" in refused and "set QDRANT_API_KEY" in refused and refused.endswith("exit 2\n")
    assert [get_counts(log) for log in filled] == [(5, 5, 0, 0), (5, 0, 0, 0), (5, 0, 0, 0)]
    assert all(f"qdrant+http://{server.address}/manuals: 5 pages" in log for log in filled)
    bad = ("me:s3cret@127.0.0.1:9/manuals", "127.0.0.1:9/manuals?api_key=s3cret", "me:s3cret@127.0.0.1:x/manuals")
    logs = run(top, *(f"embed documents --to qdrant+http://{address}" for address in bad))
    words = ["cannot be reached: [Errno 111]", "start the server, or correct", "is not valid; it must be"]
    assert all(word in log and log.endswith("exit 2\n") for word, log in zip(words, logs, strict=True)), logs
    assert "s3cret" not in "".join([refused, *filled, *logs]) and "Traceback" not in "".join(logs)


def embed_simply(pages) -> Iterator[EmbeddedPage]:
    """Stand in for a model where only the writing is in question."""
    for page, image in pages:
        generator = torch.Generator().manual_seed(len(image.tobytes()) + len(page.name))
        yield EmbeddedPage(page, normalize(torch.randn(200, 128, generator=generator), dim=-1))


def fill_and_die(url: str, documents: Path) -> None:
    """Write each page by itself, and end the process in the third write: of parquet between file and manifest."""
    calls: list[object] = []
    for store in (ParquetStore, QdrantFolderStore, LanceStore):
        store.batch_bytes, store.upsert = 1, partialmethod(upsert_or_die, store.upsert, calls)
    if "://" not in url:
        write = ParquetStore._write_manifest
        ParquetStore._write_manifest = lambda self: kill() if len(calls) == 3 else write(self)
    fill(url, documents, embed_simply)


def upsert_or_die(self, upsert, calls, rows) -> None:
    calls.append(rows)
    if len(calls) == 3 and not isinstance(self, ParquetStore):
        kill()
    upsert(self, rows)


@pytest.mark.parametrize("kind", ["parquet", "qdrant+path", "lancedb"])
def test_a_killed_run_resumes_without_gaps_or_doubles(tmp_path, documents, kind):
    url = f"{'' if kind == 'parquet' else f'{kind}://'}{tmp_path}/vectors/pages"
    process = FORKS.Process(target=fill_and_die, args=(url, documents))
    process.start()
    process.join(180)
    assert process.exitcode == -9
    assert fill(url, documents, embed_simply) == (5, 3, 0, 0)
    store = open_store(url)
    assert sorted(page.name for page in store.list_pages().values()) == sorted(f"{word}.png" for word in WORDS)
    assert len(store.search(torch.eye(128)[:2], 9)) == 5
    if kind == "parquet":
        files = json.loads((tmp_path / "vectors" / "pages" / "manifest.json").read_text())["files"]
        assert {file.name for file in (tmp_path / "vectors" / "pages").glob("*.parquet*")} == set(files)
        assert sum(files.values()) == 5


@pytest.mark.parametrize(("kind", "size"), [("parquet", "200k"), ("lancedb", "300k"), ("qdrant+path", "100m")])
def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, documents, kind, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk needs the right to mount a tmpfs: {done.stderr.strip()}")
    url = str(disk / "pages") if kind == "parquet" else f"{kind}://{disk}/pages/pages"
    try:
        with pytest.raises(
            UserError, match=r"pages: No space left on device: \d+\.\d MB are free; free disk space and run"
        ):
            fill(url, documents, embed_simply)
        subprocess.run(["mount", "-o", "remount,size=400m", disk], check=True)
        assert fill(url, documents, embed_simply).pages == 5
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_two_processes_embed_what_one_embeds(documents):
    assert (count_workers("auto"), count_workers(2)) == (1, 2)
    corpus, load = open_corpus(str(documents)), partial(load_base, BASE)

    def embed_corpus(num_workers: int) -> list[EmbeddedPage]:
        with closing(EmbeddingPool(load, num_workers)) as pool:
            return list(embed_pages_in_pool(corpus.read(set(corpus.pages), []), pool, 1))

    one, two = embed_corpus(1), embed_corpus(2)
    assert [row.page for row in two] == [row.page for row in one] and len(one) == 5
    assert all(torch.equal(a.vectors, b.vectors) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("load", "error", "message"),
    [
        (kill, OutOfMemoryError, r"was killed \(SIGKILL\); the machine probably ran out of memory"),
        (Path("gone/config.json").read_text, FileNotFoundError, "gone/config.json"),
        pytest.param(partial(os._exit, 3), UserError, "was ended with exit code 3; see", marks=pytest.mark.slow),
    ],
    ids=["killed", "cannot load", "exited"],
)
def test_what_ended_a_process_is_named(load, error, message):
    with closing(EmbeddingPool(load, 2)) as pool, pytest.raises(error, match=message):
        list(pool.embed_batches([["a page"]]))


def test_a_cluster_that_cannot_embed_is_refused(top):
    """Without Ray, which has no place in the locks; tests/test_ray.py has it."""
    commands = ("--on 10.0.0.1:6379", "--on ray --shard 1/2", "--on ray")
    logs = run(top, *(f"embed documents --out vectors {options}" for options in commands))
    words = (
        "--on: '10.0.0.1:6379' is not valid; it must be ray or ray://HOST:PORT",
        "argument --shard: not allowed with argument --on",
        "ray is not installed; install the extra `ray` of pyproject.toml",
    )
    for log, word in zip(logs, words, strict=True):
        assert word in log and log.endswith("exit 2\n")
    assert not (top / "vectors").exists()
    cluster = SimpleNamespace(num_cpus=4, num_gpus=2, num_machines=3, device="H200")
    machines = SimpleNamespace(num_cpus=4, num_gpus=0, num_machines=3, device="cpu")
    assert [count_workers("auto", 2, 3), count_workers("auto", 0, 3), count_workers(1, 2)] == [2, 3, 1]
    with pytest.raises(UserError, match="launch: 3 is more than the 2 GPUs that can be seen"):
        prepare_ray_embedding(cluster, SimpleNamespace(launch=3, threads=1), kill, 1)
    with pytest.raises(UserError, match="launch: 2 workers with threads: 2, and one that renders, need 5 CPUs, but"):
        prepare_ray_embedding(machines, SimpleNamespace(launch=2, threads=2), kill, 1)


def test_hostile_names_are_stored_and_never_reach_the_terminal(top):
    folder = top / "documents"
    for name in (b"caf\xe9.png", b"caf\xe8.png", b"\x1b[2J'; DROP TABLE pages.png", b"a\nb.png"):
        shutil.copy(folder / "milk.png", os.fsencode(folder) + b"/" + name)
    (folder / "\x1b[2Jtorn.png").write_bytes(b"torn")
    urls = ("vectors", "lancedb://lance/pages", "qdrant+path://qdrant/pages")
    for url, log in zip(
        urls, run(top, *(f"embed documents --{'to' if '/' in u else 'out'} {u}" for u in urls)), strict=True
    ):
        assert get_counts(log) == (9, 9, 0, 0) and "left out: 1 in all" in log
        assert r"left out: \x1b[2Jtorn.png: not an image" in log and "\x1b" not in log
        names = [page.name for page in open_store(url).list_pages().values()]
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
    assert done.returncode == 0 and f"org/pages@{commit} ['0', '1', '2', '3', '4'] []\n" in done.stdout, done
    (tmp_path / "data").mkdir(exist_ok=True)
    files = {path.relative_to(tmp_path / "beir").as_posix(): path for path in (tmp_path / "beir").rglob("*.*")}
    entry = {name: {"size": path.stat().st_size, "sha256": content_hash(path)} for name, path in files.items()}
    manifest = {"evaluation": {"VidoreTask": {"folder": "org/pages", "revision": commit, "files": entry}}}
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest))
    done = Workspace(tmp_path, hub).run("-c", READ_HUB, "VidoreTask", HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and done.stdout.startswith(f"VidoreTask@{commit} ['0', '1'"), done.stderr


def test_pages_are_pooled_and_truncated_as_they_are_evaluated(top):
    [log] = run(top, "embed documents --out small --pool-factor 2 --dim 64 --precision binary")
    assert get_counts(log) == (5, 5, 0, 0)
    manifest = json.loads((top / "small" / "manifest.json").read_text())
    assert (manifest["pool_factor"], manifest["dim"], manifest["precision"]) == (2, 64, "binary")
    [full, less] = run(top, "embed documents --out full --dim 64", "embed documents --out full --dim 32")
    assert get_counts(full) == (5, 5, 0, 0)
    assert "full: dim: was filled with 64, but this run has 32" in less and less.endswith("exit 2\n")
    tokens = [
        parquet.read_table(top / name / "pages-000001.parquet")["tokens"].to_pylist() for name in ("small", "full")
    ]
    assert all(pooled < whole for pooled, whole in zip(*tokens, strict=True))
    vectors = parquet.read_table(top / "small" / "pages-000001.parquet")["vectors"]
    assert vectors.type.value_type.list_size == 8


def test_a_foreign_table_or_collection_is_refused(tmp_path):
    import lancedb
    import qdrant_edge as edge

    lancedb.connect(str(tmp_path / "db")).create_table("pages", [{"id": "a", "vectors": [1.0, 2.0]}])
    with pytest.raises(UserError, match="db/pages: holds rows that colintern embed did not write; give another table"):
        open_store(f"lancedb://{tmp_path}/db/pages", IDENTITY)
    vectors = edge.EdgeVectorParams(size=2, distance=edge.Distance.Dot)
    (tmp_path / "collection").mkdir()
    shard = edge.EdgeShard.create(str(tmp_path / "collection"), edge.EdgeConfig(vectors={"": vectors}))
    shard.update(edge.UpdateOperation.upsert_points([edge.Point(1, [1.0, 2.0], {})]))
    shard.close()
    with pytest.raises(UserError, match="holds points that colintern embed did not write; give another collection"):
        open_store(f"qdrant+path://{tmp_path}/collection", IDENTITY)


@pytest.mark.parametrize(
    ("url", "module", "words"),
    [
        ("lancedb://a/b", "lancedb", "lancedb is not installed; install the extra `stores`"),
        ("qdrant+path://a/b", "qdrant_edge", "qdrant-edge-py is not installed; install the extra `stores`"),
        ("qdrant+http://a/b", "qdrant_client", "qdrant-client is not installed; install the extra `stores`"),
        ("lancedb://a/b", "", "lancedb://a/b: does not exist; fill it with colintern embed --to"),
        ("qdrant+path://a/b", "", "qdrant+path://a/b: does not exist; fill it"),
        ("vectors", "", "vectors: holds no manifest.json"),
        ("qdrant+path://collection", "", "names no store; it must be qdrant"),
        ("milvus://a/b", "", "milvus://a/b: names no store; it must be"),
    ],
)
def test_what_cannot_be_opened_is_named(tmp_path, monkeypatch, url, module, words):
    monkeypatch.chdir(tmp_path)
    if module:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=re.escape(words)):
        open_store(url)
