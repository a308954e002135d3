"""Odd PDFs, written byte by byte: each costs a page, an outline entry or a file, named; the page after it is there."""

import os
import re
from pathlib import Path

import pytest
from pdf_writer import inflating, stream, write_objects, write_odd_page, write_pdf
from test_own import DOCS, bad_rows, handbook

from colintern.ingest import pdfs
from colintern.ingest.documents import ImageStore, RawDocuments
from colintern.ingest.pdf_rendering import LIMITS, MAX_TEXT_CHARACTERS
from colintern.ingest.user_documents import convert_documents
from colintern.ingest.validation import check_bad_fraction, collect_quarantine
from colintern.search import sources as searched
from colintern.storage import isolation
from colintern.storage.isolation import CallLimits

pytestmark = pytest.mark.integration


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    Path(DOCS).mkdir(parents=True)
    return Path(DOCS)


def write_form(path: Path, contents: bytes, *forms: tuple[bytes, str]) -> None:
    """An odd page that draws forms, each given by its stream and its further entries; /X is the object 8."""
    box = "/Type /XObject /Subtype /Form /BBox [0 0 300 400]"
    more = [stream(data, f"{box} {entries}") for data, entries in forms]
    write_odd_page(path, stream(contents), "/Resources << /XObject << /X 8 0 R >> >>", more=more)


def draws(number: int) -> str:
    return f"/Resources << /XObject << /X {number} 0 R >> >>"


def write_slow_pages(folder: Path) -> None:
    twice = b"/X Do /X Do 0 0 9 9 re f"
    write_form(folder / "nested.pdf", twice, *((twice, draws(9 + level)) for level in range(40)), (b"0 0 9 9 re f", ""))
    write_form(folder / "itself.pdf", twice, (twice, draws(9)), (twice, draws(8)))
    tile = "/Type /Pattern /PatternType 1 /PaintType 1 /TilingType 1 /BBox [0 0 300 400] /XStep .01 /YStep .01"
    tiles = stream(b"/Pattern cs /P scn 0 0 300 400 re f")
    pattern = "/Resources << /Pattern << /P 8 0 R >> >>"
    write_odd_page(folder / "tiles.pdf", tiles, pattern, more=[stream(b"0 0 .5 .5 re f", f"{tile} /Resources << >>")])
    write_inflating(folder / "inflates.pdf")
    write_odd_page(
        folder / "paths.pdf", stream(inflating(b"0 0 m 9 9 l 290 390 l 1 1 l S " * 10**4, 500), "/Filter /FlateDecode")
    )


def write_inflating(path: Path) -> None:
    """A page whose contents are 6 GB of spaces."""
    write_odd_page(path, stream(inflating(b" " * 10**6, 6000), "/Filter /FlateDecode"))


def pages_and_reasons(folder: Path, shelf: Path, kind: str = "pages") -> tuple[set[str], dict[str, str]]:
    shelf.mkdir(exist_ok=True)
    found = pdfs.read_pdf_folder(folder, ImageStore(shelf))
    return set(found.pages), {bad.where: bad.reason for bad in found.invalid_rows if bad.kind == kind}


def test_a_page_that_takes_too_long_is_left_out_and_the_next_is_there(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pdfs, "LIMITS", CallLimits(seconds=1, memory=LIMITS.memory))
    monkeypatch.setattr(isolation, "SECOND_WORKER_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(isolation, "WALL_TIME_FACTOR", 100)  # other tests may have the CPU
    write_slow_pages(folder)
    pages, reasons = pages_and_reasons(folder, tmp_path / "shelf")
    names = ["inflates", "itself", "nested", "paths", "tiles"]
    assert pages == {f"{name}.pdf#page=2" for name in names}
    assert reasons == {f"{name}.pdf#page=1": "takes more than 1 s of CPU time" for name in names}


def test_a_page_that_takes_too_much_memory_is_left_out_of_data_and_search(folder, tmp_path, monkeypatch):
    for module in (pdfs, searched):
        monkeypatch.setattr(module, "LIMITS", LIMITS._replace(memory=4 * 10**8))
    write_inflating(folder / "large.pdf")
    write_odd_page(folder / "cropbox.pdf", page="/CropBox [1000 1000 1100 1100]")
    pages, reasons = pages_and_reasons(folder, tmp_path / "shelf")
    assert pages == {"cropbox.pdf#page=2", "large.pdf#page=2"}
    found, bad = searched.list_sources(folder)
    assert len(found) == 4 and not bad
    assert [source.name for source, _ in searched.render_sources(found, bad)] == [
        "cropbox.pdf, page 2",
        "large.pdf, page 2",
    ]
    assert [one.where for one in bad] == ["cropbox.pdf, page 1", "large.pdf, page 1"]
    assert [one.reason for one in bad] == list(reasons.values()) and "memory" in bad[1].reason


def test_what_pdfium_raises_for_a_page_or_a_file_costs_that_alone(folder, tmp_path):
    write_pdf(folder / "good.pdf", [["one"]])
    write_odd_page(folder / "cropbox.pdf", page="/CropBox [1000 1000 1100 1100]")
    write_odd_page(folder / "wide.pdf", page="/MediaBox [0 0 2000000000 2000000000]")
    words = stream(b"BT /F1 1 Tf " + b"(many words in one page) Tj " * 5000 + b"ET")
    write_odd_page(folder / "wordy.pdf", words, "/Resources << /Font << /F1 7 0 R >> >>")
    hidden = "<" + "00" * 32 + ">"
    write_odd_page(
        folder / "locked.pdf", more=[f"<< /Filter /Standard /V 1 /R 2 /O {hidden} /U {hidden} /P -1 >>".encode()],
        trailer="/Encrypt 8 0 R /ID [<00> <00>]",
    )  # fmt: skip
    (folder / "cut.pdf").write_bytes((folder / "good.pdf").read_bytes()[:300])
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 300 400] >>"
    catalog = b"<< /Type /Catalog /Pages 2 0 R >>"
    write_objects(folder / "circle.pdf", [catalog, b"<< /Type /Pages /Count 2 /Kids [2 0 R 3 0 R] >>", page])
    write_objects(folder / "million.pdf", [catalog, b"<< /Type /Pages /Count 1000000 /Kids [3 0 R] >>", page])
    pages, reasons = pages_and_reasons(folder, tmp_path / "shelf")
    odd = {f"{name}.pdf#page=2" for name in ("cropbox", "wide", "wordy")}
    assert pages == odd | {"good.pdf#page=1", "wordy.pdf#page=1", "circle.pdf#page=1"}
    expected = {
        "circle.pdf#page=2": "Failed to load page",
        "cropbox.pdf#page=1": "its visible area is 0 x 0 points",
        "cut.pdf": "not a readable PDF: ",
        "locked.pdf": "not a readable PDF: .*password",
        "million.pdf": "not a readable PDF: it declares 1,000,000 pages in",
        "wide.pdf#page=1": "megapixels, more than 89",
    }
    assert reasons.keys() == expected.keys()
    assert all(re.search(pattern, reasons[where]) for where, pattern in expected.items()), reasons
    _, texts = pages_and_reasons(folder, tmp_path / "shelf", "text layers")
    assert texts == {"wordy.pdf#page=1": f"its text has 110,000 characters, of which {MAX_TEXT_CHARACTERS:,} are read"}


def write_outline(path: Path, *entries: str, catalog: str = "/Outlines 8 0 R") -> None:
    """A page of words with an outline: the object 8, its entries from 9 on, the last of which may say what is next."""
    last = 8 + len(entries)
    nexts = [f"/Next {number + 1} 0 R" for number in range(9, last)] + [""]
    items = [f"<< /Parent 8 0 R {entry} {after} >>" for entry, after in zip(entries, nexts, strict=True)]
    more = [item.encode("latin-1") for item in (f"<< /First 9 0 R /Last {last} 0 R >>", *items)]
    write_odd_page(path, catalog=catalog, more=more)


def test_an_outline_entry_that_is_no_good_costs_that_entry(folder, capsys):
    good = "/Title (An honest page of far) /Dest [5 0 R /Fit]"
    far = "/A << /S /GoToR /F (other.pdf) /D [1 /Fit] >>"
    write_outline(folder / "beyond.pdf", "/Title (a) /Dest [57 /Fit]", "/Title (b) /Dest [null /Fit]")
    write_outline(folder / "circle.pdf", "/Title (a) /Dest [3 0 R /Fit]", "/Title (b) /Dest [3 0 R /Fit] /Next 9 0 R")
    write_outline(folder / "far.pdf", f"/Title (of words) {far}", good, "/Title (u) /A << /S /URI /URI (http://x) >>")
    write_outline(folder / "none.pdf", "", catalog="/Outlines 5")
    write_outline(
        folder / "titles.pdf", "/Title <FEFFD83D> /Dest [5 0 R /Fit]", "/Title <FEFFDE00> /Dest [5 0 R /Fit]",
        "/Title <FEFF00> /Dest [5 0 R /Fit]", "/Title (\xff\xfe\x80) /Dest [5 0 R /Fit]", "/Dest [5 0 R /Fit]",
    )  # fmt: skip
    own = convert_documents(DOCS, pdfs.read_pdf_folder)
    assert own.summary["kinds"] == {"heading": 1} and own.summary["rows"] == {"pages": 10, "outline entries": 12}
    expected = {
        "beyond.pdf, outline entry 1": "points at page 58; the file has 2",
        "beyond.pdf, outline entry 2": "points at no page of its file",
        "circle.pdf, outline entry 3": "links back to an earlier entry",
        "far.pdf, outline entry 1": "points into another file",
        "titles.pdf, outline entry 1": "its title is not text",
        "titles.pdf, outline entry 2": "its title is not text",
    }
    assert all(reason.startswith(expected[where]) for where, reason in bad_rows(own).items())
    assert bad_rows(own).keys() == expected.keys()
    assert "6 bad of 12 outline entries" in capsys.readouterr().out
    check_bad_fraction(collect_quarantine({}, {DOCS: own}), 0)


def test_pages_are_the_same_in_one_process_and_in_several(folder, tmp_path, monkeypatch):
    handbook(folder)

    def collected(processes: int) -> RawDocuments:
        monkeypatch.setattr(os, "cpu_count", lambda: processes)
        shelf = tmp_path / str(processes)
        shelf.mkdir()
        return pdfs.read_pdf_folder(folder, ImageStore(shelf))

    monkeypatch.setattr(isolation, "SECOND_WORKER_DELAY_SECONDS", 0.0)
    one, several = collected(1), collected(3)
    assert [(name, page.key) for name, page in one.pages.items()] == [
        (n, page.key) for n, page in several.pages.items()
    ]
    assert one.pairs == several.pairs and len(one.pages) == 60
