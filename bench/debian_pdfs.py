"""Makes real input: pages of Debian's documentation PDFs, with their section headings as queries.

    python bench/debian_pdfs.py                      # writes data/own/debian-docs
    python bench/debian_pdfs.py --dpi 150 --out /tmp/debian-docs

In: the PDFs the Debian packages of --packages install (fetched with apt-get if missing and run as root).
Out: <out>/train (training layout; split "test" is the dev set) and <out>/beir (test pages, queries, qrels), the same
bytes for the same package versions. A query is a heading of the PDF's outline that names exactly one page, can be read
there and on few other pages; chapters go to one split whole, so that no page and no query string is shared. Pages and
headings that are left out are counted.
"""

from __future__ import annotations

import argparse
import gzip
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pypdfium2 as pdfium

from colintern.formats import CorpusPage, Qrel, Query, TrainingRow, png_bytes, write_beir, write_training_split

PDFS = {  # Debian package -> the PDF of its English text; dpkg may have compressed it (.gz)
    "debian-policy": "/usr/share/doc/debian-policy/policy.pdf",
    "live-manual-pdf": "/usr/share/doc/live-manual/pdf/live-manual.portrait.en.a4.pdf",
    "maint-guide": "/usr/share/doc/maint-guide/maint-guide.en.pdf",
    "python-reportlab-doc": "/usr/share/doc/python-reportlab-doc/reportlab-userguide.pdf",
}
# live-manual-pdf can be named too, but the file in Debian 12 (2:20151217.2) is blank but for rules and addresses.
DEFAULT_PACKAGES = ["debian-policy", "maint-guide", "python-reportlab-doc"]
SHARES = {"train": 0.6, "dev": 0.1, "test": 0.3}  # of the pages of each document
LEAST_PAGES, LEAST_TEST = 100, 40
COMMON = 3  # a heading printed on more pages than this ("Package" is on most) asks for no page in particular
SECTION_NUMBER = re.compile(r"^((chapter|appendix)\s+\w+[.:]?\s+|([A-Z]\.)?\d+(\.\d+)*\.?\s+)", re.IGNORECASE)
CONTENTS = {"contents", "table of contents", "index"}  # these pages list every other heading


class InputError(ValueError):
    """The PDFs are not there or do not give enough; the message says what to do."""


@dataclass(frozen=True)
class Heading:
    """One outline entry; `page` counts from 0, `chapter` is the number of its top-level entry in the document."""

    package: str
    page: int
    chapter: int
    title: str


@dataclass(frozen=True)
class Document:
    """One PDF and the reasons why some of its headings and pages are not used."""

    package: str
    version: str
    pdf: pdfium.PdfDocument
    headings: list[Heading]
    texts: dict[int, str]  # page that a heading names -> its letters and digits
    skipped: Counter[str]


def ensure_installed(packages: list[str]) -> None:
    """Installs the packages whose PDF is missing, as root only; raises InputError with the command otherwise."""
    missing = [package for package in packages if find_pdf(package) is None]
    if not missing:
        return
    command = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0:
        raise InputError(f"PDFs of {', '.join(missing)} are missing; install them with: sudo {' '.join(command)}")
    print(f"PDFs of {', '.join(missing)} are missing; running: {' '.join(command)}", flush=True)
    try:
        subprocess.run(command, check=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
    except FileNotFoundError:
        raise InputError("apt-get not found: this script needs a Debian system, e.g. a debian container") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"apt-get ended with code {error.returncode}; try `apt-get update` first") from None
    missing = [package for package in packages if find_pdf(package) is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)} installed, but {', '.join(PDFS[name] for name in missing)} did not appear; "
            "does /etc/dpkg/dpkg.cfg.d leave out /usr/share/doc?"
        )


def find_pdf(package: str) -> Path | None:
    """The package's PDF, plain or compressed; None if it is not installed."""
    plain = Path(PDFS[package])
    return next((path for path in (plain, plain.with_name(plain.name + ".gz")) if path.exists()), None)


def open_document(package: str) -> Document:
    """Opens the installed PDF and reads its outline, with section numbers taken off the titles."""
    path = find_pdf(package)
    assert path is not None, "ensure_installed comes first"
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    pdf = pdfium.PdfDocument(data)
    query = ["dpkg-query", "--show", "--showformat", "${Version}", package]
    version = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    document = Document(package, version, pdf, [], {}, Counter())
    chapter = -1
    for entry in pdf.get_toc():
        chapter += entry.level == 0
        target = entry.get_dest()
        page = None if target is None else target.get_index()
        if page is None:
            document.skipped["headings without a page"] += 1
            continue
        title = SECTION_NUMBER.sub("", " ".join(entry.get_title().split()))
        document.headings.append(Heading(package, page, chapter, title))
        if page not in document.texts:
            document.texts[page] = squeeze(pdf[page].get_textpage().get_text_range())
    return document


def keep_usable(documents: list[Document]) -> list[Document]:
    """Leaves in each document the headings that are queries, in page order, and counts the others by reason."""
    named: dict[str, set[tuple[str, int]]] = {}
    for heading in (heading for document in documents for heading in document.headings):
        named.setdefault(squeeze(heading.title), set()).add((heading.package, heading.page))
    texts = [text for document in documents for text in document.texts.values()]
    result = []
    for document in documents:
        contents = {heading.page for heading in document.headings if heading.title.casefold() in CONTENTS}
        kept: dict[str, Heading] = {}
        for heading in document.headings:
            key = squeeze(heading.title)
            reason = (
                "without text" if not key
                else "on contents pages" if heading.page in contents
                else "of several pages" if len(named[key]) > 1
                else "twice on one page" if key in kept
                else "not printed on their page" if key not in document.texts[heading.page]
                else f"printed on more than {COMMON} pages" if sum(key in text for text in texts) > COMMON
                else ""
            )  # fmt: skip
            if reason:
                document.skipped[f"headings {reason}"] += 1
            else:
                kept[key] = heading
        document.skipped["pages without a query"] = len(document.pdf) - len({head.page for head in kept.values()})
        result.append(replace(document, headings=sorted(kept.values(), key=lambda heading: heading.page)))
    return result


def squeeze(text: str) -> str:
    """Letters and digits only, in lower case: equal for text that differs in spaces, line breaks and hyphens."""
    return re.sub(r"[\W_]+", "", text).casefold()


def split_chapters(headings: list[Heading]) -> dict[int, str]:
    """Page -> split. Chapters stay whole, chapters that meet on a page stay together; the largest are placed first.

    A pure function of the outline (no seed). `headings` are one document's, in page order.
    """
    groups: list[set[int]] = []
    previous: Heading | None = None
    for heading in headings:
        if previous is None or (heading.chapter != previous.chapter and heading.page != previous.page):
            groups.append(set())
        groups[-1].add(heading.page)
        previous = heading
    total = sum(len(group) for group in groups)
    filled: Counter[str] = Counter()
    split_of: dict[int, str] = {}
    for group in sorted(groups, key=lambda group: (-len(group), min(group))):
        split = max(SHARES, key=lambda name: SHARES[name] * total - filled[name])
        filled[split] += len(group)
        split_of |= dict.fromkeys(group, split)
    return split_of


def rows_of(document: Document, dpi: int) -> Iterator[tuple[str, TrainingRow]]:
    """(split, row) for each heading, in page order; each page is rendered once."""
    split_of = split_chapters(document.headings)
    rendered = -1
    png = b""
    for heading in document.headings:
        if heading.page != rendered:
            png = png_bytes(document.pdf[heading.page].render(scale=dpi / 72).to_pil())
            rendered = heading.page
        name = f"{document.package}-{heading.page + 1:03d}.png"
        source = f"{document.package} {document.version}"
        row = TrainingRow(png, name, query=heading.title, source=source, page=str(heading.page + 1))
        yield split_of[heading.page], row


def write_all(out: Path, splits: dict[str, list[TrainingRow]]) -> None:
    """Writes both layouts; ids of the evaluation set count pages and queries in the order of the rows."""
    write_training_split(out / "train", "train", splits["train"])
    write_training_split(out / "train", "test", splits["dev"])
    names = list(dict.fromkeys(row.image_filename for row in splits["test"]))
    ids = {name: number for number, name in enumerate(names)}
    png_of = {row.image_filename: row.image_png for row in splits["test"]}
    corpus = [CorpusPage(ids[name], png_of[name], name) for name in names]
    queries = [Query(number, row.query) for number, row in enumerate(splits["test"])]
    qrels = [Qrel(number, ids[row.image_filename]) for number, row in enumerate(splits["test"])]
    write_beir(out / "beir", corpus, queries, qrels)


def check(splits: dict[str, list[TrainingRow]]) -> dict[str, int]:
    """Raises InputError when there is too little or two splits share a page or a query; returns pages per split."""
    pages = {split: {row.image_png for row in rows} for split, rows in splits.items()}
    queries = {split: {squeeze(row.query) for row in rows} for split, rows in splits.items()}
    for left, right in (("train", "dev"), ("train", "test"), ("dev", "test")):
        if pages[left] & pages[right] or queries[left] & queries[right]:
            raise InputError(f"{left} and {right} share a page or a query; look at the outlines of the documents")
    counts = {split: len(found) for split, found in pages.items()}
    if sum(counts.values()) < LEAST_PAGES or min(counts["test"], len(splits["test"])) < LEAST_TEST:
        raise InputError(
            f"too little: {counts} pages, {len(splits['test'])} test queries; at least {LEAST_PAGES} pages in all and "
            f"{LEAST_TEST} test pages and queries are needed: name more packages of {', '.join(PDFS)}"
        )
    return counts


def main() -> int:
    """Runs the script; returns the exit code (2: the PDFs are missing or too few)."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("data/own/debian-docs"))
    parser.add_argument("--dpi", type=int, default=100)
    parser.add_argument("--packages", nargs="+", choices=PDFS, default=DEFAULT_PACKAGES, metavar="PACKAGE")
    args = parser.parse_args()
    try:
        make(args.out, args.dpi, args.packages)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def make(out: Path, dpi: int, packages: list[str]) -> None:
    """Makes both layouts under `out` and prints what came of each document."""
    ensure_installed(packages)
    documents = [open_document(package) for package in packages]
    splits: dict[str, list[TrainingRow]] = {split: [] for split in SHARES}
    for document, usable in zip(documents, keep_usable(documents), strict=True):
        for split, row in rows_of(usable, dpi):
            splits[split].append(row)
        used = len({heading.page for heading in usable.headings})
        print(f"{document.package} {document.version}: {len(document.pdf)} pages, {len(document.headings)} headings")
        print(f"    used: {used} pages, {len(usable.headings)} queries")
        for reason, count in sorted(document.skipped.items()):
            print(f"    skipped: {count} {reason}")
        if not used:
            print(f"    WARNING: nothing of {document.package} is used")
    counts = check(splits)
    write_all(out, splits)
    print(f"{'split':8}{'pages':>8}{'queries':>9}  ({dpi} dpi)")
    for split, rows in splits.items():
        print(f"{split:8}{counts[split]:8}{len(rows):9}")
    print(f"Set in params.yaml:\ntrain_data: {out / 'train'}\nbenchmarks:\n  - {out / 'beir'}")
    print(
        f"RESULT pages={sum(counts.values())} train_rows={len(splits['train'])} dev_rows={len(splits['dev'])} "
        f"test_pages={counts['test']} test_queries={len(splits['test'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
