"""A memory bank in Qdrant: one store for many devices, or for very many memories.

    with QdrantBank.open("qdrant://store.example:6333/parts", fingerprint) as bank:
        bank.search(query, k=3)

A bank is one collection, a memory one point: its vector is the key (fp16 values as float32, dot
product), its payload the rest, byte for byte what a bank file holds. docs/memory-bank.md says more.

A point's id is the first 63 bits of the memory's content hash. So writers need not agree on the
next id, adding a memory again is harmless, and no id is ever used for another memory.
"""

from __future__ import annotations

import builtins
import operator
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tinyalign.bank import health, transfer
from tinyalign.bank.bank import MemoryBank, check_same_model
from tinyalign.bank.errors import BankError, InputError
from tinyalign.bank.health import Report, Stats
from tinyalign.bank.index import EXACT_LIMIT, IndexState, top
from tinyalign.bank.memory import (
    Floats,
    Hit,
    Memory,
    Metadata,
    NewMemory,
    Row,
    Stored,
    check_floor,
    check_key,
    check_text,
    encode,
    hash_bytes,
    metadata_json,
)
from tinyalign.bank.qdrant_connection import Address, Connection, models, parse_address
from tinyalign.bank.qdrant_points import (
    Pair,
    batches,
    check_size,
    equals,
    from_point,
    id_of,
    matching,
    possible,
    to_base64,
    to_point,
    tokens,
)
from tinyalign.bank.store import Header, check_header

FORMAT = 1
FORMAT_NAME = "tinyalign_bank"  # in the collection's metadata, beside the header's fields

POINTS_TO_READ = 256  # in a request that reads
QUERIES_AT_ONCE = 32
EXTRA = 8  # more candidates than asked for, so that equal scores can be put in order
NEAR = 1e-5  # scores that differ by less may be in any order as they come from Qdrant


class QdrantBank:
    """An open bank in Qdrant, with the verbs of ``tinyalign.bank.Bank``. Threads may share one.

    What is different: ids are not in the order of adding; and every request is applied whole, but
    more than 64 memories are several requests, so an error amid ``add``, ``merge`` or
    ``import_folder`` may leave some of them in the bank. Do it again: what is there is skipped.
    """

    def __init__(
        self, connection: Connection, header: Header, read_only: bool = False, name: str = ""
    ) -> None:
        self._connection = connection
        self._collection = connection.address.collection
        self._header = header
        self._read_only = read_only
        self._name = name or header.name

    @classmethod
    def create(
        cls,
        address: str,
        fingerprint: str,
        key_width: int,
        latent_width: int,
        name: str = "",
        score_floor: float | None = None,
    ) -> QdrantBank:
        """Create a bank and open it for writing; ``name`` is the collection's unless given."""
        place = parse_address(address)
        header = Header(fingerprint, key_width, latent_width, name or place.collection)
        check_header(header)
        floor = {} if score_floor is None else {"score_floor": check_floor(score_floor)}
        connection = Connection(place)
        try:
            with connection.client() as client:
                if client.collection_exists(place.collection):
                    raise BankError(f"{place} already exists")
                client.create_collection(
                    place.collection,
                    models.VectorParams(size=key_width, distance=models.Distance.DOT),
                    metadata={FORMAT_NAME: FORMAT, **asdict(header), **floor},
                )
                info = client.get_collection(place.collection)
                if FORMAT_NAME not in (info.config.metadata or {}):
                    client.delete_collection(place.collection)
                    raise BankError(
                        f"{place}: the server is too old to keep a bank: "
                        "Qdrant 1.17 or newer is needed"
                    )
                if place.folder is None:
                    for field in ("where", "has_thumbnail"):
                        keyword = models.PayloadSchemaType.KEYWORD
                        client.create_payload_index(place.collection, field, keyword)
        except BaseException:
            connection.close()
            raise
        return cls(connection, header)

    @classmethod
    def open(
        cls,
        address: str,
        fingerprint: str | None = None,
        read_only: bool = False,
        name: str = "",
    ) -> QdrantBank:
        """Open a bank; with a ``fingerprint``, one made for another model is refused."""
        bank = cls.open_if_there(address, fingerprint, read_only, name)
        if bank is None:
            raise BankError(f"{address} does not exist")
        return bank

    @classmethod
    def open_if_there(
        cls,
        address: str,
        fingerprint: str | None = None,
        read_only: bool = False,
        name: str = "",
    ) -> QdrantBank | None:
        """The same, but None if there is no such collection."""
        place = parse_address(address)
        if place.folder is not None and not (place.folder / "meta.json").exists():
            return None  # the client would make the folder
        connection = Connection(place)
        try:
            with connection.client() as client:
                there = client.collection_exists(place.collection)
                info = client.get_collection(place.collection) if there else None
            if info is None:
                connection.close()
                return None
            header = _read_header(place, info)
            if fingerprint is not None and header.fingerprint != fingerprint:
                raise BankError(
                    f"{place} was made for another model (fingerprint {header.fingerprint[:12]}, "
                    f"the model's is {fingerprint[:12]}): use that model, or make the bank again "
                    "with this one"
                )
        except BaseException:
            connection.close()
            raise
        return cls(connection, header, read_only, name)

    @property
    def path(self) -> str:
        """The bank's address."""
        return str(self._connection.address)

    @property
    def name(self) -> str:
        """The name that hits carry."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """What the bank was made for: encoder, preprocessing, key recipe and compressor."""
        return self._header.fingerprint

    @property
    def key_width(self) -> int:
        """Numbers in a key, Dk."""
        return self._header.key_width

    @property
    def latent_width(self) -> int:
        """Numbers in one latent, d."""
        return self._header.latent_width

    @property
    def read_only(self) -> bool:
        """Whether the bank is open for reading only."""
        return self._read_only

    @property
    def score_floor(self) -> float | None:
        """The score below which a memory is not relevant; None if the bank has no floor."""
        with self._connection.client() as client:
            metadata = client.get_collection(self._collection).config.metadata or {}
        floor = metadata.get("score_floor")
        try:
            return None if floor is None else check_floor(floor)
        except InputError:
            raise BankError(f"{self.path} is damaged: its score floor is {floor!r}") from None

    def set_score_floor(self, value: float | None) -> None:
        """Store a score floor (-1 to 1), or with None remove it."""
        self._check_writable()
        floor = None if value is None else check_floor(value)
        with self._connection.client() as client:
            client.update_collection(self._collection, metadata={"score_floor": floor})

    def calibrate(self) -> float:
        """Measure a score floor on the bank's own memories, store and return it.

        As ``Bank.calibrate``, on 800 memories at most.
        """
        self._check_writable()
        health.check_enough(self.path, len(self))
        value = health.floor_of(self._nearest_scores(health.FLOOR_SAMPLE))
        self.set_score_floor(value)
        return value

    def __len__(self) -> int:
        return self._count(None)

    def __enter__(self) -> QdrantBank:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; harmless when it is closed already."""
        self._connection.close()

    def seal(self) -> None:
        """InputError: only a bank file can be sealed."""
        raise InputError(
            f"{self.path} cannot be sealed, it is no file: merge it into a bank file and seal that"
        )

    def compact(self) -> None:
        """Nothing to do: Qdrant gives the space of removed memories back by itself."""
        self._check_writable()

    def reindex(self) -> None:
        """Nothing to do: Qdrant builds its index by itself."""

    # --- writing ---------------------------------------------------------------------------

    def add(self, memories: Iterable[NewMemory]) -> builtins.list[int]:
        """Add memories and return their ids, in order; all are checked before any is added.

        A memory whose content hash is in the bank already is skipped and gives the id it has there.
        When this returns, Qdrant has stored the memories and the next search finds them.
        """
        rows = []
        for position, memory in enumerate(memories):
            try:
                rows.append((encode(memory, self.key_width, self.latent_width), memory.thumbnail))
            except InputError as error:
                raise InputError(f"memory {position + 1} of those to add: {error}") from None
        self._copy(lambda: iter(rows), None)
        return [id_of(row.content_hash) for row, _ in rows]

    def update(
        self,
        id: int,
        *,
        source: str | None = None,
        metadata: Metadata | None = None,
        thumbnail: bytes | None = None,
    ) -> None:
        """Change what is given of a memory; ``metadata`` replaces all there is."""
        changes: dict[str, Any] = {}
        if source is not None:
            changes["source"] = check_text(source, "source")
        if metadata is not None:
            changes |= {"metadata": metadata_json(metadata), "where": tokens(metadata)}
        if thumbnail is not None:
            check_size(thumbnail)
            changes |= {"thumbnail": to_base64(thumbnail), "has_thumbnail": "yes"}
        self._check_writable()
        number = operator.index(id)
        if number not in self._hashes([number]):
            raise self._unknown(number)
        if changes:
            with self._connection.client() as client:
                result = client.set_payload(self._collection, changes, [number], wait=True)
            self._check_done(result)

    def replace(self, id: int, memory: NewMemory) -> int:
        """Put another memory in the place of one; returns its id, a new one if its hash is new.

        InputError if a third memory has that content hash.
        """
        self._check_writable()
        row, thumbnail = encode(memory, self.key_width, self.latent_width), memory.thumbnail
        check_size(row.text.encode(), thumbnail)
        (number, old, picture), _ = self._one(id)
        new = id_of(row.content_hash)
        twin = self._hashes([new]).get(new)
        if twin is not None and new != number:
            self._check_hash(new, twin, row)
            raise InputError(f"memory {new} of {self.path} has that picture and text")
        if thumbnail is None and old.key == row.key:
            thumbnail = picture
        point = models.PointsList(points=[to_point((row, thumbnail))])
        steps: builtins.list[models.UpdateOperation] = [models.UpsertOperation(upsert=point)]
        if new != number:
            steps.append(models.DeleteOperation(delete=models.PointIdsList(points=[number])))
        with self._connection.client() as client:
            results = client.batch_update_points(self._collection, steps, wait=True)
        self._check_done(*results)
        return new

    def remove(self, ids: Iterable[int]) -> None:
        """Remove memories; an id that does not exist raises InputError and none is removed."""
        self._check_writable()
        numbers = sorted({operator.index(number) for number in ids})
        known = self._hashes(numbers)
        for number in numbers:
            if number not in known:
                raise self._unknown(number)
        for part in _parts(numbers, POINTS_TO_READ):
            with self._connection.client() as client:
                gone = models.PointIdsList(points=part)
                result = client.delete(self._collection, gone, wait=True)
            self._check_done(result)

    def merge(self, other: MemoryBank) -> int:
        """Add all memories of another bank; returns how many were not known yet.

        An empty bank without a score floor takes the other's.
        """
        check_same_model(self, other)
        if self.path == other.path:
            raise InputError(f"{self.path} cannot be merged into itself")

        def pairs() -> Iterator[Pair]:
            with closing(other.rows()) as rows:
                yield from ((row, thumbnail) for _, row, thumbnail in rows)

        return self._copy(pairs, other.score_floor)

    def import_folder(self, directory: str | os.PathLike[str]) -> int:
        """Add what ``export`` wrote; returns how many were not known yet.

        An empty bank without a score floor takes the exported one.
        """
        _, floor = transfer.read_export(Path(directory), self._header)

        def pairs() -> Iterator[Pair]:
            return transfer.read_export(Path(directory), self._header)[0]

        return self._copy(pairs, floor)

    # --- reading ---------------------------------------------------------------------------

    def get(self, id: int) -> Memory:
        """The memory with this id; InputError if there is none."""
        return self._one(id)[1]

    def find(self, content_hash: str) -> int | None:
        """The id of the memory with this content hash (hex), or None."""
        digest = hash_bytes(content_hash)
        if not digest:
            return None
        number = id_of(digest)
        return number if self._hashes([number]).get(number) == digest.hex() else None

    def list(self, where: Metadata | None = None) -> builtins.list[Memory]:
        """All memories, by id, or those whose metadata has every name and value in ``where``.

        A string in ``where`` also matches the number or bool it spells: "5" finds 5 and "5".
        """
        return [self._read(point)[1] for point in self._points(matching(where))]

    def rows(self) -> Generator[Stored, None, None]:
        """Every memory as it is stored, by id: (id, row, thumbnail).

        What others add or remove meanwhile may or may not be among them.
        """
        for point in self._points(None):
            yield self._read(point)[0]

    def search(
        self,
        key: Floats,
        k: int = 3,
        where: Metadata | None = None,
        exclude: frozenset[int] = frozenset(),
    ) -> builtins.list[Hit]:
        """The k memories with the highest dot product with ``key`` [Dk], best first, ties by id.

        Up to 20,000 memories, or with ``where`` or ``exclude``, the search is exact. Above, a
        server uses its own index, which may miss a memory.
        """
        query = check_key(key, self.key_width)
        if not isinstance(k, int) or k < 1:
            raise InputError(f"k is 1 or more, not {k!r}")
        condition = matching(where, exclude)
        points = self._candidates(query, k, condition)
        found = {m.id: m for _, m in map(self._read, points)}
        if not found:
            return []
        # Scored anew, so that the same memories get the same scores as in a bank file.
        scores = np.einsum("ij,j->i", np.stack([m.key for m in found.values()]), query)
        ids, best = top(np.array(builtins.list(found), np.int64), scores, k)
        return [
            self._hit(found[number], score)
            for number, score in zip(ids.tolist(), best.tolist(), strict=True)
        ]

    def export(self, directory: str | os.PathLike[str]) -> int:
        """Write all memories to a new folder as JSONL and thumbnails; returns how many."""
        return transfer.export_bank(self._header, self.score_floor, self.rows(), Path(directory))

    def stats(self) -> Stats:
        """The bank in numbers; bytes are known for a folder only."""
        count, folder = len(self), self._connection.address.folder
        size = None if folder is None else _bytes(folder / "collection" / self._collection)
        nearest = self._nearest_scores(health.SAMPLE)
        return Stats(
            name=self._header.name,
            fingerprint=self.fingerprint,
            key_width=self.key_width,
            latent_width=self.latent_width,
            memories=count,
            thumbnails=self._count(models.Filter(must=[equals("has_thumbnail", "yes")])),
            file_bytes=size,
            bytes_per_memory=size / count if size and count else size,
            index=self._index_state(),
            index_bytes=0,
            nearest=health.nearness_of(nearest) if len(nearest) else None,
            score_floor=self.score_floor,
        )

    def verify(self) -> Report:
        """Read the whole bank and say what is wrong with it."""
        problems, count = [], 0
        for point in self._points(None):
            count += 1
            try:
                check_key(self._read(point)[1].key, self.key_width)
            except InputError as error:
                reason = "" if isinstance(error, BankError) else f" ({error})"
                problems.append(f"memory {point.id} cannot be read{reason}")
        return Report(count, self._index_state(), tuple(problems))

    # --- inside ----------------------------------------------------------------------------

    def _copy(self, pairs: Callable[[], Iterator[Pair]], score_floor: float | None) -> int:
        """Add all (row, thumbnail) pairs, reading them once before; how many were not known."""
        self._check_writable()
        for row, thumbnail in pairs():
            check_size(row.text.encode(), thumbnail)
        if score_floor is not None and not len(self) and self.score_floor is None:
            self.set_score_floor(score_floor)
        return sum(self._add_some(part) for part in batches(pairs()))

    def _add_some(self, pairs: Sequence[Pair]) -> int:
        """Add what is not known yet of a few pairs, in one request; how many that were."""
        new: dict[int, Pair] = {}
        known = self._hashes([id_of(row.content_hash) for row, _ in pairs])
        for row, thumbnail in pairs:
            number = id_of(row.content_hash)
            if number in known:
                self._check_hash(number, known[number], row)
            else:
                known[number] = row.content_hash.hex()
                new[number] = (row, thumbnail)
        if new:
            points = [to_point(pair) for pair in new.values()]
            with self._connection.client() as client:
                # Only inserted: what another device has added meanwhile stays as it is.
                result = client.upsert(
                    self._collection, points, wait=True, update_mode=models.UpdateMode.INSERT_ONLY
                )
            self._check_done(result)
        return len(new)

    def _candidates(
        self, query: Floats, k: int, condition: models.Filter | None
    ) -> builtins.list[models.ScoredPoint]:
        """The best k points and all that score like the last of them, and some more."""
        params, limit = self._search_params(condition), k + EXTRA
        while True:
            with self._connection.client() as client:
                points = client.query_points(
                    self._collection,
                    query=query.tolist(),
                    query_filter=condition,
                    search_params=params,
                    limit=limit,
                    with_payload=models.PayloadSelectorExclude(exclude=["thumbnail"]),
                    with_vectors=True,
                ).points
            if len(points) < limit or points[k - 1].score - points[-1].score > NEAR:
                return points
            limit *= 2

    def _nearest_scores(self, count: int) -> Floats:
        """The score of the nearest other memory [S], for up to ``count`` memories.

        The first ids are as good as any: they are hashes.
        """
        sample = islice(self._points(None, payload=False), count)
        params, scores = self._search_params(None), []
        for part in _parts(builtins.list(sample), QUERIES_AT_ONCE):
            requests = [models.QueryRequest(query=p.vector, limit=2, params=params) for p in part]
            with self._connection.client() as client:
                answers = client.query_batch_points(self._collection, requests)
            for point, answer in zip(part, answers, strict=True):
                scores += [p.score for p in answer.points if p.id != point.id][:1]
        return np.array(scores, np.float32)

    def _points(
        self, condition: models.Filter | None, payload: bool = True
    ) -> Iterator[models.Record]:
        """All points that fit, by id, with their vectors."""
        offset = None
        while True:
            with self._connection.client() as client:
                points, offset = client.scroll(
                    self._collection,
                    scroll_filter=condition,
                    limit=POINTS_TO_READ,
                    offset=offset,
                    with_payload=payload,
                    with_vectors=True,
                )
            yield from points
            if offset is None:
                return

    def _one(self, id: int) -> tuple[Stored, Memory]:
        number = operator.index(id)
        if not possible([number]):
            raise self._unknown(number)
        with self._connection.client() as client:
            found = client.retrieve(
                self._collection, [number], with_payload=True, with_vectors=True
            )
        if not found:
            raise self._unknown(number)
        return self._read(found[0])

    def _hashes(self, ids: Sequence[int]) -> dict[int, str]:
        """The content hashes (hex) of those of the ids that are in the bank."""
        found: dict[int, str] = {}
        for part in _parts(possible(ids), POINTS_TO_READ):
            with self._connection.client() as client:
                points = client.retrieve(self._collection, part, with_payload=["content_hash"])
            found |= {int(p.id): str((p.payload or {}).get("content_hash")) for p in points}
        return found

    def _count(self, condition: models.Filter | None) -> int:
        with self._connection.client() as client:
            return int(client.count(self._collection, condition, exact=True).count)

    def _search_params(self, condition: models.Filter | None) -> models.SearchParams | None:
        """Exact search for what is small or filtered; a folder's search is exact anyway."""
        if self._connection.address.folder is not None:
            return None
        return models.SearchParams(exact=condition is not None or len(self) <= EXACT_LIMIT)

    def _index_state(self) -> IndexState:
        params = self._search_params(None)
        return "exact" if params is None or params.exact else "server"

    def _read(self, point: models.Record | models.ScoredPoint) -> tuple[Stored, Memory]:
        """A point as what a bank file stores, and as a memory; BankError if it is none."""
        try:
            return from_point(point, self.key_width, self.latent_width)
        except ValueError:
            raise BankError(
                f"{self.path} is damaged: memory {point.id} cannot be read; remove it, or take "
                "the bank from a backup"
            ) from None

    def _hit(self, memory: Memory, score: float) -> Hit:
        m = memory
        return Hit(m.id, score, m.text, m.source, m.metadata, m.latents, self._name)

    def _check_hash(self, number: int, known: str, row: Row) -> None:
        if known != row.content_hash.hex():
            raise BankError(
                f"{self.path} cannot hold two memories whose content hashes begin alike "
                f"(id {number}); change the text of one"
            )

    def _check_writable(self) -> None:
        if self._read_only:
            raise BankError(f"{self.path} is open for reading only")

    def _check_done(self, *results: models.UpdateResult) -> None:
        """The server may take a change and not have applied it yet."""
        if any(result.status != models.UpdateStatus.COMPLETED for result in results):
            raise BankError(
                f"{self.path}: the server has taken the change but not applied it in time; "
                "look again later"
            )

    def _unknown(self, number: int) -> InputError:
        return InputError(f"{self.path} has no memory {number}")


def _read_header(address: Address, info: models.CollectionInfo) -> Header:
    metadata = info.config.metadata or {}
    version = metadata.get(FORMAT_NAME)
    if not isinstance(version, int):
        raise BankError(f"{address} is a collection but not a memory bank")
    if version > FORMAT:
        raise BankError(
            f"{address} has format {version}, newer than {FORMAT}, which this version of "
            "tinyalign reads: upgrade it"
        )
    try:
        header = Header(**{name: metadata[name] for name in Header.__dataclass_fields__})
        check_header(header)
    except (KeyError, InputError):
        raise BankError(f"{address} is damaged: its header is incomplete") from None
    vectors = info.config.params.vectors
    size, distance = header.key_width, models.Distance.DOT
    if not isinstance(vectors, models.VectorParams) or (vectors.size, vectors.distance) != (
        size,
        distance,
    ):
        raise BankError(f"{address} is damaged: its vectors are no keys")
    return header


def _parts(things: Sequence[Any], size: int) -> Iterator[Any]:
    return (things[start : start + size] for start in range(0, len(things), size))


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
