"""``tinyalign.json``: what the exporter writes and the runtime reads, as frozen dataclasses.

Reading is strict: an unknown, missing or wrongly typed key is a :class:`ModelError` that names it,
so a model directory either means exactly what this version understands or is refused. Every field
is listed in JSON, also those with a default. A newer ``format`` is refused before all else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from tinyalign.runtime.errors import InputError, ModelError

# 2: latents of chunks, memory modes, copy bonus. 3: pictures are scaled by channel and may be
# cropped, so that other encoders get what they were trained on; a model need not have a memory.
# 4: a text behind the memories, the model's own chat template.
FORMAT = 4
MANIFEST_NAME = "tinyalign.json"
NEXT_TOKENS = "next_tokens.bin"  # u32 [V], what most often follows each token; need not be there
MAX_MANIFEST_BYTES = 4 << 20

Precision = Literal["fp32", "fp16", "int8", "int4"]
# As what the language model reads a retrieved memory: at most as many tokens as there are chunks,
# made from its latents; all tokens of its text; or the one after the other.
MemoryMode = Literal["latent", "text", "both"]
Resample = Literal["bilinear", "bicubic", "lanczos"]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Licence:
    """Under which licence one part came, and from where."""

    part: str
    name: str
    source: str


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """How a picture becomes the vision encoder's input: fitted to size x size pixels, then
    ``(rgb - mean) / scale`` for each channel, on numbers 0..255.

    ``squash``: all of the picture is resized to size x size. ``crop``: its shortest edge is resized
    to ``resize`` pixels, the other one in proportion, and the centre is cut out.
    """

    size: int = 260
    mean: tuple[float, float, float] = (127.0, 127.0, 127.0)
    scale: tuple[float, float, float] = (128.0, 128.0, 128.0)
    resample: Resample = "bicubic"
    background: tuple[int, int, int] = (255, 255, 255)  # under transparent pixels
    fit: Literal["squash", "crop"] = "squash"
    resize: int | None = None  # "crop" only, not below size


@dataclasses.dataclass(frozen=True)
class VisionSpec:
    """The vision encoder's output: f32 [B, cells, width], row 0 the mean of all patches."""

    cells: int = 10
    width: int = 1280


@dataclasses.dataclass(frozen=True)
class ConnectorSpec:
    """The connector's output: ``tokens`` image tokens of the LM's width.

    ``words``: each of them is a mixture of words, of which the likeliest one is given as well.
    """

    tokens: int
    words: bool = True


@dataclasses.dataclass(frozen=True)
class CompressorSpec:
    """The compressor: ``max_text_tokens`` of text and a picture into ``latents`` x ``width``.

    Latent 0 is the picture's, the others are one for each chunk of the text.
    """

    max_text_tokens: int
    latents: int
    width: int

    @property
    def chunks(self) -> int:
        """Into how many chunks a text is parted at most."""
        return self.latents - 1


@dataclasses.dataclass(frozen=True)
class RagConnectorSpec:
    """The RAG connector's output: at most ``tokens`` LM tokens a memory."""

    tokens: int


@dataclasses.dataclass(frozen=True)
class LmSpec:
    """Shapes of the language model; ``context`` is the largest number of tokens it was made for."""

    vocab: int
    width: int
    layers: int
    kv_heads: int
    head_dim: int
    context: int


@dataclasses.dataclass(frozen=True)
class PromptSpec:
    """The prompt's pieces as data. Every text is tokenized by itself, without a BOS token."""

    system: str
    image: tuple[
        str | int, ...
    ]  # texts and slot counts; the counts add up to the connector's tokens
    memory: str  # before each memory's tokens; holds "{similarity}"
    memory_end: str  # after the last memory
    question: str  # holds "{question}"
    similarity: tuple[
        tuple[str, float], ...
    ]  # words and falling score floors; below the last: dropped
    stop: tuple[str, ...]
    top_k: int = 3
    margin: float = 2.0  # a memory that scores so much less than the best one is dropped
    memory_mode: MemoryMode = "latent"
    # Bonus on the logit of the next token of a memory's sentence, after an answer has repeated
    # 1, 2, .. tokens of it.
    copy_bonus: tuple[float, ...] = (0.0, 0.0, 0.0)
    unknown: str = "I do not know."  # answers what no memory tells
    # Taken off the logit of that answer's first token where memories are read as text: without it,
    # a fact is missed more often than one is invented.
    unknown_margin: float = 0.0
    # What answers often say: guesses for decoding, which never change an answer (`decode.py`).
    phrases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Between:
    """A text between two messages, or at either end.

    `lstrip`, `rstrip`: it takes the white space that the message before it ends with, and that the
    message after it begins with.
    """

    text: str
    lstrip: bool = False
    rstrip: bool = False


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """What stands before, between and after the messages, by who speaks on either side.

    The first texts hold the BOS token, and `before_user` the default system message, where the
    template has them.
    """

    before_user: Between
    user_to_assistant: Between
    assistant_to_user: Between
    user_to_answer: Between  # after the last question: from here on the model writes
    after_user: Between  # the end, when no answer is asked for
    after_assistant: Between
    before_system: Between
    system_to_user: Between
    no_system: str  # why there can be no system message; "" where there can
    stop: tuple[str, ...]  # tokens that end an answer


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the model directory: path relative to it, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything the runtime must know about a model directory."""

    name: str
    fingerprint: str  # of encoder + preprocessing + key recipe + compressor; banks carry it too
    licences: tuple[Licence, ...]
    image: ImageSpec
    vision: VisionSpec
    connector: ConnectorSpec
    compressor: CompressorSpec | None  # None: the model has no memory, nor a key recipe or a bank
    rag_connector: RagConnectorSpec | None
    lm: LmSpec
    precisions: dict[str, Precision]
    prompt: PromptSpec
    chat: ChatTemplate | None  # of the language model, where its template is known and can be told
    files: tuple[FileEntry, ...]
    quality: dict[str, Any]  # what the export measured; free form
    format: int = FORMAT

    def to_json(self) -> str:
        """The manifest as indented JSON text, ready to be written as ``tinyalign.json``."""
        fields = {"format": self.format, **dataclasses.asdict(self)}
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> Manifest:
        """Parse and check a manifest; raises ModelError with the key that is wrong."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{MANIFEST_NAME} is not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise ModelError(f"{MANIFEST_NAME} does not hold a JSON object")
        _check_format(data.get("format"))
        manifest = from_dict(Manifest, data)
        _check_values(manifest)
        return manifest

    @property
    def memory(self) -> CompressorSpec:
        """The shapes of a memory; raises InputError for a model that has none."""
        if self.compressor is None:
            raise no_memory(self.name)
        return self.compressor

    def file(self, path: str) -> FileEntry:
        """The entry of one file; raises ModelError if the manifest does not list it."""
        for entry in self.files:
            if entry.path == path:
                return entry
        raise ModelError(f"{MANIFEST_NAME} does not list {path}")


def no_memory(name: str) -> InputError:
    """What is said when a model without a memory is asked to remember."""
    return InputError(f"the model {name} has no memory: it answers without, and cannot be taught")


def read_manifest(directory: Path) -> Manifest:
    """Read ``tinyalign.json`` of a model directory; raises ModelError with one clear line."""
    if not directory.exists():
        raise ModelError(
            f"no model directory at {directory}: make one with tinyalign-export, or name one "
            "with --model"
        )
    if not directory.is_dir():
        raise ModelError(f"{directory} is not a model directory")
    path = directory / MANIFEST_NAME
    try:
        with path.open("rb") as file:
            text = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise ModelError(
            f"{directory} has no {MANIFEST_NAME}: not a (complete) model directory"
        ) from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if len(text) > MAX_MANIFEST_BYTES:
        raise ModelError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        return Manifest.from_json(text)
    except ModelError as error:
        raise ModelError(f"{directory}: {error}") from None


def _check_format(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{MANIFEST_NAME}: format is not a positive whole number")
    if value > FORMAT:
        raise ModelError(
            f"the model has format {value}, newer than {FORMAT}: it needs a newer tinyalign"
        )
    if value < FORMAT:
        raise ModelError(
            f"the model has format {value}, older than {FORMAT}: export it again with "
            "tinyalign-export"
        )


def _check_values(m: Manifest) -> None:
    """What types alone cannot say."""
    sizes = {
        "image.size": m.image.size,
        "vision.cells": m.vision.cells,
        "vision.width": m.vision.width,
        "connector.tokens": m.connector.tokens,
        "prompt.top_k": m.prompt.top_k,
        **{f"{name}.{key}": value for name, spec in (("compressor", m.compressor), ("lm", m.lm))
           if spec is not None for key, value in dataclasses.asdict(spec).items()},
    }  # fmt: skip
    if m.rag_connector is not None:
        sizes["rag_connector.tokens"] = m.rag_connector.tokens
    if (m.compressor is None) != (m.rag_connector is None):
        raise ModelError(f"{MANIFEST_NAME}: a model has compressor and rag_connector, or neither")
    for key, size in sizes.items():
        if not 0 < size < 1 << 31:
            raise ModelError(f"{MANIFEST_NAME}: {key} is {size}")
    _check_image(m.image)
    slots = [piece for piece in m.prompt.image if isinstance(piece, int)]
    if any(count < 1 for count in slots) or sum(slots) != m.connector.tokens:
        raise ModelError(
            f"{MANIFEST_NAME}: prompt.image has {sum(slots)} slots, not {m.connector.tokens}"
        )
    if m.prompt.question.count("{question}") != 1:
        raise ModelError(f"{MANIFEST_NAME}: prompt.question must hold {{question}} once")
    floors = [floor for _, floor in m.prompt.similarity]
    if not floors or floors != sorted(floors, reverse=True):
        raise ModelError(f"{MANIFEST_NAME}: prompt.similarity must list falling score floors")
    if not m.prompt.copy_bonus or not all(map(math.isfinite, m.prompt.copy_bonus)):
        raise ModelError(f"{MANIFEST_NAME}: prompt.copy_bonus must list finite numbers")
    for entry in m.files:
        _check_entry(entry)
    if len({entry.path for entry in m.files}) != len(m.files):
        raise ModelError(f"{MANIFEST_NAME}: a file is listed twice")


def _check_image(image: ImageSpec) -> None:
    if image.size > 4096:
        raise ModelError(f"{MANIFEST_NAME}: image.size is {image.size}")
    if not all(map(math.isfinite, image.mean + image.scale)) or 0 in image.scale:
        raise ModelError(f"{MANIFEST_NAME}: image has mean {image.mean}, scale {image.scale}")
    fits = image.resize is None
    if image.fit == "crop":
        fits = image.resize is not None and image.size <= image.resize <= 8192
    if not fits:
        raise ModelError(
            f"{MANIFEST_NAME}: image has fit {image.fit}, resize {image.resize}, size {image.size}"
        )


def _check_entry(entry: FileEntry) -> None:
    parts = entry.path.split("/")
    if any(
        part in ("", ".", "..") or "\\" in part or ":" in part or "\0" in part for part in parts
    ):
        raise ModelError(f"{MANIFEST_NAME}: file path {entry.path!r} leaves the model directory")
    if entry.bytes < 0:
        raise ModelError(f"{MANIFEST_NAME}: {entry.path} has size {entry.bytes}")
    if len(entry.sha256) != 64 or set(entry.sha256) - set("0123456789abcdef"):
        raise ModelError(f"{MANIFEST_NAME}: {entry.path} has no SHA-256")


def from_dict(kind: type[T], data: object, where: str = "") -> T:
    """The dataclass ``kind`` from a JSON object; ModelError names the key that is wrong."""
    if not isinstance(data, dict):
        raise ModelError(f"{MANIFEST_NAME}: {where or 'the manifest'} is not an object")
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    if unknown := sorted(set(data) - set(hints)):
        raise ModelError(f"{MANIFEST_NAME}: unknown key {prefix}{unknown[0]}")
    if missing := sorted(set(hints) - set(data)):
        raise ModelError(f"{MANIFEST_NAME}: missing key {prefix}{missing[0]}")
    return kind(**{key: _convert(hint, data[key], prefix + key) for key, hint in hints.items()})


def _convert(hint: Any, value: object, where: str) -> Any:
    """Check one JSON value against a type hint; JSON arrays become tuples."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return _convert_tuple(arguments, value, where)
    if origin is dict and isinstance(value, dict):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal and value in arguments and isinstance(value, str):
        return value
    if origin is types.UnionType and type(value) in arguments:
        return value
    if origin is types.UnionType and dataclasses.is_dataclass(arguments[0]):
        return from_dict(typing.cast(type, arguments[0]), value, where)
    if hint is float and type(value) in (int, float):
        return float(value)  # type: ignore[arg-type]
    if type(value) is hint:
        return value
    expected = (
        " or ".join(map(str, arguments)) if origin is Literal else getattr(hint, "__name__", hint)
    )
    raise ModelError(f"{MANIFEST_NAME}: {where} is {value!r:.60}, expected {expected}")


def _convert_tuple(arguments: tuple[Any, ...], value: object, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ModelError(f"{MANIFEST_NAME}: {where} is not a list")
    if arguments[-1] is Ellipsis:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise ModelError(
            f"{MANIFEST_NAME}: {where} has {len(value)} items, expected {len(arguments)}"
        )
    pairs = zip(arguments, value, strict=True)
    return tuple(_convert(hint, item, f"{where}[{i}]") for i, (hint, item) in enumerate(pairs))
