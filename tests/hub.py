"""A hub on loopback, as huggingface_hub's client sees one: real HTTP, with the hub's endpoints, headers and faults.

Parquet and safetensors files are in LFS: `resolve` redirects to another origin (the same server under its other name),
which the token must not reach. Nothing speaks of Xet, so the client transfers by HTTP, unless `xet` is set.
"""

import hashlib
import json
import re
import socket
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from loopback import LoopbackHandler, LoopbackServer, run_in_thread

LFS = (".parquet", ".safetensors")
PAGE = 4  # entries in one answer of the tree endpoint, so that every listing goes on in a second one
CHUNK = 16384
NOT_FOUND = "Sorry, we can't find the page you are looking for."


class Request(NamedTuple):
    """A request as it arrived: `path` without the query, `range` and `token` "" where it had none."""

    method: str
    path: str
    range: str
    token: str


@dataclass
class Fault:
    """What to do, `times` times, to requests of `method` whose path holds `where`."""

    where: str
    times: int = 1
    method: str = "GET"
    status: int = 0  # answer with this instead
    headers: dict[str, str] = field(default_factory=dict)  # of that answer
    cut: int = -1  # close the connection after so many bytes of the body
    reset: bool = False  # ... not with an end but with a reset
    wrong: bool = False  # the right number of other bytes
    longer: bool = False  # one byte more than the file has
    pause: float = 0.0  # seconds between two chunks of the body


class Hub(LoopbackServer):
    """Repositories by (kind, name, revision); `requests` is what was asked, `faults` what is to go wrong."""

    def __init__(self) -> None:
        super().__init__(Handler)
        self.repos: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.gated: dict[str, str] = {}  # repository -> the only token that may read it
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.sizes: dict[str, int] = {}  # path -> size to claim in listings
        self.moved: dict[str, str] = {}  # old name -> new name of a repository
        self.xet = ""  # address of the Xet storage of the files in LFS

    def add(self, kind: str, name: str, revision: str, files: dict[str, bytes]) -> None:
        self.repos[kind, name, revision] = files

    def add_folder(self, kind: str, name: str, revision: str, folder: Path) -> None:
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        self.add(kind, name, revision, {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def asked(self, method: str, pattern: str) -> list[Request]:
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def fault(self, method: str, path: str) -> Fault:
        """The fault this request meets; one that does nothing if there is none."""
        for fault in self.faults:
            if fault.times and fault.method == method and fault.where in path:
                fault.times -= 1
                return fault
        return Fault("")

    def handle_error(self, request, client_address) -> None:
        pass  # clients that are killed go without a word


def running() -> AbstractContextManager[Hub]:
    return run_in_thread(Hub())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(LoopbackHandler):
    server: Hub

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append(Request(self.command, path, self.headers.get("Range", ""), token))
        self.fault = self.server.fault(self.command, path)
        if self.fault.status:
            return self.send(self.fault.status, b"{}", self.fault.headers)
        for old, new in self.server.moved.items():
            if f"/{old}/" in path:
                return self.send(307, b"", {"Location": self.path.replace(old, new)})
        routes: list[tuple[str, Callable[..., None]]] = [
            (r"/api/(model|dataset|kernel)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", self.tree),
            (r"/api/(model|dataset|kernel)s/([^/]+/[^/]+)/revision/([^/]+)", self.info),
            (r"/api/(model|dataset|kernel)s/([^/]+/[^/]+)/xet-read-token/([^/]+)", self.xet_token),
            (r"/(?:(dataset|kernel)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
            (r"/cdn/([0-9a-f]{64})", self.blob),
        ]
        for pattern, handle in routes:
            if match := re.fullmatch(pattern, path):
                return handle(*match.groups())
        return self.error(404, "", NOT_FOUND)

    do_HEAD = do_GET = answer

    def files(self, kind: str | None, name: str, revision: str) -> dict[str, bytes] | None:
        """The files of a repository; None once an error has been answered instead."""
        kind = kind or "model"
        if not any(key[:2] == (kind, name) for key in self.server.repos):
            # The hub does not tell strangers whether a name is private or not there.
            if "Authorization" in self.headers:
                self.error(404, "RepoNotFound", "Repository not found")
            else:
                self.error(401, "", "Invalid username or password.")
            return None
        if (kind, name, revision) not in self.server.repos:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return self.server.repos[kind, name, revision]

    def tree(self, kind: str, name: str, revision: str, top: str | None) -> None:
        files = self.files(kind, name, revision)
        if files is None:
            return
        folders = sorted({parent.as_posix() for path in files for parent in Path(path).parents} - {"."})
        rows = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders]
        for path, data in files.items():
            size = self.server.sizes.get(path, len(data))
            row = {"type": "file", "oid": git_sha1(data), "size": size, "path": path}
            if path.endswith(LFS):
                row["lfs"] = {"oid": sha256(data), "size": size, "pointerSize": 134}
                if self.server.xet:
                    row["xetHash"] = sha256(data)  # of the right shape; Xet's hash is another one
            rows.append(row)
        url = urlsplit(self.path)
        if top:  # what kernels lists: the folders of the builds
            rows = [row for row in rows if str(Path(row["path"]).parent) == top]
        start = int(parse_qs(url.query).get("cursor", ["0"])[0])
        more = start + PAGE < len(rows)
        link = {"Link": f'<{self.server.url}{url.path}?recursive=true&cursor={start + PAGE}>; rel="next"'}
        self.send(200, json.dumps(rows[start : start + PAGE]).encode(), link if more else {})

    def info(self, kind: str, name: str, revision: str) -> None:
        files = self.files(kind, name, revision)
        if files is not None:
            siblings = [{"rfilename": path} for path in files]
            self.send(200, json.dumps({"id": name, "sha": revision, "siblings": siblings}).encode())

    def xet_token(self, kind: str, name: str, revision: str) -> None:
        expires = {"X-Xet-Token-Expiration": str(int(time.time()) + 3600)}
        self.send(200, b"{}", {"X-Xet-Cas-Url": self.server.xet, "X-Xet-Access-Token": "xet_secret"} | expires)

    def resolve(self, kind: str | None, name: str, revision: str, path: str) -> None:
        files = self.files(kind, name, revision)
        if files is None:
            return None
        allowed = self.server.gated.get(name)
        if allowed and self.headers.get("Authorization") != f"Bearer {allowed}":
            known = "Authorization" in self.headers
            return self.error(403 if known else 401, "GatedRepo", f"Access to {name} is restricted.")
        commit = {"X-Repo-Commit": revision}
        if path not in files:
            return self.error(404, "EntryNotFound", "Entry not found", commit)
        data = files[path]
        if not path.endswith(LFS):
            return self.body(data, commit | {"ETag": f'"{git_sha1(data)}"'})
        linked = {
            "X-Linked-ETag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"http://localhost:{self.server.server_port}/cdn/{sha256(data)}?signature=x",
        }
        return self.send(302, b"", commit | linked)

    def blob(self, digest: str) -> None:
        for files in self.server.repos.values():
            for data in files.values():
                if sha256(data) == digest:
                    return self.body(data, {"ETag": f'"{digest}"'})
        return self.error(404, "", NOT_FOUND)

    def body(self, data: bytes, headers: dict[str, str]) -> None:
        """A file's bytes, or the range of them that was asked for."""
        if self.fault.wrong:
            data = bytes(255 - byte for byte in data[:64]) + data[64:]
        if self.fault.longer:
            data += b"x"
        start = int(match[1]) if (match := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        if start:
            headers = headers | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        self.send(206 if start else 200, data[start:], headers)

    def error(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        headers = (headers or {}) | {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = self.fault.cut < 0
        body = data if whole else data[: self.fault.cut]
        for at in range(0, len(body), CHUNK):
            self.wfile.write(body[at : at + CHUNK])
            self.wfile.flush()
            time.sleep(self.fault.pause)
        if not whole:
            self.close_connection = True
            if self.fault.reset:
                time.sleep(0.2)  # a reset also takes back what the other side has not read yet
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
