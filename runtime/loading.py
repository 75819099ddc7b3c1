"""From a model directory to open sessions, checked file by file.

Opening the language model takes longest, as onnxruntime orders its weights anew (0.13 s for the
default's 135 million). So `start_loading` begins with it in a thread; a program that calls it
first imports the rest, tokenizers, Pillow, the bank, meanwhile.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tinyalign.runtime.errors import InputError, ModelError
from tinyalign.runtime.files import verify_files
from tinyalign.runtime.keys import KeyArrays, load_key_arrays
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.manifest import NEXT_TOKENS, Manifest, no_memory, read_manifest
from tinyalign.runtime.paths import default_model_dir
from tinyalign.runtime.providers import CPU, check_started, choose_provider, find_provider
from tinyalign.runtime.threads import default_threads

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_BANK = "bank.sqlite"
GRAPHS = ("lm", "vision", "connector")
MEMORY_GRAPHS = ("rag_connector", "compressor")


@dataclass(frozen=True)
class MemoryParts:
    """What a model needs to remember with."""

    keys: KeyArrays
    rag_connector: ort.InferenceSession


@dataclass(frozen=True)
class Parts:
    """What a model directory holds, opened. The compressor is opened when it is needed first, and
    so is the language model if it was not asked for (``open_lm`` opens it once)."""

    directory: Path
    manifest: Manifest
    threads: int
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    embeddings: NDArray[np.float16]  # [V, D], mapped from the file
    next_tokens: NDArray[np.uint32] | None  # [V], what most often follows each token
    vision: ort.InferenceSession
    connector: ort.InferenceSession
    memory: MemoryParts | None  # None: the model has none
    open_lm: Callable[[], LanguageModel]
    provider: str = CPU  # of onnxruntime, that runs the graphs

    @property
    def lm(self) -> LanguageModel:
        """The language model."""
        return self.open_lm()

    @property
    def keys(self) -> KeyArrays:
        """The key recipe; InputError for a model without a memory."""
        return self.memory_parts.keys

    @property
    def rag_connector(self) -> ort.InferenceSession:
        """The RAG connector; InputError for a model without a memory."""
        return self.memory_parts.rag_connector

    @property
    def memory_parts(self) -> MemoryParts:
        """What the model remembers with; InputError for one without a memory."""
        if self.memory is None:
            raise no_memory(self.manifest.name)
        return self.memory

    @property
    def sessions(self) -> dict[str, ort.InferenceSession]:
        """The sessions that answer a question, by the names of their components."""
        sessions = {"vision": self.vision, "connector": self.connector, "lm": self.lm.session}
        if self.memory:
            sessions["rag_connector"] = self.memory.rag_connector
        return sessions


@dataclass(frozen=True)
class Loading:
    """A checked model directory whose sessions are being opened in threads."""

    started: float  # of time.perf_counter()
    directory: Path
    manifest: Manifest
    threads: int
    open_lm: Callable[[], LanguageModel]
    vision: Future[ort.InferenceSession]
    connector: Future[ort.InferenceSession]
    rag_connector: Future[ort.InferenceSession] | None
    provider: str = CPU


def start_loading(
    path: str | Path | None = None,
    threads: int | None = None,
    lm: bool = True,
    provider: str = CPU,
) -> Loading:
    """Check a model directory (the default one, if none is named) and begin to open its sessions.

    ``threads`` defaults to the CPUs this process may use. Without ``lm`` the language model is
    opened only when it is used, which teaching does not. ``provider`` ("cuda", "coreml", ...) runs
    what it has kernels for, the CPU the rest. Raises ModelError, or InputError for fewer threads
    than one and for a provider that onnxruntime does not have.
    """
    started = time.perf_counter()
    if threads is not None and threads < 1:
        raise InputError(f"the number of threads must be 1 or more, not {threads}")
    find_provider(provider)
    directory = Path(path) if path is not None else default_model_dir()
    threads = threads or default_threads()
    manifest = check_directory(directory, threads)
    pool = ThreadPoolExecutor(2)  # one is busy with the language model till the end

    @cache
    def open_lm() -> LanguageModel:
        path = graph_path(directory, manifest, "lm")
        session = open_session(path, threads, spin=True, provider=provider)
        return LanguageModel(session, manifest.lm)

    opening_lm = pool.submit(open_lm) if lm else None  # it takes longest, so it starts first

    def submit(name: str) -> Future[ort.InferenceSession]:
        path = graph_path(directory, manifest, name)
        return pool.submit(open_session, path, threads, provider=provider)

    vision, connector = submit("vision"), submit("connector")
    rag_connector = submit("rag_connector") if manifest.rag_connector else None
    pool.shutdown(wait=False)
    get_lm = opening_lm.result if opening_lm else open_lm
    return Loading(
        started, directory, manifest, threads, get_lm, vision, connector, rag_connector, provider
    )


def check_directory(directory: Path, threads: int) -> Manifest:
    """The manifest of a directory whose files are all there and unchanged; else ModelError."""
    manifest = read_manifest(directory)
    for name in (*GRAPHS, *(MEMORY_GRAPHS if manifest.compressor else ())):
        graph_path(directory, manifest, name)
    for name in ("tokenizer.json", "embeddings.bin"):
        manifest.file(name)
    if manifest.compressor:
        for name in ("key.npz", DEFAULT_BANK):
            manifest.file(name)
    verify_files(directory, manifest, threads)
    return manifest


def graph_path(directory: Path, manifest: Manifest, name: str) -> Path:
    """The file of a component's graph: ONNX, or ORT format if the manifest lists only that.

    Raises ModelError if it lists neither.
    """
    listed = {entry.path for entry in manifest.files}
    if f"{name}.ort" in listed and f"{name}.onnx" not in listed:
        return directory / f"{name}.ort"
    return directory / manifest.file(f"{name}.onnx").path


def finish_loading(loading: Loading, lm: bool = True) -> Parts:
    """All parts of a model directory; raises ModelError. ``lm`` waits for the language model."""
    directory, manifest = loading.directory, loading.manifest
    tokenizer = _open_tokenizer(directory / "tokenizer.json")
    memory = None
    if loading.rag_connector:
        keys = _check_keys(load_key_arrays(directory / "key.npz"), manifest)
        memory = MemoryParts(keys, loading.rag_connector.result())
    parts = Parts(
        directory=directory,
        manifest=manifest,
        threads=loading.threads,
        tokenizer=tokenizer,
        stop_ids=_stop_ids(tokenizer, manifest),
        embeddings=_open_embeddings(directory / "embeddings.bin", manifest),
        next_tokens=_read_next_tokens(directory, manifest),
        vision=loading.vision.result(),
        connector=loading.connector.result(),
        memory=memory,
        open_lm=loading.open_lm,
        provider=loading.provider,
    )
    if lm:
        parts.open_lm()  # raises here, not at the first question
    return parts


def open_session(
    path: Path, threads: int, spin: bool = False, provider: str = CPU
) -> ort.InferenceSession:
    """A session on the CPU, or on another provider and the CPU for what that has no kernels for.

    Raises ModelError if the graph cannot be loaded, InputError if the provider cannot be used.

    ``spin`` lets idle worker threads wait awake for the next piece of work. The hundreds of small
    operators of one decoding step are 1.3 times faster with it (7.7 against 10.3 ms on two idle
    cores). But it keeps the cores from other sessions and processes, so it is for the LM only, and
    ends a millisecond after the last piece (by default, onnxruntime spins on much longer).
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a pattern for every prompt length would be kept for ever
    options.log_severity_level = 4  # errors come as exceptions
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    providers = choose_provider(options, provider)
    try:
        # without a fallback of its own to CPU, which it would only print
        session = ort.InferenceSession(str(path), options, providers, enable_fallback=0)
    except Exception as error:  # the binding raises a dozen unrelated types
        reason = " ".join(str(error).split("[ONNXRuntimeError] : ")[-1].split())[:200]
        where = "" if provider == CPU else f" on {provider}"
        raise ModelError(f"{path} cannot be loaded{where}: {reason}") from None
    check_started(session, provider)
    _give_back_memory()
    return session


def _give_back_memory() -> None:
    """Let the C library return what loading needed for a while (a tenth of the default's memory).

    glibc keeps freed memory of each thread for ever; elsewhere this does nothing.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def _open_tokenizer(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises plain Exception
        raise ModelError(f"{path} cannot be loaded: {error}") from None
    _give_back_memory()
    return tokenizer


def _open_embeddings(path: Path, manifest: Manifest) -> NDArray[np.float16]:
    shape = (manifest.lm.vocab, manifest.lm.width)
    if path.stat().st_size != shape[0] * shape[1] * 2:
        raise ModelError(f"{path} does not hold {shape[0]} x {shape[1]} fp16 numbers")
    return np.memmap(path, np.dtype("<f2"), "r", shape=shape)


def _read_next_tokens(directory: Path, manifest: Manifest) -> NDArray[np.uint32] | None:
    """The table, where the manifest lists one."""
    if NEXT_TOKENS not in {entry.path for entry in manifest.files}:
        return None
    table = np.fromfile(directory / NEXT_TOKENS, "<u4")
    if len(table) != manifest.lm.vocab or table.max() >= manifest.lm.vocab:
        raise ModelError(f"{directory / NEXT_TOKENS} does not fit the language model")
    return table


def _stop_ids(tokenizer: Tokenizer, manifest: Manifest) -> frozenset[int]:
    ids = {word: tokenizer.token_to_id(word) for word in manifest.prompt.stop}
    if missing := [word for word, number in ids.items() if number is None]:
        raise ModelError(f"the tokenizer does not know the stop token {missing[0]!r}")
    return frozenset(ids.values())


def _check_keys(keys: KeyArrays, manifest: Manifest) -> KeyArrays:
    if (len(keys.image_mean), len(keys.text_mean)) != (manifest.vision.width, manifest.lm.width):
        raise ModelError("key.npz does not fit the vision encoder and the language model")
    return keys
