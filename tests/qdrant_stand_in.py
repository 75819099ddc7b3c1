"""A stand-in for a Qdrant server: the part of its HTTP interface that a bank uses.

Requests are read with the models of Qdrant's own client and carried out by Qdrant's own engine
(qdrant-edge), so storage, filters and search are the real ones; only the server around them is not.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import qdrant_edge as edge
from pydantic import BaseModel, ValidationError
from qdrant_client import models

API_KEY = "the key"
DISTANCES = {models.Distance.DOT: edge.Distance.Dot, models.Distance.COSINE: edge.Distance.Cosine}


class Points(BaseModel, extra="forbid"):
    """The body of an upsert."""

    points: list[models.PointStruct]
    update_mode: models.UpdateMode | None = None


class Missing(Exception):
    """There is no such collection."""


class StandIn:
    """The server's state, and its answers."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.shards: dict[str, edge.EdgeShard] = {}
        self.configs: dict[str, models.CreateCollection] = {}
        self.lock = threading.Lock()
        self.status: int | None = None  # answer everything with this
        self.completed = True  # whether changes are applied at once
        self.old = False  # as before 1.16: collections have no metadata
        self.requests: list[tuple[str, str, int]] = []  # method, path, bytes of the body

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """The HTTP status and the result."""
        with self.lock:
            self.requests.append((method, path, len(body)))
            if self.status is not None:
                return self.status, "as told"
            _, name, *rest = path.strip("/").split("/")
            try:
                return 200, self._act(method, name, "/".join(rest), body)
            except ValidationError as error:
                return 400, str(error)
            except Missing:
                return 404, f"Collection {name} not found"
            except Exception as error:
                return 500, str(error)

    def _act(self, method: str, name: str, path: str, body: bytes) -> Any:
        match method, path:
            case "GET", "exists":
                return {"exists": name in self.shards}
            case "GET", "":
                return self._info(name)
            case "PUT", "":
                return self._create(name, models.CreateCollection.model_validate_json(body))
            case "DELETE", "":
                self._shard(name).close()
                del self.shards[name]
                return True
            case "PATCH", "":
                given = models.UpdateCollection.model_validate_json(body).metadata or {}
                old = self.configs[name].metadata or {}
                merged = {key: value for key, value in (old | given).items() if value is not None}
                self.configs[name].metadata = merged
                return True
            case "PUT", "index":
                index = models.CreateFieldIndex.model_validate_json(body)
                kinds = {
                    "keyword": edge.PayloadSchemaType.Keyword,
                    "bool": edge.PayloadSchemaType.Bool,
                }
                kind = kinds[str(index.field_schema)]
                return self._update(
                    name, edge.UpdateOperation.create_field_index(index.field_name, kind)
                )
            case "PUT", "points":
                return self._upsert(name, Points.model_validate_json(body))
            case "POST", "points":
                wanted = models.PointRequest.model_validate_json(body)
                found = self._shard(name).retrieve(
                    wanted.ids, payload(wanted.with_payload), bool(wanted.with_vector)
                )
                return [record(point) for point in found]
            case "POST", "points/scroll":
                s = models.ScrollRequest.model_validate_json(body)
                vectors = bool(s.with_vector)
                request = edge.ScrollRequest(
                    s.offset, s.limit, condition(s.filter), payload(s.with_payload), vectors
                )
                points, after = self._shard(name).scroll(request)
                return {"points": [record(p) for p in points], "next_page_offset": after}
            case "POST", "points/count":
                c = models.CountRequest.model_validate_json(body)
                asked = edge.CountRequest(bool(c.exact), condition(c.filter))
                return {"count": self._shard(name).count(asked)}
            case "POST", "points/query":
                return self._query(name, models.QueryRequest.model_validate_json(body))
            case "POST", "points/query/batch":
                batch = models.QueryRequestBatch.model_validate_json(body)
                return [self._query(name, query) for query in batch.searches]
            case "POST", "points/delete":
                gone = models.PointIdsList.model_validate_json(body)
                return self._update(name, edge.UpdateOperation.delete_points(gone.points))
            case "POST", "points/payload":
                change = models.SetPayload.model_validate_json(body)
                return self._update(
                    name, edge.UpdateOperation.set_payload(change.points or [], change.payload)
                )
            case "POST", "points/batch":
                steps = models.UpdateOperations.model_validate_json(body).operations
                return [self._step(name, step) for step in steps]
        raise NotImplementedError(f"not in the stand-in: {method} {path}")

    def _shard(self, name: str) -> edge.EdgeShard:
        if name not in self.shards:
            raise Missing
        return self.shards[name]

    def _create(self, name: str, config: models.CreateCollection) -> bool:
        kinds = config.vectors if isinstance(config.vectors, dict) else {"": config.vectors}
        vectors = {
            kind: edge.EdgeVectorParams(v.size, DISTANCES[v.distance])
            for kind, v in kinds.items()
            if isinstance(v, models.VectorParams)
        }
        path = Path(self.folder.name) / name
        path.mkdir()
        self.shards[name] = edge.EdgeShard.create(str(path), edge.EdgeConfig(vectors))
        self.configs[name] = config
        if self.old:
            config.metadata = None
        return True

    def _info(self, name: str) -> Any:
        self._shard(name)
        config = self.configs[name]
        return {
            "status": "green",
            "optimizer_status": "ok",
            "segments_count": 1,
            "payload_schema": {},
            "config": {
                "params": {"vectors": plain(config.vectors)},
                "hnsw_config": {"m": 16, "ef_construct": 100, "full_scan_threshold": 10000},
                "optimizer_config": {
                    "deleted_threshold": 0.2,
                    "vacuum_min_vector_number": 1000,
                    "default_segment_number": 0,
                    "flush_interval_sec": 5,
                },
                "metadata": config.metadata,
            },
        }

    def _upsert(self, name: str, new: Points) -> Any:
        points = [edge.Point(p.id, p.vector, p.payload) for p in new.points]
        insert = new.update_mode == models.UpdateMode.INSERT_ONLY
        mode = edge.UpdateMode.InsertOnly if insert else edge.UpdateMode.Upsert
        return self._update(name, edge.UpdateOperation.upsert_points(points, update_mode=mode))

    def _step(self, name: str, step: models.UpdateOperation) -> Any:
        if isinstance(step, models.UpsertOperation) and isinstance(step.upsert, models.PointsList):
            return self._upsert(name, Points(points=step.upsert.points))
        assert isinstance(step, models.DeleteOperation)
        assert isinstance(step.delete, models.PointIdsList)
        return self._update(name, edge.UpdateOperation.delete_points(step.delete.points))

    def _update(self, name: str, operation: edge.UpdateOperation) -> Any:
        self._shard(name).update(operation)
        return {"operation_id": 0, "status": "completed" if self.completed else "acknowledged"}

    def _query(self, name: str, q: models.QueryRequest) -> Any:
        query = q.query.nearest if isinstance(q.query, models.NearestQuery) else q.query
        request = edge.QueryRequest(
            q.limit or 10,
            query=edge.Query.Nearest(query),
            with_vector=bool(q.with_vector),
            with_payload=payload(q.with_payload),
            filter=condition(q.filter),
            params=edge.SearchParams(exact=bool(q.params and q.params.exact)),
        )
        found = self._shard(name).query(request)
        return {"points": [record(p) | {"score": p.score, "version": p.version} for p in found]}


def condition(given: models.Filter | None) -> edge.Filter | None:
    """A filter of the kinds that a bank uses."""
    if given is None:
        return None
    must = [
        edge.FieldCondition(c.key, edge.MatchValue(c.match.value))  # type: ignore[union-attr]
        for c in given.must or []
    ]
    must_not = [edge.HasIdCondition(set(c.has_id)) for c in given.must_not or []]  # type: ignore[union-attr]
    return edge.Filter(must, must_not=must_not)


def payload(asked: Any) -> Any:
    """Which part of the payload is asked for."""
    if isinstance(asked, models.PayloadSelectorExclude):
        return edge.PayloadSelector.Exclude(asked.exclude)
    return asked or False


def record(point: edge.Record | edge.ScoredPoint) -> dict[str, Any]:
    """A point as JSON."""
    return {"id": point.id, "payload": point.payload, "vector": point.vector}


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
            data = json.dumps(fine if status == 200 else wrong, default=str).encode()
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
        for shard in state.shards.values():
            shard.close()
        state.folder.cleanup()


def plain(result: Any) -> Any:
    """A result as JSON values."""
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json", exclude_unset=False)
    if isinstance(result, list):
        return [plain(part) for part in result]
    if isinstance(result, dict):
        return {name: plain(part) for name, part in result.items()}
    return result
