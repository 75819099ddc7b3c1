"""A stand-in for a Qdrant server: the part of its HTTP interface that a bank uses.

The requests are checked with the client's own models, and its local mode holds the points. So what
is tested is everything up to the wire and back; how the real server searches is not.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import BaseModel, ValidationError
from qdrant_client import QdrantClient, models

API_KEY = "the key"


class Points(BaseModel, extra="forbid"):
    """The body of an upsert."""

    points: list[models.PointStruct]
    update_mode: models.UpdateMode | None = None


class StandIn:
    """The server's state, and its answers."""

    def __init__(self) -> None:
        self.client = QdrantClient(":memory:", force_disable_check_same_thread=True)
        self.lock = threading.Lock()
        self.status: int | None = None  # answer everything with this
        self.completed = True  # whether changes are applied at once
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the body

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The HTTP status and the result."""
        with self.lock:
            self.requests.append((method, path, len(body)))
            if self.status is not None:
                return self.status, None
            _, name, *rest = path.strip("/").split("/")
            try:
                return 200, self._act(method, name, "/".join(rest), body)
            except ValidationError as error:
                return 400, str(error)
            except ValueError as error:
                return (409 if "exists" in str(error) else 404), str(error)

    def _act(self, method: str, name: str, path: str, body: bytes) -> Any:
        client = self.client
        match method, path:
            case "GET", "exists":
                return {"exists": client.collection_exists(name)}
            case "GET", "":
                return client.get_collection(name)
            case "PUT", "":
                asked = models.CreateCollection.model_validate_json(body)
                return client.create_collection(name, asked.vectors, metadata=asked.metadata)
            case "PATCH", "":
                update = models.UpdateCollection.model_validate_json(body)
                return client.update_collection(name, metadata=update.metadata)
            case "PUT", "index":
                models.CreateFieldIndex.model_validate_json(body)
                return self._done()
            case "PUT", "points":
                new = Points.model_validate_json(body)
                client.upsert(name, new.points, update_mode=new.update_mode)
                return self._done()
            case "POST", "points":
                wanted = models.PointRequest.model_validate_json(body)
                return client.retrieve(
                    name, wanted.ids, wanted.with_payload, bool(wanted.with_vector)
                )
            case "POST", "points/scroll":
                scroll = models.ScrollRequest.model_validate_json(body)
                points, after = client.scroll(
                    name, scroll.filter, scroll.limit or 10, None, scroll.offset,
                    scroll.with_payload or False, bool(scroll.with_vector),
                )  # fmt: skip
                return {"points": points, "next_page_offset": after}
            case "POST", "points/count":
                count = models.CountRequest.model_validate_json(body)
                return client.count(name, count.filter)
            case "POST", "points/query":
                return self._query(name, models.QueryRequest.model_validate_json(body))
            case "POST", "points/query/batch":
                batch = models.QueryRequestBatch.model_validate_json(body)
                return [self._query(name, query) for query in batch.searches]
            case "POST", "points/delete":
                client.delete(name, models.PointIdsList.model_validate_json(body))
                return self._done()
            case "POST", "points/payload":
                change = models.SetPayload.model_validate_json(body)
                client.set_payload(name, change.payload, change.points)
                return self._done()
            case "POST", "points/batch":
                steps = models.UpdateOperations.model_validate_json(body)
                client.batch_update_points(name, steps.operations)
                return [self._done()] * len(steps.operations)
        raise ValueError(f"not in the stand-in: {method} {path}")

    def _query(self, name: str, q: models.QueryRequest) -> Any:
        return self.client.query_points(
            name, q.query, query_filter=q.filter, limit=q.limit or 10,
            with_payload=q.with_payload or False, with_vectors=bool(q.with_vector),
        )  # fmt: skip

    def _done(self) -> Any:
        return {"operation_id": 0, "status": "completed" if self.completed else "acknowledged"}


@contextmanager
def stand_in() -> Iterator[tuple[StandIn, str]]:
    """A running stand-in and its address, HOST:PORT."""
    state = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("api-key") != API_KEY:
                status, result = 401, "no key"
            else:
                status, result = state.answer(self.command, self.path.split("?")[0], body)
            fine = {"result": plain(result), "status": "ok", "time": 0.0}
            wrong = {"status": {"error": result}, "time": 0.0}
            data = json.dumps(fine if status == 200 else wrong).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = handle_one

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield state, f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        state.client.close()


def plain(result: Any) -> Any:
    """A result as JSON values."""
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json", exclude_unset=False)
    if isinstance(result, list):
        return [plain(part) for part in result]
    if isinstance(result, dict):
        return {name: plain(part) for name, part in result.items()}
    return result
