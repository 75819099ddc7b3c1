"""One search engine in a process of its own: build its index, or open and search it.

    python benchmarks/bank_engines.py build|search ENGINE KEYS FOLDER

KEYS is a folder that `bank_keys.cached` made, FOLDER where the index is kept. Prints one JSON
object. `bank.py` runs this; every process measures one engine, so that its memory is its own.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import tinyalign.bank
from tinyalign.bank import Bank, NewMemory, index

TOP = 5
PASS_SECONDS = 10.0  # of searching in one pass; exact search among a million takes its time
BATCH = 5_000
Floats = NDArray[np.float32]
Search = Callable[[Floats], list[int]]  # a query [Dk] -> rows of the nearest keys
PEERS = {"faiss flat": "faiss", "faiss hnsw": "faiss", "usearch": "usearch"}  # what to import
ENGINES = ("bank", "bank index", "numpy", *PEERS)
GRAPH = {"M": index.LINKS, "ef_construction": index.BUILD_EFFORT, "ef": index.SEARCH_EFFORT}


def file_of(engine: str, folder: Path) -> Path:
    """Where an engine keeps what it searches."""
    name = {"bank": "bank.sqlite", "bank index": "bank.sqlite", "numpy": "exact.npy"}
    return folder / name.get(engine, engine.replace(" ", "-") + ".index")


def bytes_of(engine: str, folder: Path) -> int:
    """On disk: of the bank the file itself, of its index the cache, of a peer its index."""
    files = [file_of(engine, folder)]
    if engine == "bank index":
        files = [file for file in index.cache_files(files[0]) if file.exists()]
    return sum(file.stat().st_size for file in files)


# ---- building


def build(engine: str, keys: NDArray[np.float16], folder: Path) -> dict[str, float]:
    """Make an engine's files; seconds it took on all cores."""
    file = file_of(engine, folder)
    if engine == "bank":
        return fill_bank(keys, file)
    wide = keys.astype(np.float32)
    started = time.perf_counter()
    if engine == "bank index":
        with Bank.open(file) as bank:
            bank.reindex()
    elif engine == "numpy":
        np.save(file, keys)
    elif engine == "usearch":
        from usearch.index import Index

        graph = Index(
            ndim=wide.shape[1],
            metric="ip",
            dtype="f32",
            connectivity=GRAPH["M"],
            expansion_add=GRAPH["ef_construction"],
            expansion_search=GRAPH["ef"],
        )
        graph.add(np.arange(len(wide)), wide)
        graph.save(str(file))
    else:
        import faiss

        flat = faiss.IndexFlatIP(wide.shape[1])
        if engine == "faiss hnsw":
            flat = faiss.IndexHNSWFlat(wide.shape[1], GRAPH["M"], faiss.METRIC_INNER_PRODUCT)
            flat.hnsw.efConstruction = GRAPH["ef_construction"]
        flat.add(wide)
        faiss.write_index(flat, str(file))
    return {"build_s": time.perf_counter() - started}


def fill_bank(keys: NDArray[np.float16], file: Path) -> dict[str, float]:
    """A bank with these keys; texts and latents are those of the default bank, over and over."""
    from tinyalign.training.parts import DEFAULT_WEIGHTS

    with Bank.open(DEFAULT_WEIGHTS / "bank.sqlite", read_only=True) as default:
        samples = default.list()
        fingerprint, width = default.fingerprint, default.latent_width
    file.unlink(missing_ok=True)
    started = time.perf_counter()
    with Bank.create(file, fingerprint, keys.shape[1], width) as bank:
        for start in range(0, len(keys), BATCH):
            part = keys[start : start + BATCH].astype(np.float32)
            used = (samples[(start + row) % len(samples)] for row in range(len(part)))
            bank.add(
                NewMemory(key, m.latents, f"{m.text} ({start + row})", m.source, {"row": row})
                for row, (key, m) in enumerate(zip(part, used, strict=True))
            )
    return {"build_s": time.perf_counter() - started}


# ---- searching


def opened(engine: str, folder: Path) -> Search:
    """Open an engine's files; the function that searches them on one thread."""
    file = file_of(engine, folder)
    if engine == "bank":
        bank = Bank.open(file, read_only=True)
        return lambda query: [hit.id - 1 for hit in bank.search(query, TOP)]
    if engine == "bank index":
        current = Bank.open(file, read_only=True)._current()
        return lambda query: [n - 1 for n, _ in current.search(query, TOP, None, frozenset())]
    if engine == "numpy":
        keys = np.load(file).astype(np.float32)

        def exact(query: Floats) -> list[int]:
            scores = keys @ query
            best = np.argpartition(scores, -TOP)[-TOP:]
            return list(best[np.argsort(-scores[best])])

        return exact
    if engine == "usearch":
        from usearch.index import Index

        graph = Index.restore(str(file), view=False)
        graph.expansion_search = GRAPH["ef"]
        return lambda query: list(graph.search(query, TOP, threads=1).keys)
    import faiss

    faiss.omp_set_num_threads(1)
    loaded = faiss.read_index(str(file))
    if engine == "faiss hnsw":
        loaded.hnsw.efSearch = GRAPH["ef"]
    return lambda query: list(loaded.search(query[None], TOP)[1][0])


def search(engine: str, keys: Path, folder: Path) -> dict[str, Any]:
    """Open and search once with each query: milliseconds, MiB, and the rows found."""
    import psutil

    process = psutil.Process(os.getpid())
    if engine in PEERS:
        __import__(PEERS[engine])
    queries = np.load(keys / "queries.npy")
    before = process.memory_info().rss
    started = time.perf_counter()
    find = opened(engine, folder)
    find(queries[0])
    open_ms = 1e3 * (time.perf_counter() - started)
    start_ms = 1e3 * (time.time() - process.create_time())
    times, found = [], []
    until = time.perf_counter() + PASS_SECONDS
    for query in queries:
        start = time.perf_counter()
        rows = find(query)
        times.append(1e3 * (time.perf_counter() - start))
        found.append([int(row) for row in rows])
        if time.perf_counter() > until:
            break
    return {
        "open_ms": open_ms,  # and the first search
        "start_ms": start_ms,  # the same from the start of the process
        "search_ms": statistics.median(times),
        "search_p95_ms": float(np.percentile(times, 95)),
        "resident_mib": (process.memory_info().rss - before) / (1 << 20),
        "found": found,
    }


def changes(folder: Path) -> dict[str, float]:
    """Milliseconds to add one memory and have it on disk, and of the next search, by a reader that
    has the bank open; the bank has the same memories again afterwards."""
    added, searched = [], []
    file = file_of("bank", folder)
    with Bank.open(file) as writer, Bank.open(file, read_only=True) as reader:
        key = reader.get(1).key
        reader.search(key, TOP)
        ids = []
        for turn in range(20):
            text = f"something new {turn}"
            start = time.perf_counter()
            ids += writer.add([NewMemory(key, np.ones((1, reader.latent_width)), text)])
            middle = time.perf_counter()
            reader.search(key, TOP)
            added.append(1e3 * (middle - start))
            searched.append(1e3 * (time.perf_counter() - middle))
        start = time.perf_counter()
        sound = reader.verify().sound
        verified = time.perf_counter() - start
        writer.remove(ids)
    assert sound
    return {
        "add_ms": statistics.median(added),
        "search_after_add_ms": statistics.median(searched),
        "verify_s": verified,
    }


def main() -> None:
    assert tinyalign.bank  # imported before anything is timed
    task, engine, keys, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    if task == "build":
        result: dict[str, Any] = build(engine, np.load(keys / "keys.npy"), folder)
        result["bytes"] = bytes_of(engine, folder)
    elif task == "changes":
        result = changes(folder)
    else:
        result = search(engine, keys, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
