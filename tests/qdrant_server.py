"""Qdrant's REST calls that `colintern embed` makes, on loopback, answered by qdrant-client's local mode.

It stands in for the server, whose binary is not available where the tests run; a real one also compresses, replicates
and limits requests.
"""

import json
import threading
import warnings
from contextlib import AbstractContextManager

from loopback import LoopbackHandler, LoopbackServer, run_in_thread
from qdrant_client import QdrantClient, models


class Server(LoopbackServer):
    def __init__(self, api_key: str = "") -> None:
        super().__init__(Answers)
        self.client, self.api_key, self.lock = QdrantClient(":memory:"), api_key, threading.Lock()
        self.largest_request = 0


def running(api_key: str = "") -> AbstractContextManager[Server]:
    return run_in_thread(Server(api_key))


class Answers(LoopbackHandler):
    server: Server

    def answer(self) -> None:
        content = self.read_body()
        self.server.largest_request = max(self.server.largest_request, len(content))
        body = json.loads(content or b"{}")
        _, _, name, *action = self.path.partition("?")[0].split("/")
        if self.server.api_key and self.headers.get("api-key") != self.server.api_key:
            return self.send_body(401, b"Must provide an API key")
        with self.server.lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = self.call(self.server.client, name, " ".join([self.command, *action]), body)
        data = json.dumps({"result": result, "status": "ok", "time": 0.0}).encode()
        return self.send_body(200, data, {"Content-Type": "application/json"})

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
