"""Rows that name their pages by number, as in manu/colpali-queries, and hard negatives: from a column, and mined."""

import hashlib
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import BASE, ROOT, load_pairs, page_image
from processes import program
from pyarrow import parquet
from test_survey import PAGES, fetch_data, quarantine, write_eval, write_set
from test_training import TARGETS

from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.page_features import Page
from colintern.ingest.scan import select_dev_pages
from colintern.modeling.lora import add_lora
from colintern.modeling.processor import ColIntern3_5Processor
from colintern.modeling.retriever import ColIntern3_5
from colintern.params import load_params
from colintern.training.mining import MiningLimits, TopKAccumulator, filter_negatives
from colintern.training.pairs import MinedNegatives, TrainingPair, read_mined_negatives, write_mined_negatives

pytestmark = pytest.mark.integration
QUERIES, CORPUS, MINED = "data/own/queries", "data/own/corpus", "data/mined/negatives.parquet"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    shutil.copytree(BASE, "demo/base")
    page = CorpusPage(0, encode_png(page_image("a page of the test set")), "0.png")
    write_beir(Path("data/own/beir"), [page], [Query(0, "a query")], [Qrel(0, 0)])


def write_params(**values: object) -> None:
    """The demo recipe with other values."""
    lines = render_recipe(ROOT / "recipes" / "demo.yaml").replace("- demo\n", "- data/own/beir\n").splitlines()
    for place, line in enumerate(lines):
        name = line.partition(":")[0]
        if name in values:
            lines[place] = f"{name}: {values.pop(name)}"
    assert not values
    Path("params.yaml").write_text("\n".join(lines) + "\n")


def write_numbered(asked: list[tuple[str, object, list[int]]], pages: list[bytes] = PAGES) -> None:
    """The two data sets in the layout of manu/colpali-queries and manu/colpali-corpus; the corpus in two shards."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for shard in (0, 1):
        half = pages[shard * 30 : shard * 30 + 30]
        table = pa.Table.from_pylist(
            [{"image": {"bytes": data, "path": "p.png"}} for data in half], schema=pa.schema([("image", image)])
        )
        Path(CORPUS, "data").mkdir(parents=True, exist_ok=True)
        parquet.write_table(table, f"{CORPUS}/data/train-0000{shard}-of-00002.parquet", row_group_size=7)
    names = ("query", "positive_passages", "negative_passages", "gold_in_top_100")
    records = [dict(zip(names, (*row, True), strict=True)) for row in asked]
    Path(QUERIES, "data").mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(records), f"{QUERIES}/data/train-00000-of-00001.parquet")


def numbered(count: int = 45) -> list[tuple[str, object, list[int]]]:
    return [(f"question {n}", [n], [n, (n + 1) % 45, (n + 2) % 45, 50 + n % 10]) for n in range(count)]


@pytest.fixture
def by_number():
    write_numbered(numbered())
    write_params(train_data=QUERIES, train_corpus=CORPUS, negatives=2)


def key(number: int) -> str:
    return hashlib.sha256(PAGES[number]).hexdigest()


def test_rows_find_their_pages_and_negatives_by_number(by_number):
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    found = load_pairs()
    [dev] = found["test"]
    assert dev.page.key == min(key(n) for n in range(45)), "a fiftieth of 45 pages, by hash"
    assert len(found["train"]) == 44
    for row in found["train"]:
        number = int(row.query.split()[1])
        assert row.page.key == key(number) and row.page.image().tobytes() == page_image(f"page {number}").tobytes()
        wanted = [key(n) for n in ((number + 1) % 45, (number + 2) % 45, 50 + number % 10) if key(n) != dev.page.key]
        assert [page.key for page in row.negatives] == wanted[:2]


def test_a_set_by_number_is_surveyed_like_any_other(by_number):
    write_eval(range(45, 46))
    done = fetch_data()
    assert done.returncode == 2 and f"the same page is in {CORPUS} (corpus)" in done.stderr, done.stderr
    write_numbered(numbered(), PAGES[:45] + PAGES[50:])
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    survey = json.loads(Path("data/survey.json").read_text())
    assert {name: (facts["rows"], facts["pages"], facts["queries"]) for name, facts in survey.items()} == {
        f"{CORPUS} (corpus)": (55, 55, 0),
        f"{QUERIES} (train)": (44, 44, 44),
        f"{QUERIES} (dev)": (1, 1, 1),
        "data/own/beir (test)": (1, 1, 1),
    }


BAD = [
    (("one past the end", [60], []), "positive_passages: [60] is no row of the corpus"),
    (("before the first", [-1], []), "positive_passages: [-1] is no row of the corpus"),
    (("no page", [], []), "positive_passages: [] is no row of the corpus"),
    (("null", None, []), "positive_passages: None is no row of the corpus"),
    (("  ", [3], []), "query is empty"),
    (("a broken page", [59], []), "its page, row 59: image: cannot be decoded"),
]


def test_a_bad_row_costs_one_row():
    write_numbered([*numbered(), *(row for row, _ in BAD)], [*PAGES[:59], PAGES[59][:400]])
    write_params(train_data=QUERIES, train_corpus=CORPUS, max_bad_fraction=0.2)
    done = fetch_data()
    assert done.returncode == 0, done.stderr
    bad = {(entry["source"], entry["row"]): entry["reason"] for entry in quarantine()}
    assert bad.pop((CORPUS, "data/train-00001-of-00002.parquet:29")).startswith("image: cannot be decoded")
    assert len(bad) == len(BAD)
    for number, (_, reason) in enumerate(BAD, start=45):
        assert bad[QUERIES, f"data/train-00000-of-00001.parquet:{number}"].startswith(reason)
    assert sum(map(len, load_pairs().values())) == 45
    shown = {page.key for row in load_pairs(replace(load_params(), negatives=50))["train"] for page in row.negatives}
    assert key(50) in shown and hashlib.sha256(PAGES[59][:400]).hexdigest() not in shown


def test_a_corpus_is_there_where_it_is_needed_and_nowhere_else(by_number):
    write_params(train_data=QUERIES)
    done = fetch_data()
    assert done.returncode == 2 and "train_corpus: '' is not valid: rows of data/own/queries name" in done.stderr
    write_set(range(0, 40), range(40, 45))
    write_params(train_data="data/own/set", train_corpus=CORPUS)
    done = fetch_data()
    assert done.returncode == 2 and f"train_corpus: '{CORPUS}' has no effect" in done.stderr


def test_negatives_that_nothing_gives_are_refused():
    write_set(range(0, 40), range(40, 45))
    write_params(train_data="data/own/set", negatives=2)
    assert fetch_data().returncode == 0
    with pytest.raises(UserError, match="negatives: 2, but no row has one: data/own/set has no column negative_pass"):
        load_pairs()
    write_params(train_data="data/own/set", negatives=2, negatives_file="nothing.parquet")
    done = fetch_data()
    assert done.returncode == 2 and "negatives_file: 'nothing.parquet' does not exist" in done.stderr
    shutil.copy(next(Path("data/own/set").glob("*.parquet")), "nothing.parquet")
    assert fetch_data().returncode == 0
    with pytest.raises(UserError, match="was not written by `colintern mine`"):
        load_pairs()
    write_mined_negatives(Path("nothing.parquet"), [MinedNegatives("another", key(1), [key(2)], [1.0])], {})
    assert fetch_data().returncode == 0
    with pytest.raises(UserError, match="names none of the 40 training rows"):
        load_pairs()
    write_mined_negatives(
        Path("nothing.parquet"),
        [MinedNegatives("question 0", key(0), [key(2), key(41), "0" * 64], [3.0, 2.0, 1.0])],
        {},
    )
    with pytest.raises(UserError, match=r"nothing\.parquet: .*changed after it was fetched"):
        load_pairs()


def ranking(train, scores, keys, chunk, top=5):
    queries = list(dict.fromkeys(row.query for row in train))
    found = TopKAccumulator(train, queries, top)
    for start in range(0, len(keys), chunk):
        part = [Page(key, None) for key in keys[start : start + chunk]]
        found.add(part, scores[:, start : start + chunk])
    return found


@pytest.mark.parametrize("chunk", [1, 2, 6])
def test_what_is_right_or_nearly_as_good_is_no_negative(chunk):
    a, b, c, d, e, f = keys = list("abcdef")
    train = [
        TrainingPair("q", Page(a, None)),
        TrainingPair("q", Page(b, None)),
        TrainingPair("r", Page(c, None)),
        TrainingPair("q", Page(a, None)),
    ]
    scores = torch.tensor([[10.0, 12.0, 9.4, 9.6, 9.4, 1.0], [-9.0, -12.0, -10.0, -10.4, -10.6, -13.0]])
    mined, right, close = filter_negatives(train, ranking(train, scores, keys, chunk), MiningLimits(5, 0.95, 2), {f})
    assert [(row.query, row.page, row.negatives) for row in mined] == [
        ("q", a, [c, e]),  # 9.4 <= 9.5, and 9.6 is too close; of equal scores the first page first
        ("q", b, [d, c]),
        ("r", c, [e, b]),  # below -10.5; f would be the last, and is unfit
    ]
    assert mined[0].scores == pytest.approx([9.4, 9.4])
    assert (right, close) == (5, 3)


def test_a_file_reads_as_it_was_written(tmp_path):
    row = MinedNegatives("q", "a" * 64, ["b" * 64], [0.5])
    write_mined_negatives(tmp_path / "deep" / "n.parquet", [row], {"adapter": "x"})
    assert read_mined_negatives(tmp_path / "deep" / "n.parquet") == {("q", "a" * 64): ["b" * 64]}
    assert json.loads(parquet.read_schema(tmp_path / "deep" / "n.parquet").metadata[b"colintern"]) == {"adapter": "x"}


def test_held_out_is_a_fiftieth_by_hash():
    keys = [f"{number:064x}" for number in range(200)]
    assert select_dev_pages([*keys, *keys]) == set(keys[:4])
    assert select_dev_pages(keys[:3]) == {keys[0]}


def test_mined_negatives_train(tmp_path):
    """The command, on an adapter, then fetch-data and the rows of the training stage."""
    write_set(range(0, 40), range(40, 45))
    write_params(train_data="data/own/set")
    assert fetch_data().returncode == 0
    wrapped = add_lora(ColIntern3_5.from_pretrained("demo/base", dtype=torch.float32), TARGETS, 4, 4, 0.0)
    for name, weights in wrapped.named_parameters():
        if "lora_B" in name:  # an untrained adapter is refused
            torch.nn.init.normal_(weights, std=1e-3, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained("experiments/colintern")
    wrapped.base_model.model.save_head("experiments/colintern")
    ColIntern3_5Processor.from_pretrained(BASE, max_visual_tokens=96).save_pretrained("experiments/colintern")

    def colintern(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return program("colintern.__main__", "mine", *arguments)

    done = colintern("--top", "0")
    assert done.returncode == 2 and "--top: 0 is not valid" in done.stderr
    write_params(train_data="data/own/set", max_visual_tokens=64)
    done = colintern()
    assert done.returncode == 2 and "trained with max_visual_tokens: 96, but params.yaml has 64; set" in done.stderr
    write_params(train_data="data/own/set")
    done = colintern("--adapter", "nowhere")
    assert done.returncode == 2 and "--adapter: nowhere: does not exist, or is no folder here" in done.stderr
    done = colintern("--top", "12", "--margin", "0.999", "--keep", "3")
    assert done.returncode == 0, done.stderr
    assert "40 rows" in done.stdout and "left out: " in done.stdout
    phases = ["mine: checking the base and the training pages", "mine: loading experiments/colintern"]
    assert [line for line in done.stderr.splitlines() if line.startswith("mine: ")] == phases
    first = Path(MINED).read_bytes()
    made = json.loads(parquet.read_schema(MINED).metadata[b"colintern"])
    assert made["limits"] == {"top": 12, "margin": 0.999, "keep": 3} and len(made["adapter_sha256"]) == 64
    write_params(train_data="data/own/set", launch=2)
    done = colintern("--top", "12", "--margin", "0.999", "--keep", "3")
    assert done.returncode == 0, done.stderr
    assert Path(MINED).read_bytes() == first, "two processes mine the same, to the byte"

    write_params(train_data="data/own/set", negatives=2, negatives_file=MINED)
    assert fetch_data().returncode == 0
    found = load_pairs()["train"]
    mined = read_mined_negatives(Path(MINED))
    dev = {key(number) for number in range(40, 45)}
    for row in found:
        assert [page.key for page in row.negatives] == mined[row.query, row.page.key][:2]
        assert not {page.key for page in row.negatives} & (dev | {row.page.key})
    assert any(row.negatives for row in found)
