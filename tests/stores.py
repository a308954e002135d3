"""Servers on loopback for the remotes of docs/remotes.md: S3, SSH, and what DVC asks of Google Cloud Storage.

S3 is rclone's, SSH asyncssh's own server. Google's is written out here, from its JSON API: a token for the signed
request of a service account, uploads in one piece, listings, reading and deleting.
"""

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import asyncssh
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from loopback import LoopbackHandler, LoopbackServer, run_in_thread

MARK = "".join(("mArK", "eD"))  # in what is secret; in two parts, so that this file has none
KEY, SECRET = "AKIAMARKEDNOT", f"{MARK}5ecret/key+of/aws"  # pragma: allowlist secret
TOKEN = f"ya29.{MARK}"


class Store(NamedTuple):
    """An S3-compatible server's address, and the folder in which the bucket `my-bucket` lies."""

    address: str
    folder: Path

    def object(self, md5: str) -> Path:
        return self.folder / "my-bucket" / "colintern" / "files" / "md5" / md5[:2] / md5[2:]


@contextmanager
def s3(top: Path) -> Iterator[Store]:
    """`top`/s3 holds the buckets; KEY and SECRET open it."""
    folder, log = top / "s3", top / "rclone.log"
    (folder / "my-bucket").mkdir(parents=True)
    env = os.environ | {"RCLONE_AUTH_KEY": f'"{KEY},{SECRET}"', "RCLONE_CONFIG": os.devnull}
    command = ["rclone", "serve", "s3", "--addr", "127.0.0.1:0", str(folder)]
    with log.open("w") as file:
        server = subprocess.Popen(command, env=env, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 30
        while not (found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert server.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield Store(found[0], folder)
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def ssh(folder: Path, home: Path) -> Iterator[None]:
    """storage.example.org, as `home`/.ssh/config knows it: `folder` is its /, the key in `home` opens it for `me`."""
    key = asyncssh.generate_private_key("ssh-ed25519")
    (home / ".ssh").mkdir(parents=True)
    key.write_private_key(home / ".ssh" / "id_ed25519")
    key.write_public_key(home / "authorized")
    loop, ready, over = asyncio.new_event_loop(), threading.Event(), asyncio.Event()

    async def serve() -> None:
        server = await asyncssh.listen(
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=str(home / "authorized"),
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=bytes(folder)),
        )
        config = f"Host storage.example.org\n  HostName 127.0.0.1\n  Port {server.get_port()}\n"
        (home / ".ssh" / "config").write_text(config)
        ready.set()
        await over.wait()
        server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(30)
        yield
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
        loop.close()


class Google(LoopbackServer):
    """Objects of the one bucket `my-bucket`, by name; `key` opens it."""

    def __init__(self) -> None:
        super().__init__(Answers)
        self.objects: dict[str, bytes] = {}
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    def account(self) -> dict[str, str]:
        """A service account's file."""
        kinds = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return {
            "type": "service_account",
            "client_email": "colintern@example.org",
            "token_uri": f"{self.url}/token",
            "private_key": self.key.private_bytes(*kinds).decode(),
        }


def google() -> AbstractContextManager[Google]:
    return run_in_thread(Google())


class Answers(LoopbackHandler):
    server: Google

    def described(self, name: str) -> dict[str, str]:
        data = self.server.objects[name]
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object",
            "bucket": "my-bucket",
            "name": name,
            "size": str(len(data)),
            "md5Hash": md5,
            "etag": md5,
            "generation": "1",
            "timeCreated": when,
            "updated": when,
            "mediaLink": f"{self.server.url}/download/storage/v1/b/my-bucket/o/{name}?alt=media",
        }

    def answer(self) -> None:
        body, url = self.read_body(), urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if url.path == "/token":
            assert b"urn%3Aietf%3Aparams%3Aoauth%3Agrant-type%3Ajwt-bearer" in body
            return self.send(200, {"access_token": TOKEN, "expires_in": 3600, "token_type": "Bearer"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": {"code": 401, "message": "Invalid Credentials"}})
        name = unquote(url.path.partition("/b/my-bucket/o/")[2])
        objects = self.server.objects
        if self.command == "POST" and url.path.startswith("/upload/") and query["uploadType"] == "multipart":
            return self.upload(body)
        if url.path.endswith("/b/my-bucket/o"):
            return self.listing(query.get("prefix", ""), query.get("delimiter", ""))
        if not name:
            return self.send(200, {"kind": "storage#bucket", "name": "my-bucket", "locationType": "region"})
        if name not in objects:
            return self.send(404, {"error": {"code": 404, "message": "Not Found"}})
        if self.command == "DELETE":
            del objects[name]
            return self.send(204, b"")
        return self.send(200, objects[name] if query.get("alt") == "media" else self.described(name))

    do_GET = do_POST = do_DELETE = answer

    def upload(self, body: bytes) -> None:
        """Two parts, as multipart/related has them: what it is called, what it is."""
        boundary = self.headers["Content-Type"].partition("boundary=")[2].strip("\"'").encode()
        _, first, second, _ = body.split(b"--" + boundary)
        name = json.loads(first.partition(b"\n\n" if b"\n\n" in first else b"\r\n\r\n")[2])["name"]
        self.server.objects[name] = second.partition(b"\n\n" if b"\n\n" in second[:200] else b"\r\n\r\n")[2][:-1]
        self.send(200, self.described(name))

    def listing(self, prefix: str, delimiter: str) -> None:
        found = sorted(name for name in self.server.objects if name.startswith(prefix))
        folders = {
            prefix + rest.partition(delimiter)[0] + delimiter
            for name in found
            if delimiter and delimiter in (rest := name[len(prefix) :])
        }
        items = [self.described(name) for name in found if not delimiter or delimiter not in name[len(prefix) :]]
        self.send(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def send(self, status: int, answer: dict | bytes) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_body(status, data, {"X-Goog-Hash": f"md5={base64.b64encode(hashlib.md5(data).digest()).decode()}"})
