"""`colintern report`: what is in it, and what a reader sees of it in a real browser, in light and dark."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import browser
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from processes import FORKS
from test_adapters import trained

from colintern.core.errors import UserError
from colintern.core.recipes import render_recipe
from colintern.data.formats import CorpusPage, Qrel, Query, write_beir
from colintern.data.images import encode_png
from colintern.encoding.embed import embed_queries
from colintern.encoding.pooling import truncate_dim
from colintern.evaluation.mteb_encoder import ColIntern3_5Encoder
from colintern.evaluation.results import QueryResult
from colintern.monitoring.guide import get_recommended_bounds
from colintern.monitoring.health import HEALTH, assess_run, findings_to_json
from colintern.params import load_params as load_params
from colintern.params import load_recipe
from colintern.reporting import examples, plots
from colintern.reporting.evaluation import (
    FULL_SIZE,
    apply_evaluated_settings,
    compute_margin,
    count_ranks,
    find_evaluation,
    list_published_scores,
    select_worst_queries,
)
from colintern.reporting.examples import RankedPage, explain_failures, explain_query, split_query
from colintern.reporting.failures import JudgedQuery, group_failures
from colintern.reporting.html import render_html
from colintern.reporting.near_duplicates import are_near_duplicates, shrink_page
from colintern.scoring.maxsim import maxsim_scores
from colintern.scoring.metrics import MAIN_METRIC
from colintern.storage.files import format_json
from colintern.storage.manifest import BEIR_SUFFIXES, hash_local_files, hash_source_files
from demo.corpus import generate_corpus

pytestmark = pytest.mark.integration
SET = "data/own/pages"
HOSTILE = '<script>alert(1)</script> & "Oslo" <img src=http://example.org/x onerror=alert(1)>'
DOCUMENTS = "data/own/docs"
HARD_NAME = "sub dir/50% Größe #2.pdf#page=36"
SECONDS = 3.0  # to open 90 pages; measured 0.3 on two slow cores


def fork(folder: Path, *command: str) -> tuple[int, str]:
    """A `colintern` command in a separate process: the exit code and what it printed."""
    process = FORKS.Process(target=run, args=(folder, command))
    process.start()
    process.join(300)
    assert process.exitcode is not None, "hangs"
    return process.exitcode, (folder / "log.txt").read_text()


def run(folder: Path, command: tuple[str, ...]) -> None:
    os.chdir(folder)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from colintern.__main__ import main

    main(command)


def write_set() -> None:
    """60 pages, one of whose queries would do harm if it were not escaped."""
    pages = generate_corpus("test", 60, 1, seed=3)
    images = [encode_png(page.image.resize((600, 900))) for page in pages]
    queries = [HOSTILE, *(page.queries[0] for page in pages[1:])]
    write_beir(
        Path(SET),
        [CorpusPage(number, image, f"{number}.png" if number else HARD_NAME) for number, image in enumerate(images)],
        [Query(number, query) for number, query in enumerate(queries)],
        [Qrel(number, number) for number in range(len(pages))],
    )


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory, processor, pages) -> Path:
    """A repository with an adapter of two steps, evaluated on 60 pages."""
    top = trained(tmp_path_factory.mktemp("report"), processor, pages, epochs=2, warmup_steps=0)
    with contextlib.chdir(top):
        for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
            Path(name).symlink_to(ROOT / name)
        text = render_recipe(ROOT / "recipes" / "demo.yaml").replace("- demo\n", f"- {SET}\n")
        Path("params.yaml").write_text(text)
        write_set()
        manifest = json.loads(Path("data/manifest.json").read_text())
        Path(DOCUMENTS, "sub dir").mkdir(parents=True)
        Path(DOCUMENTS, HARD_NAME.partition("#page")[0]).touch()
        made_from = {"folder": DOCUMENTS, "files": hash_source_files(DOCUMENTS), "pseudo": False}
        manifest["evaluation"] = {SET: hash_local_files(SET, BEIR_SUFFIXES)._replace(made_from=made_from)._asdict()}
        Path("data/manifest.json").write_text(format_json(manifest))
        write_health()
    code, log = fork(top, "evaluate", "adapter")
    assert code == 0, log
    return top


def write_health() -> None:
    state = json.loads(Path("adapter/trainer_state.json").read_text())
    judged = assess_run(state["log_history"], load_params(), 0.5, get_recommended_bounds(0))
    Path("adapter", HEALTH).write_text(format_json({"verdict": judged.verdict} | findings_to_json(judged.findings)))


@pytest.fixture(scope="session")
def report(evaluated) -> Path:
    code, log = fork(evaluated, "report", "adapter", "--out", "report.html")
    assert code == 0, log
    assert re.search(r"report: drawing the worst 30 of \d+ queries below NDCG@5 1", log), log
    assert re.search(r"report.html: 30 queries with 90 pages, \d\.\d MB", log), log
    return evaluated / "report.html"


def test_failures_are_grouped(report):
    """60 pages, of which one is a page of a PDF."""
    text = report.read_text()
    section = text[text.index('<section id="failures">') : text.index('<section id="queries">')]
    count = int(re.search(r"wrong page comes first for (\d+) queries", section)[1])
    tables = [
        re.findall(r'<tr><th>([^<]*)</th><td class="n">(\d+)</td><td class="n">(\d+)</td>', part)
        for part in section.split("<table>")[1:]
    ]
    assert [sum(int(queries) for _, queries, _ in table) for table in tables] == [count, 60, 60, 60]
    assert all(sum(int(failed) for *_, failed in table) == count for table in tables)
    assert {name for name, *_ in tables[2]} == {"sub dir/50% Größe #2.pdf", "not a page of a PDF"}


def test_groups_of_failures_are_those_of_their_pages():
    def make_judged(
        rank: int, first: str | None, *right: str | None, words: int = 3, same: bool = False
    ) -> JudgedQuery:
        scores = {MAIN_METRIC.key: 1.0 if rank == 1 else 0.5}
        return JudgedQuery(
            QueryResult("b", "t", "fr", "q", scores, rank, ["1"], query="w " * words), first, right, "fr", same
        )

    groups = group_failures(
        [
            make_judged(1, "a.pdf", "a.pdf"),
            make_judged(2, "a.pdf", "b.pdf", "a.pdf", words=4),
            make_judged(2, "a.pdf", "b.pdf", words=5),
            make_judged(2, "b.pdf", "c.pdf", words=17),
            make_judged(2, None, "c.pdf"),
            make_judged(2, "a.pdf", "a.pdf", same=True),
            make_judged(2, "c.pdf", None),
        ]
    )
    names = {key: [(group.name, group.queries, group.failed) for group in rows] for key, rows in groups.items()}
    first_pages = {name: failed for name, _, failed in names.pop("first page")}
    assert first_pages == {
        "another document": 2,
        "not a page of a PDF": 2,
        "another page of the same document": 1,
        "a page that looks like the right one": 1,
    }
    assert names == {
        "language": [("fr", 7, 6)],
        "document of the right page": [
            ("b.pdf", 2, 2),
            ("c.pdf", 2, 2),
            ("a.pdf", 2, 1),
            ("not a page of a PDF", 1, 1),
        ],
        "query length": [("1 to 4 words", 5, 4), ("5 to 8 words", 1, 1), ("more than 16 words", 1, 1)],
    }
    assert groups["language"][0].ndcg == pytest.approx(4 / 7)


def test_pages_that_look_the_same_are_found_and_others_are_not():
    pages = [page.image.convert("RGB").resize((600, 900)) for page in generate_corpus("test", 12, 1, seed=3)]
    thumbnails = [shrink_page(page) for page in pages]
    assert not any(are_near_duplicates(a, b) for a, b in itertools.combinations(thumbnails, 2))
    jpeg = io.BytesIO()
    for page, thumbnail in zip(pages, thumbnails, strict=True):
        page.save(jpeg, "JPEG", quality=30)
        for changed in (page.resize((300, 450)), Image.open(jpeg), ImageOps.expand(page, 30, page.getpixel((0, 0)))):
            assert are_near_duplicates(thumbnail, shrink_page(changed)), changed
        jpeg.seek(0)
    blank = shrink_page(Image.new("L", (10, 10), 255))
    assert not are_near_duplicates(blank, blank)


@pytest.fixture(scope="session")
def tab(tmp_path_factory):
    if not browser.program():
        pytest.skip(f"no browser here: none of {', '.join(browser.NAMES)} is on the PATH")
    with browser.tab(tmp_path_factory.mktemp("browser") / "profile") as one:
        yield one


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [browser.DESKTOP, browser.PHONE])
def test_a_reader_sees_it_fast_and_nothing_is_fetched(report, tab, tmp_path, size, dark):
    assert any(tab.show(report, size, dark) < SECONDS for _ in range(3)), "slow each time"
    assert tab.value("document.images.length") >= 90
    assert tab.value("document.documentElement.scrollWidth") <= size[0], "it does not scroll sideways"
    tab.picture(tmp_path / "shot.png")
    assert (tmp_path / "shot.png").stat().st_size > 10_000
    red, *_ = map(int, re.findall(r"\d+", tab.value("getComputedStyle(document.body).backgroundColor")))
    assert (red < 60) == dark
    last = "document.querySelector('.case:last-of-type img')"
    tab.value(f"{last}.scrollIntoView()")
    assert tab.value(f"{last}.decode().then(() => {last}.naturalWidth)") == 600
    assert tab.fetched() == [report.absolute().as_uri()]
    assert tab.complaints() == []


def test_choosing_a_word_moves_the_heatmaps_of_its_query_alone(report, tab):
    tab.show(report)
    places = (
        "JSON.stringify([...document.querySelectorAll('.case i')].map(i => getComputedStyle(i).backgroundPosition))"
    )
    before = json.loads(tab.value(places))
    tab.value("document.querySelectorAll('.case')[1].querySelectorAll('input')[3].click()")
    after = json.loads(tab.value(places))
    assert [i for i, place in enumerate(after) if place != before[i]] == [3, 4, 5]


def test_text_from_data_stays_text(report, tab):
    text = report.read_text()
    assert "<script" not in text and "onerror=alert" not in re.sub(r"&lt;img[^<]*", "", text)
    assert "http" not in re.sub(r"&lt;img[^<]*", "", text.replace('http-equiv="Content-Security-Policy"', ""))
    tab.show(report)
    heads = json.loads(tab.value("JSON.stringify([...document.querySelectorAll('.case h3')].map(h => h.textContent))"))
    assert len(heads) == 30 and any(head.endswith(HOSTILE) for head in heads)
    assert tab.value("document.querySelectorAll('script, .case h3 *').length") == 0


def test_pages_are_named_by_their_files_with_a_link_where_there_is_one(report, tab):
    tab.show(report)
    captions = json.loads(
        tab.value(
            "JSON.stringify([...document.querySelectorAll('figcaption .dim')].map(dim => "
            "[dim.textContent.split(' · ')[0], dim.querySelector('a') ? dim.querySelector('a').href : '']))"
        )
    )
    names = dict(captions)
    url = f"{report.parent.resolve().as_uri()}/{DOCUMENTS}/sub%20dir/50%25%20Gr%C3%B6%C3%9Fe%20%232.pdf#page=36"
    assert names.pop("sub dir/50% Größe #2.pdf, page 36") == url
    assert set(names.values()) == {""} and all(re.fullmatch(r"\d+\.png", name) for name in names)
    assert "-test-" not in report.read_text()


def test_the_same_inputs_give_the_same_bytes(report, evaluated):
    code, log = fork(evaluated, "report", "adapter", "--out", "again.html")
    assert code == 0, log
    assert (evaluated / "again.html").read_bytes() == report.read_bytes()


def test_a_strip_of_a_page_has_a_bounded_height_and_its_heat_lies_on_it(tab, tmp_path, processor):
    images = [Image.new("RGB", size, "grey") for size in ((8, 2500), (100, 600), (600, 900))]
    counts = [len(processor.process_images([image]).input_ids[0]) for image in images]
    seen = [
        RankedPage("page", "", "found", image, torch.rand(count, 8))
        for image, count in zip(images, counts, strict=True)
    ]
    vectors = torch.rand(len(split_query(processor, "from Oslo")), 8)
    found = explain_query(processor, "from Oslo", vectors, seen, {"pages": 3, "place": "here"})
    (tmp_path / "found.html").write_text(render_html("search.html", [found], model="m"))
    tab.show(tmp_path / "found.html")
    boxes = "[...document.querySelectorAll('.sheets>figure>.sheet>WHAT')].map(i => i.getBoundingClientRect())"
    drawn, heat = (
        json.loads(tab.value(f"JSON.stringify({boxes.replace('WHAT', what)}.map(b => [b.width, b.height]))"))
        for what in ("img", "i")
    )
    assert drawn == heat and all(width >= 40 and height <= 1280 for width, height in drawn)
    assert [height / width for width, height in drawn[1:]] == pytest.approx([6, 1.5], rel=0.05), "not squeezed"


def test_what_is_not_known_is_said(evaluated, tmp_path):
    copy = shutil.copytree(evaluated, tmp_path / "repo", symlinks=True)
    (copy / "adapter" / HEALTH).unlink()
    code, log = fork(copy, "report", "adapter", "--worst", "0")
    assert code == 0, log
    [file] = (copy / "results" / "report").glob("adapter-*.html")
    text = file.read_text()
    assert "the adapter's folder has no health.json" in text and "made with --worst 0" in text
    assert "nobody else has been evaluated on this data" in text and "data/survey.json here is of other data" in text


def test_results_of_another_model_are_refused(evaluated, tmp_path):
    [own] = (evaluated / "results" / "evaluate").iterdir()
    other = tmp_path / "other"
    shutil.copytree(own, other)
    (other / "run.json").write_text((own / "run.json").read_text().replace('"revision": "', '"revision": "0'))
    code, log = fork(evaluated, "report", "adapter", "--results", str(other))
    assert code == 2 and f"{other} is of revision 0" in log
    code, log = fork(evaluated, "report", "adapter", "--results", "demo")
    assert code == 2 and "--results: demo holds no run.json" in log
    code, log = fork(evaluated, "report", "adapter", "--worst", "-1")
    assert code == 2 and "--worst: -1 is not valid; it must be 0 or more" in log


def test_results_of_smaller_embeddings_are_not_those_of_whole_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, params in {"a": {"pool_factor": 8, "dim": 32}, "b": {"pool_factor": 1, "dim": 128}}.items():
        place = Path("results/evaluate") / name
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps({"revision": "1", "params": params}))
    assert find_evaluation("1", None).name == "a" and find_evaluation("1", None, FULL_SIZE).name == "b"
    Path("results/evaluate/b").rename("results/evaluate/a/pool1-dim128")
    assert find_evaluation("1", None, FULL_SIZE).name == "pool1-dim128", (
        "one of several sizes that were evaluated at once"
    )
    shutil.rmtree("results/evaluate/a/pool1-dim128")
    with pytest.raises(
        UserError,
        match="is of it with pool_factor 1, dim 128, embedding_precision float32, rescore_top_k 0; evaluate it",
    ):
        find_evaluation("1", None, FULL_SIZE)


def test_an_evaluation_that_names_no_tiling_is_of_exact_tiles(tmp_path, monkeypatch):
    now = replace(load_recipe(ROOT / "recipes" / "demo.yaml"), tiling="stock")
    monkeypatch.chdir(tmp_path)
    for name, tiling in {"old": {}, "stock": {"tiling": "stock"}}.items():
        place = Path("results/evaluate") / name
        place.mkdir(parents=True)
        run = {"revision": "1", "params": tiling | {"benchmarks": ["demo"], "max_visual_tokens": 32}}
        (place / "run.json").write_text(json.dumps(run))
    for name, tiling in (("old", "exact"), ("stock", "stock")):
        assert find_evaluation("1", None, {"tiling": tiling}).name == name
        assert apply_evaluated_settings(now, Path("results/evaluate") / name).tiling == tiling


def test_scores_that_are_shown_are_those_it_is_ranked_by_and_a_query_without_a_right_page_is_passed_over(
    monkeypatch, model, processor, pages
):
    class Corpus:
        documents = ""
        list_right_pages = staticmethod(lambda subset, query: ["0"] if query == "3" else [])
        read_row = staticmethod(lambda subset, kind, key: {"text": "from Oslo", "image": pages[int(key)]})

    monkeypatch.setattr(examples, "EvaluationCorpus", lambda task: Corpus)
    encoder = ColIntern3_5Encoder(model, processor, "a/b", "1", pool_factor=4, dim=32, precision="int8")
    found = result("3", 0.0, 2, None, None)._replace(top_pages=["1", "0", "2"])
    rows = [found._replace(query_id="2"), found, found._replace(query_id="1")]
    [case], passed = explain_failures(encoder, [SimpleNamespace(metadata=SimpleNamespace(name="t"))], rows, 1)
    assert passed == 1, "a query all of whose judgements are 0"
    query = truncate_dim(embed_queries(model, processor, ["from Oslo"], 1), 32)
    ranked = encoder.select_scored_vectors(encoder.embed_images(pages[:3]))
    assert [page.score for page in case.pages] == pytest.approx(maxsim_scores(query, ranked)[0].tolist(), abs=2e-3)
    leads = sum(token.lead for token in case.tokens)
    assert leads == pytest.approx(case.pages[0].score - case.pages[1].score, abs=2e-3)


def result(query: str, ndcg: float, rank: int | None, right: float | None, wrong: float | None) -> QueryResult:
    return QueryResult("t", "t", "default", query, {"ndcg_at_5": ndcg}, rank, [], right, wrong)


def test_the_worst_are_those_found_last_and_by_the_widest_margin():
    rows = [result("a", 1, 1, 5, 4), result("b", 0.5, 3, 4, 5), result("c", 0, 9, 4, 5), result("d", 0, 8, 2, 5)]
    rows += [result("e", 0, None, None, 5), result("f", 0.6, 2, 4, None)]
    assert [one.query_id for one in select_worst_queries(rows)] == ["e", "d", "c", "b", "f"]
    assert compute_margin(rows[5]) == 0
    assert [count for _, count in count_ranks(rows)] == [1, 2, 2, 0, 0, 1]


def test_published_scores_stand_beside_the_same_task_only():
    assert (
        list_published_scores("VidoreDocVQARetrieval")[:2] == [56.6, 58.0]
        and list_published_scores("ViDoRe(v1)")[-1] == 92.7
    )
    assert list_published_scores("ColInternDemoRetrieval") == []


def test_a_plot_is_an_image_for_light_and_one_for_dark_pages_and_loads_nothing():
    bar = plots.Bar('A & "B" <c>', 50.0, 40.0, 60.0, 10.0, [70.0, 80.0])
    for draw in (
        lambda: plots.plot_bars([bar], 'bars <&> "'),
        lambda: plots.plot_curve([(1, 3.0), (2, 2.0)], "loss"),
        lambda: plots.plot_margins([-1, 0, 2, 3], "m"),
    ):
        html = draw()
        assert html == draw(), "the same bytes"
        urls = re.findall(r'(?:src|srcset)="data:image/svg\+xml;base64,([^"]+)"', html)
        dark, light = (base64.b64decode(url).decode() for url in urls)
        for text, (theme, other) in ((light, ("light", "dark")), (dark, ("dark", "light"))):
            first, *_, ink, _ = plots.THEMES[theme]
            assert first in text and ink in text and not any(colour in text for colour in plots.THEMES[other])
            assert not re.search(r'(?:href|src)="(?!#)|url\((?!#)|<image|<script', text), "loads nothing"
            assert "<dc:date>" not in text
        assert html.count("<") == 4 and html.count("prefers-color-scheme: dark") == 1
    assert 'alt="bars &lt;&amp;&gt; &#34;"' in plots.plot_bars([bar], 'bars <&> "')
