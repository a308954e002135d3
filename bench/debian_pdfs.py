"""Gets real input: the English PDFs of Debian's documentation packages, for the recipe `own-pdfs`.

    python bench/debian_pdfs.py        # fills data/own/debian-docs
    colintern recipe own-pdfs && dvc repro

Needs apt-get and dpkg-deb, that is a Debian system or container; not root: the packages are unpacked, not installed.
Whatever else lies in the folder stays.
"""

import gzip
import subprocess
import sys
import tempfile
from pathlib import Path

OUT = Path("data/own/debian-docs")
# live-manual-pdf is left out: its files in Debian 12 (2:20151217.2) are blank but for rules and addresses.
PDFS = {
    "debian-faq": "usr/share/doc/debian/FAQ/debian-faq.en.pdf.gz",
    "debian-policy": "usr/share/doc/debian-policy/policy.pdf.gz",
    "developers-reference": "usr/share/developers-reference/developers-reference.pdf",
    "maint-guide": "usr/share/doc/maint-guide/maint-guide.en.pdf",
    "python-reportlab-doc": "usr/share/doc/python-reportlab-doc/reportlab-userguide.pdf",
}


def main() -> int:
    """Run the script; the exit code: 2 when a package cannot be had or holds no such PDF."""
    OUT.mkdir(parents=True, exist_ok=True)
    for package, path in PDFS.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                _run(["apt-get", "download", package], folder)
                [archive] = Path(folder).glob("*.deb")
                _run(["dpkg-deb", "--extract", archive.name, "."], folder)
                data = (Path(folder) / path).read_bytes()
            except (OSError, ValueError, subprocess.CalledProcessError) as error:
                print(f"error: {package}: {error}; try `apt-get update` first", file=sys.stderr)
                return 2
            pdf = gzip.decompress(data) if path.endswith(".gz") else data
            (OUT / f"{package}.pdf").write_bytes(pdf)
            print(f"{archive.name}: {OUT / package}.pdf, {len(pdf) / 1e6:.1f} MB")
    return 0


def _run(command: list[str], folder: str) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    sys.exit(main())
