"""The folders `formats` writes, read back by the tools that will read them: `datasets` and mteb, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from colintern.data import formats
from colintern.data.formats import CorpusPage, Qrel, Query, TrainingRow, write_beir, write_training_split
from colintern.data.images import encode_png

pytestmark = pytest.mark.integration
HUB_COLUMNS = [  # of vidore/colpali_train_set
    "image", "image_filename", "query", "answer", "source", "options", "page", "model", "prompt", "answer_type",
]  # fmt: skip
MTEB_LOAD = """
import json, sys
from mteb.tasks.retrieval.eng.vidore_bench_retrieval import VidoreDocVQARetrieval as Hub

class Local(Hub):
    metadata = Hub.metadata.model_copy(
        update={"name": "LocalPages", "dataset": {"path": sys.argv[1], "revision": "0" * 40}}
    )

task = Local()
task.load_data()
corpus, queries = task.corpus["test"], task.queries["test"]
print(json.dumps({
    "corpus": [[row["id"], row["image"].mode, *row["image"].size] for row in corpus],
    "queries": [[row["id"], row["text"]] for row in queries],
    "qrels": task.relevant_docs["test"],
}))
"""


def test_a_page_of_many_rows_is_held_once_and_written_as_if_it_were_held_for_each(tmp_path):
    rows = [TrainingRow(page(n // 60), f"{n // 60}.png", f"question {n}", page="1") for n in range(230)]
    rows.append(TrainingRow(page(0), "again.png", "question", answer="a"))
    file = write_training_split(tmp_path, "train", rows)
    schema = formats._build_schema({"image": formats.IMAGE_TYPE} | dict.fromkeys(formats.TEXT_COLUMNS, pa.string()))
    with pq.ParquetWriter(
        tmp_path / "plain.parquet", schema, version="2.6", compression="snappy", dictionary_pagesize_limit=2**30
    ) as writer:
        for start in range(0, len(rows), formats.ROWS_PER_GROUP):
            group = [
                vars(row) | {"image": {"bytes": row.image, "path": row.image_filename}} for row in rows[start:][:100]
            ]
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    assert file.read_bytes() == (tmp_path / "plain.parquet").read_bytes()
    image = {"bytes": page(7), "path": "x"}
    table = formats._build_table([{"image": image}] * 100, pa.schema([("image", formats.SHARED_IMAGE_TYPE)]))
    assert table.nbytes < 2 * len(page(7)) + 100 * 16


def page(shade: int) -> bytes:
    return encode_png(Image.new("L", (40 + shade, 30), shade))


def training_rows() -> list[TrainingRow]:
    """Two pages; the first is asked twice."""
    return [
        TrainingRow(page(1), "one.png", "What is on page one?", answer="a", source="demo", page="1"),
        TrainingRow(page(1), "one.png", "Und auf Seite eins? ✓", source="demo", page="1"),
        TrainingRow(page(2), "two.png", "What is on page two?", source="demo", page="2", answer_type="text"),
    ]


def beir(first: int = 0) -> tuple[list[CorpusPage], list[Query], list[Qrel]]:
    """Three pages, two queries; page 12 answers both and page 10 answers only the first."""
    corpus = [CorpusPage(10 + number, page(first + number), f"{number}.png") for number in range(3)]
    queries = [Query(0, f"first of {first}"), Query(1, f"second of {first}")]
    return corpus, queries, [Qrel(0, 10), Qrel(0, 12, 2), Qrel(1, 12)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_training_set_is_read_by_datasets_as_images_and_strings(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_training_split(folder, "train", training_rows())
    write_training_split(folder, "test", training_rows()[2:])
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 3, "test": 1}
    train = loaded["train"]
    assert train.column_names == HUB_COLUMNS
    assert isinstance(train.features["image"], datasets.Image)
    assert {str(train.features[name].dtype) for name in HUB_COLUMNS[1:]} == {"string"}
    assert train["query"][:] == [row.query for row in training_rows()]
    assert train[0]["answer"] == "a" and train[1]["answer"] is None
    assert [train[i]["image"].size for i in range(3)] == [(41, 30), (41, 30), (42, 30)]
    assert train[2]["image"].getpixel((0, 0)) == (2, 2, 2)


def test_a_page_asked_twice_is_stored_once(tmp_path: Path) -> None:
    noise = encode_png(Image.effect_noise((1200, 1200), 80))  # > 1 MB, above parquet's own dictionary limit
    rows = [TrainingRow(noise, "noise.png", f"query {number}") for number in range(4)]
    path = write_training_split(tmp_path, "train", rows)
    assert len(noise) > 2**20
    assert path.stat().st_size < 1.1 * len(noise)


def test_more_rows_than_a_row_group_keep_their_order(tmp_path: Path) -> None:
    rows = [TrainingRow(page(number % 7), f"{number % 7}.png", f"query {number}") for number in range(250)]
    path = write_training_split(tmp_path, "train", rows)
    table = pq.read_table(path)
    assert pq.ParquetFile(path).num_row_groups == 3
    assert table.column("query").to_pylist() == [row.query for row in rows]
    assert table.column("image").to_pylist() == [{"bytes": row.image, "path": row.image_filename} for row in rows]


def test_large_pages_fill_a_row_group_before_it_is_too_large_to_be_read(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(formats, "MAX_GROUP_BYTES", 3 * len(page(1)))
    rows = [TrainingRow(page(1), "one.png", f"question {number}") for number in range(7)]
    path = write_training_split(tmp_path, "train", rows)
    assert pq.ParquetFile(path).num_row_groups == 3
    assert pq.read_table(path)["query"].to_pylist() == [row.query for row in rows]


def test_mteb_loads_the_beir_folder_offline(tmp_path: Path) -> None:
    write_beir(tmp_path / "beir", *beir())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", MTEB_LOAD, str(tmp_path / "beir")]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["corpus"] == [[f"corpus-test-{10 + i}", "RGB", 40 + i, 30] for i in range(3)]
    assert seen["queries"] == [["query-test-0", "first of 0"], ["query-test-1", "second of 0"]]
    assert seen["qrels"] == {
        "query-test-0": {"corpus-test-10": 1, "corpus-test-12": 2},
        "query-test-1": {"corpus-test-12": 1},
    }


def test_folders_of_one_name_and_rewritten_folders_do_not_share_the_cache_of_datasets(tmp_path: Path) -> None:
    def queries_of(folder: Path) -> list[str]:
        loaded = datasets.load_dataset(str(folder), "queries", split="test", cache_dir=str(tmp_path / "cache"))
        return list(loaded["query"])

    left = write_beir(tmp_path / "left" / "beir", *beir(0))
    right = write_beir(tmp_path / "right" / "beir", *beir(5))
    assert queries_of(left) == ["first of 0", "second of 0"]
    assert queries_of(right) == ["first of 5", "second of 5"]
    write_beir(left, *beir(9))
    assert queries_of(left) == ["first of 9", "second of 9"]


def test_same_input_gives_the_same_bytes_and_no_other_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_training_split(tmp_path / name, "train", training_rows())
        write_beir(tmp_path / name / "beir", *beir())
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert list(files_of(tmp_path / "a")) == [
        "beir/README.md",
        "beir/corpus/test-00000-of-00001.parquet",
        "beir/qrels/test-00000-of-00001.parquet",
        "beir/queries/test-00000-of-00001.parquet",
        "data/train-00000-of-00001.parquet",
    ]
