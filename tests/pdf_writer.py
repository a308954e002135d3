"""Writes small real PDFs: text in Helvetica, an outline; and odd ones."""

import zlib
from collections.abc import Sequence
from pathlib import Path


def write_pdf(
    path: Path,
    pages: Sequence[Sequence[str]],
    outline: Sequence[tuple[str, int]] = (),
    size: tuple[int, int] = (300, 400),
    filled: str = "",
) -> None:
    """One page a list of lines; `outline`: (title, page from 0); `size` in points; `filled`: in a field of page 1."""
    objects: list[str] = []

    def add(body: str) -> int:
        objects.append(body)
        return len(objects)

    catalog, tree, font = add(""), add(""), add("<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>")
    kids = []
    for lines in pages:
        shown = " ".join(f"({line}) Tj T*" for line in lines)
        text = f"BT /F1 10 Tf 12 TL 20 {size[1] - 30} Td {shown} ET"
        stream = add(f"<< /Length {len(text)} >>\nstream\n{text}\nendstream")
        kids.append(
            add(
                f"<< /Type /Page /Parent {tree} 0 R /MediaBox [0 0 {size[0]} {size[1]}] /Contents {stream} 0 R "
                f"/Resources << /Font << /F1 {font} 0 R >> >> >>"
            )
        )
    objects[tree - 1] = f"<< /Type /Pages /Count {len(kids)} /Kids [{' '.join(f'{k} 0 R' for k in kids)}] >>"
    entries = ""
    if outline:
        top = len(objects) + 1
        first, last = top + 1, top + len(outline)
        add(f"<< /Type /Outlines /First {first} 0 R /Last {last} 0 R /Count {len(outline)} >>")
        for number, (title, page) in enumerate(outline, start=first):
            near = f"/Prev {number - 1} 0 R " * (number > first) + f"/Next {number + 1} 0 R " * (number < last)
            add(f"<< /Title ({title}) /Parent {top} 0 R {near}/Dest [{kids[page]} 0 R /Fit] >>")
        entries = f" /Outlines {top} 0 R"
    if filled:
        text = f"/Tx BMC q BT /F1 20 Tf 2 8 Td ({filled}) Tj ET Q EMC"
        box = f"/Type /XObject /Subtype /Form /BBox [0 0 200 30] /Resources << /Font << /F1 {font} 0 R >> >>"
        look = add(f"<< {box} /Length {len(text)} >>\nstream\n{text}\nendstream")
        field = add(
            f"<< /Type /Annot /Subtype /Widget /FT /Tx /T (f) /V ({filled}) /F 4 /Rect [20 100 220 130] "
            f"/DA (/F1 20 Tf) /AP << /N {look} 0 R >> /P {kids[0]} 0 R >>"
        )
        objects[kids[0] - 1] = objects[kids[0] - 1].replace("/Contents", f"/Annots [{field} 0 R] /Contents")
        entries += f" /AcroForm << /Fields [{field} 0 R] /DR << /Font << /F1 {font} 0 R >> >> >>"
    objects[catalog - 1] = f"<< /Type /Catalog /Pages {tree} 0 R{entries} >>"
    write_objects(path, [body.encode("latin-1") for body in objects])


def write_objects(path: Path, objects: Sequence[bytes], trailer: str = "") -> None:
    """A file of the objects 1, 2, ..., the first of which is the catalog."""
    data, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"trailer << /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(data)}\n%%EOF\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode())


def stream(data: bytes, entries: str = "") -> bytes:
    return f"<< {entries} /Length {len(data)} >>\nstream\n".encode() + data + b"\nendstream"


def inflating(block: bytes, times: int) -> bytes:
    """What inflates to a block many times over, compressed once."""
    packer = zlib.compressobj(9)
    head = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    more = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + more * (times - 1)


def write_odd_page(
    path: Path, contents: bytes = b"", page: str = "", catalog: str = "", more: Sequence[bytes] = (), trailer: str = ""
) -> None:
    """Two pages: first one with `contents` (a stream), second an honest one of words.

    `page`, `catalog`, `trailer`: further entries of the first page and so on; `more`: the objects 8, 9, ...; 7 is a
    font.
    """
    box = "" if "/MediaBox" in page else "/MediaBox [0 0 300 400]"
    honest = "/MediaBox [0 0 300 400] /Contents 6 0 R /Resources << /Font << /F1 7 0 R >> >>"
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R {catalog} >>".encode(),
        b"<< /Type /Pages /Count 2 /Kids [3 0 R 5 0 R] >>",
        f"<< /Type /Page /Parent 2 0 R {box} /Contents 4 0 R {page} >>".encode(),
        contents or stream(b""),
        f"<< /Type /Page /Parent 2 0 R {honest} >>".encode(),
        stream(f"BT /F1 20 Tf 20 300 Td (An honest page of {path.stem}.) Tj ET".encode()),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    write_objects(path, [*objects, *more], trailer)
