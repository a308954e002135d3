"""Parquet sets with real faults in their rows: what costs a row, what stops the run, and what is never read (D1-D8)."""

import json
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import IRREGULAR, ROOT, load_pairs, page_image
from pdf_writer import write_pdf
from processes import program

from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.data.benchmarks import _folder_task
from colintern.data.formats import TABLES, CorpusPage, Qrel, Query, check_beir, write_beir
from colintern.data.images import png_bytes
from colintern.ingest.checks import check_benchmarks, check_judgements
from colintern.ingest.collected import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import Part, look
from colintern.ingest.splits import by_name
from colintern.params import load_params
from colintern.statistics.survey import survey
from colintern.storage.manifest import hash_local_file, hash_local_files

pytestmark = pytest.mark.integration
SET, BEIR = "data/own/set", "data/own/beir"
PAGES = [png_bytes(page_image(f"page {number}")) for number in range(60)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A repository with the demo base and params that name a training set and an evaluation set of one's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    shutil.copytree(ROOT / "demo" / "base", "demo/base")
    write_params()
    write_set(range(0, 40), range(40, 45))
    write_eval(range(45, 55))


def write_params(**values: object) -> None:
    text = render_recipe(ROOT / "recipes" / "demo.yaml")
    text = text.replace("train_data: demo\n", f"train_data: {values.pop('train_data', SET)}\n")
    text = text.replace("- demo\n", f"- {BEIR}\n")
    for key, value in values.items():
        text = text.replace(f"\n{key}: 0.01\n", f"\n{key}: {value}\n")
    Path("params.yaml").write_text(text)


def row(number: int) -> dict:
    return {"query": f"question {number}", "image": {"bytes": PAGES[number], "path": f"{number}.png"}}


def write_rows(split: str, rows: list[dict], name: str = SET) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(rows, schema=pa.schema([("query", pa.string()), ("image", image)]))
    Path(name).mkdir(parents=True, exist_ok=True)
    pq.write_table(table, f"{name}/{split}-00000-of-00001.parquet", row_group_size=16)


def write_set(train: range, dev: range, name: str = SET) -> None:
    write_rows("train", [row(number) for number in train], name)
    write_rows("test", [row(number) for number in dev], name)


def write_eval(pages: range) -> None:
    write_beir(
        Path(BEIR),
        [CorpusPage(number, PAGES[number], f"{number}.png") for number in pages],
        [Query(number, f"query {number}") for number in pages],
        [Qrel(number, number) for number in pages],
    )


def fetch_data() -> "subprocess.CompletedProcess[str]":
    return program("stages.fetch_data")


def quarantine() -> list[dict]:
    return json.loads(Path("data/quarantine.json").read_text())["rows"]


CASES = [
    ({"image": {"bytes": PAGES[59][:400], "path": "59.png"}}, "image: cannot be decoded"),
    ({"image": {"bytes": b"<html>429 too many requests", "path": "59.png"}}, "image: not an image"),
    ({"image": {"bytes": b"", "path": "59.png"}}, "image: empty: 0 bytes"),
    ({"image": {"bytes": None, "path": "https://example.com/59.png"}}, "image: refused: the row holds no bytes"),
    ({"image": {"bytes": None, "path": "/etc/hostname"}}, "image: refused: the row holds no bytes"),
    ({"image": {"bytes": None, "path": "../59.png"}}, "image: refused: the row holds no bytes"),
    ({"image": None}, "image: missing"),
    ({"query": ""}, "query is empty"),
    ({"query": " \t\u2003"}, "query is empty"),
    ({"query": None}, "query is not text"),
]


def test_each_bad_row_costs_one_row_and_is_named():
    from colintern.modeling.processing_colintern import ColIntern3_5Processor

    bad = [row(n) | change for n, (change, _) in enumerate(CASES)]
    long = {"query": "word " * 10_000} | {"image": row(0)["image"]}
    right_to_left = row(1) | {"query": "ما هو المبلغ؟ 📄"}
    write_rows("train", [*bad[:5], *map(row, range(10, 30)), long, right_to_left, *bad[5:]])
    write_params(max_bad_fraction=0.3)
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    assert "10 of 47 rows in data/quarantine.json" in done.stdout  # 32 training, 5 dev, 10 pages of the benchmark
    places = [f"train-00000-of-00001.parquet:{n}" for n in (*range(5), *range(27, 32))]
    assert [(entry["source"], entry["row"]) for entry in quarantine()] == [(SET, place) for place in places]
    for entry, (_, reason) in zip(quarantine(), CASES, strict=True):
        assert entry["reason"].startswith(reason)
    queries = [row.query for row in load_pairs()["train"]]
    assert queries == [f"question {n}" for n in range(10, 30)] + [long["query"], right_to_left["query"]]
    processor = ColIntern3_5Processor.from_pretrained("demo/base", max_visual_tokens=96, max_query_tokens=64)
    assert processor.process_queries(queries[-2:])["input_ids"].shape == (2, 64)
    assert processor.count_truncated(queries) == 1


def test_too_many_bad_rows_stop_the_run_and_are_named_all_the_same():
    write_rows("train", [row(0) | {"query": ""}, *map(row, range(1, 40))])
    done = fetch_data()
    assert done.returncode == 2
    assert f"{SET}: 1 of 45 rows cannot be used, more than max_bad_fraction: 0.01" in done.stderr
    assert "train-00000-of-00001.parquet:0: query is empty: ''" in done.stderr
    assert len(quarantine()) == 1
    assert not Path("data/manifest.json").exists()


def test_the_list_is_there_when_it_is_empty():
    assert fetch_data().returncode == 0
    assert quarantine() == []


def test_a_decompression_bomb_in_a_row_is_refused_and_named():
    from test_images import bomb

    write_rows("train", [row(0) | {"image": {"bytes": bomb(14_000, 14_000), "path": "b.png"}}, *map(row, range(1, 40))])
    write_params(max_bad_fraction=0.05)
    assert fetch_data().returncode == 0
    [entry] = quarantine()
    assert entry["reason"].startswith("image: decompression bomb")


@pytest.mark.parametrize(
    ("train", "dev", "evaluation", "message"),
    [
        (range(0, 41), range(40, 45), range(45, 55), rf"in {SET} \(train\), .*:40, and in {SET} \(dev\), .*:0 "),
        (range(0, 40), range(40, 46), range(45, 55), rf"in {SET} \(dev\), .*:5, and in {BEIR} \(test\), corpus/.*:0 "),
        (range(0, 40), range(40, 45), range(38, 55), rf"in {SET} \(train\), .*:38, and in {BEIR} \(test\), .*:0 \(2 "),
    ],
    ids=["train and dev", "dev and evaluation", "train and evaluation"],
)
def test_a_page_in_two_splits_is_refused_with_both_places(train, dev, evaluation, message):
    write_set(train, dev)
    write_eval(evaluation)
    done = fetch_data()
    assert done.returncode == 2
    assert re.search(f"the same page is {message}", done.stderr), done.stderr
    assert not Path("data/manifest.json").exists()


def test_a_mixture_shows_the_rows_of_a_set_as_often_as_its_weight_says():

    write_set(range(55, 58), range(58, 59), "data/own/small")
    write_params(train_data=f"{SET} + data/own/small*3")
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    found = {split: [row.query for row in some] for split, some in load_pairs().items()}
    queries = found["train"]
    assert len(queries) == 40 + 3 * 3
    assert queries.count("question 56") == 3 and queries.count("question 7") == 1
    assert found["test"].count("question 58") == 1, "the dev set is not weighted"
    assert found["test"][:2] == ["question 40", "question 58"], "the sets take turns"


def test_a_leak_between_two_sets_of_a_mixture_is_found():
    write_set(range(43, 48), range(58, 59), "data/own/small")
    write_params(train_data=f"{SET} + data/own/small*3")
    done = fetch_data()
    assert done.returncode == 2
    assert "the same page is in data/own/small (train)" in done.stderr


EVALUATION_FAULTS = {
    "corpus": ({"image": {"bytes": b"<html>", "path": "1.png"}}, "corpus/.*:0: image: not an image"),
    "queries": ({"query": "  "}, "query 45: query is empty"),
    "qrels": ({"corpus-id": 999}, "qrels: the page '999' of query '45' is not in the corpus"),
}


def rewritten(part: str, rows: Callable[[list[dict]], list[dict]]) -> None:
    [path] = Path(BEIR, part).glob("*.parquet")
    table = pq.read_table(path)
    pq.write_table(pa.Table.from_pylist(rows(table.to_pylist())), path)


@pytest.mark.parametrize(
    ("part", "rows", "message"),
    [
        ("corpus", lambda rows: [*rows, rows[3]], "corpus-id 48 is in 2 rows"),
        ("queries", lambda rows: [*rows, rows[3]], "query-id 48 is in 2 rows"),
        ("qrels", lambda rows: [rows[0] | {"score": 0}, *rows[1:]], "query 45: .* with a score above 0"),
        ("qrels", lambda rows: [rows[0] | {"score": None}, *rows], "qrels: the score None of query 45"),
        ("qrels", lambda rows: [rows[0] | {"score": 2**62}, *rows[1:]], "query 45 is not from -1000 to 1000"),
        ("qrels", lambda rows: [row | {"score": 0.5} for row in rows], "the score 0.5 of query 45 is no whole number"),
        ("qrels", lambda rows: [row | {"score": True} for row in rows], "the score True of query 45 is no whole"),
        (
            "qrels",
            lambda rows: [row | {"corpus-id": 45.5} for row in rows],
            "qrels: row 0: corpus-id 45.5 is of the type",
        ),
        (
            "qrels",
            lambda rows: [rows[0] | {"corpus-id": None}, *rows],
            "qrels: row 0: corpus-id None is of the type None",
        ),
        (
            "corpus",
            lambda rows: [row | {"corpus-id": f"{row['corpus-id']:04}"} for row in rows],
            "the page '45' of query '45' is not in the corpus; .* qrels has them as int, the corpus as str",
        ),
        ("qrels", lambda rows: [*rows, rows[0] | {"score": 0}], "page 45 of query 45 has the scores 1 and 0"),
        ("qrels", lambda rows: [{k: v for k, v in row.items() if k != "score"} for row in rows], "no column score"),
    ],
)
def test_judgements_that_mteb_would_not_take_or_take_otherwise_are_refused(part, rows, message):
    rewritten(part, rows)
    with pytest.raises(UserError, match=message):
        check_judgements(Part(BEIR, "test", Path(BEIR), ()))


@pytest.mark.parametrize("kind", [str, float, int])
def test_ids_are_compared_as_mteb_compares_them_and_only_what_is_needed_is_read(kind):
    for part in ("queries", "qrels"):
        rewritten(part, lambda rows: [row | {"query-id": kind(row["query-id"])} for row in rows])
    rewritten("qrels", lambda rows: [row | {"corpus-id": kind(row["corpus-id"]), "note": None} for row in rows])
    rewritten("corpus", lambda rows: [row | {"seen": None if row["corpus-id"] % 2 else "yes"} for row in rows])
    Path(BEIR, "beir.py").write_text("raise SystemExit('is never run')\n")
    check_judgements(Part(BEIR, "test", Path(BEIR), ()))
    task = _folder_task(Path(BEIR), "IdsRetrieval", {"revision": "a" * 40})
    task.load_data()
    assert task.relevant_docs["test"]["query-test-45"] == {"corpus-test-45": 1}
    pages = {f"corpus-test-{number}" for number in range(45, 55)}
    assert set(task.corpus["test"]["id"]) == pages and task.corpus["test"].column_names == ["image", "id", "modality"]
    assert task.relevant_docs["test"].keys() == set(task.queries["test"]["id"])


@pytest.mark.parametrize("part", ["corpus", "queries", "qrels"])
def test_an_evaluation_set_without_rows_is_refused(part):
    [path] = Path(BEIR, part).glob("*.parquet")
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(UserError, match=f"{part}: has no rows"):
        check_judgements(Part(BEIR, "test", Path(BEIR), ()))


CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {table}\n  data_files:\n  - split: test\n    path: {table}/*\n" for table in TABLES
)


@pytest.mark.parametrize(
    ("card", "lacking"),
    [
        ("", "corpus"),
        ("# Pages\n", "corpus"),
        ("---\nlicense: mit\n---\n", "corpus"),
        ("---\nconfigs: [\n---\n", "corpus"),
        (CARD.replace("test\n    path: qrels", "train\n    path: qrels") + "---\n", "qrels"),
        (CARD + "---\n", None),
        ("---\nconfigs:\n" + "".join(f"- {{config_name: {t}, data_dir: {t}}}\n" for t in TABLES) + "---\n", None),
    ],
    ids=["empty", "no head", "no configs", "no YAML", "train", "whole", "folders"],
)
def test_a_card_by_which_mteb_finds_no_table_is_refused(card, lacking):
    Path(BEIR, "README.md").write_text(card)
    with pytest.raises(UserError, match=f"README.md has none for {lacking}") if lacking else nullcontext():
        check_beir(Path(BEIR))


def test_evaluation_sets_are_refused_by_layout_and_name_before_their_rows_are_read():
    text = Path("params.yaml").read_text()

    def refusal(*others: str) -> str:
        for other in others:
            shutil.copytree(BEIR, other, dirs_exist_ok=True)
        Path("params.yaml").write_text(text.replace(f"- {BEIR}\n", "".join(f"- {one}\n" for one in (BEIR, *others))))
        done = fetch_data()
        assert done.returncode == 2 and not Path("data/quarantine.json").exists()
        return done.stderr

    assert f"{BEIR} and data/more/beir would both be called beir; rename one" in refusal("data/more/beir")
    Path(BEIR, "README.md").unlink()
    assert f"{BEIR}: not an evaluation set" in refusal()


def test_names_of_evaluation_sets_are_held_against_each_other_and_those_of_mteb():
    local, hub = {"folder": BEIR, "revision": ""}, {"folder": "vidore/x", "revision": "a" * 40}
    check_benchmarks(["data/文件", "data/書類", "V"], {"data/文件": local, "data/書類": local, "VRetrieval": hub})
    for names in (["some-docs", "some_docs"], ["demo", "own/demo"]):
        with pytest.raises(UserError, match="would both be called"):
            check_benchmarks(names, dict.fromkeys(names, local))
    with pytest.raises(UserError, match="VRetrieval and data/v would both be called VRetrieval"):
        check_benchmarks(["data/v", "V"], {"data/v": local, "VRetrieval": hub})


@pytest.mark.parametrize("part", EVALUATION_FAULTS)
def test_an_evaluation_set_with_a_fault_is_refused(part):
    change, message = EVALUATION_FAULTS[part]
    [path] = Path(BEIR, part).glob("*.parquet")
    table = pq.read_table(path)
    first, *rest = table.to_pylist()
    pq.write_table(pa.Table.from_pylist([first | change, *rest], schema=table.schema), path)
    done = fetch_data()
    assert done.returncode == 2
    assert re.search(f"benchmarks: {BEIR}: {message}", done.stderr), done.stderr


def test_a_query_without_a_page_in_an_evaluation_set_is_refused():
    [path] = Path(BEIR, "qrels").glob("*.parquet")
    pq.write_table(pq.read_table(path).slice(1), path)
    done = fetch_data()
    assert done.returncode == 2
    assert "query 45: no qrel names a page for it" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"PAR1 no", "is not a parquet file"), (None, "has no column image")],
    ids=["cut", "columns"],
)
def test_a_file_that_is_no_training_set_is_refused(content, message):
    path = Path(SET, "train-00000-of-00001.parquet")
    if content:
        path.write_bytes(content)
    else:
        pq.write_table(pa.table({"query": ["one"]}), path)
    done = fetch_data()
    assert done.returncode == 2
    assert f"{path}: {message}" in done.stderr


COLUMNS = {  # of a training file that has them wrong -> what is said of it
    "lists of queries": ({"query": [["one"]]}, "column query is of the type list"),
    "numbers as queries": ({"query": [7]}, "column query is of the type int64; it must hold text"),
    "bytes as queries": ({"query": [b"one"]}, "column query is of the type binary; it must hold text"),
    "numbers as images": ({"image": [7]}, "column image is of the type int64; it must hold the bytes of images"),
    "lists of images": ({"image": [[PAGES[0]]]}, "column image is of the type list"),
    "no columns": (None, "has no column image and query; it has \\[\\]"),
}


@pytest.mark.parametrize(("columns", "message"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_a_wrong_type_is_named_with_its_file(columns, message):
    table = {} if columns is None else {"query": ["one"], "image": [PAGES[0]]} | columns
    pq.write_table(pa.table(table), f"{SET}/train.parquet")
    with pytest.raises(UserError, match=f"{SET}/train.parquet: {message}"):
        look([Part(SET, "train", Path(SET), ("train.parquet",))])


@pytest.mark.parametrize("place", ["pages", "text", "footer"])
def test_damaged_row_groups_are_named_with_their_file(place):
    path = Path(SET, "train-00000-of-00001.parquet")
    if place == "text":
        pq.write_table(pa.table({"query": pa.array([b"\xff"]).view(pa.string()), "image": [PAGES[0]]}), path)
    else:
        data = bytearray(path.read_bytes())
        at = 4 if place == "pages" else len(data) - 200
        data[at : at + 100] = bytes(100)
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: "):
        look([Part(SET, "train", Path(SET), (path.name,))])


@pytest.mark.parametrize(
    ("table", "rows", "message"),
    [
        ("qrels", None, "is not a parquet file"),
        ("qrels", {"query-id": [[1]], "corpus-id": [1], "score": [1]}, "column query-id is of the type list"),
        ("corpus", {"corpus-id": [{"a": 1}], "image": [PAGES[0]]}, "column corpus-id is of the type struct"),
        ("queries", {"query-id": [b"1"], "query": ["one"]}, "column query-id is of the type binary"),
        ("queries", {"query-id": [1], "query": [["one"]]}, "column query is of the type list"),
    ],
)
def test_tables_of_an_evaluation_set_that_cannot_be_read_are_named(table, rows, message):
    [path] = Path(BEIR, table).glob("*.parquet")
    if rows is None:
        path.write_bytes(b"no parquet")
    else:
        pq.write_table(pa.table(rows), path)
    with pytest.raises(UserError, match=f"{path}: {message}"):
        check_judgements(Part(BEIR, "test", Path(BEIR), ()))


def test_a_training_file_without_rows_is_named():
    write_rows("train", [])
    done = fetch_data()
    assert done.returncode == 2
    assert "has no row that can be used, in 1 parquet files (train-00000-of-00001.parquet)" in done.stderr


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_parquet_file_that_is_no_regular_file_is_refused(kind):
    IRREGULAR[kind](Path(SET, "train-1.parquet"))
    if kind == "a folder":  # as some programs write a table: what is in it counts
        assert len(hash_local_files(SET, (".parquet",)).files) == 2
    else:
        with pytest.raises(UserError, match=f"{SET}: train-1.parquet is {kind}; only regular files are read"):
            hash_local_files(SET, (".parquet",))
    with pytest.raises(UserError, match=f"negatives_file: .* is {kind}"):
        hash_local_file(f"{SET}/train-1.parquet")
    for path in Path(BEIR, "qrels").glob("*"):
        path.unlink()
    IRREGULAR[kind](Path(BEIR, "qrels", "test.parquet"))
    with pytest.raises(UserError, match=f"no parquet file in qrels/: test.parquet/? is {kind}"):
        check_beir(Path(BEIR))


def test_a_long_query_is_cut_and_counted():
    longest = "word " * 13_107 + "w"  # 65,536 characters
    assert len(longest) == MAX_QUERY_CHARACTERS
    texts = [longest, longest + "x" * 2**22]
    write_rows("train", [row(0), *(row(1) | {"query": text} for text in texts)])
    rewritten("queries", lambda rows: [rows[0] | {"query": texts[1]}, *rows[1:]])
    parts = [
        Part(SET, "train", Path(SET), ("train-00000-of-00001.parquet",)),
        Part(BEIR, "test", Path(BEIR), ("corpus/test-00000-of-00001.parquet",)),
    ]
    seen = look(parts)
    assert [one.query for one in seen[parts[0]]] == ["question 0", longest, longest]
    facts = survey(seen, ROOT / "demo" / "base" / "tokenizer.json")
    assert [found["queries cut"] for found in facts.values()] == [1, 1]
    tokens = max(map(int, facts[f"{SET} (train)"]["tokens of a query"]))
    assert tokens == max(map(int, facts[f"{BEIR} (test)"]["tokens of a query"])) <= MAX_QUERY_CHARACTERS


def test_a_file_is_opened_and_a_page_hashed_as_often_however_many_rows_there_are(monkeypatch):
    from test_own import Counted

    from colintern.ingest import survey as module

    path = Path(SET, "train-00000-of-00001.parquet")
    write_rows("train", [row(0) | {"query": f"question {number}"} for number in range(800)])  # 50 row groups
    opened = Counted(monkeypatch, module.pq, "ParquetFile")
    hashed = Counted(monkeypatch, module.hashlib, "sha256")
    part = Part(SET, "train", Path(SET), (path.name,))
    [rows] = look([part]).values()
    assert len(rows) == 800 and len({one.key for one in rows}) == 1
    assert opened.calls <= 3 and hashed.calls == 50, "once a row group"


def test_names_of_files_say_the_split_as_in_datasets():
    names = {
        "train": ["train2.parquet", "data/train-00000-of-00001.parquet", "training/pages.parquet", "my_train.parquet"],
        "dev": ["validation-0.parquet", "dev/0.parquet", "train/val.parquet"],
    }
    other = ["constraint.parquet", "pages.parquet", "test-0.parquet"]
    found, unread = by_name(sum(names.values(), other))
    assert found == {split: sorted(some) for split, some in names.items()}
    assert unread == other
    assert by_name(["train.parquet", "test.parquet"]) == ({"train": ["train.parquet"], "dev": ["test.parquet"]}, [])
    assert by_name(["b.parquet", "a.parquet"]) == ({"train": ["a.parquet", "b.parquet"], "dev": []}, [])


def test_a_file_that_is_not_read_is_told_and_a_set_without_rows_refused():
    [train, dev] = (Path(SET, f"{name}-00000-of-00001.parquet") for name in ("train", "test"))
    shutil.copy(dev, Path(SET, "validation.parquet"))
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    assert f"{SET}: 1 of 3 parquet files are not read" in done.stdout and dev.name in done.stdout
    train.rename(Path(SET, "mypages.parquet"))
    done = fetch_data()
    assert done.returncode == 2
    assert f"train_data: {SET} (train): has no row that can be used, in 0 parquet files" in done.stderr


def test_a_folder_of_two_kinds_is_refused():
    Path(SET, "rows.jsonl").write_text("{}")
    done = fetch_data()
    assert done.returncode == 2
    assert f"{SET}: holds parquet files and JSON lines" in done.stderr


def test_the_data_in_numbers():
    from colintern.params import load_params
    from colintern.statistics.inventory import inventory, summarize_survey

    write_rows("train", [*map(row, range(40)), row(3), row(3) | {"query": "again"}, row(4) | {"query": ""}])
    write_params(max_bad_fraction=0.05)
    assert fetch_data().returncode == 0
    found = summarize_survey(inventory(load_params().max_visual_tokens))
    train, test = found[f"{SET} (train)"], found[f"{BEIR} (test)"]
    assert {key: train[key] for key in ("rows", "pages", "queries", "duplicates", "quarantined")} == {
        "rows": 43, "pages": 40, "queries": 42, "duplicates": 1, "quarantined": 1
    }  # fmt: skip
    assert train["bytes"] == Path(SET, "train-00000-of-00001.parquet").stat().st_size
    assert train["queries/page"] == 42 / 40
    assert train["tiles/page"] == 1 and train["tokens/page"] == 16  # 112 x 112 px is one tile
    assert inventory(load_params().max_visual_tokens)[f"{SET} (train)"]["queries of a page"] == {"1": 39, "3": 1}
    assert (test["rows"], test["pages"], test["queries"]) == (10, 10, 10)
    assert test["tokens/query"] > 1
    assert sum(train["languages, guessed"].values()) == 41, "distinct queries"


def test_the_languages_of_the_queries_are_counted_over_distinct_queries_and_shown_as_a_guess():
    from colintern.statistics.inventory import inventory, summarize_survey, table

    french, german = "Quels sont les principaux risques du projet ?", "Wer hat den Vertrag unterschrieben?"
    spoken = [row(n) | {"query": query} for n, query in enumerate((french, french, german, "4711", "question 1"))]
    write_rows("train", [*spoken, *(row(n) | {"query": f"What does figure {n} show us?"} for n in range(5, 9))])
    assert fetch_data().returncode == 0
    found = inventory(load_params().max_visual_tokens)
    assert summarize_survey(found)[f"{SET} (train)"]["languages, guessed"] == {"de": 1, "en": 4, "fr": 1, "unknown": 2}
    assert "guessed, of 8 distinct queries: en: 4  fr: 1  de: 1  unknown: 2" in table(found, [])


def test_the_table_says_the_same():
    from colintern.params import load_params
    from colintern.statistics.inventory import inventory, table

    write_rows("train", [row(4) | {"query": ""}, *map(row, range(40))])
    write_params(max_bad_fraction=0.05)
    assert fetch_data().returncode == 0
    shown = table(inventory(load_params().max_visual_tokens), quarantine())
    assert f"{SET} (train): 41 rows, 40 pages, 40 queries, 0 duplicates, 1 quarantined" in shown
    assert f"quarantined: {SET}: 1 x query is empty" in shown


def test_values_stand_in_their_order_which_is_not_that_of_json_keys():
    from colintern.statistics.inventory import MEASURES, table

    facts = dict.fromkeys(("rows", "pages", "queries", "duplicates", "quarantined", "bytes"), 3)
    facts |= {"languages, guessed": {}, **{key: {"10": 2, "9": 1} for key in MEASURES}}
    assert table({"x": facts}, []).count("9: 1  10: 2") == len(MEASURES)


def test_the_survey_of_other_data_than_params_name_is_refused():
    from colintern.commands import data

    assert fetch_data().returncode == 0
    data.run(Namespace())
    write_params(train_data="data/own/other")
    with pytest.raises(UserError, match=f"train_data: 'data/own/other' is not the one in data/manifest.json, '{SET}'"):
        data.run(Namespace())
    write_params()
    shutil.copytree(BEIR, "data/own/other")
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace(f"- {BEIR}\n", "- data/own/other\n"))
    with pytest.raises(UserError, match="'data/own/other' is not among the data sets"):
        data.run(Namespace())


def test_a_folder_of_pdfs_is_training_and_evaluation_set_by_its_name():
    from colintern.data.trainset import asks_pseudo_queries
    from colintern.storage.manifest import ensure_benchmark

    folder = Path("data/own/manuals")
    for name in ("a", "b"):
        pages = [[f"About {name}{n}topic", f"The {name}{n}pump fills a {name}{n}tank in hours."] for n in range(40)]
        write_pdf(folder / f"{name}.pdf", pages, [(lines[0], n) for n, lines in enumerate(pages)])
    (folder / "cut.pdf").write_bytes((folder / "a.pdf").read_bytes()[200:900])
    write_params(train_data=folder, max_bad_fraction=0.05)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace(f"- {BEIR}\n", f"- {folder}\n"))
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    [entry] = quarantine()
    assert (entry["source"], entry["row"]) == (str(folder), "cut.pdf")
    assert "1 of 81 rows in data/quarantine.json" in done.stdout
    corpus = pq.read_table(next(ensure_benchmark(str(folder)).glob("corpus/*.parquet"))).num_rows
    assert sum(map(len, load_pairs().values())) + corpus == 80
    assert asks_pseudo_queries()
    write_pdf(folder / "c.pdf", [["new"]])
    with pytest.raises(UserError, match=r"data/own/manuals/c\.pdf: new since the pages were made"):
        load_pairs()
