"""Nearest memories by dot product: exact numpy search, and an hnswlib graph for large banks.

A graph is followed from neighbour to neighbour, and misses some memories that have none: a thing
taught by one example among many others. So all memories that agree with the query in many more
signs than chance would have it are compared as well (``_twins``).

The graph is only a cache of the bank file. ``Snapshot`` is what one state of the bank is searched
with: the graph over the memories that were there when it was built, and an exact tail over those
added since. Ids and keys never change in a bank, so a graph built from an earlier state of the
same file stays true: ids that are gone are marked as deleted, new ones are in the tail.

hnswlib 0.8 crashes on files it does not expect, so a cache file is loaded only if everything it
was built from matches (``_Binding``); otherwise the graph is built again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tinyalign.bank.memory import Floats, Halves
from tinyalign.bank.store import Generation, Store

try:
    import hnswlib
except ImportError:  # it has no binary wheels: without a C++ compiler search is exact
    hnswlib = None

# From here on a graph is worth building (benchmarks/bank.py). It is ahead from about 3k, but up to
# 20k it saves under 1.5 ms of some hundred ms to the first token: too little for a build of seconds
# and a cache larger than the bank.
EXACT_LIMIT = 20_000

LINKS = 16  # M
BUILD_EFFORT = 200  # ef_construction
SEARCH_EFFORT = 100  # ef
# Signs are compared of a key's first numbers, the picture's main axes. More of them or less strict
# deviations find more and take longer.
SIGNS = 128
TWIN_DEVIATIONS = 4.5
ENDINGS = (".hnsw", ".hnsw.npy", ".hnsw.json")  # of the cache files, after the bank's name
CACHE_FORMAT = 2
SIDECAR_BYTES = 4096
ABANDONED_SECONDS = 3600  # nobody takes that long to write a cache file
ROWS_AT_ONCE = 8192

Ids = NDArray[np.int64]
Words = NDArray[np.uint64]
NO_IDS = np.empty(0, np.int64)
NEVER = Generation(0, "")  # before anything was read
# exact: no graph is used. cached: a graph that fits lies beside the bank. missing, stale: there is
# none, or one that is damaged or of another bank; the next search builds it. server: Qdrant's.
IndexState: TypeAlias = Literal["exact", "cached", "missing", "stale", "server"]


@dataclass(frozen=True, eq=False)
class Graph:
    """What N memories are searched with: hnswlib's index, and by rows their ids and keys."""

    index: Any
    ids: Ids  # [N], ascending
    keys: Halves  # [N, Dk]
    signs: Words  # [W, N], see ``signs_of``
    alive: NDArray[np.bool_]  # [N], whether the memory is still in the bank


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One state of a bank, ready to search. Threads may share it."""

    generation: Generation
    graph: Graph | None
    tail_ids: Ids  # [T], ascending
    tail_keys: Floats  # [T, Dk]

    def search(
        self, query: Floats, k: int, allowed: Ids | None, exclude: frozenset[int]
    ) -> list[tuple[int, float]]:
        """Up to k (id, score), best first, ties by id; ``allowed`` limits it to some ids."""
        ids, scores = self.tail_ids, _dots(self.tail_keys, query)
        if self.graph is not None:
            more_ids, more = _search_graph(self.graph, query, k + len(exclude), allowed)
            ids, scores = np.concatenate([ids, more_ids]), np.concatenate([scores, more])
        if allowed is not None:
            kept = np.isin(ids, allowed)
            ids, scores = ids[kept], scores[kept]
        if exclude:
            kept = ~np.isin(ids, list(exclude))
            ids, scores = ids[kept], scores[kept]
        ids, scores = top(ids, scores, k)
        return list(zip(ids.tolist(), scores.tolist(), strict=True))


def top(ids: Ids, scores: Floats, k: int) -> tuple[Ids, Floats]:
    """The k highest scores, best first, ties by id; all of them if there are fewer."""
    if k < len(scores):
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        ids, scores = ids[kept], scores[kept]
    order = np.lexsort((ids, -scores))[:k]
    return ids[order], scores[order]


def refresh(store: Store, previous: Snapshot | None) -> Snapshot:
    """The bank's snapshot now, made from the previous one and the cache where they hold.

    Ids only grow: what was added since is read from the newest known id on, and something is gone
    only if the numbers do not add up.
    """
    if previous is None:
        previous = Snapshot(
            NEVER, _load(store), NO_IDS, np.empty((0, store.header.key_width), "f4")
        )
    graph, tail_ids, tail_keys = previous.graph, previous.tail_ids, previous.tail_keys
    known = np.concatenate([graph.ids[graph.alive], tail_ids]) if graph else tail_ids
    with store.reading():
        generation, count = store.generation(), store.count()
        new_ids, new_keys = store.keys(int(known[-1]) + 1 if len(known) else 0)
        gone = NO_IDS
        if count != len(known) + len(new_ids):
            gone = np.setdiff1d(known, store.ids(), assume_unique=True)
        differ = len(gone) + len(tail_ids) + len(new_ids)  # from what the graph holds
        large = hnswlib is not None and count > EXACT_LIMIT
        anew = (large and differ > EXACT_LIMIT) or (graph is not None and not large)
        if anew and len(known):
            new_ids, new_keys = store.keys()
    if anew:
        return _anew(store, generation, new_ids, new_keys)
    if len(gone):
        kept = ~np.isin(tail_ids, gone)
        tail_ids, tail_keys = tail_ids[kept], tail_keys[kept]
        graph = _without(graph, gone) if graph else None
    tail_ids = np.concatenate([tail_ids, new_ids])
    tail_keys = np.concatenate([tail_keys, new_keys.astype(np.float32)])
    return Snapshot(generation, graph, tail_ids, tail_keys)


def rebuild(store: Store) -> Snapshot:
    """Build the graph anew and write the cache file, whatever there was before."""
    drop_cache(store.path)
    with store.reading():
        generation = store.generation()
        ids, keys = store.keys()
    return _anew(store, generation, ids, keys)


def build_graph(ids: Ids, keys: Halves) -> Graph:
    """A graph over keys fp16 [N, Dk]; takes seconds from 10k on."""
    index = hnswlib.Index(space="ip", dim=keys.shape[1])
    index.init_index(max_elements=len(ids), M=LINKS, ef_construction=BUILD_EFFORT)
    for start in range(0, len(ids), ROWS_AT_ONCE):  # hnswlib's own copy is fp32
        part = slice(start, start + ROWS_AT_ONCE)
        index.add_items(keys[part].astype(np.float32), ids[part], num_threads=_threads())
    return _graph(index, ids, keys)


def state(store: Store) -> IndexState:
    """How the bank would be searched now (see ``IndexState``); loads and builds nothing."""
    if hnswlib is None or store.count() <= EXACT_LIMIT:
        return "exact"
    if not cache_files(store.path)[0].exists():
        return "missing"
    return "cached" if _trusted(store) is not None else "stale"


def cache_files(path: Path) -> tuple[Path, Path, Path]:
    """The graph, the keys and their sidecar beside a bank file."""
    graph, keys, sidecar = (path.with_name(path.name + end) for end in ENDINGS)
    return graph, keys, sidecar


def drop_cache(path: Path) -> None:
    """Delete the cache files of a bank, if there are any and they can be deleted."""
    for file in reversed(cache_files(path)):
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


# --- inside --------------------------------------------------------------------------------


def _anew(store: Store, generation: Generation, ids: Ids, keys: Halves) -> Snapshot:
    """A snapshot of all keys fp16 [N, Dk]; where they are many, with a graph and its cache file."""
    if hnswlib is None or len(ids) <= EXACT_LIMIT:
        return Snapshot(generation, None, ids, keys.astype(np.float32))
    graph = build_graph(ids, keys)
    _save(store, generation, graph)
    return Snapshot(generation, graph, NO_IDS, np.empty((0, keys.shape[1]), np.float32))


def _graph(index: Any, ids: Ids, keys: Halves) -> Graph:
    index.set_ef(SEARCH_EFFORT)
    parts = [
        signs_of(keys[start : start + ROWS_AT_ONCE]) for start in range(0, len(keys), ROWS_AT_ONCE)
    ]
    return Graph(index, ids, keys, np.concatenate(parts, axis=1), np.ones(len(ids), bool))


def _without(graph: Graph, gone: Ids) -> Graph:
    """The graph without some ids, which need not be in it."""
    marked = np.isin(graph.ids, gone, assume_unique=True) & graph.alive
    for number in graph.ids[marked].tolist():
        graph.index.mark_deleted(number)
    return replace(graph, alive=graph.alive & ~marked)


def _search_graph(
    graph: Graph, query: Floats, wanted: int, allowed: Ids | None
) -> tuple[Ids, Floats]:
    """Ids and scores that hold the ``wanted`` best of the graph, or all that are ``allowed``."""
    if allowed is None:
        chosen = _near(graph, query, wanted)
    else:
        chosen = np.isin(graph.ids, allowed, assume_unique=True)
    rows = np.flatnonzero(chosen & graph.alive)
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        scores[part] = _dots(graph.keys[rows[part]].astype(np.float32), query)
    return graph.ids[rows], scores


def _near(graph: Graph, query: Floats, wanted: int) -> NDArray[np.bool_]:
    """Which rows [N] are among the nearest: what the graph finds, and the query's twins."""
    near = _twins(graph.signs, query)
    wanted = min(wanted, int(np.count_nonzero(graph.alive)))
    try:
        labels, _ = graph.index.knn_query(query[None], k=wanted, num_threads=1)
    except RuntimeError:  # hnswlib reaches fewer
        return np.ones_like(near)
    near[np.searchsorted(graph.ids, labels[0].astype(np.int64))] = True
    return near


def _twins(signs: Words, query: Floats) -> NDArray[np.bool_]:
    """Which keys' signs differ from the query's in fewer places than chance would have it.

    By chance half of them do, with a standard deviation of half their number's root.
    """
    words = signs_of(query[None].astype(np.float16))[:, 0]
    differing = np.zeros(signs.shape[1], np.uint16)
    for row, word in zip(signs, words, strict=True):
        differing += np.bitwise_count(row ^ word)
    width = min(len(query), SIGNS)
    return differing <= int(width / 2 - TWIN_DEVIATIONS * width**0.5 / 2)


def signs_of(keys: Halves) -> Words:
    """Which of the first numbers of keys [N, Dk] are positive, as bits: words of 64 [W, N]."""
    positive = keys[:, :SIGNS].view(np.int16) > 0  # the same for fp16, and faster
    missing = -positive.shape[1] % 64
    packed = np.packbits(np.pad(positive, ((0, 0), (0, missing))) if missing else positive, axis=1)
    return np.ascontiguousarray(packed.view(np.uint64).T)


def _threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# --- the cache file ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Binding:
    """What a cache file was built from and by; any difference and it is not loaded."""

    format: int
    writer: str
    generation: int
    token: str
    dim: int
    count: int
    graph: list[Any]  # bytes and SHA-256 of the file
    keys: list[Any]


def _writer() -> str:
    from importlib.metadata import version  # slow, and seldom needed

    bits = 64 if sys.maxsize > 2**32 else 32
    return f"hnswlib {version('hnswlib')} {sys.byteorder} {bits}"


def _save(store: Store, generation: Generation, graph: Graph) -> None:
    """Write the cache files, each by renaming; that they cannot be written is no error."""
    file, keys_file, sidecar = cache_files(store.path)
    _sweep(file)
    with (
        contextlib.suppress(OSError, RuntimeError),
        _temporary(file) as new_graph,
        _temporary(keys_file) as new_keys,
        _temporary(sidecar) as new_sidecar,
    ):
        graph.index.save_index(str(new_graph))
        with new_keys.open("wb") as stream:
            np.save(stream, graph.keys)
        if new_graph.stat().st_size != graph.index.index_file_size():
            return  # hnswlib is silent about a full disk
        number, token = generation.number, generation.token
        dim, count = graph.keys.shape[1], len(graph.ids)
        digests = _digest(new_graph), _digest(new_keys)
        binding = _Binding(CACHE_FORMAT, _writer(), number, token, dim, count, *digests)
        new_sidecar.write_text(json.dumps(asdict(binding)))
        sidecar.unlink(missing_ok=True)
        new_graph.replace(file)
        new_keys.replace(keys_file)
        new_sidecar.replace(sidecar)


def _load(store: Store) -> Graph | None:
    """The cached graph of this very bank, or None if there is none that can be trusted."""
    if hnswlib is None or store.count() <= EXACT_LIMIT:
        return None
    file, keys_file, _ = cache_files(store.path)
    try:
        before = _identity(file), _identity(keys_file)
        binding = _trusted(store)
        if binding is None:
            return None
        index = hnswlib.Index(space="ip", dim=binding.dim)
        index.load_index(str(file))
        keys = np.load(keys_file, allow_pickle=False)
        if before != (_identity(file), _identity(keys_file)):
            return None
        ids = np.sort(np.array(index.get_ids_list(), np.int64))
        if len(ids) != binding.count or keys.shape != (binding.count, binding.dim):
            return None
    except (OSError, RuntimeError, ValueError):
        return None
    return _graph(index, ids, keys)


def _trusted(store: Store) -> _Binding | None:
    """What the cache files are bound to, if that is this program and this bank."""
    file, keys_file, sidecar = cache_files(store.path)
    try:
        with sidecar.open("rb") as stream:
            binding = _Binding(**json.loads(stream.read(SIDECAR_BYTES)))
        expected = _Binding(
            CACHE_FORMAT,
            _writer(),
            binding.generation,
            binding.token,
            store.header.key_width,
            binding.count,
            _digest(file),
            _digest(keys_file),
        )
        known = store.knows(Generation(binding.generation, binding.token))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return binding if binding == expected and known else None


def _digest(file: Path) -> list[Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return [stream.tell(), digest]


def _identity(file: Path) -> tuple[int, int, int]:
    status = file.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _sweep(file: Path) -> None:
    """Delete the temporary files of processes that were killed while they wrote the cache."""
    with contextlib.suppress(OSError):
        for left in file.parent.iterdir():
            temporary = left.name.startswith(file.name + ".") and left.suffix == ".tmp"
            if temporary and time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                left.unlink()


@contextlib.contextmanager
def _temporary(target: Path) -> Any:
    """A new empty file beside ``target``, deleted at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=target.name + ".", suffix=".tmp", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _dots(keys: Floats, query: Floats) -> Floats:
    """Dot products f32 [T] of keys [T, Dk] with a query [Dk].

    Not `@`: the threads of BLAS stay awake after a product and take a core from the language model
    that runs next (two cores, prompt of 96 tokens: 142 ms after `@`, 88 ms after this).
    """
    scores: Floats = np.einsum("ij,j->i", keys, query)
    return scores
