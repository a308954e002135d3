"""User documents with faults put into real files: one bad row costs one row, and is named (D1, D2, D7, D8)."""

import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import pyarrow.parquet as pq
import pytest
from conftest import IRREGULAR, ROOT, irregular_files, page_image
from pdf_writer import stream, write_odd_page, write_pdf
from PIL import Image

from colintern.core.errors import UserError
from colintern.data import formats
from colintern.data.images import encode_png
from colintern.data.training_set import get_training_data_params, load_training_data
from colintern.ingest import pdfs, pseudo_queries
from colintern.ingest.documents import MAX_QUERY_CHARACTERS, ImageStore, RawDocuments, read_json_lines
from colintern.ingest.jsonl import read_jsonl_folder
from colintern.ingest.pdf_rendering import PageRef, group_pages, render_and_store_pages
from colintern.ingest.pdfs import read_pdf_folder
from colintern.ingest.pseudo_queries import DocumentText, count_pages_with, make_pseudo_queries
from colintern.ingest.query_csv import read_query_csv
from colintern.ingest.sources import detect_format
from colintern.ingest.user_documents import MADE, DivisionParams, UserDocuments, convert_documents
from colintern.ingest.validation import check_bad_fraction, collect_quarantine
from colintern.params import load_recipe
from colintern.storage.isolation import Failure, IsolatedPool
from colintern.storage.lock import mark_in_use

pytestmark = pytest.mark.integration
DOCS = "data/own/docs"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path(DOCS).mkdir(parents=True)
    return Path(DOCS)


def convert_jsonl(name: str = DOCS) -> UserDocuments:
    return convert_documents(name, read_jsonl_folder)


def convert_pdfs() -> UserDocuments:
    return convert_documents(DOCS, read_pdf_folder)


def write_page(path: Path, word: str = "") -> None:
    path.write_bytes(encode_png(page_image(word or path.stem)))


def jsonl_folder(folder: Path, rows: list, pages: int = 12) -> None:
    """`pages` images, one good row for each in turn of the three splits, and the given rows (text as it is)."""
    for number in range(pages):
        write_page(folder / f"{number}.png", f"page {number}")
    good = [
        {"image": f"{n}.png", "query": f"question {n}", "split": ("train", "dev", "test")[n % 3]} for n in range(pages)
    ]
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [*good, *rows]]
    (folder / "rows.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))


def table(made: str, part: str) -> list[dict]:
    return pq.read_table(next(Path(made).glob(part))).to_pylist()


def training(made: str, split: str = "train") -> list[dict]:
    return table(made, f"train/data/{split}-*.parquet")


def test_queries(made: str) -> list[str]:
    return [row["query"] for row in table(made, "beir/queries/*.parquet")]


test_queries.__test__ = False  # type: ignore[attr-defined]


def answering_pages(made: str) -> set[str]:
    """The names of the pages that answer test queries."""
    names = {row["corpus-id"]: row["image"]["path"] for row in table(made, "beir/corpus/*.parquet")}
    return {names[row["corpus-id"]] for row in table(made, "beir/qrels/*.parquet")}


def bad_rows(own: UserDocuments) -> dict[str, str]:
    return {bad["where"]: bad["reason"] for bad in own.summary["bad"]}


BAD_LINES = [
    ({"image": "cut.png", "query": "q"}, "cannot be decoded"),
    ({"image": "page.html", "query": "q"}, "not an image"),
    ({"image": "empty.png", "query": "q"}, "empty: 0 bytes"),
    ({"image": "missing.png", "query": "q"}, "'missing.png' is missing"),
    ({"image": "https://example.com/1.png", "query": "q"}, "refused: .* is a URL"),
    ({"image": "file:///etc/hostname", "query": "q"}, "refused: .* is a URL"),
    ({"image": "../secret.png", "query": "q"}, "refused: .* points outside"),
    ({"image": "/etc/hostname", "query": "q"}, "refused: .* points outside"),
    ({"image": "0.png/../../secret.png", "query": "q"}, "refused: .* points outside"),
    ({"image": "share/secret.png", "query": "q"}, "refused: .* below 'share', a linked folder"),
    ({"image": "x" * 5000, "query": "q"}, "is no file name"),
    ({"image": "a\0b.png", "query": "q"}, "is no file name"),
    ({"query": "q"}, "names no file: None"),
    ({"image": "0.png", "query": ""}, "query is empty"),
    ({"image": "0.png", "query": " \u00a0\n"}, "query is empty"),
    ({"image": "0.png", "query": 7}, "query is not text: 7"),
    ({"image": "0.png", "query": "cut emoji \ud83d"}, r"half a character: 'cut emoji \\ud83d'"),
    ({"image": "\udcff.png", "query": "q"}, "is no file name"),
    ({"image": "0.png", "query": "q", "split": "validation"}, "split is 'validation'"),
    ('{"image": "0.png", ', "not JSON"),
    ('["0.png", "q"]', "not a JSON object"),
    ("[" * 100_000, "not JSON"),
    ('{"image": "0.png", "query": "\udcff"}', "not JSON"),
]


def test_each_bad_line_costs_one_row_and_is_named(folder):
    rows = [row for row, _ in BAD_LINES]
    jsonl_folder(folder, rows)
    whole = encode_png(page_image("cut"))
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "page.html").write_text("<html>not found</html>")
    (folder / "empty.png").touch()
    (folder.parent / "secret.png").write_bytes(whole)
    (folder / "share").symlink_to(folder.parent.absolute())
    own = convert_jsonl()
    bad = bad_rows(own)
    assert list(bad) == [f"rows.jsonl:{13 + n}" for n in range(len(rows))]
    for reason, (_, pattern) in zip(bad.values(), BAD_LINES, strict=True):
        assert re.search(pattern, reason), (pattern, reason)
    assert own.summary["rows"] == {"rows": 12 + len(rows)}
    assert [row["query"] for row in training(own.made)] == ["question 0", "question 3", "question 6", "question 9"]


def test_unusual_rows_are_kept_to_the_letter(folder, capsys):
    unusual = ["слово " * 10_000, "📄🔍 invoices 2024?", "ما هو المبلغ الإجمالي؟", "e\u0301 é", "line\nbreak"]
    rows = [
        {"image": "0.png", "queries": unusual},
        {"image": "0.png", "queries": "one", "query": "more", "weight": 3, "cut \ud83d": 1},
        {"image": "photo.jpg", "query": "which photo", "split": "test"},
        {"image": "alone.png", "split": "test"},
        {"image": "./0.png", "query": "again"},
        {"image": "copy.png", "query": "of the copy"},
    ]
    jsonl_folder(folder, rows)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("CMYK", (60, 40)).save(folder / "photo.jpg", exif=exif)
    write_page(folder / "alone.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    (folder / "._rows.jsonl").write_bytes(b"\0\5\x16\7Mac OS X")  # a hidden file holds no lines
    (folder / "forgotten.png").touch()
    own = convert_jsonl()
    queries = {row["query"]: row["image_filename"] for row in training(own.made)}
    assert list(queries)[:10] == ["question 0", *unusual, "one", "more", "again", "of the copy"]
    assert not own.summary["bad"]
    assert queries["of the copy"] == "0.png" and own.summary["same pages"] == 2, "equal pages are one page"
    pages = {row["image"]["path"]: row["image"]["bytes"] for row in table(own.made, "beir/corpus/*.parquet")}
    image = Image.open(io.BytesIO(pages["photo.jpg"]), formats=["PNG"])
    assert (image.mode, image.size) == ("RGB", (40, 60)), "upright, and RGB"
    assert "alone.png" in pages and own.summary["pages without a query"] == 1
    shown = capsys.readouterr().out
    assert "pages without a query: 1" in shown and "keys of rows without effect: cut \\ud83d, weight" in shown
    assert "\n  not read: 1, forgotten.png\n" in shown


def test_a_page_that_cannot_be_stored_is_no_bad_row(folder):
    jsonl_folder(folder, [{"image": "large.png", "query": "which is large"}], pages=3)
    Image.frombytes("L", (400, 400), os.urandom(160_000)).save(folder / "large.png")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # writing then fails as on a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            convert_jsonl()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)


def test_pages_and_questions_of_linked_files_are_read_alike_and_what_is_not_read_is_named(folder, capsys):
    """As `dvc add` with `cache.type symlink`, or `ln -s /share/*.pdf`, leaves a folder."""
    handbook(folder)
    (folder / "sub").rename(folder / "sub.pdf")  # a folder that is called like a file, and holds one
    rows = [f"question {page},sub.pdf/b.pdf,{page}" for page in range(1, 31)]
    (folder / "queries.csv").write_text("\n".join(["query,file,page", *rows]))
    whole = convert_pdfs()
    assert whole.summary["rows"] == {"pages": 60, "questions": 30} and not whole.summary["not read"]
    store = Path("store").absolute()
    store.mkdir()
    for number, path in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        path.rename(store / str(number))
        path.symlink_to(store / str(number))
    linked = convert_pdfs()
    assert linked.summary == whole.summary and not linked.summary["bad"] and linked.summary["kinds"]["given"] == 30
    for name in ("Queries.csv", "scans/1.tif", "._a.pdf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "share").symlink_to(store)
    convert_pdfs()
    assert "\n  not read: 3, Queries.csv, scans/1.tif, share/\n" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".jsonl", ".png", ".pdf"])
def test_what_is_no_regular_file_is_never_opened_and_named(folder, suffix, capsys):
    names = irregular_files(folder, suffix)
    if suffix == ".pdf":
        write_pdf(folder / "a.pdf", [["one"]])
    else:
        jsonl_folder(folder, [{"image": f"odd{n}.png", "query": "q"} for n in range(len(names))])
    own = convert_pdfs() if suffix == ".pdf" else convert_jsonl()
    assert sorted(names) == own.summary["not read"]
    assert f"not read: {len(names)}, {names[0]}, " in capsys.readouterr().out
    reasons = list(bad_rows(own).values())
    assert len(reasons) == (0 if suffix == ".pdf" else len(names))
    assert all(f"'odd{n}.png'" in reason for n, reason in enumerate(reasons))


@pytest.mark.parametrize("suffix", [".jsonl", ".pdf", ".parquet"])
def test_a_folder_that_holds_nothing_but_what_is_no_regular_file_is_refused(folder, suffix):
    irregular_files(folder, suffix)
    with pytest.raises(UserError, match=rf"holds none of .*odd0\{suffix} is a named pipe, odd1\{suffix} is a device"):
        detect_format(DOCS)


@pytest.mark.parametrize("name", ["queries.csv", "queries.jsonl", "queries.CSV"])
@pytest.mark.parametrize("kind", IRREGULAR)
def test_questions_that_are_no_regular_file_are_refused_and_not_made_up(folder, name, kind):
    write_pdf(folder / "a.pdf", [["one"]])
    IRREGULAR[kind](folder / name)
    with pytest.raises(UserError, match=f"{name}: is {kind}"):
        convert_pdfs()
    (folder / "queries.jsonl" if "csv" in name.lower() else folder / "queries.csv").touch()
    with pytest.raises(UserError, match="keep one"):
        convert_pdfs()


@pytest.mark.parametrize(
    "row",
    [
        {"image": "copy.png", "query": "of the copy", "split": "test"},
        {"image": "0.png", "query": "again", "split": "dev"},
        {"image": "new.png", "query": "Question  0", "split": "test"},
    ],
    ids=["same bytes", "same file", "same query"],
)
def test_a_page_or_query_in_two_splits_is_refused_with_both_rows(folder, row):
    jsonl_folder(folder, [row])
    shutil.copy(folder / "0.png", folder / "copy.png")
    write_page(folder / "new.png")
    with pytest.raises(UserError, match=r"rows\.jsonl:1 is in train, rows\.jsonl:13 in (test|dev)"):
        convert_jsonl()


def test_queries_that_differ_in_a_sign_alone_are_two(folder):
    pairs = [("section 1.12", "section 11.2"), ("who signed C", "who signed C++"), ("is -5 allowed", "is 5 allowed"),
             ("किताब", "कताबी"), ("ไก่", "ไก")]  # fmt: skip
    jsonl_folder(folder, [{"image": "new.png", "query": one, "split": "train"} for one, _ in pairs])
    write_page(folder / "new.png")
    write_page(folder / "other.png")
    with (folder / "rows.jsonl").open("a") as file:
        file.writelines(
            "\n" + json.dumps({"image": "other.png", "query": other, "split": "test"}) for _, other in pairs
        )
    own = convert_jsonl()
    assert not own.summary["bad"] and {one for one, _ in pairs} <= {row["query"] for row in training(own.made)}
    assert {other for _, other in pairs} <= set(test_queries(own.made))


@pytest.mark.parametrize(
    "sentence",
    [
        "किसान अपने खेत में गेहूँ और चावल की फसल उगाते हैं और उसे बाजार में बेचते हैं।",
        "การติดตั้งโปรแกรมบนเครื่องคอมพิวเตอร์ต้องใช้สิทธิ์ของผู้ดูแลระบบ",
        "هل يمكن للمستخدم أن يعيد تشغيل الجهاز بعد انقطاع الكهرباء؟",
        "この装置を初めて使用する前に、必ず取扱説明書をよくお読みになり、安全上の注意を守ってください。",
    ],
    ids=["Hindi", "Thai", "Arabic", "Japanese"],
)
def test_a_text_without_latin_letters_asks_its_own_sentences(sentence):
    [found] = make_pseudo_queries([DocumentText([f"12 | 34 | 56\n{sentence}"])])
    assert (found.query, found.kind) == (sentence, "sentence")


def many(folder: Path, pages: int = 60) -> None:
    """Pages whose split no row names; the query `shared` is answered by five of them."""
    rows = []
    for number in range(pages):
        write_page(folder / f"{number}.png", f"page {number}")
        queries = [f"question {number}", *(["shared"] if number < 5 else [])]
        rows.append({"image": f"{number}.png", "queries": queries})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_the_content_of_a_page_decides_its_split_and_splits_share_nothing(folder):
    many(folder)
    own = convert_jsonl()
    rows = [training(own.made), training(own.made, "test")]
    pages = [*({row["image_filename"] for row in part} for part in rows), answering_pages(own.made)]
    queries = [*({row["query"] for row in part} for part in rows), set(test_queries(own.made))]
    for groups in (pages, queries):
        assert len(set.union(*groups)) == sum(map(len, groups)) and all(groups)
    assert sum(map(len, pages)) == len(table(own.made, "beir/corpus/*.parquet")) == 60
    shutil.move(DOCS, "elsewhere")
    moved = convert_jsonl("elsewhere").summary["files"]
    same = {name: known for name, known in own.summary["files"].items() if "beir" in name}
    assert moved.items() >= same.items(), "the same pages and queries, wherever they lie"


def test_what_is_unchanged_is_not_made_again_and_what_is_changed_or_damaged_is(folder):
    many(folder)
    own = convert_jsonl()
    file = next(Path(own.made).glob("train/data/train-*.parquet"))
    written, content = file.stat().st_mtime_ns, file.read_bytes()
    assert convert_jsonl().made == own.made and file.stat().st_mtime_ns == written
    file.write_bytes(content[:-1])
    convert_jsonl()
    assert file.read_bytes() == content
    Path("demo/base").mkdir(parents=True)
    params = replace(load_recipe(ROOT / "recipes" / "demo.yaml"), train_data=DOCS)
    train = [own.list_dataset_files("train")._asdict()]
    made = {"made_for": get_training_data_params(params), "train": train, "train_corpus": None, "negatives": None}
    Path("data/manifest.json").write_text(json.dumps(made))
    assert len(load_training_data(params).sets) == 1
    write_page(folder / "0.png", "another page")
    with pytest.raises(UserError, match=r"data/own/docs/0\.png: changed since the pages were made.*fetch-data"):
        load_training_data(params)
    assert convert_jsonl().made != own.made


MARK = (
    "import sys; from pathlib import Path; from colintern.storage.lock import mark_in_use; "
    "mark_in_use(Path(sys.argv[1]))"
)


def test_pages_stay_while_they_are_read_and_until_newer_ones_were(folder):
    """As for a run of `--temp` or of the queue, under which the folder is changed in the workspace."""

    def make_changed(number: int) -> Path:
        write_page(folder / "0.png", f"page {number}")
        return Path(convert_jsonl().made).absolute()

    many(folder)
    held, read, last_read, unread = (make_changed(number) for number in range(4))
    assert [path.is_dir() for path in (held, read, last_read, unread)] == [False, False, True, True], "none was read"
    held, read, last_read = make_changed(4), None, None
    mark_in_use(held)
    for number in (5, 6):
        read, last_read = last_read, make_changed(number)
        subprocess.run([sys.executable, "-c", MARK, last_read], check=True, cwd=ROOT)
    unread, new = make_changed(7), make_changed(8)
    assert [path.is_dir() for path in (held, read, last_read, unread, new)] == [True, False, True, False, True]
    write_page(folder / "0.png", "page 6")
    written = (last_read / "summary.json").stat().st_mtime_ns
    convert_jsonl()
    assert (last_read / "summary.json").stat().st_mtime_ns == written, "the former folder needs no new pages"


def test_folders_whose_names_differ_in_punctuation_or_script_keep_their_own_pages(folder):
    jsonl_folder(folder, [])
    others = [Path("data/own/docs!"), Path("data/own/文件"), Path("data/own/書類")]
    for other in others:
        shutil.copytree(folder, other)
        write_page(other / "0.png", f"page of {other}")
    made = {convert_jsonl(str(one)).made for one in (folder, *others)}
    assert len(made) == 4 and all(map(os.path.isdir, made))


def test_too_few_rows_are_refused_by_split_and_with_the_reasons(folder):
    jsonl_folder(folder, [], pages=1)
    with pytest.raises(UserError, match=r"cannot be used as train_data; queries by split.*'dev': 0"):
        convert_jsonl().list_dataset_files("train")
    jsonl_folder(folder, [{"image": r"scans\1.png", "query": "q"}] * 7, pages=0)
    with pytest.raises(UserError, match=r"7 bad rows, the first:\n  rows\.jsonl:1: 'scans.*1\.png' is missing\n"):
        convert_jsonl().list_dataset_files("train")


PROSE = "The {0}engine drives a {0}wheel slowly and not without noise."


def handbook(folder: Path) -> None:
    """Two documents of 30 pages each; every page has prose of its own, every other page a heading."""
    for name, offset in (("a.pdf", 0), ("sub/b.pdf", 100)):
        titles = [f"{n + 1}. Chapter about w{offset + n}topic" for n in range(30)]
        pages = [[title, PROSE.format(f"w{offset + n}")] for n, title in enumerate(titles)]
        write_pdf(folder / name, pages, [(titles[n], n) for n in range(0, 30, 2)])


def test_a_form_is_drawn_with_what_is_filled_in(folder, tmp_path):
    write_pdf(folder / "form.pdf", [["Name:"]], filled="Oslo")
    found = read_pdf_folder(folder, ImageStore(tmp_path))
    with Image.open(found.pages["form.pdf#page=1"].path) as page:
        low, _ = page.convert("L").crop((40, 540, 440, 600)).getextrema()  # the field's place, at two pixels a point
    assert low < 50


def test_pdfs_without_questions_get_pseudo_queries_named_wherever_they_appear(folder):
    from colintern.data.benchmarks import resolve_benchmarks

    handbook(folder)
    try:  # a file whose name is not UTF-8 costs one row
        shutil.copy(folder / "a.pdf", folder / "Pr\udcfcf.pdf")
        bad = {r"Pr\udcfcf.pdf": "its name is not UTF-8; rename it"}
    except OSError:
        bad = {}  # this file system takes no such name
    own = convert_pdfs()
    assert bad_rows(own) == bad and own.summary["kinds"] == {"heading": 30, "sentence": 30}
    rows = {row["image_filename"]: row for row in [*training(own.made), *training(own.made, "test")]}
    assert rows
    for name, row in rows.items():
        file, page = name.split("#page=")
        topic = f"w{int(page) - 1 + (100 if file == 'sub/b.pdf' else 0)}"
        heading = int(page) % 2 == 1
        assert row["query"] == (f"Chapter about {topic}topic" if heading else PROSE.format(topic))
        assert row["source"] == f"docs (pseudo-query: {'heading' if heading else 'sentence'})"
    assert "machine-generated" in Path(own.made, "beir", "README.md").read_text()
    for row in table(own.made, "beir/corpus/*.parquet"):
        file, page = row["image"]["path"].split("#page=")
        assert f"w{int(page) - 1 + (100 if file == 'sub/b.pdf' else 0)}topic" in row["text"]
    manifest = {"evaluation": {DOCS: own.list_dataset_files("beir")._asdict()}}
    Path("data/manifest.json").write_text(json.dumps(manifest))
    [(label, task)] = resolve_benchmarks([DOCS])
    assert label == "docs (pseudo-queries)" and task.metadata.name == "DocsPseudoQueriesRetrieval"


def test_pseudo_queries_of_twice_the_pages_take_twice_the_work(monkeypatch):
    texts = [PROSE.format(f"w{n}") for n in range(200)]
    counted = Counted(monkeypatch, pseudo_queries, "normalize_text")
    work = []
    for documents in (10, 20):
        counted.calls = 0
        found = make_pseudo_queries([DocumentText(texts[n * 10 : n * 10 + 10]) for n in range(documents)])
        assert [query.query for query in found] == texts[: documents * 10]
        work.append(counted.calls)
    assert work[1] == 2 * work[0]


def test_what_several_pages_print_asks_for_none_of_them():
    pages = [f"{PROSE.format('')} {PROSE.format(f'w{n}')}" for n in range(9)]
    outline = [("Package", 0), ("1. engine", 1), ("w2engine", 2)]
    found = make_pseudo_queries([DocumentText(["Package " + page for page in pages], outline)])
    assert [query.query for query in found] == ["w2engine" if n == 2 else PROSE.format(f"w{n}") for n in range(9)]


def test_sentences_that_begin_alike_on_many_pages_are_counted_in_seconds():
    """Each searched for on each page, as before, would be 3.6 thousand million searches."""
    texts = [f"thefollowingtable{n:06}" for n in range(60_000)]
    assert count_pages_with(texts, texts) == dict.fromkeys(texts, 1)


QUESTIONS = [
    ("what drives the wheel", "a.pdf", "1", "test"),
    ("where is the second chapter", "sub/b.pdf", "2", "train"),
    ("and the third", "sub/b.pdf", "3", "dev"),
    ("line,\nbreak", "a.pdf", "6", "test"),
    ('a "5" disk', "a.pdf", "7", "test"),
    ("what is,\nin a.pdf, 1", "a.pdf", "8", "test"),
    ("both", "a.pdf", "4", "test"),
    ("both", "./a.pdf", "5", ""),
    ("both", "./a.pdf", "5", ""),
]
BAD_QUESTIONS = [
    (("page too high", "a.pdf", "31", ""), r"page '31': a\.pdf has pages 1 to 30"),
    (("page zero", "a.pdf", "0", ""), "page '0'"),
    (("page in words", "a.pdf", "two", ""), "page 'two'"),
    (("page of many digits", "a.pdf", "9" * 5000, ""), r"page '9+: a\.pdf has pages 1 to 30"),
    (("no such file", "c.pdf", "1", ""), "'c.pdf' is missing"),
    (("outside", "../../x.pdf", "1", ""), "refused: .* points outside"),
    (("a URL", "http://example.com/a.pdf", "1", ""), "refused: .* is a URL"),
    (("damaged file", "damaged.pdf", "1", ""), "damaged.pdf is not a readable PDF"),
    (("too large", "poster.pdf", "1", ""), "could not be rendered"),
    (("  ", "a.pdf", "1", ""), "query is empty"),
    (("split", "a.pdf", "1", "eval"), "split is 'eval'"),
]


def test_given_questions_are_taken_and_bad_ones_named(folder):
    handbook(folder)
    (folder / "damaged.pdf").write_bytes((folder / "a.pdf").read_bytes()[300:700])
    write_pdf(folder / "poster.pdf", [["large"]], size=(14_000, 14_000))
    with (folder / "queries.CSV").open("w", newline="") as file:
        csv.writer(file).writerows([("query", "file", "page", "split"), *QUESTIONS, *(row for row, _ in BAD_QUESTIONS)])
    own = convert_pdfs()
    bad = bad_rows(own)
    assert re.search("not a readable PDF", bad.pop("damaged.pdf"))
    assert re.search("megapixels, more than 89", bad.pop("poster.pdf#page=1"))
    assert list(bad) == [f"queries.CSV:{13 + n}" for n in range(len(BAD_QUESTIONS))]
    for reason, (_, pattern) in zip(bad.values(), BAD_QUESTIONS, strict=True):
        assert re.search(pattern, reason), (reason, pattern)
    assert own.summary["kinds"] == {"given": 8} and own.summary["not read"] == [], "rows name train and dev: no others"
    assert sorted(test_queries(own.made)) == sorted({query for query, *_, split in QUESTIONS if split == "test"})
    assert len(table(own.made, "beir/qrels/*.parquet")) == 6, "a query of two pages is one query with two answers"
    assert own.summary["same queries"] == 1
    assert "machine-generated" not in Path(own.made, "beir", "README.md").read_text()
    assert all("pseudo" not in row["source"] for row in training(own.made))
    quarantine = collect_quarantine({}, {DOCS: own})
    assert quarantine.totals == {(DOCS, "pages"): 62, (DOCS, "questions"): 20}
    with pytest.raises(UserError, match=r"docs: 11 of 20 questions cannot be used, .*\n  queries\.CSV:13: page '31'"):
        check_bad_fraction(quarantine, 0.5)  # of which the 13 bad rows are no large share of pages and questions


FEW_QUESTIONS = "query,file,page\nthe first,a.pdf,1\nboth,a.pdf,2\nboth,a.pdf,3\nof the other,sub/b.pdf,1\n"


@pytest.mark.parametrize("split_by", ["page", "document"])
@pytest.mark.parametrize("train_on_test_pages", [False, True])
def test_few_given_questions_are_the_test_set_and_pseudo_queries_the_rest(
    folder, split_by, train_on_test_pages, capsys
):
    from colintern.data.formats import get_benchmark_label

    handbook(folder)
    for name in ("c.pdf", "d.pdf"):
        write_pdf(folder / name, [[PROSE.format(f"{name[0]}{n}")] for n in range(5)])
    (folder / "queries.csv").write_text(FEW_QUESTIONS)
    own = convert_documents(DOCS, read_pdf_folder, DivisionParams(split_by, train_on_test_pages))
    judged = {"a.pdf#page=1", "a.pdf#page=2", "a.pdf#page=3", "sub/b.pdf#page=1"}
    assert set(test_queries(own.made)) == {"the first", "both", "of the other"}
    assert answering_pages(own.made) == judged and len(table(own.made, "beir/corpus/*.parquet")) == 70
    train, dev = ({row["image_filename"] for row in training(own.made, split)} for split in ("train", "test"))
    assert train and dev and not train & dev
    assert bool(judged & (train | dev)) == train_on_test_pages
    if split_by == "document":
        documents = [{page.partition("#")[0] for page in pages} - {"a.pdf", "sub/b.pdf"} for pages in (train, dev)]
        assert set.union(*documents) == {"c.pdf", "d.pdf"} and not set.intersection(*documents)
        assert train_on_test_pages or train | dev == {f"{name}.pdf#page={n + 1}" for name in "cd" for n in range(5)}
    else:
        assert len(train | dev) == (70 if train_on_test_pages else 66)
    label = "docs (pages trained on)" if train_on_test_pages else "docs"
    assert get_benchmark_label(DOCS, Path(own.made, "beir")) == label
    assert (
        own.list_dataset_files("train").made_from["pseudo"] and not own.list_dataset_files("beir").made_from["pseudo"]
    )
    out = capsys.readouterr().out
    assert "to evaluate on: 3 queries, 70 pages ranked for each\n    few: the standard error" in out


@pytest.mark.parametrize(("asked", "there"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_an_umlaut_of_a_file_name_is_found_however_it_is_spelled(folder, asked, there):
    name = "Prüfung/Größe.pdf"
    (folder / normalize(there, "Prüfung")).mkdir()
    write_pdf(folder / normalize(there, name), [["one"]])
    Image.new("RGB", (9, 9)).save(folder / normalize(there, "ü.png"))
    line = {"query": "the engine", "file": normalize(asked, name), "page": 1, "split": "test"}
    (folder / "queries.jsonl").write_text(json.dumps(line))
    own = convert_pdfs()
    assert not own.summary["bad"] and own.summary["queries"]["test"] == 1
    (folder / "queries.jsonl").write_text(json.dumps({"image": normalize(asked, "ü.png"), "query": "which"}))
    assert not convert_jsonl().summary["bad"]


def test_a_line_with_several_bad_queries_is_one_bad_row(folder, capsys):
    jsonl_folder(folder, [{"image": "0.png", "queries": ["", " ", 7]}])
    quarantine = collect_quarantine({}, {DOCS: convert_jsonl()})
    assert "1 bad of 13 rows" in capsys.readouterr().out and len(quarantine.rows) == 3
    check_bad_fraction(quarantine, 1 / 13)
    with pytest.raises(UserError, match=r"1 of 13 rows cannot be used, .* \(a bad page counts in each row"):
        check_bad_fraction(quarantine, 0.07)


def read_table(text: str | bytes, name: str = "queries.csv") -> tuple[list[tuple], list[str]]:
    """Read a table of questions about a.pdf: (query, file, page) of its rows, and the reasons of its bad ones."""
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
    documents = RawDocuments()
    if name.endswith("jsonl"):
        rows = read_json_lines(Path(name), documents)
    else:
        rows = read_query_csv(Path(name), {"a.pdf"}, documents)
    found = [(row["query"], row.get("file"), row.get("page")) for _, row in rows]
    return found, [f"{row.where}: {row.reason}" for row in documents.invalid_rows]


LINES = "".join(json.dumps({"image": "0.png", "query": f"größe {n}"}, ensure_ascii=False) + "\n" for n in range(9))
STRAY = 'query,file,page\nfirst,a.pdf,1\n"stray,a.pdf,1\n'
ROWS = "where is it,a.pdf,1\n"
STRAY_ROW = r"queries\.csv: the row that begins in line 3: "


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("queries.csv", "question,file,page\n", r"has no column query; its first line is .*'question'"),
        ("queries.csv", "query,file,page,page\n", "has the column page 2 times"),
        ("queries.csv", "query;page\n", r"has no column file; its first line is \['query', 'page'\]"),
        ("queries.csv", "", r"has no column query, file, page; its first line is \[\]"),
        ("queries.csv", "query|file|page\n", "has no column query, file, page"),
        ("queries.csv", "Query,query,file,page\n", "has the column query 2 times"),
        ("queries.csv", "query,file,page\na\0b,a.pdf,1\n", "holds zero bytes, the first in line 2"),
        ("queries.jsonl", "{}\n{\0}\n", "holds zero bytes, the first in line 2"),
        ("queries.csv", "query,file,page\n\udcff,a.pdf,1\n", "is not UTF-8.*save it as CSV UTF-8"),
        ("rows.jsonl", LINES.encode("utf-16"), "rows.jsonl: is UTF-16, not UTF-8; save it as UTF-8"),
        ("rows.jsonl", LINES.encode("utf-16-le"), "holds zero bytes, the first in line 1: UTF-16, or damaged"),
        ("rows.jsonl", LINES.encode("utf-32"), "rows.jsonl: is UTF-16"),
        ("rows.jsonl", LINES.encode("latin-1"), "is not UTF-8: 9 of 9 lines are not, the first is line 1"),
        ("queries.csv", STRAY + ROWS * 9, STRAY_ROW + "unexpected end of data"),
        ("queries.csv", STRAY + ROWS * 9 + '"is it here, or there",a.pdf,1\n', STRAY_ROW + "',' expected after"),
        ("queries.csv", STRAY + ROWS * 9 + 'a disk of 5",a.pdf,1\n', STRAY_ROW + "one of its cells holds whole rows"),
        ("queries.csv", STRAY + ROWS * 9999, STRAY_ROW + "field larger than field limit"),
    ],
)
def test_a_table_or_lines_that_cannot_be_read_are_refused(name, text, message):
    with pytest.raises(UserError, match=message):
        read_table(text, name)


TABLES = {  # of the questions "one" and "two" for pages 1 and 2
    "tabs": "query\tfile\tpage\none\ta.pdf\t1\ntwo\ta.pdf\t2\n",
    "sep": "sep=;\nquery;file;page\none;a.pdf;1\ntwo;a.pdf;2\n",
    "quoted sep": '"sep=|"\r\nquery|file|page\r\none|a.pdf|1\r\ntwo|a.pdf|2\r\n',
    "sep of tabs": "SEP=\t\nquery\tfile\tpage\none\ta.pdf\t1\ntwo\ta.pdf\t2\n",
    "capitals and spaces": "\ufeffQuery, FILE ,Page\none, a.pdf, 1\ntwo,a.pdf ,2 \n",
    "line ends of old Macs": "query,file,page\rone,a.pdf,1\r\rtwo,a.pdf,2\r",
    "blank rows": "\n,,\nquery,file,page\n\none,a.pdf,1\n,,\n  ,,\ntwo,a.pdf,2\n\n",
    "more commas than columns": "query,file,page,,\none,a.pdf,1,,\ntwo,a.pdf,2,,,,\n",
    "quoted header": '"query","file","page"\n"one","a.pdf","1"\n"two","a.pdf","2"\n',
    "semicolons in a header of commas": "query,file,page,a;b;c;d\none,a.pdf,1,\ntwo,a.pdf,2,\n",
}


@pytest.mark.parametrize("text", TABLES.values(), ids=TABLES)
def test_a_table_is_read_whatever_wrote_it(text):
    assert read_table(text) == ([("one", "a.pdf", "1"), ("two", "a.pdf", "2")], [])


def test_lines_with_a_byte_order_mark_are_read_and_a_few_damaged_ones_cost_a_row_each():
    rows, bad = read_table(LINES.encode("utf-8-sig") + b'{"query": "\xff"}\n' * 2, "rows.jsonl")
    assert [row[0] for row in rows] == [f"größe {n}" for n in range(9)]
    assert [reason.split(": ")[:2] for reason in bad] == [[f"rows.jsonl:{n}", "not JSON"] for n in (10, 11)]


def test_a_query_with_an_unquoted_comma_is_named_as_such():
    rows = ["where, and how,a.pdf,1", "line,a.pdf,2", "one, two, three,a.pdf,1,test", "short,a.pdf"]
    assert read_table("\n".join(["query,file,page,split", "", *rows]))[1] == [
        "queries.csv:3: row 3 names the file 'a.pdf' where its page should be: quote a query that contains a comma",
        "queries.csv:5: row 5 has 6 fields, header has 4: quote a query that contains a comma",
        "queries.csv:6: row 6 has 2 fields, header has 4: each needs query, file, page",
    ]
    rows, bad = read_table("query;file;page\nwhere; and how;a.pdf;1\nwhat, then;a.pdf;1\n")
    assert bad == ["queries.csv:2: row 2 has 4 fields, header has 3: quote a query that contains a semicolon"]
    assert rows == [("what, then", "a.pdf", "1")]


@pytest.mark.parametrize("comma", [",", ";"])
def test_a_table_is_read_as_excel_writes_it(folder, comma, capsys):
    write_pdf(folder / "a.pdf", [["one"], ["two"]])
    rows = [["query", "file", "page", "split", ""]]
    rows += [
        ["wo, und; wie?", "a.pdf", "1", "test", ""],
        ['2.\nZeile "ü"', "a.pdf", "2", "test", ""],
        *([[""] * 5] * 40),
    ]
    with (folder / "queries.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=comma).writerows(rows)
    own = convert_pdfs()
    assert test_queries(own.made) == ["wo, und; wie?", '2.\nZeile "ü"']
    assert (own.summary["rows"], own.summary["bad"]) == ({"pages": 2, "questions": 2}, [])
    assert "without effect" not in capsys.readouterr().out


def test_a_query_without_an_end_is_cut_and_counted(folder, capsys):
    longest = "x" * MAX_QUERY_CHARACTERS
    jsonl_folder(folder, [{"image": "0.png", "queries": [longest, longest + "y" * 2**24, " " * 2**20, [1] * 2**20]}])
    own = convert_jsonl()
    assert [row["query"] for row in training(own.made)][1] == longest and own.summary["cut queries"] == 1
    assert "queries cut to 65536 characters: 1" in capsys.readouterr().out
    assert max(map(len, bad_rows(own).values())) < 200, "nor is it written into its reason"
    documents = RawDocuments()
    documents.add_query(longest + "y", "a page", "heading")
    assert (documents.pairs[0].query, documents.num_cut_queries) == (longest, 1)


class Counted:
    """Counts the calls of a function that it stands in for."""

    def __init__(self, monkeypatch, where: object, name: str):
        self.calls, self.real = 0, getattr(where, name)
        monkeypatch.setattr(where, name, self)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.real(*args, **kwargs)


def test_what_a_page_or_file_costs_is_paid_once_and_not_for_each_question(folder, monkeypatch):
    write_pdf(folder / "a.pdf", [["one"], ["two"], ["three"]])
    splits = ("train", "dev", "test")
    rows = [f"question {n},a.pdf,{n % 3 + 1},{splits[n % 3]}\n" for n in range(900)]
    (folder / "queries.csv").write_text("query,file,page,split\n" + "".join(rows))
    hashed = Counted(monkeypatch, formats.hashlib, "sha256")
    located = Counted(monkeypatch, pdfs, "resolve_within")
    own = convert_pdfs()
    assert own.summary["queries"] == {"train": 300, "dev": 300, "test": 300}
    assert located.calls == 1 and hashed.calls < 100


@pytest.fixture
def rendered(monkeypatch) -> list[str]:
    """The pages that worker processes were sent to render, in order; the test empties the list."""
    sent: list[str] = []
    real = IsolatedPool.map

    def record(self, function, groups):
        if getattr(function, "func", None) is render_and_store_pages:
            sent.extend(f"{page.path.name} {page.page + 1}" for group in groups for page in group)
        return real(self, function, groups)

    monkeypatch.setattr(IsolatedPool, "map", record)
    return sent


def write_three_pdfs(folder: Path) -> None:
    """Pages and a question for each split, one PDF each."""
    rows = []
    for name, split in (("a", "train"), ("b", "dev"), ("c", "test")):
        write_pdf(folder / f"{name}.pdf", [[f"{name}{page}"] for page in range(3)])
        rows.append(f"where is {name},{name}.pdf,1,{split}\n")
    (folder / "queries.csv").write_text("query,file,page,split\n" + "".join(rows))


@pytest.fixture(scope="module")
def converted_place(tmp_path_factory) -> Path:
    """A place in which `write_three_pdfs` was converted."""
    place = tmp_path_factory.mktemp("converted")
    (place / DOCS).mkdir(parents=True)
    with chdir(place):
        write_three_pdfs(Path(DOCS))
        convert_pdfs()
    return place


@pytest.fixture
def converted(converted_place, tmp_path) -> Path:
    """A copy of it in the current folder; the folder of the rendered pages."""
    shutil.copytree(converted_place / "data", tmp_path / "data", dirs_exist_ok=True)
    return next(Path(MADE).glob("*/rendered"))


def list_rendered_files(pages: str = "*") -> set[Path]:
    return {path for path in Path(MADE).glob(f"*/rendered/{pages}") if path.is_file()}


def test_only_pages_of_new_and_changed_pdfs_are_rendered(folder, converted, rendered, capsys):
    images = {path: path.stat().st_mtime_ns for path in list_rendered_files("images/*")}
    assert len(images) == 9 and len(list_rendered_files()) == 3
    questions = (folder / "queries.csv").read_text()
    (folder / "queries.csv").write_text(questions + "another one,c.pdf,2,test\n")
    assert "another one" in test_queries(convert_pdfs().made)
    assert rendered == [] and "rendered before: 9 of 9 pages" in capsys.readouterr().out
    write_pdf(folder / "new.pdf", [["new"]])
    (folder / "b.pdf").rename(folder / "renamed.pdf")
    (folder / "queries.csv").write_text(questions.replace("b.pdf", "renamed.pdf"))
    convert_pdfs()
    assert rendered == ["new.pdf 1"]
    assert images.items() <= {path: path.stat().st_mtime_ns for path in list_rendered_files("images/*")}.items()
    rendered.clear()

    (folder / "new.pdf").unlink()
    write_pdf(folder / "c.pdf", [["c0"], ["changed"]])
    own = convert_pdfs()
    assert rendered == ["c.pdf 1", "c.pdf 2"]
    assert len(list_rendered_files()) == 3, "what no PDF of the folder has is deleted"
    assert len(list_rendered_files("images/*")) == 8
    shutil.rmtree(MADE)
    assert convert_pdfs().summary == own.summary, "as where nothing was kept"
    assert len(rendered) == 2 + 8
    for path in folder.iterdir():
        path.unlink()
    jsonl_folder(folder, [])
    convert_jsonl()
    assert not list_rendered_files() and not list_rendered_files("images/*"), "the folder holds no PDF any more"


def test_an_outline_that_failed_is_read_again_and_then_kept(folder, converted, monkeypatch):
    reads: list[int] = []
    real = IsolatedPool.map

    def fail_first(self, function, groups):
        if function is not pdfs.read_outlines:
            return real(self, function, groups)
        reads.append(len(groups))
        return [Failure("too slow") for _ in groups] if len(reads) == 1 else real(self, function, groups)

    monkeypatch.setattr(IsolatedPool, "map", fail_first)
    write_pdf(folder / "new.pdf", [["new"]])
    for number in range(3):
        (folder / f"{number}.txt").touch()
        convert_pdfs()
    assert reads == [1, 1, 0]


def test_what_is_kept_of_a_pdf_is_its_outline_and_its_faults_too(folder, rendered):
    handbook(folder)
    write_pdf(folder / "faults.pdf", [["one"], ["two"]], [("one", 0), ("points nowhere", 1)])
    data = (folder / "faults.pdf").read_bytes()
    (folder / "faults.pdf").write_bytes(re.sub(rb"(points nowhere.*?/Dest \[)\d+", rb"\g<1>9", data))
    words = stream(b"BT /F1 1 Tf " + b"(many words in one page) Tj " * 5000 + b"ET")
    write_odd_page(folder / "wordy.pdf", words, "/Resources << /Font << /F1 7 0 R >> >>")
    first = convert_pdfs()
    (folder / "more.txt").touch()
    rendered.clear()
    second = convert_pdfs()
    assert second.made != first.made and rendered == []
    assert all(second.summary[key] == first.summary[key] for key in ("files", "bad", "kinds"))
    assert list(bad_rows(second)) == ["faults.pdf, outline entry 2", "wordy.pdf#page=1"]


def replace_in_lists(old: str, new: str, number: int = 1) -> Callable[[Path], None]:
    """Return a function that edits the first lists of pages below a folder; with "" for `old` they are replaced."""

    def edit(top: Path) -> None:
        for path in sorted(top.glob("*.json"))[:number]:
            path.write_text(path.read_text().replace(old, new) if old else new)

    return edit


@pytest.mark.parametrize(
    ("damage", "again"),
    [
        (lambda top: os.truncate(min((top / "images").iterdir()), 100), 1),
        (lambda top: min((top / "images").iterdir()).unlink(), 1),
        (replace_in_lists("", '{"renderer": '), 3),
        (replace_in_lists("", "[]"), 3),
        (replace_in_lists('"count"', '"counts"'), 3),
        (replace_in_lists('"renderer": "', '"renderer": "0', 3), 9),
        (shutil.rmtree, 9),
    ],
    ids=["damaged image", "missing image", "torn list", "other list", "no count", "other renderer", "nothing"],
)
def test_what_is_damaged_or_of_another_renderer_is_rendered_again(folder, converted, rendered, damage, again):
    before = convert_pdfs().summary["files"]
    assert rendered == []
    damage(converted)
    (folder / "more.txt").touch()
    assert convert_pdfs().summary["files"] == before and len(rendered) == again


def test_pages_that_failed_are_tried_again_and_those_of_a_run_that_fails_later_are_kept(folder, rendered):
    write_three_pdfs(folder)
    write_pdf(folder / "poster.pdf", [["large"]], size=(14_000, 14_000))
    questions = (folder / "queries.csv").read_text()
    (folder / "queries.csv").write_text(questions + '"stray,a.pdf,1\n')
    with pytest.raises(UserError, match=r"queries\.csv: the row that begins in line 5"):
        convert_pdfs()
    (folder / "queries.csv").write_text(questions)
    assert len(rendered) == 10
    rendered.clear()
    assert list(bad_rows(convert_pdfs())) == ["poster.pdf#page=1"] and rendered == ["poster.pdf 1"]


def test_pages_of_a_pdf_that_changes_while_it_is_read_are_not_kept(folder, rendered, monkeypatch):
    write_three_pdfs(folder)
    store_pages = pdfs._store_pages

    def change(files, *arguments):
        for name, pdf in store_pages(files, *arguments):
            if name == "b.pdf":
                write_pdf(files[name], [["other"]])
            yield name, pdf

    monkeypatch.setattr(pdfs, "_store_pages", change)
    convert_pdfs()
    assert len(list_rendered_files()) == 2 and not any('"b0"' in path.read_text() for path in list_rendered_files())


def test_a_document_is_opened_as_often_however_many_pages_it_has():
    pages = [PageRef(Path(name), index) for name in ("a.pdf", "b.pdf") for index in range(1000)]
    groups = group_pages(pages)
    assert len(groups) <= 140 and [page for group in groups for page in group] == pages
    assert all(len({page.path for page in group}) == 1 for group in groups)
    assert [len(group) for group in group_pages(pages[:20])] == [8, 8, 4]
