"""Parquet sets with real faults in their rows: what costs a row, what stops the run, and what is never read (D1-D8)."""

import io
import json
import re
import shutil
import subprocess
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import IRREGULAR, ROOT, load_pairs, page_image
from pdf_writer import write_pdf
from test_images import bomb

from colintern.commands import data as data_command
from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.data.formats import BEIR_TABLES, CorpusPage, Qrel, Query, check_beir_layout, write_beir
from colintern.data.images import encode_png
from colintern.ingest import scan
from colintern.ingest.documents import MAX_QUERY_CHARACTERS
from colintern.ingest.scan import DatasetSplit, scan_rows
from colintern.ingest.sources import group_files_by_split
from colintern.ingest.validation import check_benchmarks, validate_judgments
from colintern.params import load_params
from colintern.statistics.dataset_stats import MEASURES, format_stats, load_dataset_stats, summarize_stats
from colintern.statistics.survey import survey_rows
from colintern.storage.manifest import SURVEY, ensure_benchmark, hash_local_file, hash_local_files
from stages import fetch_data as stage

pytestmark = pytest.mark.integration
SET, BEIR = "data/own/set", "data/own/beir"
TRAIN_FILE, DEV_FILE = (Path(SET, f"{split}-00000-of-00001.parquet") for split in ("train", "test"))
TRAIN_SPLIT = DatasetSplit(SET, "train", Path(SET), (TRAIN_FILE.name,))
BEIR_SPLIT = DatasetSplit(BEIR, "test", Path(BEIR), ("corpus/test-00000-of-00001.parquet",))
PAGES = [encode_png(page_image(f"page {number}")) for number in range(60)]


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
    benchmarks = values.pop("benchmarks", (BEIR,))
    text = text.replace("- demo\n", "".join(f"- {name}\n" for name in benchmarks))
    for key, value in values.items():
        text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}", text)
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
    """Run the stage in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            stage.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return subprocess.CompletedProcess("fetch-data", code, out.getvalue(), err.getvalue())


def fetched() -> str:
    """Run the stage, which must succeed, and return what it prints."""
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(message: str) -> None:
    """Run the stage, which must refuse the data."""
    done = fetch_data()
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


def quarantine() -> list[dict]:
    return json.loads(Path("data/quarantine.json").read_text())["rows"]


def dev_and_train() -> dict:
    return {split: [pair.query for pair in pairs] for split, pairs in load_pairs().items()}


def stats() -> dict:
    params = load_params()
    return load_dataset_stats(params.max_visual_tokens, params.tiling)


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
    ({"image": {"bytes": bomb(14_000, 14_000), "path": "b.png"}}, "image: decompression bomb"),
]


def test_each_bad_row_costs_one_row_and_is_named():
    from colintern.modeling.processor import ColIntern3_5Processor

    bad = [row(n) | change for n, (change, _) in enumerate(CASES)]
    long = {"query": "word " * 10_000} | {"image": row(0)["image"]}
    right_to_left = row(1) | {"query": "ما هو المبلغ؟ 📄"}
    write_rows("train", [*bad[:5], *map(row, range(11, 30)), long, right_to_left, *bad[5:]])
    write_params(max_bad_fraction=0.3)
    assert "11 of 47 rows in data/quarantine.json" in fetched()  # 32 training, 5 dev, 10 pages of the benchmark
    places = [f"{TRAIN_FILE.name}:{n}" for n in (*range(5), *range(26, 32))]
    assert [(entry["source"], entry["row"]) for entry in quarantine()] == [(SET, place) for place in places]
    for entry, (_, reason) in zip(quarantine(), CASES, strict=True):
        assert entry["reason"].startswith(reason)
    queries = dev_and_train()["train"]
    assert queries == [f"question {n}" for n in range(11, 30)] + [long["query"], right_to_left["query"]]
    processor = ColIntern3_5Processor.from_pretrained("demo/base", max_visual_tokens=96, max_query_tokens=64)
    assert processor.process_queries(queries[-2:])["input_ids"].shape == (2, 64)
    assert processor.count_truncated(queries) == 1


def test_too_many_bad_rows_stop_the_run_and_are_named_all_the_same():
    write_rows("train", [row(0) | {"query": ""}, *map(row, range(1, 40))])
    message = f"{SET}: 1 of 45 rows cannot be used, more than max_bad_fraction: 0.01"
    refused(rf"(?s){message}.*{TRAIN_FILE.name}:0: query is empty: ''")
    assert len(quarantine()) == 1 and not Path("data/manifest.json").exists()


@pytest.mark.parametrize(
    ("train", "dev", "evaluation", "small", "message"),
    [
        (range(0, 41), range(40, 45), range(45, 55), None, rf"in {SET} \(train\), .*:40, and in {SET} \(dev\), .*:0 "),
        (range(40), range(40, 46), range(45, 55), None, rf"in {SET} \(dev\), .*:5, and in {BEIR} .*, corpus/.*:0 "),
        (range(40), range(40, 45), range(38, 55), None, rf"in {SET} \(train\), .*:38, and in {BEIR} .*:0 \(2 "),
        (range(40), range(40, 45), range(45, 55), range(43, 48), r"in data/own/small \(train\)"),
    ],
    ids=["train and dev", "dev and evaluation", "train and evaluation", "two sets of a mixture"],
)  # fmt: skip
def test_a_page_in_two_splits_is_refused_with_both_places(train, dev, evaluation, small, message):
    write_set(train, dev)
    write_eval(evaluation)
    if small:
        write_set(small, range(58, 59), "data/own/small")
        write_params(train_data=f"{SET} + data/own/small*3")
    refused(f"the same page is {message}")
    assert not Path("data/manifest.json").exists()


def test_a_mixture_shows_the_rows_of_a_set_as_often_as_its_weight_says():
    write_set(range(55, 58), range(58, 59), "data/own/small")
    write_params(train_data=f"{SET} + data/own/small*3")
    fetched()
    assert quarantine() == [], "the list is there when it is empty"
    found = dev_and_train()
    assert len(found["train"]) == 40 + 3 * 3
    assert found["train"].count("question 56") == 3 and found["train"].count("question 7") == 1
    assert found["test"].count("question 58") == 1, "the dev set is not weighted"
    assert found["test"][:2] == ["question 40", "question 58"], "the sets take turns"


def rewrite(part: str, change: Callable[[list[dict]], list[dict]], **options: object) -> Path:
    """Write the rows of a table of the evaluation set again; `schema=True` keeps the types of its columns."""
    [path] = Path(BEIR, part).glob("*.parquet")
    table = pq.read_table(path)
    schema = table.schema if options.get("schema") else None
    pq.write_table(pa.Table.from_pylist(change(table.to_pylist()), schema=schema), path)
    return path


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("corpus", lambda rows: [*rows, rows[3]], "corpus-id 48 is in 2 rows"),
        ("queries", lambda rows: [*rows, rows[3]], "query-id 48 is in 2 rows"),
        ("queries", lambda rows: [rows[0] | {"query": "  "}, *rows[1:]], "query 45: query is empty"),
        ("qrels", lambda rows: [rows[0] | {"corpus-id": 999}, *rows[1:]], "'999' of query '45' is not in the corpus"),
        ("qrels", lambda rows: rows[1:], "query 45: no qrel names a page for it"),
        ("qrels", lambda rows: [rows[0] | {"score": 0}, *rows[1:]], "query 45: .* with a score above 0"),
        ("qrels", lambda rows: [rows[0] | {"score": None}, *rows], "qrels: the score None of query 45"),
        ("qrels", lambda rows: [rows[0] | {"score": 2**62}, *rows[1:]], "query 45 is not from -1000 to 1000"),
        ("qrels", lambda rows: [row | {"score": 0.5} for row in rows], "the score 0.5 of query 45 is no whole number"),
        ("qrels", lambda rows: [row | {"score": True} for row in rows], "the score True of query 45 is no whole"),
        ("qrels", lambda rows: [row | {"corpus-id": 45.5} for row in rows], "row 0: corpus-id 45.5 is of the type"),
        ("qrels", lambda rows: [rows[0] | {"corpus-id": None}, *rows], "row 0: corpus-id None is of the type None"),
        (
            "corpus", lambda rows: [row | {"corpus-id": f"{row['corpus-id']:04}"} for row in rows],
            "the page '45' of query '45' is not in the corpus; .* qrels has them as int, the corpus as str",
        ),
        ("qrels", lambda rows: [*rows, rows[0] | {"score": 0}], "page 45 of query 45 has the scores 1 and 0"),
        ("qrels", lambda rows: [{k: v for k, v in row.items() if k != "score"} for row in rows], "no column score"),
    ],
)  # fmt: skip
def test_judgments_that_mteb_would_refuse_or_misread_are_refused(part, change, message):
    rewrite(part, change)
    with pytest.raises(UserError, match=message):
        validate_judgments(BEIR_SPLIT)


@pytest.mark.parametrize("kind", [str, float, int])
def test_ids_are_compared_as_mteb_compares_them_and_only_what_is_needed_is_read(kind):
    from colintern.data.benchmarks import build_folder_task

    for part in ("queries", "qrels"):
        rewrite(part, lambda rows: [row | {"query-id": kind(row["query-id"])} for row in rows])
    rewrite("qrels", lambda rows: [row | {"corpus-id": kind(row["corpus-id"]), "note": None} for row in rows])
    rewrite("corpus", lambda rows: [row | {"seen": None if row["corpus-id"] % 2 else "yes"} for row in rows])
    Path(BEIR, "beir.py").write_text("raise SystemExit('is never run')\n")
    validate_judgments(BEIR_SPLIT)
    task = build_folder_task(Path(BEIR), "IdsRetrieval", {"revision": "a" * 40})
    task.load_data()
    assert task.relevant_docs["test"]["query-test-45"] == {"corpus-test-45": 1}
    pages = {f"corpus-test-{number}" for number in range(45, 55)}
    assert set(task.corpus["test"]["id"]) == pages and task.corpus["test"].column_names == ["image", "id", "modality"]
    assert task.relevant_docs["test"].keys() == set(task.queries["test"]["id"])


CARD = "---\nconfigs:\n" + "".join(
    f"- config_name: {table}\n  data_files:\n  - split: test\n    path: {table}/*\n" for table in BEIR_TABLES
)


@pytest.mark.parametrize(
    ("card", "missing"),
    [
        ("", "corpus"),
        ("# Pages\n", "corpus"),
        ("---\nlicense: mit\n---\n", "corpus"),
        ("---\nconfigs: [\n---\n", "corpus"),
        ("---\n- configs\n---\n", "corpus"),
        (CARD.replace("test\n    path: qrels", "train\n    path: qrels") + "---\n", "qrels"),
        (CARD + "---\n", None),
        ("---\nconfigs:\n" + "".join(f"- {{config_name: {t}, data_dir: {t}}}\n" for t in BEIR_TABLES) + "---\n", None),
    ],
    ids=["empty", "no head", "no configs", "no YAML", "a list", "train", "whole", "folders"],
)
def test_a_card_by_which_mteb_finds_no_table_is_refused(card, missing):
    Path(BEIR, "README.md").write_text(card)
    with pytest.raises(UserError, match=f"README.md has none for {missing}") if missing else nullcontext():
        check_beir_layout(Path(BEIR))


def test_evaluation_sets_are_refused_by_layout_and_name_before_their_rows_are_read():
    shutil.copytree(BEIR, "data/more/beir")
    write_params(benchmarks=(BEIR, "data/more/beir"))
    refused(f"{BEIR} and data/more/beir would both be called beir; rename one")
    Path(BEIR, "README.md").unlink()
    write_params()
    refused(f"{BEIR}: not an evaluation set")
    assert not Path("data/quarantine.json").exists()


def test_names_of_evaluation_sets_are_compared_with_each_other_and_those_of_mteb():
    local, hub = {"folder": BEIR, "revision": ""}, {"folder": "vidore/x", "revision": "a" * 40}
    check_benchmarks(["data/文件", "data/書類", "V"], {"data/文件": local, "data/書類": local, "VRetrieval": hub})
    for names in (["some-docs", "some_docs"], ["demo", "own/demo"]):
        with pytest.raises(UserError, match="would both be called"):
            check_benchmarks(names, dict.fromkeys(names, local))
    with pytest.raises(UserError, match="VRetrieval and data/v would both be called VRetrieval"):
        check_benchmarks(["data/v", "V"], {"data/v": local, "VRetrieval": hub})


def test_an_evaluation_set_with_an_error_stops_the_run():
    broken = {"image": {"bytes": b"<html>", "path": "1.png"}}
    path = rewrite("corpus", lambda rows: [rows[0] | broken, *rows[1:]], schema=True)
    refused(f"benchmarks: {BEIR}: corpus/.*:0: image: not an image")
    for part in BEIR_TABLES:
        write_eval(range(45, 55))
        [path] = Path(BEIR, part).glob("*.parquet")
        pq.write_table(pq.read_table(path).slice(0, 0), path)
        refused(f"benchmarks: {BEIR}: {part}: has no rows")


COLUMNS = {  # of a training file that has them wrong -> what is said of it
    "lists of queries": ({"query": [["one"]]}, "column query is of the type list"),
    "numbers as queries": ({"query": [7]}, "column query is of the type int64; it must hold text"),
    "bytes as queries": ({"query": [b"one"]}, "column query is of the type binary; it must hold text"),
    "numbers as images": ({"image": [7]}, "column image is of the type int64; it must hold the bytes of images"),
    "lists of images": ({"image": [[PAGES[0]]]}, "column image is of the type list"),
    "no columns": (None, "has no column image and query; it has \\[\\]"),
    "no image": ({"image": None}, "has no column image; "),
}


@pytest.mark.parametrize(("columns", "message"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_a_wrong_type_is_named_with_its_file(columns, message):
    table = {} if columns is None else {"query": ["one"], "image": [PAGES[0]]} | columns
    pq.write_table(pa.table({name: values for name, values in table.items() if values}), TRAIN_FILE)
    with pytest.raises(UserError, match=f"{TRAIN_FILE}: {message}"):
        scan_rows([TRAIN_SPLIT])


@pytest.mark.parametrize("place", ["pages", "text", "footer", "all"])
def test_damaged_files_are_named(place):
    if place == "all":
        TRAIN_FILE.write_bytes(b"PAR1 no")
        refused(f"{TRAIN_FILE}: is not a parquet file")
        return
    if place == "text":
        query = pa.array([b"\xff"]).view(pa.string())
        pq.write_table(pa.table({"query": query, "image": [PAGES[0]]}), TRAIN_FILE)
    else:
        data = bytearray(TRAIN_FILE.read_bytes())
        start = 4 if place == "pages" else len(data) - 200
        data[start : start + 100] = bytes(100)
        TRAIN_FILE.write_bytes(data)
    with pytest.raises(UserError, match=f"{TRAIN_FILE}: "):
        scan_rows([TRAIN_SPLIT])


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
        validate_judgments(BEIR_SPLIT)


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
        check_beir_layout(Path(BEIR))


def test_a_long_query_is_cut_and_counted():
    longest = "word " * 13_107 + "w"  # 65,536 characters
    assert len(longest) == MAX_QUERY_CHARACTERS
    texts = [longest, longest + "x" * 2**22]
    write_rows("train", [row(0), *(row(1) | {"query": text} for text in texts)])
    rewrite("queries", lambda rows: [rows[0] | {"query": texts[1]}, *rows[1:]])
    scanned = scan_rows([TRAIN_SPLIT, BEIR_SPLIT])
    assert [info.query for info in scanned[TRAIN_SPLIT]] == ["question 0", longest, longest]
    facts = survey_rows(scanned, ROOT / "demo" / "base" / "tokenizer.json")
    assert [found["queries cut"] for found in facts.values()] == [1, 1]
    tokens = max(map(int, facts[str(TRAIN_SPLIT)]["tokens of a query"]))
    assert tokens == max(map(int, facts[str(BEIR_SPLIT)]["tokens of a query"])) <= MAX_QUERY_CHARACTERS


def test_a_file_is_opened_and_a_page_hashed_as_often_however_many_rows_there_are(monkeypatch):
    from test_own import Counted

    write_rows("train", [row(0) | {"query": f"question {number}"} for number in range(800)])  # 50 row groups
    opened = Counted(monkeypatch, scan.pq, "ParquetFile")
    hashed = Counted(monkeypatch, scan.hashlib, "sha256")
    [rows] = scan_rows([TRAIN_SPLIT]).values()
    assert len(rows) == 800 and len({info.key for info in rows}) == 1
    assert opened.calls <= 3 and hashed.calls == 50, "once a row group"


def test_names_of_files_say_the_split_as_in_datasets():
    names = {
        "train": ["train2.parquet", "data/train-00000-of-00001.parquet", "training/pages.parquet", "my_train.parquet"],
        "dev": ["validation-0.parquet", "dev/0.parquet", "train/val.parquet"],
    }
    other = ["constraint.parquet", "pages.parquet", "test-0.parquet"]
    found, unread = group_files_by_split(sum(names.values(), other))
    assert found == {split: sorted(some) for split, some in names.items()} and unread == other
    assert group_files_by_split(["train.parquet", "test.parquet"]) == (
        {"train": ["train.parquet"], "dev": ["test.parquet"]},
        [],
    )
    assert group_files_by_split(["b.parquet", "a.parquet"]) == ({"train": ["a.parquet", "b.parquet"], "dev": []}, [])


def test_a_file_that_is_not_read_is_named_and_a_set_without_rows_or_of_two_kinds_refused():
    shutil.copy(DEV_FILE, Path(SET, "validation.parquet"))
    shown = fetched()
    assert f"{SET}: 1 of 3 parquet files are not read" in shown and DEV_FILE.name in shown
    TRAIN_FILE.rename(Path(SET, "mypages.parquet"))
    refused(rf"train_data: {SET} \(train\): has no row that can be used, in 0 parquet files")
    write_rows("train", [])
    refused(rf"has no row that can be used, in 1 parquet files \({TRAIN_FILE.name}\)")
    Path(SET, "rows.jsonl").write_text("{}")
    refused(f"{SET}: holds parquet files and JSON lines")


def test_the_data_in_numbers():
    french, german = "Quels sont les principaux risques du projet ?", "Wer hat den Vertrag unterschrieben?"
    spoken = [row(n) | {"query": query} for n, query in enumerate((french, french, german, "4711"))]
    spoken += [row(n) | {"query": f"What does figure {n} show us?"} for n in range(4, 8)]
    rest = [*map(row, range(8, 40)), row(8), row(8) | {"query": "again"}, row(9) | {"query": ""}]
    write_rows("train", [*spoken, *rest])
    write_params(max_bad_fraction=0.05)
    fetched()
    found = summarize_stats(stats())
    train, test = found[f"{SET} (train)"], found[f"{BEIR} (test)"]
    assert {key: train[key] for key in ("rows", "pages", "queries", "duplicates", "quarantined")} == {
        "rows": 43, "pages": 40, "queries": 42, "duplicates": 1, "quarantined": 1
    }  # fmt: skip
    assert train["bytes"] == TRAIN_FILE.stat().st_size
    assert train["queries/page"] == 42 / 40
    assert train["tiles/page"] == 1 and train["tokens/page"] == 16  # 112 x 112 px is one tile
    assert stats()[f"{SET} (train)"]["queries of a page"] == {"1": 39, "3": 1}
    assert (test["rows"], test["pages"], test["queries"]) == (10, 10, 10) and test["tokens/query"] > 1
    languages = train["languages, guessed"]
    assert sum(languages.values()) == 40, "distinct queries"
    assert (languages["de"], languages["en"], languages["fr"]) == (1, 4, 1)
    survey = json.loads(Path(SURVEY).read_text())
    survey[f"{BEIR} (test)"]["page sizes"] = {"224x336": 4}
    Path(SURVEY).write_text(json.dumps(survey))
    for tiling, tiles in (("exact", 6), ("stock", 3)):
        assert load_dataset_stats(96, tiling)[f"{BEIR} (test)"]["tiles of a page"] == {str(tiles): 4}
    with pytest.raises(UserError, match="max_visual_tokens: 16 is less than a tile and its thumbnail cost"):
        load_dataset_stats(16, "stock")
    shown = format_stats(stats(), quarantine())
    assert f"{SET} (train): 43 rows, 40 pages, 42 queries, 1 duplicates, 1 quarantined" in shown
    assert f"quarantined: {SET}: 1 x query is empty" in shown
    assert "guessed, of 40 distinct queries: en: 4  fr: 1  de: 1  unknown: 34" in shown


def test_values_stand_in_their_order_which_is_not_that_of_json_keys():
    facts = dict.fromkeys(("rows", "pages", "queries", "duplicates", "quarantined", "bytes"), 3)
    facts |= {"languages, guessed": {}, **{key: {"10": 2, "9": 1} for key in MEASURES}}
    assert format_stats({"x": facts}, []).count("9: 1  10: 2") == len(MEASURES)
    facts |= {"languages, guessed": {}, **{key: {str(n): 1 for n in (3, 5, 6, 7, 8, 9, 29)} for key in MEASURES}}
    assert format_stats({"x": facts}, []).count("3-7: 4  8-12: 2  28-29: 1") == len(MEASURES)


def test_the_survey_of_other_data_than_params_name_is_refused():
    fetched()
    data_command.run(Namespace())
    write_params(train_data="data/own/other")
    with pytest.raises(UserError, match=f"train_data: 'data/own/other' is not the one in data/manifest.json, '{SET}'"):
        data_command.run(Namespace())
    shutil.copytree(BEIR, "data/own/other")
    write_params(benchmarks=("data/own/other",))
    with pytest.raises(UserError, match="'data/own/other' is not among the data sets"):
        data_command.run(Namespace())


def test_a_division_without_a_folder_to_divide_is_refused():
    write_params(split_by="document")
    refused("split_by: document has no effect: neither train_data nor benchmarks is a folder of PDFs")


def test_a_folder_of_pdfs_is_training_and_evaluation_set_by_its_name():
    from colintern.data.training_set import trains_on_pseudo_queries

    folder = Path("data/own/manuals")
    for name in ("a", "b"):
        pages = [[f"About {name}{n}topic", f"The {name}{n}pump fills a {name}{n}tank in hours."] for n in range(40)]
        write_pdf(folder / f"{name}.pdf", pages, [(lines[0], n) for n, lines in enumerate(pages)])
    (folder / "cut.pdf").write_bytes((folder / "a.pdf").read_bytes()[200:900])
    write_params(train_data=folder, benchmarks=(folder,), max_bad_fraction=0.05)
    printed = fetched()
    assert "1 of 81 rows in data/quarantine.json" in printed
    assert "note: demo/base knows about 300 words in six fonts and cannot read\ndata/own/manuals;" in printed
    [entry] = quarantine()
    assert (entry["source"], entry["row"]) == (str(folder), "cut.pdf")
    tables = {table: next(ensure_benchmark(str(folder)).glob(f"{table}/*.parquet")) for table in ("corpus", "queries")}
    num_rows = {table: pq.read_table(file).num_rows for table, file in tables.items()}
    assert num_rows["corpus"] == 80 == sum(map(len, dev_and_train().values())) + num_rows["queries"]
    assert trains_on_pseudo_queries()
    write_pdf(folder / "c.pdf", [["new"]])
    with pytest.raises(UserError, match=r"data/own/manuals/c\.pdf: new since the pages were made"):
        dev_and_train()
