"""The rows of the training set: which page belongs to which query, and that none of it is held in memory."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT, load_pairs
from PIL import Image

from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.data.images import encode_png
from colintern.data.training_set import ROW_INDEX, IndexRow, get_training_data_params, read_row_index, write_row_index
from colintern.params import load_params
from colintern.storage.manifest import hash_local_files
from colintern.training.pairs import read_page_image

pytestmark = pytest.mark.integration
SET, GROUP = "data/own/set", 8
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Most memory in MB, seen after each page of the first row group and of all, and the bytes read before pages.
READ_ALL = """
import json
from colintern.data.training_set import ROW_INDEX, IndexRow, read_row_index, write_row_index, load_training_data
from colintern.training.pairs import load_training_pairs
from colintern.params import load_params

def fact(file, name):
    return int(next(line for line in open(f"/proc/self/{file}") if line.startswith(name)).split()[1])

def most(pairs):
    return max(fact("status", "VmRSS") for pair in pairs if pair.page.image()) / 1024

load_training_pairs(load_training_data(load_params()))  # what is imported on first use
before = fact("io", "rchar")
pairs = load_training_pairs(load_training_data(load_params()))["train"]
started = fact("io", "rchar") - before
print(json.dumps({"one": most(pairs[:8]), "all": most(pairs), "read": started / 2**20, "rows": len(pairs)}))
"""


def write_rows(split: str, images: list, column: pa.DataType = STRUCT) -> Path:
    path = Path(SET, f"{split}-00000-of-00001.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"query": [f"{split} {n}" for n in range(len(images))], "image": pa.array(images, column)})
    pq.write_table(table, path, row_group_size=GROUP)
    return path


def page(number: int, noise: int = 0) -> bytes:
    """A page as wide as its number tells; of `noise` x `noise` random pixels if given, which nothing compresses."""
    if noise:
        pixels, file = np.random.default_rng(number).integers(0, 256, (noise, noise, 3), np.uint8), io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=0)
        return file.getvalue()
    return encode_png(Image.new("RGB", (10 + number, 10), "white"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)


def fetched(train: list[bytes], dev: list[bytes], **index_of_dev: str) -> None:
    """What fetch-data leaves behind for a training set."""
    for split, pages in (("train", train), ("test", dev)):
        write_rows(split, [{"bytes": data, "path": None} for data in pages])
    shutil.copytree(ROOT / "demo" / "base", "demo/base")
    text = render_recipe(ROOT / "recipes" / "demo.yaml")
    Path("params.yaml").write_text(text.replace("train_data: demo\n", f"train_data: {SET}\n"))
    manifest = {
        "base": hash_local_files("demo/base", (".json", ".safetensors"))._asdict(),
        "made_for": get_training_data_params(load_params()),
        "train_corpus": None,
        "negatives": None,
        "train": [hash_local_files(SET, (".parquet",))._asdict()],
        "evaluation": {},
    }
    Path("data/manifest.json").write_text(json.dumps(manifest))
    name = "{}-00000-of-00001.parquet"
    found = [IndexRow(SET, "train", name.format("train"), n, f"t{n}", f"train {n}") for n in range(len(train))]
    found += [IndexRow(SET, "dev", name.format("test"), n, f"d{n}", f"test {n}") for n in range(len(dev))]
    write_row_index(row._replace(**index_of_dev) if row.split == "dev" else row for row in found)


@pytest.mark.parametrize("column", [STRUCT, pa.binary()], ids=["as the hub stores it", "bare bytes"])
def test_each_row_has_its_own_page_on_both_sides_of_a_row_group(folder, column):
    images = [page(n) for n in range(2 * GROUP + 3)]
    path = write_rows("train", [{"bytes": data} for data in images] if column == STRUCT else images, column)
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [read_page_image(path, n).width for n in range(len(images))] == [10 + n for n in range(len(images))]


def test_a_query_is_paired_with_the_page_of_its_row(folder):
    fetched([page(n) for n in range(20)], [page(30 + n) for n in range(3)])
    found = load_pairs()
    assert [(p.query, p.page.key, p.page.image().width) for p in found["test"]] == [
        (f"test {n}", f"d{n}", 40 + n) for n in range(3)
    ]
    assert [p.page.image().width for p in found["train"]] == [10 + n for n in range(20)]


def test_memory_holds_a_row_group_and_not_the_set_and_a_start_reads_no_page(folder):
    fetched([page(n, noise=600) for n in range(12 * GROUP)], [page(0)])
    size = sum(path.stat().st_size for path in Path(SET).glob("*.parquet")) / 2**20
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", READ_ALL], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 12 * GROUP and size > 90
    assert found["all"] - found["one"] < size / 4, (found, size)
    assert found["read"] < size / 100, (found, size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../other.parquet"}, r"data/rows\.parquet: \.\./other\.parquet of .* is not in data/manifest\.json"),
        ({"source": "data/own/other"}, r"test-.* of data/own/other is not in data/manifest\.json"),
        ({"split": "train"}, r"train_data: data/own/set has no row of dev that can be used"),
    ],
)
def test_an_index_that_does_not_fit_the_manifest_is_refused(folder, change, message):
    fetched([page(0)], [page(1)], **change)
    with pytest.raises(UserError, match=message):
        load_pairs()


def test_a_missing_index_says_what_to_run(folder):
    fetched([page(0)], [page(1)])
    Path(ROW_INDEX).unlink()
    with pytest.raises(UserError, match=r"data/rows\.parquet: missing.*dvc repro fetch-data"):
        load_pairs()


def test_the_index_has_the_same_bytes_for_the_same_rows(folder):
    found = [IndexRow(SET, "train", "a.parquet", n, f"{n:064x}", f"query {n} é") for n in range(300)]
    Path("data").mkdir()
    written = []
    for _ in range(2):
        write_row_index(iter(found))
        written.append(Path(ROW_INDEX).read_bytes())
    assert written[0] == written[1] and read_row_index() == found
