"""From a model directory to open sessions, checked file by file."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tinyalign.runtime.errors import ModelError
from tinyalign.runtime.files import verify_files
from tinyalign.runtime.keys import KeyArrays, load_key_arrays
from tinyalign.runtime.lm import LanguageModel
from tinyalign.runtime.manifest import Manifest, read_manifest

DEFAULT_BANK = "bank.sqlite"


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
    keys: KeyArrays
    vision: ort.InferenceSession
    connector: ort.InferenceSession
    rag_connector: ort.InferenceSession
    open_lm: Callable[[], LanguageModel]

    @property
    def lm(self) -> LanguageModel:
        """The language model."""
        return self.open_lm()


def check_directory(directory: Path, threads: int) -> Manifest:
    """The manifest of a directory whose files are all there and unchanged; else ModelError."""
    manifest = read_manifest(directory)
    for name in (
        "lm.onnx",
        "vision.onnx",
        "connector.onnx",
        "rag_connector.onnx",
        "compressor.onnx",
    ):
        manifest.file(name)
    for name in ("tokenizer.json", "embeddings.bin", "key.npz", DEFAULT_BANK):
        manifest.file(name)
    verify_files(directory, manifest, threads)
    return manifest


def load_parts(directory: Path, manifest: Manifest, threads: int, lm: bool = True) -> Parts:
    """Open the parts of a checked directory side by side; raises ModelError.

    Without ``lm`` the language model is opened only when it is used, which teaching does not.
    """

    @cache
    def open_lm() -> LanguageModel:
        session = open_session(directory / "lm.onnx", threads, spin=True)
        return LanguageModel(session, manifest.lm)

    with ThreadPoolExecutor(max(2, threads)) as pool:
        if lm:  # it takes longest, so it starts first
            opening = pool.submit(open_lm)
        vision = pool.submit(open_session, directory / "vision.onnx", threads)
        tokenizer = pool.submit(_open_tokenizer, directory / "tokenizer.json")
        connector = pool.submit(open_session, directory / "connector.onnx", threads)
        rag_connector = pool.submit(open_session, directory / "rag_connector.onnx", threads)
        keys = load_key_arrays(directory / "key.npz")
        embeddings = _open_embeddings(directory / "embeddings.bin", manifest)
        parts = Parts(
            directory=directory,
            manifest=manifest,
            threads=threads,
            tokenizer=tokenizer.result(),
            stop_ids=_stop_ids(tokenizer.result(), manifest),
            embeddings=embeddings,
            keys=_check_keys(keys, manifest),
            vision=vision.result(),
            connector=connector.result(),
            rag_connector=rag_connector.result(),
            open_lm=opening.result if lm else open_lm,
        )
        if lm:
            opening.result()  # raises here, not at the first question
    return parts


def open_session(path: Path, threads: int, spin: bool = False) -> ort.InferenceSession:
    """A CPU session; raises ModelError if the graph cannot be loaded.

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
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the binding raises a dozen unrelated types
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path} cannot be loaded: {reason}") from None


def _open_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the binding raises plain Exception
        raise ModelError(f"{path} cannot be loaded: {error}") from None


def _open_embeddings(path: Path, manifest: Manifest) -> NDArray[np.float16]:
    shape = (manifest.lm.vocab, manifest.lm.width)
    if path.stat().st_size != shape[0] * shape[1] * 2:
        raise ModelError(f"{path} does not hold {shape[0]} x {shape[1]} fp16 numbers")
    return np.memmap(path, np.dtype("<f2"), "r", shape=shape)


def _stop_ids(tokenizer: Tokenizer, manifest: Manifest) -> frozenset[int]:
    ids = {word: tokenizer.token_to_id(word) for word in manifest.prompt.stop}
    if missing := [word for word, number in ids.items() if number is None]:
        raise ModelError(f"the tokenizer does not know the stop token {missing[0]!r}")
    return frozenset(ids.values())


def _check_keys(keys: KeyArrays, manifest: Manifest) -> KeyArrays:
    if (len(keys.image_mean), len(keys.text_mean)) != (manifest.vision.width, manifest.lm.width):
        raise ModelError("key.npz does not fit the vision encoder and the language model")
    return keys
