"""What a memory is as a point in Qdrant, and how ``where`` becomes a filter.

    id        the first 63 bits of the content hash
    vector    the key: fp16 values as float32
    payload   text, source, metadata (the JSON text of a bank file), content_hash (hex), latents,
              scales and thumbnail (base64 of what a bank file holds), has_thumbnail ("yes"), where

``where`` in the payload is made from the metadata, so that Qdrant's test for equal strings finds
exactly what a bank file's SQL finds.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np

from tinyalign.bank import memory as codec
from tinyalign.bank.errors import InputError
from tinyalign.bank.memory import Memory, Metadata, Row, Stored, Value
from tinyalign.bank.qdrant_connection import models
from tinyalign.bank.sqlite import MAX_VALUE_BYTES

POINTS_AT_ONCE = 64  # in a request that writes: applied as a whole
BYTES_AT_ONCE = 4 << 20  # the same in bytes of thumbnails; a server takes 32 MiB a request

Pair: TypeAlias = tuple[Row, bytes | None]  # a row and its thumbnail


def id_of(content_hash: bytes) -> int:
    """A memory's id: the first 63 bits of its content hash (32 bytes)."""
    return int.from_bytes(content_hash[:8], "big") >> 1


def to_point(pair: Pair) -> models.PointStruct:
    """A row and its thumbnail as a point."""
    row, thumbnail = pair
    payload: dict[str, Any] = {
        "text": row.text,
        "source": row.source,
        "metadata": row.metadata,
        "where": tokens(codec.decode_metadata(row.metadata)),
        "content_hash": row.content_hash.hex(),
        "latents": to_base64(row.latents),
        "scales": to_base64(row.scales),
    }
    if thumbnail is not None:
        payload |= {"thumbnail": to_base64(thumbnail), "has_thumbnail": "yes"}
    key = np.frombuffer(row.key, "<f2").astype(np.float32)
    return models.PointStruct(id=id_of(row.content_hash), vector=key.tolist(), payload=payload)


def from_point(
    point: models.Record | models.ScoredPoint, key_width: int, latent_width: int
) -> tuple[Stored, Memory]:
    """A point as what a bank file stores, and as a memory; ValueError if it is none."""
    payload = point.payload or {}
    try:
        key = np.asarray(point.vector, np.float32)
        half = key.astype("<f2")
        if not np.array_equal(half.astype(np.float32), key):
            raise ValueError("the vector is no key")
        row = Row(
            content_hash=bytes.fromhex(payload["content_hash"]),
            key=half.tobytes(),
            latents=_from_base64(payload["latents"]),
            scales=_from_base64(payload["scales"]),
            text=payload["text"],
            source=payload["source"],
            metadata=payload["metadata"],
        )
        if len(row.content_hash) != 32 or id_of(row.content_hash) != point.id:
            raise ValueError("the id does not belong to the content")
        picture = payload.get("thumbnail")
        thumbnail = None if picture is None else _from_base64(picture)
        stored = id_of(row.content_hash), row, thumbnail
        return stored, codec.decode(stored, key_width, latent_width)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"bad {error}") from None


# --- filters: metadata as tokens, so that Qdrant's equality means what a bank file's does -----


def tokens(metadata: Metadata) -> list[str]:
    """What may be asked for in ``where``: each entry's value, and the string that spells it."""
    tokens = set()
    for name, value in metadata.items():
        tokens |= {_token(name, value), _token(name, _spelled(value))}
    return sorted(tokens)


def _token(name: str, value: Value) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 5.0 is 5
    return json.dumps([name, value], ensure_ascii=False, separators=(",", ":"))


def _spelled(value: Value) -> str:
    """A value as SQLite makes it a text."""
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, float):
        return str(value)
    digits, e, exponent = f"{value:.15g}".partition("e")
    return (digits if "." in digits else digits + ".0") + e + exponent


def matching(where: Metadata | None, exclude: frozenset[int] = frozenset()) -> models.Filter | None:
    """A filter for the memories that match ``where`` and are not left out; None for all."""
    conditions: list[models.Condition] = []
    for name, value in (where or {}).items():
        codec.check_value(name, value)
        conditions.append(equals("where", _token(name, value)))
    left_out = possible(exclude)
    if not conditions and not left_out:
        return None
    return models.Filter(
        must=conditions, must_not=[models.HasIdCondition(has_id=left_out)] if left_out else None
    )


def equals(field: str, value: str) -> models.FieldCondition:
    """A condition on one field of the payload."""
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))


# --- small things --------------------------------------------------------------------------


def possible(ids: Iterable[int]) -> list[Any]:
    """Those numbers that can be an id at all."""
    return [int(number) for number in ids if 0 <= number < 2**63]


def batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pairs for one request each."""
    batch: list[Pair] = []
    size = 0
    for row, thumbnail in pairs:
        more = len(row.text) + len(row.latents) + len(thumbnail or b"")
        if batch and (len(batch) == POINTS_AT_ONCE or size + more > BYTES_AT_ONCE):
            yield batch
            batch, size = [], 0
        batch.append((row, thumbnail))
        size += more
    if batch:
        yield batch


def check_size(*values: bytes | None) -> None:
    """InputError if a text or thumbnail is larger than a bank file may hold."""
    if any(len(value or b"") > MAX_VALUE_BYTES for value in values):
        raise InputError(f"a text or thumbnail is over {MAX_VALUE_BYTES >> 20} MiB")


def to_base64(data: bytes) -> str:
    """Bytes as text for a payload."""
    return base64.b64encode(data).decode("ascii")


def _from_base64(text: str) -> bytes:
    return base64.b64decode(text, validate=True)
