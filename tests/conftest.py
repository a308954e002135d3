"""Fixtures: the demo base is small enough to be loaded by any test."""

import contextlib
import logging
import os
import socket
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: a second thread slows such small models down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import forked_python
import pytest
from PIL import Image, ImageDraw
from postgres import postgresql, postgresql_or_none  # noqa: F401
from small_run import fetched, place, whole  # noqa: F401

from colintern.core.terminal import configure_logging

ROOT = Path(__file__).parents[1]
BASE = ROOT / "demo" / "base"
configure_logging()  # as a command or stage does
logging.getLogger("colintern").propagate = True  # to `caplog`
# The longest first: several processes share the files between them, and should not end on one of these.
LONG = """tune_dvc tutorial dvc_commands evaluate survival hub training pretended_cuda tune verify cluster hub_pipeline
kernels negatives remotes own search survey costs doctor recommend checkpoints pr demo adapters report""".split()


def pytest_collection_modifyitems(items):
    for item in items:
        if not any(item.iter_markers("integration")) and not any(item.iter_markers("slow")):
            item.add_marker("unit")
    order = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """A folder of all processes of pytest-xdist that run these tests."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def forked(shared_folder):
    """A folder with a `python` that need not import torch, and a `dvc`."""
    with forked_python.join_server(shared_folder / "forked") as folder:
        yield folder


@pytest.fixture(scope="session")
def processor():
    from colintern.modeling.processor import ColIntern3_5Processor

    return ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96, max_query_tokens=64)


@pytest.fixture
def model():
    import torch

    from colintern.modeling.retriever import ColIntern3_5

    return ColIntern3_5.from_pretrained(BASE, dtype=torch.float32)


@pytest.fixture(scope="session")
def pages():
    """Pages of several shapes, so that batches are ragged."""

    def page(width: int, height: int, word: str) -> Image.Image:
        image = Image.new("RGB", (width, height), "white")
        ImageDraw.Draw(image).text((20, 30), word, fill="black")
        return image

    return [page(224, 336, "Oslo"), page(112, 112, "Rome"), page(224, 112, "Halde"), page(150, 400, "milk")]


def page_image(word: str) -> Image.Image:
    """A small page that shows a word."""
    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).text((10, 30), word, fill="black")
    return image


# What stands in for a file and is none: reading the first three would never end, the others end in an error.
IRREGULAR = {
    "a named pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": lambda path: _socket(path),
    "a folder": Path.mkdir,
    "a dangling link": lambda path: path.symlink_to("nowhere"),
    "a loop of links": lambda path: path.symlink_to(path.name),
}


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(path.parent):
        one.bind(path.name)  # a path of more than 107 characters is refused


def irregular_files(folder: Path, suffix: str) -> list[str]:
    """Put one of each kind of `IRREGULAR` into a folder; their names with their kinds."""
    for number, make in enumerate(IRREGULAR.values()):
        make(folder / f"odd{number}{suffix}")
    return [f"odd{number}{suffix}{'/' * (kind == 'a folder')} ({kind})" for number, kind in enumerate(IRREGULAR)]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def fake_gs(tmp_path, monkeypatch) -> Path:
    """A file that appears when Ghostscript is run."""
    marker, folder = tmp_path / "ghostscript-was-run", tmp_path / "path"
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow remembers that there is none
    return marker


def load_pairs(params=None):
    """Load the training pairs of the project in the current folder."""
    from colintern.data.training_set import load_training_data
    from colintern.params import load_params
    from colintern.training.pairs import load_training_pairs

    params = params or load_params()
    return load_training_pairs(load_training_data(params), params.negatives)
