"""Qdrant's REST calls that `colintern embed` makes, on loopback, answered by qdrant-client's local mode.

It stands in for the server, whose binary is not available where the tests run; a real one also compresses, replicates
and limits requests.
"""

import json
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qdrant_client import QdrantClient, models


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, api_key: str = "") -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.client, self.api_key, self.lock = QdrantClient(":memory:"), api_key, threading.Lock()
        self.largest_request = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


@contextmanager
def running(api_key: str = "") -> Iterator[Server]:
    server = Server(api_key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        self.server.largest_request = max(self.server.largest_request, size)
        body = json.loads(self.rfile.read(size) or b"{}")
        _, _, name, *action = self.path.partition("?")[0].split("/")
        if self.server.api_key and self.headers.get("api-key") != self.server.api_key:
            return self.send(401, b"Must provide an API key")
        with self.server.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self.call(self.server.client, name, " ".join([self.command, *action]), body)
        return self.send(200, json.dumps({"result": result, "status": "ok", "time": 0.0}).encode())

    do_GET = do_PUT = do_POST = answer

    def call(self, client: QdrantClient, name: str, action: str, body: dict) -> object:
        completed = {"operation_id": 0, "status": "completed"}
        if action == "GET exists":
            return {"exists": client.collection_exists(name)}
        if action == "PUT":
            return client.create_collection(name, models.VectorParams(**body["vectors"]))
        if action == "GET":
            return client.get_collection(name).model_dump(mode="json")
        if action == "PUT points":
            client.upsert(name, [models.PointStruct(**point) for point in body["points"]])
            return completed
        if action == "POST points delete":
            client.delete(name, models.PointIdsList(points=body["points"]))
            return completed
        if action == "POST points scroll":
            fields = body["with_payload"]
            points, offset = client.scroll(name, limit=body["limit"], offset=body.get("offset"), with_payload=fields)
            return {"points": [point.model_dump(mode="json") for point in points], "next_page_offset": offset}
        assert action == "POST points query", action
        query = body["query"].get("nearest", body["query"]) if isinstance(body["query"], dict) else body["query"]
        return client.query_points(name, query, limit=body["limit"]).model_dump(mode="json")

    def send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
