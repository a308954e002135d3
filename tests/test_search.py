"""`colintern search`: an index that grows by content, and ranks as the model itself does."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import IRREGULAR, ROOT, irregular_files, page_image
from pages import documented, words
from pdf_writer import write_pdf
from processes import FORKS
from test_adapters import trained
from test_report import fork, run

from colintern.core.errors import UserError
from colintern.core.page_labels import count_columns
from colintern.core.recipes import render_recipe
from colintern.encoding.embed import embed_pages, embed_queries
from colintern.ingest.documents import InvalidRow
from colintern.scoring.maxsim import maxsim_scores
from colintern.search.index import PageIndex, get_index_identity
from colintern.search.listing import draw_text_maps, format_ranking
from colintern.search.searcher import PageSearcher, rank_pages
from colintern.search.sources import decode_name, list_sources, render_sources, summarize_unsearched

pytestmark = pytest.mark.integration
MANY = words(documented("colintern search ~/manuals --queries questions.txt --precision binary --rescore 20 --json"))[
    3:
]
WORDS = ("Oslo", "Rome", "Halde", "milk", "Calyx")


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, processor, pages):
    top = trained(tmp_path_factory.mktemp("search"), processor, pages, epochs=1, warmup_steps=0)
    for name in ("colintern", "stages", "dvc.yaml", "versions.yaml"):
        (top / name).symlink_to(ROOT / name)
    (top / "params.yaml").write_text(render_recipe(ROOT / "recipes" / "demo.yaml"))
    return top


@pytest.fixture
def top(adapted, tmp_path):
    """A repository with an adapter, and documents: a PDF of three pages, one with an outline, an image, a torn PDF."""
    top = shutil.copytree(
        adapted, tmp_path / "top", symlinks=True, ignore=shutil.ignore_patterns("run", "features", ".index")
    )
    documents = top / "documents"
    (documents / "below").mkdir(parents=True)
    write_pdf(documents / "three.pdf", [[word] for word in WORDS[:3]])
    write_pdf(documents / "below" / "one.pdf", [[WORDS[3]]])
    page_image(WORDS[4]).save(documents / "scan.png")
    (documents / "torn.pdf").write_bytes(b"%PDF-1.4 torn")
    return top


def new(log: str) -> int:
    return int(re.search(r"\d+ pages, (\d+) of them new", log)[1])


def ranking(log: str) -> list[str]:
    return re.findall(r"^ *\d+ +\d+\.\d{3}  (.+)$", log, re.M)


def test_the_second_time_nothing_is_computed_and_only_what_is_new_later(top):
    for name in ("torn.png", "moving.gif", "phone.heic"):
        (top / "documents" / name).write_bytes(b"torn")
    (top / "documents" / "linked").symlink_to("below")
    code, first = fork(top, "search", "--model", "adapter", "documents", "from Oslo", "--html", "found.html")
    assert code == 0, first
    assert "5 pages, 5 of them new" in first and "left out: torn.pdf: not a readable PDF" in first
    assert "left out: torn.png: not an image" in first and "not searched: 1 .heic, 1 linked folder" in first
    assert "left out: moving.gif: not an image" in first
    names = {"three.pdf, page 1", "three.pdf, page 2", "three.pdf, page 3", "below/one.pdf, page 1", "scan.png"}
    assert set(ranking(first)) == names
    assert all(len(line) <= 80 for line in first.splitlines())
    html = (top / "found.html").read_text()
    assert html.count("<img") == 5
    assert f'<a href="{(top / "documents").resolve().as_uri()}/three.pdf#page=2">three.pdf, page 2</a>' in html
    _, second = fork(top, "search", "--model", "adapter", "documents", "from Oslo")
    assert new(second) == 0 and ranking(second) == ranking(first)
    write_pdf(top / "documents" / "three.pdf", [[WORDS[0]], ["paid"], [WORDS[2]]])  # one page changed
    shutil.copy(top / "documents" / "scan.png", top / "documents" / "copy.png")
    _, third = fork(top, "search", "--model", "adapter", "documents", "from Oslo", "--top", "2")
    assert new(third) == 1 and "6 pages scored" in third and len(ranking(third)) == 2
    shutil.rmtree(top / "data" / ".index")
    (top / "questions.txt").write_bytes("\ufefffrom Oslo\r\n\nCalyx <b>\n".encode())
    _, fourth = fork(top, "search", "documents/three.pdf", "--model", "adapter", *MANY)
    assert new(fourth) == 3 and "1 empty lines left out" in fourth and "3 pages scored for 2 queries" in fourth
    first, second = json.loads(fourth[fourth.index("\n[") :])
    assert (first["query"], second["query"]) == ("from Oslo", "Calyx <b>") and first["pages"] == 3
    assert [page["rank"] for page in first["results"]] == [1, 2, 3]
    assert {page["page"] for page in second["results"]} == {1, 2, 3}
    [best, *_] = first["results"]
    assert set(best) == {"rank", "score", "file", "page", "link"} and best["file"] == "three.pdf"
    assert best["link"] == f"{(top / 'documents' / 'three.pdf').resolve().as_uri()}#page={best['page']}"


def test_a_store_ranks_as_the_index_does(top):
    command = ("search", "documents", "from Oslo", "--model", "adapter")
    page = words(
        documented(
            'colintern search FOLDER "how is a package removed" --store STORE', FOLDER="documents", STORE="files"
        )
    )
    own = ranking(fork(top, *command, "--precision", "float32")[1])
    for place, url in (("--to", "lancedb://vectors/pages"), ("--out", "files")):
        code, log = fork(top, "embed", "documents", place, url, "--model", "adapter")
        assert code == 0, log
        code, log = fork(top, *command, "--store", url)
        assert code == 0 and ranking(log) == own and "5 pages scored" in log, log
    page_image("new").save(top / "documents" / "new.png")
    assert fork(top, "embed", "documents/scan.png", "--to", "lancedb://vectors/pages", "--model", "adapter")[0] == 0
    code, log = fork(top, *command, "--store", "lancedb://vectors/pages", "--top", "3")
    assert ranking(log) == own[:3] and "1 pages are not in the store; embed SOURCE again" in log
    code, log = fork(top, *page[1:], "--model", "adapter")
    assert code == 0 and len(ranking(log)) == 5, log
    shutil.copytree(top / "adapter", top / "other")
    (top / "other" / "note.txt").write_text("another model")
    for change, reason in (
        (("--model", "other"), "--store: files: revision: was filled with"),
        (("--html", "a.html"), "--html: is not supported with --store"),
        (("--rescore", "5"), "--rescore: is not supported with --store"),
        (("--precision", "int8"), "--precision: is not supported with --store"),
        (("--store", "lancedb://nowhere/pages"), "lancedb://nowhere/pages: does not exist"),
    ):
        code, log = fork(top, *command, "--store", "files", *change)
        assert code == 2 and reason in log, log


def run_and_delete(folder: Path, command: tuple[str, ...]) -> None:
    """Run a command during which an image is deleted, after the pages were scored."""

    def scores(self, *arguments, score=PageIndex.score_pages):
        yield from score(self, *arguments)
        (folder / "documents" / "scan.png").unlink()

    PageIndex.score_pages = scores
    run(folder, command)


@pytest.mark.parametrize(
    ("place", "code", "left"),
    [
        ("documents", 0, "left out: scan.png: [Errno 2]"),
        (
            "documents/scan.png",
            2,
            "error: SOURCE: none of the 1 pages to show can be rendered; scan.png: [Errno",
        ),
    ],
)
def test_a_page_of_the_index_that_cannot_be_rendered_any_more_is_named(top, place, code, left):
    process = FORKS.Process(
        target=run_and_delete, args=(top, ("search", "--model", "adapter", place, "Oslo", "--html", "a.html"))
    )
    process.start()
    process.join(300)
    log = (top / "log.txt").read_text()
    assert process.exitcode == code and left in log, log
    assert code or (top / "a.html").read_text().count("<img") == 4


def test_a_form_is_drawn_with_what_is_filled_in(tmp_path):
    write_pdf(tmp_path / "form.pdf", [["Name:"]], filled="Oslo")
    [(_, page)] = render_sources(list_sources(tmp_path)[0], [])
    assert page.convert("L").crop((40, 540, 440, 600)).getextrema()[0] < 50


def test_a_file_that_may_not_be_read_is_named_and_the_others_are_searched(tmp_path):
    page_image("Oslo").save(tmp_path / "page.png")
    for name in ("mine.png", "mine.pdf"):
        (tmp_path / name).symlink_to("/proc/self/mem")  # which not even root can read from its start
    found, bad = list_sources(tmp_path)
    assert [source.name for source in found] == ["page.png"]
    assert [one.where for one in bad] == ["mine.pdf", "mine.png"] and "cannot be read: " in bad[0].reason
    (tmp_path / "page.png").unlink()
    assert list(render_sources(found, bad)) == [] and bad[-1].where == "page.png"


@pytest.mark.parametrize("suffix", [".png", ".PDF"])
def test_what_is_no_regular_file_is_never_opened_and_named(tmp_path, suffix, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("documents").mkdir()
    names = irregular_files(Path("documents"), suffix)
    irregular_files(Path("documents"), ".txt")
    with pytest.raises(UserError, match=rf"documents holds no page; .*odd0\{suffix}: is a named pipe, not a regular"):
        list_sources(Path("documents"))
    page_image("Oslo").save("documents/page.png")
    found, bad = list_sources(Path("documents"))
    assert [source.name for source in found] == ["page.png"] and summarize_unsearched(Path("documents")) == "5 .txt"
    assert sorted(f"{one.where} ({one.reason.removeprefix('is ').partition(',')[0]})" for one in bad) == names
    for name, kind in zip(names, IRREGULAR, strict=True):
        if kind != "a folder":
            with pytest.raises(UserError, match=f"SOURCE: '.*' is {kind}; it must be a folder or a regular file"):
                list_sources(Path("documents", name.partition(" ")[0]))


@pytest.mark.parametrize("kind", IRREGULAR)
def test_a_list_of_pages_that_is_no_regular_file_is_refused(top, model, processor, kind):
    first = index(top, model, processor)
    first.cache.folder.mkdir()
    IRREGULAR[kind](first.list_file)
    with pytest.raises(UserError, match=f"pages.json: is {kind}.*delete it"):
        index(top, model, processor)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--model", "adapter", "nowhere", "x"), "SOURCE: 'nowhere' does not exist"),
        (("--model", "adapter", "demo", "x"), "demo holds no page"),
        (("--model", "adapter", "documents", " "), "QUERY: is empty"),
        (("--model", "adapter", "documents", "caf\udce9"), r"QUERY: 'caf\udce9' is not UTF-8"),
        (("--model", "adapter", "documents", "x", "--top", "0"), "--top: 0 is not valid"),
        (("--model", "adapter", "documents", "x", "--index", "params.yaml"), "--index: params.yaml is a file"),
        (
            ("--model", "adapter", "documents", "x", "--html", "documents"),
            "--html: documents is a folder; give a file's name",
        ),
        (("--model", "adapter", "scans", "x"), "none of 1 pages in scans can be read; torn.png: not an image: 4 bytes"),
        (("--model", "documents", "documents", "x"), "holds no adapter_model.safetensors"),
    ],
)
def test_what_cannot_be_searched_is_refused(top, arguments, words):
    (top / "scans").mkdir()
    (top / "scans" / "torn.png").write_bytes(b"torn")
    code, log = fork(top, "search", *arguments)
    assert code == 2 and words in log, log


def test_a_name_that_is_not_utf_8_can_be_printed(tmp_path):
    place = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(place)
    for name in (b"caf\xe9.png", b"caf\xe9.caf\xe9"):
        page_image("Oslo").save(os.fsdecode(place + b"/" + name), format="PNG")
    [source], _ = list_sources(Path(os.fsdecode(place)))
    assert source.name == "caf\ufffd.png" and summarize_unsearched(source.path.parent) == "1 .caf\ufffd"
    assert decode_name(source.path.parent).endswith("/caf\ufffd")


def main_in_latin_1(folder: Path, command: tuple[str, ...]) -> None:
    sys.stdout.reconfigure(encoding="latin-1", errors="strict")
    run(folder, command)


def test_a_terminal_without_the_characters_of_a_name_and_names_that_would_command_it(top):
    (top / "documents" / "three.pdf").unlink()
    for name in ("\x1b]0;title\x07 \u03a9\u202e.png", "\x1b[2J.pdf", "odd.\x1b]0;x"):
        shutil.copy(top / "documents" / ("torn.pdf" if name.endswith("pdf") else "scan.png"), top / "documents" / name)
    process = FORKS.Process(
        target=main_in_latin_1, args=(top, ("search", "--model", "adapter", "documents", "caf\xe9 \u03a9"))
    )
    process.start()
    process.join(300)
    log = (top / "log.txt").read_text(encoding="latin-1")
    assert process.exitcode == 0, log
    assert r"\x1b]0;title\x07 \u03a9\u202e.png" in ranking(log)
    assert r"left out: \x1b[2J.pdf: not" in log and r"not searched: 1 .\x1b]0;x" in log
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", log)
    code, log = fork(top, "search", "--model", "adapter", "documents/\x1b[2Jnone", "x")
    assert code == 2 and r"\x1b[2Jnone" in log and "\x1b" not in log


def index(top: Path, model, processor, weights: str = "a") -> PageIndex:
    return PageIndex(top / "index", get_index_identity(weights, None, model, processor))


def test_it_ranks_as_the_model_does(top, model, processor):
    found, bad = list_sources(top / "documents")
    own = index(top, model, processor)
    assert own.add_pages(found, model, processor, 2, bad) == 5
    [query] = embed_queries(model, processor, ["sent to Rome by Halde"], 1)
    kept = list(index(top, model, processor).score_pages(query, found))
    drawn = [image for _, image in render_sources(found, [])]
    want = maxsim_scores([query], embed_pages(model, processor, drawn, 5))[0]
    assert [source for source, _ in kept] == found
    assert torch.tensor([score for _, score in kept]) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize(("precision", "bytes_per_vector"), [("float32", 512), ("int8", 128), ("binary", 16)])
def test_an_index_keeps_what_its_precision_says_and_the_best_are_scored_by_float16(
    top, model, processor, precision, bytes_per_vector
):
    found, bad = list_sources(top / "documents")
    identity = get_index_identity("a", None, model, processor)
    kept = PageIndex(top / "index", identity, precision, keeps_full=precision != "float32")
    assert kept.add_pages(found, model, processor, 2, bad) == 5
    kept = PageIndex(top / "index", identity, precision, keeps_full=precision != "float32")
    assert kept.list_missing(found) == [] and PageIndex(top / "other", identity, precision).list_missing(found) == found
    pages = [kept.cache.get_stored(kept.page_keys[source.key]) for source in found]
    assert {page.nbytes // len(page) for page in pages} == {bytes_per_vector}
    [query] = embed_queries(model, processor, ["sent to Rome by Halde"], 1)
    quantized = dict(kept.score_pages(query, found))
    ranked = rank_pages(kept, query, found, 2)
    assert [score for _, score in ranked[2:]] == sorted(quantized.values(), reverse=True)[2:]
    if precision == "float32":
        return
    full = dict(index(top, model, processor).score_pages(query, found))
    assert index(top, model, processor).list_missing(found) == [], "the float16 copy is the index of that precision"
    want = sorted(((source, full[source]) for source in sorted(quantized, key=quantized.get)[-2:]), key=lambda x: -x[1])
    assert ranked[:2] == want
    shutil.rmtree(kept.full.cache.folder)
    assert PageIndex(top / "index", identity, precision, keeps_full=True).list_missing(found) == found


def test_a_page_that_changed_since_it_was_embedded_is_named(top, model, processor):
    found, bad = list_sources(top / "documents")
    searcher = PageSearcher(model, processor, index(top, model, processor), found, 0)
    searcher.index.add_pages(found, model, processor, 2, bad)
    [(_, ranking)] = searcher.rank_queries(["milk"], 10)
    assert len(searcher.render_ranking(ranking, [])) == 5
    page_image("milk").resize((300, 100)).save(top / "documents" / "scan.png")
    changed: list[InvalidRow] = []
    pages = searcher.render_ranking(ranking, changed)
    assert "scan.png" not in [page.name for page in pages] and len(pages) == 4
    assert changed == [InvalidRow("scan.png", "has changed since it was embedded; run the command again")]


def test_another_model_or_a_torn_file_costs_time_only(top, model, processor):
    found, bad = list_sources(top / "documents")
    first = index(top, model, processor)
    first.add_pages(found, model, processor, 2, bad)
    assert index(top, model, processor).list_missing(found) == []
    assert index(top, model, processor, weights="b").list_missing(found) == found
    first.list_file.write_text('{"torn')
    again = index(top, model, processor)
    assert again.add_pages(found, model, processor, 2, bad) == 0, "pages are rendered, and known by their pixels"
    [shard, *_] = first.cache.folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    again = index(top, model, processor)
    assert again.add_pages(found, model, processor, 2, bad) >= 1
    assert index(top, model, processor).list_missing(found) == []
    model.set_attn_implementation("eager")
    assert index(top, model, processor).list_missing(found) == found


def test_a_run_that_is_cut_off_keeps_what_it_has(top, model, processor, monkeypatch):
    found, bad = list_sources(top / "documents")

    class Stopped(Exception):
        pass

    def stop(source_pages):
        for number, (source, image) in enumerate(source_pages):
            if number == 3:
                raise Stopped
            yield source, image

    from colintern.search import index as module

    real = module.render_sources
    monkeypatch.setattr(module, "render_sources", lambda *arguments: stop(real(*arguments)))
    with pytest.raises(Stopped):
        index(top, model, processor).add_pages(found, model, processor, 1, bad)
    assert len(index(top, model, processor).list_missing(found)) == len(found) - 3


def test_what_the_disk_has_no_room_for_is_searched_all_the_same(top, model, processor):
    found, bad = list_sources(top / "documents")
    own = index(top, model, processor)
    own.cache.is_full = True
    assert own.add_pages(found, model, processor, 2, bad) == 5
    [query] = embed_queries(model, processor, ["milk"], 1)
    assert len(list(own.score_pages(query, found))) == 5 and not list(own.cache.folder.glob("*.safetensors"))


def test_the_terminal_is_80_columns_wide():
    grid = torch.zeros(4, 3)
    grid[3, 2] = 1
    text = draw_text_maps([grid, grid, grid, grid])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].split() == ["rank", "1", "rank", "2", "rank", "3"]
    assert lines[-1].endswith("@" * 8) and not lines[1].strip()
    ranked = [("取扱説明書" * 20 + ".pdf, page 7", 1.0), ("\x1b[2J" * 30, 2.0)]
    short, long = "file:///" + "a" * 66, "file:///" + "b" * 67
    rows = format_ranking(ranked, [short, long]).splitlines()
    assert max(map(count_columns, rows)) == 80 and "      " + short in rows and long not in "".join(rows)
    assert rows[1].endswith(".pdf, page 7") and rows[-1].startswith("links longer than a line, left out: 1; --html")
    _, *rows = format_ranking(
        [("a" * 200 + ".pdf, page 7", 1.0), ("b c " * 90, 123.456), ("short.png", 0.5)]
    ).splitlines()
    assert max(map(len, rows)) == 80 and rows[2].endswith("  short.png")
    assert re.search(r"  \.\.\.a+\.pdf, page 7$", rows[0]), "which page it is stands at the end"
