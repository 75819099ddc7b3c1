"""What a memory is, and how its vectors become bytes and come back.

Keys are stored as fp16. Latents are stored as int8 with one fp16 scale per latent: a value comes
back as ``int8 * scale`` and is at most half a scale away from what was given.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank.errors import InputError

Floats: TypeAlias = NDArray[np.float32]
Halves: TypeAlias = NDArray[np.float16]
Value: TypeAlias = str | int | float | bool
Metadata: TypeAlias = Mapping[str, Value]

NORM_LIMIT = 1.01  # a key has length 1, or less where it has no text part


@dataclass(frozen=True, eq=False)
class NewMemory:
    """A memory to add: key [Dk] of length 1, latents [l, d], and a text that is not empty.

    ``content_hash`` is the hex SHA-256 that makes two memories the same (see ``content_hash``);
    left empty, it is taken from the key and the text.
    """

    key: Floats
    latents: Floats
    text: str
    source: str = ""
    metadata: Metadata = field(default_factory=dict)
    thumbnail: bytes | None = None
    content_hash: str = ""


@dataclass(frozen=True, eq=False)
class Memory:
    """A stored memory: key [Dk] (fp16 precision) and latents [l, d] (int8 precision) as float32."""

    id: int
    key: Floats
    latents: Floats
    text: str
    source: str
    metadata: Metadata
    thumbnail: bytes | None
    content_hash: str


@dataclass(frozen=True, eq=False)
class Hit:
    """A retrieved memory: ``score`` is its key's dot product with the query; latents [l, d]."""

    id: int
    score: float
    text: str
    source: str
    metadata: Metadata
    latents: Floats
    bank: str


class Row(NamedTuple):
    """One memory as it is stored; its thumbnail is kept beside it."""

    content_hash: bytes  # 32 bytes
    key: bytes  # fp16 [Dk]
    latents: bytes  # int8 [l, d]
    scales: bytes  # fp16 [l]
    text: str
    source: str
    metadata: str  # JSON object


def checksum(row: Row, thumbnail: bytes | None) -> int:
    """CRC-32 of everything stored of a memory: it finds any flipped bit."""
    texts = (text.encode() for text in (row.text, row.source, row.metadata))
    parts = [row.content_hash, row.key, row.latents, row.scales, *texts]
    if thumbnail is not None:
        parts.append(thumbnail)
    return zlib.crc32(b"".join(len(part).to_bytes(8, "little") + part for part in parts))


Stored: TypeAlias = tuple[int, Row, bytes | None]  # id, row, thumbnail


def content_hash(image: bytes, text: str) -> str:
    """The hex SHA-256 of a (picture, text) pair: picture bytes are hashed first, then the text."""
    return hashlib.sha256(hashlib.sha256(image).digest() + text.encode()).hexdigest()


def encode(memory: NewMemory, key_width: int, latent_width: int) -> Row:
    """Check a new memory and turn it into a row; what cannot be stored raises InputError."""
    key = check_key(memory.key, key_width).astype("<f2").tobytes()
    latents, scales = quantize(_check_latents(memory.latents, latent_width))
    text = check_text(memory.text, "text")
    digest = hash_bytes(memory.content_hash) or hashlib.sha256(key + text.encode()).digest()
    if not text.strip():
        raise InputError("the text is empty: a memory needs a text")
    if memory.thumbnail is not None and not isinstance(memory.thumbnail, bytes):
        raise InputError(f"the thumbnail is {type(memory.thumbnail).__name__}, not bytes")
    return Row(
        content_hash=digest,
        key=key,
        latents=latents.tobytes(),
        scales=scales.tobytes(),
        text=text,
        source=check_text(memory.source, "source"),
        metadata=metadata_json(memory.metadata),
    )


def check_row(row: Row, key_width: int, latent_width: int) -> None:
    """Check a row that comes from outside; what a bank cannot hold raises InputError."""
    try:
        key = decode_key(row.key, key_width)
        latents = decode_latents(row.latents, row.scales, latent_width)
        metadata = decode_metadata(row.metadata)
    except ValueError as error:
        raise InputError(f"the vectors do not fit together or the bank ({error})") from None
    digest = row.content_hash.hex()
    encode(
        NewMemory(key, latents, row.text, row.source, metadata, None, digest),
        key_width,
        latent_width,
    )


def decode(stored: Stored, key_width: int, latent_width: int) -> Memory:
    """What is stored as a memory; ValueError or TypeError if it is damaged."""
    number, row, thumbnail = stored
    if not isinstance(row.text, str) or not isinstance(row.source, str):
        raise ValueError("bad text")
    if not isinstance(thumbnail, bytes | None):
        raise ValueError("bad thumbnail")
    return Memory(
        id=number,
        key=decode_key(row.key, key_width),
        latents=decode_latents(row.latents, row.scales, latent_width),
        text=row.text,
        source=row.source,
        metadata=decode_metadata(row.metadata),
        thumbnail=thumbnail,
        content_hash=bytes(row.content_hash).hex(),
    )


def decode_key(blob: bytes, width: int) -> Floats:
    """fp16 bytes -> [Dk] float32; ValueError if they are not a key."""
    key = np.frombuffer(blob, "<f2").astype(np.float32)
    if key.shape != (width,) or not np.isfinite(key).all():
        raise ValueError("bad key")
    return key


def decode_latents(latents: bytes, scales: bytes, width: int) -> Floats:
    """int8 and fp16 bytes -> [l, d] float32; ValueError if they do not belong together."""
    scale = np.frombuffer(scales, "<f2").astype(np.float32)
    if len(scale) == 0 or not np.isfinite(scale).all():
        raise ValueError("bad scales")
    return np.frombuffer(latents, np.int8).reshape(len(scale), width) * scale[:, None]


def decode_metadata(text: str) -> dict[str, Value]:
    """A JSON object -> dict; ValueError if it is none."""
    metadata = json.loads(text)
    if not isinstance(metadata, dict):
        raise ValueError("bad metadata")
    return metadata


def quantize(latents: Floats) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """[l, d] float32 -> int8 [l, d] and fp16 scales [l]; the error is at most half a scale."""
    exact = np.abs(latents).max(axis=1) / 127
    with np.errstate(over="ignore"):
        scales = exact.astype(np.float16)
    above = np.nextafter(scales, np.float16(np.inf))
    scales = np.where(scales < exact, above, scales)  # rounded up, so that nothing is clipped
    if not np.isfinite(scales).all():
        raise InputError("the latents are too large to be stored (over 8 million)")
    steps = latents / np.where(scales > 0, scales, 1).astype(np.float32)[:, None]
    return np.rint(steps).astype(np.int8), scales.astype("<f2")


def check_key(key: Any, width: int) -> Floats:
    """A key or query as float32 [Dk]; wrong size, NaN, zero or not normalised raises InputError."""
    array = _floats(key, "key")
    if array.shape != (width,):
        raise InputError(f"the key has shape {array.shape}, this bank's keys have ({width},)")
    norm = float(np.linalg.norm(array))
    if not 0 < norm <= NORM_LIMIT:
        raise InputError(f"the key has length {norm:.4g}; keys are normalised to length 1")
    return array


def check_floor(value: object) -> float:
    """A score floor as a float; what is no finite number from -1 to 1 raises InputError."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1 <= value <= 1:
        raise InputError(f"a score floor is a number from -1 to 1, not {value!r}")
    return float(value)


def check_value(name: object, value: object) -> None:
    """One metadata entry: a name and a string, a finite number or a bool; else InputError."""
    if not isinstance(name, str) or not name:
        raise InputError(f"metadata names are strings that are not empty, not {name!r}")
    if not isinstance(value, str | int | float):
        raise InputError(f"metadata {name!r} is {type(value).__name__}, not text, number or bool")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"metadata {name!r} is {value}, not a finite number")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise InputError(f"metadata {name!r} does not fit into 64 bits")
    check_text(name, "metadata")
    check_text(str(value), "metadata")


def _check_latents(latents: Any, width: int) -> Floats:
    array = _floats(latents, "latents")
    if array.ndim != 2 or array.shape[0] == 0 or array.shape[1] != width:
        raise InputError(f"the latents have shape {array.shape}, not (1 or more, {width})")
    return array


def _floats(values: Any, what: str) -> Floats:
    try:
        array = np.ascontiguousarray(values, np.float32)
    except (TypeError, ValueError):
        raise InputError(f"the {what} is not an array of numbers") from None
    if not np.isfinite(array).all():
        raise InputError(f"the {what} holds NaN or infinity")
    return array


def check_text(text: object, what: str) -> str:
    """A string that can be stored as UTF-8; else InputError."""
    if not isinstance(text, str):
        raise InputError(f"the {what} is {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} is not valid Unicode (a lone surrogate)") from None
    return text


def hash_bytes(text: str) -> bytes:
    """A hex SHA-256 as 32 bytes, nothing as nothing; else InputError."""
    try:
        digest = bytes.fromhex(text)
    except (TypeError, ValueError):
        digest = b"?"
    if digest and len(digest) != 32:
        raise InputError("the content hash is not a hex SHA-256 (64 digits)")
    return digest


def metadata_json(metadata: Metadata) -> str:
    """A mapping of names to strings, finite numbers or bools as JSON; else InputError."""
    if not isinstance(metadata, Mapping):
        raise InputError(f"the metadata is {type(metadata).__name__}, not a mapping")
    for name, value in metadata.items():
        check_value(name, value)
    return json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
