"""`colintern embed --on`: two workers of a Ray cluster on this machine embed what one process embeds.

Ray is installed by uv below `.ray`, in an environment that has the packages of this one too.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, page_image
from environments import make_environment
from pages import documented
from pdf_writer import write_pdf
from test_embed import get_counts, read_rows
from test_processes import free_port
from test_search import adapted  # noqa: F401

from colintern.stores.urls import open_store

pytestmark = [pytest.mark.slow, pytest.mark.integration]
# What ray[client,data] needs beyond the locks. With rfc3987_syntax, of the development lock, `import ray` takes seconds
# longer, and the start of a busy machine's cluster fails.
PACKAGES = ["ray==2.60.*", "msgpack"]
SETUP = "import site, sys; sys.modules['rfc3987_syntax'] = None; site.addsitedir({!r})\n"
LOCAL = documented("colintern embed FOLDER --out vectors/parquet --on ray", FOLDER="documents")
CLUSTER = documented("colintern embed FOLDER --out vectors/parquet --on ray://HEAD:10001", FOLDER="documents")
NUM_IMAGES = 70
START_SECONDS = 180


@pytest.fixture(scope="module")
def ray_python() -> Path:
    return make_environment(ROOT / ".ray", "--no-deps", *PACKAGES, setup=SETUP.format(sysconfig.get_path("purelib")))


@pytest.fixture(scope="module")
def top(adapted, tmp_path_factory) -> Path:  # noqa: F811
    """A repository with an adapter, `launch: 2`, and documents: images, a PDF and a file that is none."""
    ignore = shutil.ignore_patterns("run", "features", ".index")
    folder = tmp_path_factory.mktemp("ray") / "top"
    shutil.copytree(adapted, folder, symlinks=True, ignore=ignore)
    (folder / "experiments").mkdir()
    (folder / "adapter").rename(folder / "experiments" / "colintern")
    (folder / "documents").mkdir()
    for number in range(NUM_IMAGES):
        page_image(f"page {number}").save(folder / "documents" / f"{number:03}.png")
    write_pdf(folder / "documents" / "two.pdf", [["first"], ["second"]])
    (folder / "documents" / "torn.png").write_bytes(b"torn")
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub("(?m)^launch: auto", "launch: 2", params))
    return folder


@pytest.fixture(scope="module")
def cluster(ray_python, tmp_path_factory):
    """Start a cluster of three CPUs; yield its process, and the environment in which `--on ray` joins it."""
    gcs, client = free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray")  # short, since it is part of the names of sockets
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "RAY_ADDRESS": f"127.0.0.1:{gcs}"}
    options = ["--num-cpus=3", "--include-dashboard=false", "--object-store-memory=200000000", "--disable-usage-stats"]
    command = ["start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", *options]
    with open(f"{folder}/log", "w+") as log:
        process = subprocess.Popen(
            [ray_python.parent / "ray", *command, f"--ray-client-server-port={client}"], env=env, stdout=log, stderr=log
        )
        try:
            end = time.monotonic() + START_SECONDS
            while "runtime started" not in Path(log.name).read_text():
                assert process.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                time.sleep(1)
            yield psutil.Process(process.pid), env | {"CLIENT": f"127.0.0.1:{client}"}
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            for child in filter(psutil.Process.is_running, children):
                child.kill()
            shutil.rmtree(folder)


def run(python: Path, top: Path, env: dict[str, str], command: str) -> str:
    done = subprocess.run(
        [python, "-m", "colintern", *command.split()[1:]], cwd=top, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout


class WorkerKiller(threading.Thread):
    """Kills the first worker that embeds, while it does; `pids` are those of all workers that were seen to embed."""

    def __init__(self, process: psutil.Process):
        super().__init__(daemon=True)
        self.process, self.pids, self.killed, self.ended = process, set(), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.05):
            for child in self.process.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    title = " ".join(child.cmdline())
                    if "MapWorker(MapBatches(_Embedder)).submit" in title:
                        self.pids.add(child.pid)
                        if not self.killed:
                            self.killed = child.pid
                            child.kill()


def assert_same_rows(top: Path, name: str, other: str) -> None:
    first, second = (read_rows(open_store(str(top / folder))) for folder in (name, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_killed_worker_changes_no_vector(ray_python, top, cluster):
    process, env = cluster
    single = run(ray_python, top, env, "colintern embed documents --out single")
    killer = WorkerKiller(process)
    killer.start()
    start = time.monotonic()
    log = run(ray_python, top, env, LOCAL)
    print(f"embedded on Ray in {time.monotonic() - start:.0f} s")
    killer.ended.set()
    killer.join()
    assert killer.killed in killer.pids and len(killer.pids) > 1, "others embedded what the killed one did not finish"
    pages = NUM_IMAGES + 2
    assert get_counts(single) == get_counts(log) == (pages, pages, 0, 0)
    assert "left out: torn.png: not an image" in log and "left out: 1 in all" in log
    assert len(open_store(str(top / "vectors" / "parquet")).list_pages()) == pages
    assert_same_rows(top, "single", "vectors/parquet")
    page_image("changed").save(top / "documents" / "000.png")
    page_image("page 1").save(top / "documents" / "001.png", compress_level=1)  # other bytes, the same pixels
    (top / "documents" / "002.png").unlink()
    log = run(ray_python, top, env, CLUSTER.replace("HEAD:10001", env["CLIENT"]))
    assert get_counts(log) == (pages - 1, 0, 1, 1), "a client outside the cluster embeds what changed"


HALVE = """
from pathlib import Path
import torch
from PIL import Image
from colintern.search.ray_embedding import _Embedder, _make_table, _read_table
def load():
    def embed(images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return [torch.tensor([image.width]) for image in images]
    return embed
worker = _Embedder(Path(), load, 4)
rows = worker(_make_table([(width, Image.new("RGB", (width, 1))) for width in range(1, 5)]))
print([(page, vectors.item()) for page, vectors in _read_table(rows)], worker.embed.batch_size)
"""


def test_a_worker_halves_a_batch_that_does_not_fit(ray_python):
    done = subprocess.run([ray_python, "-c", HALVE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[(1, 1), (2, 2), (3, 3), (4, 4)] 2\n" and "--batch-size is 2 from here on" in done.stderr
